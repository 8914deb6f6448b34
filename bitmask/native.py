"""The native libraries: bitmask._C, and the CUDA ops, which are loaded where torch has CUDA.

Both are of one build, of which every torch from 2.10 on takes what it can use: a CPU torch leaves the CUDA ops alone.
"""

from __future__ import annotations

import ctypes
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from bitmask import _C

CUDA_LIBRARY = Path(__file__).with_name(f"_C_cuda{EXTENSION_SUFFIXES[0]}")


def _load_cuda(library: Path) -> str | None:
    """Load the CUDA ops; returns why there are none, if so.

    A library that does not load is warned about and left out: all else works without it, and CUDA tensors meet an
    error that says why, so nothing goes wrong unseen.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not library.exists():
        return (
            "bitmask was built without CUDA: install it where a CUDA toolkit is, with BITMASK_CUDA=1 to see what fails"
        )
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        problem = f"{library.name} cannot be loaded: {error.__cause__ or error}; build bitmask again for this torch"
        warnings.warn(f"bitmask works without CUDA: {problem}", RuntimeWarning, stacklevel=2)
        return problem
    return None


# Why there are no CUDA ops; None if there are.
cuda_missing: str | None = _load_cuda(CUDA_LIBRARY)

# Kinds of devices that have native ops.
DEVICES = frozenset({"cpu"} if cuda_missing else {"cpu", "cuda"})


def build_info() -> dict[str, object]:
    """How the native libraries were built: compiler, C++ standard, least torch; toolkit and GPUs of the CUDA ops.

    `cuda_missing` says why there are no CUDA ops, None if there are.

    >>> sorted(build_info())
    ['compiler', 'cuda_architectures', 'cuda_missing', 'cuda_toolkit', 'cxx_standard', 'torch_target']
    """
    architectures, toolkit = None, None
    if cuda_missing is None:
        library = ctypes.CDLL(str(CUDA_LIBRARY))
        library.bitmask_cuda_architectures.restype = ctypes.c_char_p
        architectures = library.bitmask_cuda_architectures().decode()
        version = library.bitmask_cuda_toolkit()
        toolkit = f"{version // 1000}.{version % 1000 // 10}"
    return {
        **_C.build_info(),
        "cuda_architectures": architectures,
        "cuda_missing": cuda_missing,
        "cuda_toolkit": toolkit,
    }
