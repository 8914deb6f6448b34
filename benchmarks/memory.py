"""The memory results are written to: always mapped afresh, and, for a second yardstick, made of huge pages."""

import ctypes
import mmap
import platform

import torch
from torch import Tensor

_M_TRIM_THRESHOLD = -1  # from malloc.h
_M_MMAP_THRESHOLD = -3
_FRESH_BLOCK_NBYTES = 256 * 1024


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
