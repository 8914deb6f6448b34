"""The native ops, one typed function each, with their fake kernels and autograd formulas.

`torch.ops.bitmask.*` may be called directly too; these functions add what needs Python: kinds of tensor and exceptions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.fx.node import has_side_effect

from bitmask import native, portable
from bitmask.calls import (
    LINEAR_DTYPES,
    FormatError,
    call,
    call_past_autograd,
    check_flag,
    check_strided,
    refuse_frozen_gradient,
    register_autocast,
    register_writes,
)
from bitmask.reference import rows_and_columns, unpack_bits

_DTYPE_NAMES = (
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 "
    "complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
DTYPES = frozenset(getattr(torch, name) for name in _DTYPE_NAMES.split() if hasattr(torch, name))
# Kinds of device that have kernels here.
DEVICES = portable.devices() | native.DEVICES


def check_dense(dense: Tensor) -> None:
    check_strided("dense", dense)
    if dense.dtype not in DTYPES:
        raise TypeError(f"dense: got dtype {dense.dtype}, expected bool, integer, float or complex of whole bytes")
    if dense.is_meta:
        raise ValueError("dense: got a meta tensor, expected one with data")


def check_parts(values: Tensor, bitmasks: Tensor, row_offsets: Tensor) -> None:
    """Raise TypeError or ValueError unless the parts are plain tensors of the right dtypes on one device."""
    expected = {"values": DTYPES, "bitmasks": {torch.uint8}, "row_offsets": {torch.int64}}
    for (name, dtypes), part in zip(expected.items(), (values, bitmasks, row_offsets), strict=True):
        check_strided(name, part)
        if part.dtype not in dtypes:
            wanted = next(iter(dtypes)) if len(dtypes) == 1 else "a dtype that bitmask compresses"
            raise TypeError(f"{name}: got dtype {part.dtype}, expected {wanted}")
        if part.device != values.device:
            raise ValueError(f"{name}: got device {part.device}, expected {values.device}, the device of values")


def _check_shape(shape: Sequence[int]) -> list[int]:
    try:
        sizes = [size if isinstance(size, int | torch.SymInt) else operator.index(size) for size in shape]
    except TypeError:
        raise TypeError(f"shape: got {shape!r}, expected a sequence of integers") from None
    if any(isinstance(size, int) and not -(2**63) <= size < 2**63 for size in sizes):
        raise FormatError(f"shape: got {sizes}, expected sizes below 2^63")
    return sizes


def _call_on_parts(
    op: Callable[..., Any], values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]
) -> Any:
    check_parts(values, bitmasks, row_offsets)
    return call(op, values, bitmasks, row_offsets, _check_shape(shape), invalid=FormatError)


def compress(dense: Tensor, keep_negative_zero: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Compress `dense` losslessly into the three parts of the bitmask layout (FORMAT.md).

    Args:
        dense: any shape, strides and supported dtype; differentiable.
        keep_negative_zero: store -0.0, which the default drops (it comes back as +0.0).

    Returns:
        values [nnz] in the dtype of `dense`; bitmasks uint8 [..., ceil(cols / 8)], least significant bit first;
        row_offsets int64 [rows].

    Raises:
        TypeError: a sparse, quantized or nested tensor, or a dtype without a codec.

    >>> values, bitmasks, row_offsets = compress(torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 0.0]]))
    >>> values, bitmasks.tolist(), row_offsets.tolist()
    (tensor([1., 2., 5., 3.]), [[5], [3]], [0, 2])
    """
    check_dense(dense)
    check_flag("keep_negative_zero", keep_negative_zero)
    parts: tuple[Tensor, Tensor, Tensor] = call(torch.ops.bitmask.compress, dense, keep_negative_zero)
    return parts


def check_into(dense: Tensor, keep_negative_zero: bool, values: Tensor, bitmasks: Tensor, row_offsets: Tensor) -> None:
    """Raise what `compress_into` promises, for all that can be seen without looking at memory."""
    check_parts(values, bitmasks, row_offsets)
    if values.dtype != dense.dtype:
        raise TypeError(f"values: got dtype {values.dtype}, expected {dense.dtype}, the dtype of dense")
    if values.device != dense.device:
        raise ValueError(f"values: got device {values.device}, expected {dense.device}, the device of dense")
    check_part_sizes(values, bitmasks, row_offsets, dense.shape)
    if values.requires_grad:
        raise TypeError("values: got a tensor that requires a gradient, expected one that does not: it is written to")


def compress_into(
    dense: Tensor, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, keep_negative_zero: bool = False
) -> Tensor:
    """Compress `dense` into buffers of the caller's, without waiting for a GPU: what `compress` does in a CUDA graph.

    No gradient flows.

    Args:
        dense: any shape, strides and supported dtype.
        values: [capacity] in the dtype of `dense`; gets the first `capacity` stored elements.
        bitmasks: uint8 [..., ceil(cols / 8)] or [rows, ceil(cols / 8)].
        row_offsets: int64 [rows].
        keep_negative_zero: as for `compress`.

    Returns:
        How many elements there are to store: int64, on the device of `dense`. Where that is more than `capacity`, the
        parts are not those of a whole tensor; else `values[:nnz]`, `bitmasks` and `row_offsets` are.

    Raises:
        TypeError, ValueError: a tensor of the wrong kind, dtype, device or size, or buffers that have gaps, or that
            overlap each other or `dense`.

    >>> values, bitmasks, row_offsets = torch.zeros(4), torch.zeros(2, 1, dtype=torch.uint8), torch.zeros(2).long()
    >>> compress_into(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]), values, bitmasks, row_offsets)
    tensor(3)
    >>> values, bitmasks.tolist(), row_offsets.tolist()
    (tensor([1., 2., 3., 0.]), [[5], [2]], [0, 2])
    """
    check_dense(dense)
    check_flag("keep_negative_zero", keep_negative_zero)
    check_into(dense, keep_negative_zero, values, bitmasks, row_offsets)
    nnz: Tensor = call(
        torch.ops.bitmask.compress_into, dense.detach(), keep_negative_zero, values, bitmasks, row_offsets
    )
    return nnz


def decompress(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """Restore the dense tensor of `shape` from its parts, which are proven consistent before they are used.

    While a CUDA graph is captured, nothing can be raised for what the parts hold: if they prove faulty when the graph
    runs, the result is NaN. Integers and other dtypes for which all bits set is no NaN are refused then.

    Raises:
        FormatError: parts that contradict each other or the shape.
        TypeError, ValueError: a part of the wrong kind, dtype or device.

    >>> decompress(torch.tensor([7, 8]), torch.tensor([[5]], dtype=torch.uint8), torch.tensor([0]), [1, 3])
    tensor([[7, 0, 8]])
    """
    dense: Tensor = _call_on_parts(torch.ops.bitmask.decompress, values, bitmasks, row_offsets, shape)
    return dense


def validate(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> list[int]:
    """Raise as `decompress` does if the parts are faulty, without decompressing; returns the shape as a list.

    Waits for a GPU, so not while a CUDA graph is captured.
    """
    sizes = _check_shape(shape)
    _call_on_parts(torch.ops.bitmask.validate, values, bitmasks, row_offsets, sizes)
    return sizes


def check_linear(
    x: Tensor, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, in_features: int, bias: Tensor | None
) -> None:
    """Raise what `linear` promises, for all that can be seen without looking at the contents of the parts."""
    check_parts(values, bitmasks, row_offsets)
    if values.dtype not in LINEAR_DTYPES:
        raise TypeError(f"values: got dtype {values.dtype}, expected float32, bfloat16, float16 or float64")
    rows = row_offsets.numel()
    check_part_sizes(values, bitmasks, row_offsets, _check_shape([rows, in_features]))
    for name, tensor in (("x", x),) if bias is None else (("x", x), ("bias", bias)):
        check_strided(name, tensor)
        if tensor.dtype != values.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {values.dtype}, the dtype of the weight")
        if tensor.device != values.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {values.device}, the device of the weight")
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: got size {list(x.shape)}, expected [..., {in_features}] (in_features of the weight)")
    if bias is not None and list(bias.shape) != [rows]:
        raise ValueError(f"bias: got size {list(bias.shape)}, expected [{rows}] (out_features of the weight)")


def linear(
    x: Tensor,
    values: Tensor,
    bitmasks: Tensor,
    row_offsets: Tensor,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias)` straight from the parts of a weight [out_features, in_features].

    The parts are proven while they are used. A GPU is not waited for to raise what they hold: there a faulty weight
    gives NaN, at least in the outputs of its faulty rows (`validate` raises). Gradients flow to `x` and `bias`; the
    weight is frozen. Under autocast, `x`, the values and `bias` are cast as for `F.linear`.

    Args:
        x: [..., in_features], in the dtype of `values`: float32, bfloat16, float16 or float64.
        values: [nnz], with `bitmasks` uint8 [out_features, ceil(in_features / 8)] and `row_offsets` int64
            [out_features].
        in_features: columns of the weight.
        bias: [out_features], in the dtype of `values`.

    Returns:
        [..., out_features] in the dtype of `x`; sums are kept in float32 (float64 for float64) and rounded once. Large
        products on a GPU are cuBLAS's, in the precision that `torch.backends.cuda.matmul` asks of it.

    Raises:
        FormatError: parts that contradict each other or `in_features`; on a GPU only where their sizes do.
        TypeError, ValueError: a tensor of the wrong kind, dtype, device or size.

    >>> values, bitmasks, row_offsets = compress(torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 0.0]]))
    >>> linear(torch.tensor([1.0, 10.0, 100.0]), values, bitmasks, row_offsets, 3)
    tensor([201.,  35.])
    """
    if not type(values) is type(bitmasks) is type(row_offsets) is Tensor:
        check_parts(values, bitmasks, row_offsets)
    # The native op refuses every mistake; which one it was is asked afterwards, to keep small products fast.
    try:
        y: Tensor = call_past_autograd(
            torch.ops.bitmask.linear.default, x, values, bitmasks, row_offsets, in_features, bias, invalid=FormatError
        )
    except (RuntimeError, TypeError, ValueError):
        check_linear(x, values, bitmasks, row_offsets, in_features, bias)
        raise
    return y


def bitmask_sizes(shape: Sequence[int]) -> list[int]:
    """Sizes of the bitmasks of a tensor of `shape`: the last dimension counts bytes."""
    return [*shape[:-1], ((shape[-1] if len(shape) > 0 else 1) + 7) // 8]


def _fake_compress(dense: Tensor, keep_negative_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    nnz = library.get_ctx().new_dynamic_size()
    rows, _ = rows_and_columns(dense.shape)
    return (
        dense.new_empty([nnz]),
        dense.new_empty(bitmask_sizes(dense.shape), dtype=torch.uint8),
        dense.new_empty([rows], dtype=torch.int64),
    )


def _fake_compress_into(
    dense: Tensor, keep_negative_zero: bool, values: Tensor, bitmasks: Tensor, row_offsets: Tensor
) -> Tensor:
    check_into(dense, keep_negative_zero, values, bitmasks, row_offsets)
    return dense.new_empty([], dtype=torch.int64)


def check_part_sizes(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> None:
    """Raise FormatError unless the parts have the sizes that the shape asks for; contents are not looked at."""
    rows, cols = rows_and_columns(shape)
    if values.ndim != 1:
        raise FormatError(f"values: got {values.ndim} dimensions, expected 1")
    if row_offsets.ndim != 1 or row_offsets.shape[0] != rows:
        raise FormatError(f"row_offsets: got size {list(row_offsets.shape)}, expected [{rows}] (one per row)")
    if list(bitmasks.shape) not in (bitmask_sizes(shape), [rows, (cols + 7) // 8]):
        raise FormatError(
            f"bitmasks: got size {list(bitmasks.shape)}, expected {bitmask_sizes(shape)} for shape {list(shape)}"
        )


def _fake_decompress(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> Tensor:
    check_parts(values, bitmasks, row_offsets)  # parts on different devices come here too
    check_part_sizes(values, bitmasks, row_offsets, shape)
    return values.new_empty(shape)


def _fake_validate(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> None:
    check_parts(values, bitmasks, row_offsets)  # parts on different devices come here too
    check_part_sizes(values, bitmasks, row_offsets, shape)


def _compress_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, bitmasks, row_offsets = output
    ctx.mark_non_differentiable(bitmasks, row_offsets)
    ctx.save_for_backward(bitmasks, row_offsets)
    ctx.shape = inputs[0].shape


def _compress_backward(ctx: Any, grad_values: Tensor, *unused: object) -> tuple[Tensor, None]:
    """Dropped elements are constants here, so their gradient is zero."""
    bitmasks, row_offsets = ctx.saved_tensors
    return call(torch.ops.bitmask.decompress, grad_values, bitmasks, row_offsets, ctx.shape), None


def _decompress_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.shape = inputs[3]


def _decompress_backward(ctx: Any, grad_dense: Tensor) -> tuple[Tensor, None, None, None]:
    (bitmasks,) = ctx.saved_tensors
    rows, cols = rows_and_columns(ctx.shape)
    mask = unpack_bits(bitmasks.reshape(rows, (cols + 7) // 8), cols)
    return grad_dense.reshape(rows, cols).masked_select(mask), None, None, None


def _fake_linear(
    x: Tensor, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, in_features: int, bias: Tensor | None = None
) -> Tensor:
    check_linear(x, values, bitmasks, row_offsets, in_features, bias)
    return x.new_empty([*x.shape[:-1], row_offsets.shape[0]])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, bitmasks, row_offsets, in_features, bias = inputs
    refuse_frozen_gradient(ctx.needs_input_grad[1])
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(values, bitmasks, row_offsets)
    ctx.in_features = in_features
    ctx.bias_shape = None if bias is None else bias.shape


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None]:
    needs_x, *_, needs_bias = ctx.needs_input_grad
    grad_x = None
    if needs_x:
        values, bitmasks, row_offsets = ctx.saved_tensors
        grad_x = _backward_input(grad, values, bitmasks, row_offsets, ctx.in_features)
    return grad_x, None, None, None, None, grad.sum_to_size(ctx.bias_shape) if needs_bias else None


def _backward_input(grad: Tensor, *weight: Any) -> Tensor:
    """Gradient of x [..., in_features] from that of the output [..., out_features]."""
    grad_x: Tensor = call(torch.ops.bitmask.linear_backward_input, grad, *weight, invalid=FormatError)
    return grad_x


def _fake_linear_backward_input(
    grad: Tensor, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, in_features: int
) -> Tensor:
    return grad.new_empty([*grad.shape[:-1], in_features])


def _backward_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.in_features = inputs[4]


def _backward_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    """The product with the transposed weight is linear, too: its gradient is the product with the weight."""
    y = call(torch.ops.bitmask.linear, grad, *ctx.saved_tensors, ctx.in_features, invalid=FormatError)
    return y, None, None, None, None


library.register_fake("bitmask::compress", _fake_compress)
library.register_fake("bitmask::compress_into", _fake_compress_into)
library.register_fake("bitmask::decompress", _fake_decompress)
library.register_fake("bitmask::linear", _fake_linear)
library.register_fake("bitmask::linear_backward_input", _fake_linear_backward_input)
library.register_fake("bitmask::validate", _fake_validate)
has_side_effect(torch.ops.bitmask.validate.default)  # else a compiler drops the call: it returns nothing
library.register_autograd("bitmask::compress", _compress_backward, setup_context=_compress_setup)
library.register_autograd("bitmask::decompress", _decompress_backward, setup_context=_decompress_setup)
library.register_autograd("bitmask::linear", _linear_backward, setup_context=_linear_setup)
library.register_autograd(
    "bitmask::linear_backward_input", _backward_input_backward, setup_context=_backward_input_setup
)
_implementations: Any = library.Library("bitmask", "FRAGMENT")  # type: ignore[no-untyped-call]  # die with it
register_autocast(_implementations, torch.ops.bitmask.linear)
register_writes(_implementations, torch.ops.bitmask.compress_into.default, slice(2, 5))
