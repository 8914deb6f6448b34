"""What a timing on a GPU depends on: the device, the versions, and the two ceilings measured in the same run."""

import os
import platform
import re
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch

import bitmask
from benchmarks.gpu.device import Device, Hardware
from benchmarks.machine import git_commit
from benchmarks.timer import Budget, Contender, interleave

_COPY_NBYTES = 4 * 2**30
_MATMUL_SIZE = 8192
_QUICK_COPY_NBYTES = 2**20
_QUICK_MATMUL_SIZE = 64
_ROUNDS = Budget(min_rounds=15, max_rounds=15, slow_rounds=0, seconds=0.0)
_QUICK_ROUNDS = Budget(min_rounds=2, max_rounds=2, slow_rounds=0, seconds=0.0)


@dataclass(frozen=True)
class GpuHeader:
    """Device, versions and ceilings.

    `copy_bandwidth` is in GB/s (read + write), `matmul_tflop_per_s` of a large bf16 product; `seed` made the inputs.
    """

    hardware: Hardware
    copy_bandwidth: float
    matmul_tflop_per_s: float
    seed: int
    quick: bool
    bitmask_version: str
    torch_version: str
    python_version: str
    system: str
    commit: str
    date: str

    @classmethod
    def of_this_run(cls, device: Device, quick: bool) -> "GpuHeader":
        """Look around, then measure the ceilings, which also warms the device up."""
        hardware = device.hardware()
        return cls(
            hardware=hardware,
            copy_bandwidth=copy_bandwidth(device, quick),
            matmul_tflop_per_s=matmul_rate(device, quick),
            seed=int.from_bytes(os.urandom(4), "little"),
            quick=quick,
            bitmask_version=bitmask.__version__,
            torch_version=torch.__version__,
            python_version=platform.python_version(),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            commit=git_commit(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "GpuHeader":
        """Read back what `to_json` gave."""
        return cls(**{**stored, "hardware": Hardware(**stored["hardware"])})

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def slug(self) -> str:
        """The GPU's name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.hardware.name.lower()).strip("-")

    def device(self) -> str:
        """The GPU on one line."""
        found = self.hardware
        return (
            f"{found.name} (compute capability {found.capability}, {found.multiprocessors} multiprocessors, "
            f"{found.cache_nbytes / 2**20:.0f} MiB L2, {found.memory_nbytes / 2**30:.0f} GiB)"
        )

    def ceilings(self) -> str:
        """Both ceilings on one line."""
        return (
            f"device-to-device copy {self.copy_bandwidth:.0f} GB/s (read + write), "
            f"bf16 product {self.matmul_tflop_per_s:.0f} TFLOP/s"
        )

    def software(self) -> str:
        """The versions on one line."""
        found = self.hardware
        return (
            f"bitmask {self.bitmask_version} ({self.commit}), torch {self.torch_version}, CUDA {found.cuda}, "
            f"driver {found.driver}, Python {self.python_version}"
        )

    def lines(self) -> list[str]:
        """The header that precedes a report."""
        fields = {
            "GPU": self.device(),
            "Clocks": self.hardware.clocks,
            "Ceilings": self.ceilings(),
            "Software": self.software(),
            "System": self.system,
            "Seed": str(self.seed),
            "Date": self.date,
        }
        return [f"{name:<16}{value}" for name, value in fields.items()]

    def markdown(self) -> str:
        """The header as a Markdown paragraph."""
        quick = " Quick sizes: these figures mean nothing." if self.quick else ""
        return (
            f"Hardware: {self.device()}; {self.ceilings()}; clocks as found: {self.hardware.clocks}.\n"
            f"Software: {self.software()}; {self.date[:10]}.{quick}"
        )


def copy_bandwidth(device: Device, quick: bool) -> float:
    """GB/s of the best copy of random bytes between two buffers, counting reads and writes."""
    nbytes = _QUICK_COPY_NBYTES if quick else _COPY_NBYTES
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device.where)
    target = torch.empty_like(source)
    return 2 * nbytes / _best_ms(device, Contender(lambda _: target.copy_(source)), quick) / 1e6


def matmul_rate(device: Device, quick: bool) -> float:
    """TFLOP/s of the best product of two random bf16 matrices."""
    size = _QUICK_MATMUL_SIZE if quick else _MATMUL_SIZE
    left, right = (torch.randn(size, size, device=device.where).bfloat16() for _ in range(2))
    return 2 * size**3 / _best_ms(device, Contender(lambda _: left @ right), quick) / 1e9


def _best_ms(device: Device, contender: Contender, quick: bool) -> float:
    (summary,) = interleave([contender], 1, _QUICK_ROUNDS if quick else _ROUNDS, device.milliseconds)
    device.release()
    return summary.min_ms
