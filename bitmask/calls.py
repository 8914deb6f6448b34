"""How native ops of every family are called: exceptions, autograd where it is needed, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitmask import _C, native

# Dtypes that have products.
LINEAR_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


class FormatError(ValueError):
    """Compressed data that contradicts itself; names the field, what was got and what was expected."""


def call(op: Callable[..., Any], *args: object, invalid: type[ValueError] = ValueError) -> Any:
    """Call a native op, whose exceptions torch hands over as ValueError or RuntimeError, depending on its version.

    What the native checks refuse comes out as `invalid`, what a Python signal handler raised meanwhile as itself, a GPU
    without memory as torch.OutOfMemoryError.
    """
    try:
        return op(*args)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        if message.startswith(_C.INVALID):
            raise invalid(message.removeprefix(_C.INVALID)) from None
        if message.startswith(_C.OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(f"CUDA out of memory. {message.removeprefix(_C.OUT_OF_MEMORY)}") from None
        if isinstance(error, NotImplementedError) and native.cuda_missing and "'CUDA' backend" in message:
            raise NotImplementedError(f"bitmask has no kernels for CUDA here: {native.cuda_missing}") from error
        pending = _C.take_pending_exception() if message == _C.INTERRUPTED else None
        if pending is not None:
            raise pending from None
        raise


def differentiates_forward() -> bool:
    """Whether forward-mode derivatives or a torch.func transform are under way, for which products have no formula."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _refuse_tangents(op: Any, args: tuple[Any, ...]) -> None:
    """Raise where forward mode asks for a derivative: torch would take it for zero."""
    unpack: Any = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(
        isinstance(arg, Tensor) and unpack(arg).tangent is not None for arg in args
    ):
        raise NotImplementedError(f"{op}: has no forward-mode derivative, only gradients")


def refuse_transforms(op: Any, args: tuple[Any, ...]) -> None:
    """Raise where torch.func asks for a gradient of an op whose formula it cannot use."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    _refuse_tangents(op, args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        raise NotImplementedError(f"{op}: has no gradient under torch.func, only with backward() or autograd.grad")


def _past_autograd(op: Any, *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return op(*args)
    if differentiates_forward():
        _refuse_tangents(op, args)
        return op(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def call_past_autograd(op: Any, *args: Any, invalid: type[ValueError] = ValueError) -> Any:
    """`call`, past autograd where nothing needs it: a formula in Python costs more than a small product."""
    return call(_past_autograd, op, *args, invalid=invalid)


def check_strided(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor is a plain dense one."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: got a {kind} tensor, expected a dense (strided) one")
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(f"{name}: got a {type(tensor).__name__}, which wraps other tensors, expected a plain tensor")


def register_autocast(implementations: Any, op: Any) -> None:
    """Cast what autocast casts for F.linear in calls of the op: floating-point tensors, but for those of float64."""
    for device in ("cpu", "cuda", "xpu"):
        key = f"Autocast{device.upper()}"
        name = op._qualified_op_name.removeprefix("bitmask::")
        implementations.impl(name, _autocast(op, device, getattr(torch._C.DispatchKey, key)), key)


def _autocast(op: Any, device: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
    """The op under autocast of a kind of device, which `key` stands for in the dispatcher."""

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)

        def cast(arg: Any) -> Any:
            floating = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
            return arg.to(dtype) if floating else arg

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*map(cast, args))

    return run
