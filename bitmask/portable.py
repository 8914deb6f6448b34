"""Where the ops come from on GPUs that the native library has no kernels for: AMD's, Intel's, and any with a CPU build.

They are written in Triton, which comes with the GPU builds of torch; it is imported by the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import library

_MODULES = {
    "compress": "bitmask.triton_codec",
    "compress_into": "bitmask.triton_codec",
    "decompress": "bitmask.triton_codec",
    "validate": "bitmask.triton_codec",
    "linear": "bitmask.triton_linear",
    "linear_backward_input": "bitmask.triton_linear",
}
_DISPATCH_KEYS = ("CUDA", "XPU")  # AMD's GPUs go by the name CUDA too

_library: Any = library.Library("bitmask", "IMPL")  # type: ignore[no-untyped-call]  # unregisters as it dies


def register() -> None:
    """Register each op for each kind of GPU that it has no kernel for; to be called after the native libraries."""
    for key in _DISPATCH_KEYS:
        for op in _MODULES:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"bitmask::{op}", key):
                _library.impl(op, _deferred(op), key)


def _deferred(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(_imported(_MODULES[op]), op)(*args)

    return run


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise RuntimeError(
            "bitmask: this build has no kernels for this GPU, and the portable ones need Triton (pip install triton)"
        ) from error
