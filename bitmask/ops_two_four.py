"""2:4 semi-structured sparsity, one typed function for each native op, with fake kernels and autograd formulas.

Of every four columns two are stored: `values` [..., cols / 2], and which ones, `metadata` uint8 [..., ceil(cols / 8)],
is a bitmask whose every four bits have two set (FORMAT.md). cols is a multiple of 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, library
from torch.fx.node import has_side_effect

from bitmask import native
from bitmask.calls import (
    LINEAR_DTYPES,
    FormatError,
    call,
    call_past_autograd,
    check_flag,
    check_has_kernels,
    check_strided,
    check_tensors,
    refuse_frozen_gradient,
    refuse_transforms,
    register_autocast,
    register_writes,
)
from bitmask.ops import DTYPES, bitmask_sizes
from bitmask.reference import stored_columns

# Kinds of devices that have kernels here.
DEVICES = native.DEVICES

# Real dtypes that have a zero.
TWO_FOUR_DTYPES = frozenset(
    dtype for dtype in DTYPES if not dtype.is_complex and dtype != getattr(torch, "float8_e8m0fnu", None)
)


def pack_24(dense: Tensor, prune: bool = False, keep_negative_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Pack a tensor whose groups of four columns have at most two non-zeros, losslessly (FORMAT.md).

    Args:
        dense: [..., cols], cols a multiple of 4, of any strides and real dtype but float8_e8m0fnu; differentiable.
        prune: keep the two largest magnitudes of groups that have more non-zeros: of equal ones the first; NaN is
            larger than anything.
        keep_negative_zero: -0.0 is not a zero (it comes back as +0.0 if it is not stored).

    Returns:
        values [..., cols / 2] in the dtype of `dense`; metadata uint8 [..., ceil(cols / 8)].

    Raises:
        ValueError: a group of more than two non-zeros, unless `prune`, or cols that are no multiple of 4.
        TypeError: a sparse, quantized or nested tensor, or a dtype that has no 2:4 layout.

    >>> values, metadata = pack_24(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 5.0, 0.0, 0.0]]))
    >>> values, metadata.tolist()
    (tensor([[1., 2.], [5., 0.]]), [[5], [6]])
    """
    _check_packable("dense", dense)
    check_flag("prune", prune)
    check_flag("keep_negative_zero", keep_negative_zero)
    parts: tuple[Tensor, Tensor] = _differentiable(torch.ops.bitmask.pack_24.default, dense, prune, keep_negative_zero)
    return parts


def bitmask_parts_24(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of the same tensor in the bitmask layout: metadata are bitmasks, and every row stores as many values.

    >>> metadata = torch.tensor([[0b0110], [0b1001]], dtype=torch.uint8)
    >>> bitmask_parts_24(torch.tensor([[7, 8], [5, 6]]), metadata)[2]
    tensor([0, 2])
    """
    check_parts_24(values, metadata)
    row_offsets = values.shape[-1] * torch.arange(math.prod(values.shape[:-1]), device=values.device)
    return values.reshape(-1), metadata, row_offsets


def unpack_24(values: Tensor, metadata: Tensor) -> Tensor:
    """Restore the dense tensor [..., cols] from its parts, which are proven while they are used; differentiable.

    While a CUDA graph is captured, nothing can be raised for what the parts hold: if they prove faulty when the graph
    runs, the result is NaN. Integers and other dtypes for which all bits set is no NaN are refused then.

    Raises:
        FormatError: parts that contradict each other or the layout.
        TypeError, ValueError: a part of the wrong kind, dtype or device.

    >>> unpack_24(torch.tensor([7, 8]), torch.tensor([0b0101], dtype=torch.uint8))
    tensor([7, 0, 8, 0])
    """
    check_parts_24(values, metadata)
    dense: Tensor = _differentiable(torch.ops.bitmask.unpack_24.default, values, metadata, invalid=FormatError)
    return dense


def validate_24(values: Tensor, metadata: Tensor) -> None:
    """Raise as `unpack_24` does if the parts are faulty, without unpacking.

    >>> validate_24(torch.tensor([7, 8]), torch.tensor([0b0111], dtype=torch.uint8))
    Traceback (most recent call last):
    bitmask.calls.FormatError: metadata: row 0, columns 0 to 3: got 3 bits set, expected 2
    """
    check_parts_24(values, metadata)
    call(torch.ops.bitmask.validate_24, values, metadata, invalid=FormatError)


def prune_24(tensor: Tensor, transposable: bool = False) -> None:
    """Set to zero, in place, what `pack_24(prune=True)` would not store; autograd takes no part.

    Args:
        tensor: [..., cols], contiguous, of a dtype that `pack_24` takes.
        transposable: prune in rows and in columns at once: of each 4 x 4 elements the eight that keep the largest sum
            of magnitudes, two in every row and column (Hubara et al., 2021, https://arxiv.org/abs/2102.08124); [...,
            rows, cols], both multiples of 4, in float32, bfloat16, float16 or float64.

    Raises:
        TypeError, ValueError: a tensor of the wrong kind, dtype or size, or with gaps in memory.

    >>> tensor = torch.tensor([0.5, -2.0, 3.0, 1.0])
    >>> prune_24(tensor)
    >>> tensor
    tensor([ 0., -2.,  3.,  0.])
    """
    _check_prunable(tensor, transposable)
    call(torch.ops.bitmask.prune_24, tensor.detach(), transposable)


def linear_24(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` straight from the parts of a 2:4 weight [out_features, in_features].

    The parts are proven while they are used. Gradients flow to `x` and `bias`; the weight is frozen. Under autocast,
    `x`, the values and `bias` are cast as for `F.linear`.

    An infinity or NaN of `x` that meets an element that is not stored makes NaN, as from a dense weight, but not in
    the 2:4 kernels of GPUs: there it takes no part, unless the weight has to be unpacked first.

    Args:
        x: [..., in_features], in the dtype of `values`: float32, bfloat16, float16 or float64.
        values: [out_features, in_features / 2].
        metadata: uint8 [out_features, ceil(in_features / 8)].
        bias: [out_features], in the dtype of `values`.

    Returns:
        [..., out_features] in the dtype of `x`; sums are kept in float32 (float64 for float64) and rounded once. What a
        GPU has no 2:4 kernel for is cuBLAS's, in the precision that `torch.backends.cuda.matmul` asks of it.

    Raises:
        FormatError: parts that contradict each other or the layout. What parts on a GPU hold is not waited for: where
            it contradicts, the result is NaN.
        TypeError, ValueError: a tensor of the wrong kind, dtype, device or size.

    >>> values, metadata = pack_24(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 5.0, 0.0, 3.0]]))
    >>> linear_24(torch.tensor([1.0, 10.0, 100.0, 1000.0]), values, metadata)
    tensor([ 201., 3050.])
    """
    if not type(values) is type(metadata) is Tensor:
        check_parts_24(values, metadata)
    # The native op refuses every mistake; which one it was is asked afterwards, to keep small products fast.
    try:
        y: Tensor = _differentiable(torch.ops.bitmask.linear_24.default, x, values, metadata, bias, invalid=FormatError)
    except (RuntimeError, TypeError, ValueError):
        _check_linear(x, values, metadata, bias)
        raise
    return y


def linear_24_backward_input(grad: Tensor, values: Tensor, metadata: Tensor) -> Tensor:
    """The gradient of x [..., in_features], from that of the output [..., out_features]; differentiable.

    >>> values, metadata = pack_24(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 5.0, 0.0, 3.0]]))
    >>> linear_24_backward_input(torch.tensor([1.0, 10.0]), values, metadata)
    tensor([ 1., 50.,  2., 30.])
    """
    if not type(values) is type(metadata) is Tensor:
        check_parts_24(values, metadata)
    try:
        grad_x: Tensor = _differentiable(
            torch.ops.bitmask.linear_24_backward_input.default, grad, values, metadata, invalid=FormatError
        )
    except (RuntimeError, TypeError, ValueError):
        _check_backward_input(grad, values, metadata)
        raise
    return grad_x


def _differentiable(op: Any, *args: Any, invalid: type[ValueError] = ValueError) -> Any:
    """Call an op that has a gradient, but none in forward mode or under torch.func."""
    refuse_transforms(op, args)
    return call_past_autograd(op, *args, invalid=invalid)


# What is wrong with a call, for all that can be seen without looking at what the parts hold.


def _check_kind(name: str, tensor: Tensor) -> None:
    check_strided(name, tensor)
    if tensor.dtype not in TWO_FOUR_DTYPES:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, expected bool, an integer or a real float dtype that has a zero"
        )
    check_has_kernels(name, tensor, "2:4")


def _check_packable(name: str, dense: Tensor) -> None:
    _check_kind(name, dense)
    if dense.ndim == 0:
        raise ValueError(f"{name}: got size [], expected at least one dimension")
    if dense.shape[-1] % 4 != 0:
        raise ValueError(
            f"{name}: got size {list(dense.shape)}, expected a last size that is a multiple of 4, "
            "for groups of four columns"
        )


def _check_prunable(tensor: Tensor, transposable: bool) -> None:
    _check_packable("tensor", tensor)
    check_flag("transposable", transposable)
    if transposable and tensor.dtype not in LINEAR_DTYPES:
        raise TypeError(f"tensor: got dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")
    if transposable and (tensor.ndim < 2 or tensor.shape[-2] % 4 != 0):
        raise ValueError(
            f"tensor: got size {list(tensor.shape)}, expected [..., rows, cols], both multiples of 4 (transposable)"
        )


def check_parts_24(values: Tensor, metadata: Tensor) -> None:
    """Raise unless the parts are plain tensors of the right dtypes and sizes on one device; contents are not seen."""
    _check_kind("values", values)
    check_strided("metadata", metadata)
    if metadata.dtype != torch.uint8:
        raise TypeError(f"metadata: got dtype {metadata.dtype}, expected torch.uint8")
    if metadata.device != values.device:
        raise ValueError(f"metadata: got device {metadata.device}, expected {values.device}, the device of values")
    if values.ndim > 0 and values.shape[-1] >= 2**62:
        raise FormatError(f"values: got size {list(values.shape)}, expected fewer than 2^63 columns")
    if values.ndim == 0 or values.shape[-1] % 2 != 0:
        raise FormatError(
            f"values: got size {list(values.shape)}, expected [..., cols / 2], two for each group of four columns"
        )
    expected = bitmask_sizes(_dense_sizes(values))
    if list(metadata.shape) != expected:
        raise FormatError(
            f"metadata: got size {list(metadata.shape)}, expected {expected} ([..., ceil(cols / 8)]) "
            f"for values of size {list(values.shape)}"
        )


def _dense_sizes(values: Tensor) -> list[int]:
    return [*values.shape[:-1], 2 * values.shape[-1]]


def _check_weight(values: Tensor, metadata: Tensor) -> None:
    if values.ndim != 2:
        raise FormatError(f"values: got size {list(values.shape)}, expected [out_features, in_features / 2]")
    check_parts_24(values, metadata)


def _check_last_size(name: str, tensor: Tensor, expected: int, feature: str) -> None:
    if tensor.ndim == 0 or tensor.shape[-1] != expected:
        raise ValueError(f"{name}: got size {list(tensor.shape)}, expected [..., {expected}] ({feature} of the weight)")


def _check_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> None:
    floating = {"values": values, "x": x} | ({} if bias is None else {"bias": bias})
    check_tensors(floating, {"metadata": metadata}, index_dtype=torch.uint8, family="2:4", autocasts=True)
    _check_weight(values, metadata)
    _check_last_size("x", x, 2 * values.shape[1], "in_features")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != values.shape[0]):
        raise ValueError(
            f"bias: got size {list(bias.shape)}, expected [{values.shape[0]}] (out_features of the weight)"
        )


def _check_backward_input(grad: Tensor, values: Tensor, metadata: Tensor) -> None:
    floating = {"values": values, "grad": grad}
    check_tensors(floating, {"metadata": metadata}, index_dtype=torch.uint8, family="2:4")
    _check_weight(values, metadata)
    _check_last_size("grad", grad, values.shape[0], "out_features")


def _fake_pack(dense: Tensor, prune: bool, keep_negative_zero: bool) -> tuple[Tensor, Tensor]:
    _check_packable("dense", dense)
    values = dense.new_empty([*dense.shape[:-1], dense.shape[-1] // 2])
    return values, dense.new_empty(bitmask_sizes(dense.shape), dtype=torch.uint8)


def _fake_unpack(values: Tensor, metadata: Tensor) -> Tensor:
    check_parts_24(values, metadata)
    return values.new_empty(_dense_sizes(values))


def _fake_validate(values: Tensor, metadata: Tensor) -> None:
    check_parts_24(values, metadata)


def _fake_prune(tensor: Tensor, transposable: bool) -> None:
    _check_prunable(tensor, transposable)


def _fake_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_linear(x, values, metadata, bias)
    return x.new_empty([*x.shape[:-1], values.shape[0]])


def _fake_backward_input(grad: Tensor, values: Tensor, metadata: Tensor) -> Tensor:
    _check_backward_input(grad, values, metadata)
    return grad.new_empty([*grad.shape[:-1], 2 * values.shape[1]])


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, metadata = output
    ctx.mark_non_differentiable(metadata)
    ctx.save_for_backward(metadata)


def _pack_backward(ctx: Any, grad_values: Tensor, grad_metadata: object) -> tuple[Tensor, None, None]:
    """Dropped elements are constants here, so their gradient is zero."""
    (metadata,) = ctx.saved_tensors
    return call(torch.ops.bitmask.unpack_24, grad_values, metadata), None, None


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _unpack_backward(ctx: Any, grad_dense: Tensor) -> tuple[Tensor, None]:
    (metadata,) = ctx.saved_tensors
    *leading, cols = grad_dense.shape
    groups = grad_dense.reshape(*leading, cols // 4, 4)
    return groups.gather(-1, stored_columns(metadata, cols)).reshape(*leading, cols // 2), None


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, metadata, bias = inputs
    refuse_frozen_gradient(ctx.needs_input_grad[1])
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(values, metadata)
    ctx.bias_shape = None if bias is None else bias.shape


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    needs_x, _, _, *needs_bias = ctx.needs_input_grad  # as many as were given
    grad_x = linear_24_backward_input(grad, *ctx.saved_tensors) if needs_x else None
    return grad_x, None, None, grad.sum_to_size(ctx.bias_shape) if any(needs_bias) else None


def _backward_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_frozen_gradient(ctx.needs_input_grad[1])
    ctx.save_for_backward(*inputs[1:])


def _backward_input_backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None, None]:
    """The product with the transposed weight is linear, too: its gradient is the product with the weight."""
    return linear_24(grad_x, *ctx.saved_tensors), None, None


library.register_fake("bitmask::linear_24", _fake_linear)
library.register_fake("bitmask::linear_24_backward_input", _fake_backward_input)
library.register_fake("bitmask::pack_24", _fake_pack)
library.register_fake("bitmask::prune_24", _fake_prune)
library.register_fake("bitmask::unpack_24", _fake_unpack)
library.register_fake("bitmask::validate_24", _fake_validate)
has_side_effect(torch.ops.bitmask.validate_24.default)  # else a compiler drops the call: it returns nothing
library.register_autograd("bitmask::linear_24", _linear_backward, setup_context=_linear_setup)
library.register_autograd(
    "bitmask::linear_24_backward_input", _backward_input_backward, setup_context=_backward_input_setup
)
library.register_autograd("bitmask::pack_24", _pack_backward, setup_context=_pack_setup)
library.register_autograd("bitmask::unpack_24", _unpack_backward, setup_context=_unpack_setup)
_implementations: Any = library.Library("bitmask", "FRAGMENT")  # type: ignore[no-untyped-call]  # die with it
register_autocast(_implementations, torch.ops.bitmask.linear_24)
register_writes(_implementations, torch.ops.bitmask.prune_24.default, slice(0, 1))
