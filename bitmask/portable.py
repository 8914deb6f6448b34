"""The ops on GPUs that the native libraries have no kernels for: AMD's, Intel's, and any if built without CUDA.

They are written in Triton, which comes with the GPU builds of torch; the first call that needs it imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import library

MODULES = {
    "compress": "bitmask.triton_codec",
    "compress_into": "bitmask.triton_codec",
    "decompress": "bitmask.triton_codec",
    "validate": "bitmask.triton_codec",
    "linear": "bitmask.triton_linear",
    "linear_backward_input": "bitmask.triton_linear",
}

_library: Any = library.Library("bitmask", "IMPL")  # type: ignore[no-untyped-call]  # unregisters as it dies


def devices() -> frozenset[str]:
    """Kinds of GPU that this torch knows and Triton, if it is there, compiles for; AMD's go by the name of cuda."""
    known = {name for name in ("cuda", "xpu") if getattr(torch, name)._is_compiled()}
    return frozenset(known if find_spec("triton") else ())


def register() -> None:
    """Give each kind of GPU the ops that it has no kernels for; to be called after the native libraries are loaded."""
    for key in sorted(device.upper() for device in devices()):
        for op in MODULES:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"bitmask::{op}", key):
                _library.impl(op, implementation(op), key)


def implementation(op: str) -> Callable[..., Any]:
    """The op in Triton, which is imported when it is called."""

    def run(*args: Any) -> Any:
        return getattr(import_module(MODULES[op]), op)(*args)

    return run
