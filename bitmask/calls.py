"""How native ops of every family are called: exceptions, autograd where it is needed, autocast."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitmask import _C, native

# Dtypes that have products.
LINEAR_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

# The most rows, and columns, of a block: kMostBlockSide of the kernels.
MOST_BLOCK_SIDE = 2**28

# Kinds of devices whose autocast is minded.
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu")


_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """A function that compilers run as it is, between their graphs: what they have no tensors or operations for."""
    return cast(_Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


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
    """Raise where forward mode asks for a derivative: torch would take it for zero.

    Below autograd, where dense copies are made, it asks for none, and torch cannot unpack what it would ask of.
    """
    is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
    if forward_ad._current_level < 0 or is_excluded(torch._C.DispatchKey.ADInplaceOrView):
        return
    unpack: Any = forward_ad.unpack_dual
    if any(isinstance(arg, Tensor) and unpack(arg).tangent is not None for arg in args):
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


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless it is True or False."""
    if not isinstance(value, bool | torch.SymBool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def check_fraction(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless it is a number from 0 to 1."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number from 0 to 1")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: got {value}, expected 0 to 1")


def check_block_shape(block_shape: Sequence[int]) -> tuple[int, int]:
    """Two positive integers, as large as blocks can be, as a tuple; raises TypeError or ValueError."""
    try:
        height, width = (operator.index(size) for size in block_shape)
    except (TypeError, ValueError):
        raise TypeError(f"block_shape: got {block_shape!r}, expected two integers") from None
    if min(height, width) < 1 or max(height, width) > MOST_BLOCK_SIDE:
        raise ValueError(f"block_shape: got {block_shape!r}, expected sizes of at least 1 and at most 2^28")
    return height, width


def check_strided(name: str, tensor: object) -> None:
    """Raise TypeError unless it is a plain dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: got a {kind} tensor, expected a dense (strided) one")
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(f"{name}: got a {type(tensor).__name__}, which wraps other tensors, expected a plain tensor")


def check_tensors(
    floating: dict[str, Tensor],
    indices: dict[str, Tensor],
    *,
    index_dtype: torch.dtype,
    family: str,
    autocasts: bool = False,
) -> None:
    """Raise unless these are plain tensors on one device that has kernels, of the right dtypes after autocast.

    Args:
        floating: by name, tensors of one dtype that has products; the first one is what others are compared with.
        indices: by name, tensors of `index_dtype`.
        family: of the kernels.
        autocasts: whether the op does what `register_autocast` gives it.
    """
    tensors = floating | indices
    for name, tensor in tensors.items():
        check_strided(name, tensor)
    first_name, first = next(iter(tensors.items()))
    cast_to = _autocast_dtype(first.device.type) if autocasts else None
    for name, tensor in tensors.items():
        if name in indices and tensor.dtype != index_dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {index_dtype}")
        if name in floating and tensor.dtype not in LINEAR_DTYPES:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")
        if name in floating and _after_autocast(tensor.dtype, cast_to) != _after_autocast(first.dtype, cast_to):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {first.dtype}, the dtype of {first_name}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {first.device}, the device of {first_name}")
    check_has_kernels(first_name, first, family)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on a kind of device; None where it is off."""
    enabled = device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def _after_autocast(dtype: torch.dtype, cast_to: torch.dtype | None) -> torch.dtype:
    return dtype if cast_to is None or dtype == torch.float64 else cast_to


def check_has_kernels(name: str, tensor: Tensor, family: str) -> None:
    """Raise NotImplementedError if the tensor is where a family of ops has no kernels."""
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"{name}: got device {tensor.device}, expected cpu or cuda: bitmask has no {family} kernels for others"
        )


def refuse_frozen_gradient(needed: bool) -> None:
    """Raise if autograd asks for the gradient of the values of a compressed weight, which products have not."""
    if needed:
        raise TypeError(
            "values: got a tensor that requires a gradient, expected one that does not: the compressed weight is "
            "frozen; train the dense one (to_dense()) and compress it afterwards"
        )


def register_writes(implementations: Any, op: Any, written: slice) -> None:
    """Note for autograd, and for whoever keeps what it has proven of a tensor, which arguments the op writes to."""

    def run(keyset: Any, *args: Any) -> Any:
        torch.autograd.graph.increment_version(args[written])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    name = op._schema.name.removeprefix("bitmask::")
    implementations.impl(name, run, "ADInplaceOrView", with_keyset=True)


def register_autocast(implementations: Any, op: Any) -> None:
    """Cast what autocast casts for F.linear in calls of the op: floating-point tensors, but for those of float64."""
    for device in _AUTOCAST_DEVICES:
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
