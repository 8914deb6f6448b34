"""What every GPU suite is given, and how it ends when its time is up."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Selection
from benchmarks.gpu.device import Device
from benchmarks.gpu.header import GpuHeader

_Cell = TypeVar("_Cell")


@dataclass(frozen=True)
class GpuPlan:
    """What a suite is to run, and until when, by `time.monotonic()`; `rivals` is a module of further contenders."""

    device: Device
    header: GpuHeader
    selection: Selection
    deadline: float
    say: Callable[[str], None]
    rivals: Any = None

    @property
    def quick(self) -> bool:
        """Whether sizes are tiny and figures mean nothing."""
        return self.header.quick

    @property
    def uncached_nbytes(self) -> int:
        """How many bytes must go by until what was used before them is gone from the device's cache."""
        return 2**16 if self.quick else 4 * self.header.hardware.cache_nbytes

    def random_rows(self, dtype: str, rows: int, columns: int) -> Tensor:
        """Normal numbers on the device, others for each number of rows."""
        generator = torch.Generator(self.device.where).manual_seed(self.header.seed + rows)
        return torch.randn(rows, columns, generator=generator, device=self.device.where).to(DTYPES[dtype])

    def in_time(self, cells: Iterable[_Cell], within: str = "") -> Iterator[_Cell]:
        """The cells that begin before the deadline; the others are named."""
        for cell in cells:
            if time.monotonic() < self.deadline:
                yield cell
            else:
                self.say(f"left out, the time for this suite is up: {within}{cell}")


def microseconds(milliseconds: float) -> str:
    """A time as it stands in tables."""
    value = 1e3 * milliseconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
