"""Memory: results mapped afresh, copies made of huge pages for a second yardstick, and what the process holds."""

import ctypes
import gc
import mmap
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timer import host_milliseconds

_M_TRIM_THRESHOLD = -1  # from malloc.h
_M_MMAP_THRESHOLD = -3
_FRESH_BLOCK_NBYTES = 256 * 1024
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def map_large_blocks_afresh() -> bool:
    """Make malloc map every large block anew instead of recycling freed ones; False where the C library cannot.

    By default glibc raises its thresholds up to 32 and 64 MiB as blocks are freed, so that some results would be timed
    on recycled memory and others on fresh memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    fixed = [libc.mallopt(option, _FRESH_BLOCK_NBYTES) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    libc.malloc_trim(0)
    return fixed == [1, 1]


def huge_page_clone(dense: Tensor) -> Tensor:
    """`dense.clone()` into memory for which huge pages are asked (Linux only)."""
    result = torch.empty_like(dense)
    start = -(-result.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    nbytes = result.data_ptr() + result.nbytes - start
    if nbytes > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), mmap.MADV_HUGEPAGE)
    return result.copy_(dense)


def resident_nbytes() -> int | None:
    """Bytes of physical memory that the process holds, after it gave back what it freed; None where nobody says."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE if _STATM.exists() else None


def peak_growth(work: Callable[[], object]) -> tuple[float, int | None]:
    """Milliseconds of some work, and by how many bytes the process grew at most; None where nobody says."""
    before = resident_nbytes()
    try:
        _CLEAR_REFS.write_text("5")  # begins to record the peak anew
    except OSError:
        before = None
    milliseconds = host_milliseconds(work)
    return milliseconds, None if before is None else _peak_nbytes() - before


def _peak_nbytes() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
