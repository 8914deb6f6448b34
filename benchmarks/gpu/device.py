"""What the suites ask of a GPU: time some work, replay it without launch gaps, tell its memory and what it is.

Nothing else in this package calls torch.cuda, so that the suites also run on a stand-in (tests/test_benchmarks_gpu.py).
"""

import gc
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import bitmask

_QUEUE_CYCLES = 200_000  # about 0.1 ms, in which the host queues what is timed
_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
_OPS = ("compress", "compress_into", "decompress", "linear", "bsr_linear", "linear_24", "bsr_linear_24")


@dataclass(frozen=True)
class Hardware:
    """A GPU and its driver; `clocks` as they were found, before anything ran."""

    name: str
    capability: str
    multiprocessors: int
    cache_nbytes: int
    memory_nbytes: int
    driver: str
    cuda: str
    clocks: str


@dataclass(frozen=True)
class Recording:
    """Work captured once: `replay` does it again, into the same `result`."""

    replay: Callable[[], object]
    result: Any


class Device(Protocol):
    """Where the suites run."""

    where: torch.device
    blas_libraries: tuple[str, ...]

    def hardware(self) -> Hardware:
        """What this device is."""

    def milliseconds(self, work: Callable[[], object]) -> float:
        """How long the device is busy with the work."""

    def record(self, work: Callable[[], object]) -> Recording:
        """Capture the work; RuntimeError where it cannot be."""

    def peak_nbytes(self, work: Callable[[], object]) -> int:
        """The most memory that tensors took while the work ran, all that was there before included."""

    def blas(self, library: str) -> AbstractContextManager[None]:
        """Within it, torch's dense products come from this library."""

    def precision(self, tf32: bool) -> AbstractContextManager[None]:
        """Within it, float32 is multiplied as tf32, or is not."""

    def release(self) -> None:
        """Give back the memory of what is no longer used."""


class CudaDevice:
    """The current CUDA device."""

    blas_libraries: tuple[str, ...] = ("cublas", "cublaslt")

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def hardware(self) -> Hardware:
        """What torch and nvidia-smi say."""
        found = torch.cuda.get_device_properties(self.where)
        driver, *clocks = _ask_smi(f"GPU-{str(found.uuid).removeprefix('GPU-')}")
        return Hardware(
            name=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            cache_nbytes=found.L2_cache_size,
            memory_nbytes=found.total_memory,
            driver=driver,
            cuda=str(torch.version.cuda),
            clocks=", ".join(f"{name} {value}" for name, value in zip(_SMI_FIELDS[1:], clocks, strict=True)),
        )

    def milliseconds(self, work: Callable[[], object]) -> float:
        """By two events; the device sleeps first, so that it never waits for the host to launch."""
        events: Any = torch.cuda.Event
        start, end = (events(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(_QUEUE_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        result = work()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end))

    def record(self, work: Callable[[], object]) -> Recording:
        """A CUDA graph. What is made on first use (handles, workspaces, modules) is there before it is captured."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            try:
                result = work()
            finally:
                graph.capture_end()
        return Recording(graph.replay, result)

    def peak_nbytes(self, work: Callable[[], object]) -> int:
        """By torch's own count, which leaves out what CUDA and its libraries keep for themselves."""
        self.release()
        torch.cuda.reset_peak_memory_stats(self.where)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.where)

    @contextmanager
    def blas(self, library: str) -> Iterator[None]:
        """Torch's preference, which decides when a product is called or captured."""
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            yield
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    @contextmanager
    def precision(self, tf32: bool) -> Iterator[None]:
        """Torch's setting, which dense products and those of this library ask for when they are called or captured."""
        matmul: Any = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before

    def release(self) -> None:
        """Collect garbage, then empty torch's cache."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def reason_against() -> str | None:
    """Why nothing can be timed on a GPU here, or None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if all(torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"bitmask::{name}", "CUDA") for name in _OPS):
        return None
    return f"bitmask has no kernels for CUDA here: {bitmask.build_info()['cuda_missing']}"


def _ask_smi(uuid: str) -> list[str]:
    """The values of _SMI_FIELDS, in their order; nothing is set."""
    command = ("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", f"--id={uuid}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ["unknown"] * len(_SMI_FIELDS)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if len(values) == len(_SMI_FIELDS) else ["unknown"] * len(_SMI_FIELDS)
