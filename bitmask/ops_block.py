"""Products with a block-sparse weight, one typed function each, with their fake kernels and autograd formulas.

Kept blocks are `values` [blocks, block rows, block columns], row by row, in the order of `col_indices` int64 [blocks],
which ascend in each block row; `crow_indices` int64 [block rows of the weight + 1] tells where each block row begins:
PyTorch's BSR layout. Blocks at the edges may reach past the weight, with elements that count for nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from bitmask import native
from bitmask.calls import (
    FormatError,
    call,
    call_past_autograd,
    check_tensors,
    refuse_transforms,
    register_autocast,
)

# Kinds of devices that have kernels here.
DEVICES = native.DEVICES


class TransposedIndex(NamedTuple):
    """The kept blocks by block columns: what the gradient of x walks by.

    `ccol_indices` int64 [block columns of the weight + 1]: where each block column begins; `row_indices` int64
    [blocks], which ascend in each block column; `order` int64 [blocks]: where each block lies in `values`.
    """

    ccol_indices: Tensor
    row_indices: Tensor
    order: Tensor


def bsr_transpose(crow_indices: Tensor, col_indices: Tensor, cols_of_blocks: int) -> TransposedIndex:
    """The same blocks by block columns; waits for a GPU if the index is there.

    Args:
        crow_indices: int64 [block rows + 1].
        col_indices: int64 [blocks].
        cols_of_blocks: block columns of the weight.

    Raises:
        FormatError: indices that contradict themselves or each other.
        TypeError, ValueError: a tensor of the wrong kind, dtype or device.

    >>> bsr_transpose(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0]), 2)
    TransposedIndex(ccol_indices=tensor([0, 2, 3]), row_indices=tensor([0, 1, 0]), order=tensor([0, 2, 1]))
    """
    try:
        return TransposedIndex(
            *call(torch.ops.bitmask.bsr_transpose, crow_indices, col_indices, cols_of_blocks, invalid=FormatError)
        )
    except (RuntimeError, TypeError, ValueError):
        _check_transpose(crow_indices, col_indices, cols_of_blocks)
        raise


def bsr_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    transposed: TransposedIndex | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias)` straight from the kept blocks of a weight [out_features, in_features].

    Gradients flow to `x`, `values` and `bias`. Under autocast they are cast as for `F.linear`.

    Args:
        x: [..., in_features], in the dtype of `values`: float32, bfloat16, float16 or float64.
        values: [blocks, block rows, block columns].
        crow_indices: int64 [ceil(out_features / block rows) + 1].
        col_indices: int64 [blocks].
        out_features: rows of the weight.
        bias: [out_features], in the dtype of `values`.
        transposed: what `bsr_transpose` makes of the index, to save the backward pass from making it again.

    Returns:
        [..., out_features] in the dtype of `x`; sums are kept in float32 (float64 for float64) and rounded once. A GPU
        multiplies float32 as tf32 where torch allows it.

    Raises:
        FormatError: an index that contradicts itself, the blocks or the sizes of the weight. What an index on a GPU
            holds is not waited for: where it contradicts, the result is NaN.
        TypeError, ValueError: a tensor of the wrong kind, dtype, device or size.
        NotImplementedError: gradients under torch.func, derivatives in forward mode.

    >>> values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> bsr_linear(torch.tensor([1.0, 10.0, 7.0, 7.0]), values, torch.tensor([0, 0, 1]), torch.tensor([0]), 4)
    tensor([ 0.,  0., 21., 43.])
    """
    parts = _parts_of(transposed)
    return _linear(x, values, crow_indices, col_indices, out_features, bias, *parts, _allows_tf32(x))


def bsr_linear_backward_input(grad: Tensor, values: Tensor, transposed: TransposedIndex, in_features: int) -> Tensor:
    """The gradient of x [..., in_features], from that of the output [..., out_features]; differentiable.

    >>> values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> transposed = bsr_transpose(torch.tensor([0, 0, 1]), torch.tensor([0]), 2)
    >>> bsr_linear_backward_input(torch.tensor([7.0, 7.0, 1.0, 10.0]), values, transposed, 4)
    tensor([31., 42.,  0.,  0.])
    """
    return backward_input(grad, values, *_parts_of(transposed), in_features, _allows_tf32(grad))


def bsr_linear_backward_values(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block_shape: Sequence[int]
) -> Tensor:
    """The gradient of the kept blocks, from that of the output [..., out_features] and x; differentiable.

    >>> grad, x = torch.tensor([5.0, 5.0, 1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> bsr_linear_backward_values(grad, x, torch.tensor([0, 0, 1]), torch.tensor([0]), (2, 2))
    tensor([[[3., 4.],
             [6., 8.]]])
    """
    return _backward_values(grad, x, crow_indices, col_indices, block_shape, _allows_tf32(grad))


# The ops as they are: with what torch allows as an argument, so that gradients are as precise as what they are of.


def _linear(*args: Any) -> Tensor:
    return _product(torch.ops.bitmask.bsr_linear.default, check_linear, args)


def backward_input(*args: Any) -> Tensor:
    return _product(torch.ops.bitmask.bsr_linear_backward_input.default, _check_backward_input, args)


def _backward_values(*args: Any) -> Tensor:
    return _product(torch.ops.bitmask.bsr_linear_backward_values.default, _check_backward_values, args)


def _product(op: Any, check: Callable[..., None], args: tuple[Any, ...]) -> Tensor:
    """The op of these arguments; if it fails, `check` may know better what is wrong with them."""
    try:
        refuse_transforms(op, args)
        y: Tensor = call_past_autograd(op, *args, invalid=FormatError)
    except (RuntimeError, TypeError, ValueError):
        check(*args)
        raise
    return y


def _allows_tf32(multiplied: Tensor) -> bool:
    """Whether torch lets tensor cores round what is multiplied there from float32 to tf32."""
    return isinstance(multiplied, Tensor) and multiplied.is_cuda and _tf32_of_matmuls()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compilers guard the setting
def _tf32_of_matmuls() -> bool:
    """By the newer of torch's two ways to ask: the older one, `allow_tf32`, raises if the newer one was used to set."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _parts_of(transposed: TransposedIndex | None) -> tuple[Any, Any, Any]:
    if transposed is None:
        return None, None, None
    if not isinstance(transposed, tuple) or len(transposed) != 3:
        raise TypeError(f"transposed: got {type(transposed).__name__}, expected the TransposedIndex of bsr_transpose")
    return transposed


# What is wrong with a call, for all that can be seen without looking at the contents of an index. Fake kernels ask
# first, the functions above only when the native op has refused: so small products stay fast.

_check_tensors = partial(check_tensors, index_dtype=torch.int64, family="block-sparse")


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, int | torch.SymInt):
        try:
            operator.index(count)
        except TypeError:
            raise TypeError(f"{name}: got {count!r}, expected an integer") from None
    if not 0 <= count < 2**63 - 1:
        raise ValueError(f"{name}: got {count}, expected 0 or more, and less than 2^63 - 1")


def _check_last_size(name: str, tensor: Tensor, feature: str) -> None:
    if tensor.ndim == 0:
        raise ValueError(f"{name}: got size [], expected [..., {feature}]")


def _check_values(values: Tensor) -> None:
    if values.ndim != 3 or min(values.shape[1:]) < 1:
        raise FormatError(f"values: got size {list(values.shape)}, expected [blocks, block rows, block columns]")


def _check_sizes(vectors: dict[str, Tensor], expected: int, of_what: str) -> None:
    for name, vector in vectors.items():
        if vector.ndim != 1 or vector.shape[0] != expected:
            raise FormatError(f"{name}: got size {list(vector.shape)}, expected [{expected}] ({of_what})")


def _blocks_across(size: int, block: int) -> int:
    return (size + block - 1) // block


def _check_transpose(crow_indices: Tensor, col_indices: Tensor, cols_of_blocks: int) -> None:
    _check_tensors({}, {"crow_indices": crow_indices, "col_indices": col_indices})
    _check_count("cols_of_blocks", cols_of_blocks)
    if crow_indices.ndim != 1 or crow_indices.shape[0] < 1:
        raise FormatError(f"crow_indices: got size {list(crow_indices.shape)}, expected [block rows + 1]")
    if col_indices.ndim != 1:
        raise FormatError(f"col_indices: got size {list(col_indices.shape)}, expected [blocks]")


def check_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    bias: Tensor | None,
    ccol_indices: Tensor | None = None,
    row_indices: Tensor | None = None,
    order: Tensor | None = None,
    allow_tf32: bool = False,
) -> None:
    """Raise unless these are the arguments of a product, for all that can be seen without looking at indices."""
    parts = {"ccol_indices": ccol_indices, "row_indices": row_indices, "order": order}
    transposed = {name: part for name, part in parts.items() if part is not None}
    _check_tensors(
        {"values": values, "x": x} | ({} if bias is None else {"bias": bias}),
        {"crow_indices": crow_indices, "col_indices": col_indices} | transposed,
        autocasts=True,
    )
    _check_count("out_features", out_features)
    _check_values(values)
    _check_last_size("x", x, "in_features")
    blocks, block_rows, block_cols = values.shape
    lines = _blocks_across(out_features, block_rows)
    _check_sizes({"crow_indices": crow_indices}, lines + 1, "one per block row, and the end")
    _check_sizes({"col_indices": col_indices}, blocks, "one per block")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != out_features):
        raise ValueError(f"bias: got size {list(bias.shape)}, expected [{out_features}] (out_features)")
    if len(transposed) == 3:
        _check_transposed(**transposed, lines=_blocks_across(x.shape[-1], block_cols), blocks=blocks)
    elif transposed:
        raise ValueError(f"ccol_indices, row_indices, order: got {', '.join(transposed)} alone, expected all or none")


def _check_transposed(ccol_indices: Tensor, row_indices: Tensor, order: Tensor, lines: int, blocks: int) -> None:
    _check_sizes({"ccol_indices": ccol_indices}, lines + 1, "one per block column, and the end")
    _check_sizes({"row_indices": row_indices, "order": order}, blocks, "one per block")


def _check_backward_input(
    grad: Tensor,
    values: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    order: Tensor,
    in_features: int,
    allow_tf32: bool,
) -> None:
    transposed = {"ccol_indices": ccol_indices, "row_indices": row_indices, "order": order}
    _check_tensors({"values": values, "grad": grad}, transposed)
    _check_count("in_features", in_features)
    _check_values(values)
    _check_last_size("grad", grad, "out_features")
    lines = _blocks_across(in_features, values.shape[2])
    _check_transposed(ccol_indices, row_indices, order, lines, values.shape[0])


def _check_backward_values(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block_shape: Sequence[int], allow_tf32: bool
) -> None:
    _check_tensors({"grad": grad, "x": x}, {"crow_indices": crow_indices, "col_indices": col_indices})
    _check_last_size("grad", grad, "out_features")
    _check_last_size("x", x, "in_features")
    if grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"x: got size {list(x.shape)}, expected {[*grad.shape[:-1], 'in_features']} as that of grad")
    if not isinstance(block_shape, Sequence) or len(block_shape) != 2:
        raise TypeError(f"block_shape: got {block_shape!r}, expected two integers: block rows and block columns")
    for side in block_shape:
        _check_count("block_shape", side)
    if min(block_shape) < 1:
        raise ValueError(f"block_shape: got {list(block_shape)}, expected block rows and block columns of at least 1")
    lines = _blocks_across(grad.shape[-1], block_shape[0])
    _check_sizes({"crow_indices": crow_indices}, lines + 1, "one per block row, and the end")
    if col_indices.ndim != 1:
        raise FormatError(f"col_indices: got size {list(col_indices.shape)}, expected [blocks]")


def _fake_transpose(crow_indices: Tensor, col_indices: Tensor, cols_of_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_transpose(crow_indices, col_indices, cols_of_blocks)
    return (
        col_indices.new_empty([cols_of_blocks + 1]),
        col_indices.new_empty(col_indices.shape),
        col_indices.new_empty(col_indices.shape),
    )


def _fake_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    ccol_indices: Tensor | None = None,
    row_indices: Tensor | None = None,
    order: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    transposed = (ccol_indices, row_indices, order)
    check_linear(x, values, crow_indices, col_indices, out_features, bias, *transposed, allow_tf32)
    return x.new_empty([*x.shape[:-1], out_features])


def _fake_backward_input(
    grad: Tensor,
    values: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    order: Tensor,
    in_features: int,
    allow_tf32: bool = False,
) -> Tensor:
    _check_backward_input(grad, values, ccol_indices, row_indices, order, in_features, allow_tf32)
    return grad.new_empty([*grad.shape[:-1], in_features])


def _fake_backward_values(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_shape: Sequence[int],
    allow_tf32: bool = False,
) -> Tensor:
    _check_backward_values(grad, x, crow_indices, col_indices, block_shape, allow_tf32)
    return grad.new_empty([col_indices.shape[0], *block_shape])


# The three products are the gradients of each other. Each formula saves only what its gradients need.


def transposed_for_gradients(crow_indices: Tensor, col_indices: Tensor, cols_of_blocks: int) -> TransposedIndex:
    """What `bsr_transpose` makes of an index that a product has taken, without waiting for a GPU.

    There, what it makes of a faulty one may be faulty, too, which gradients show as NaN.
    """
    if crow_indices.device.type == "cpu":
        return bsr_transpose(crow_indices, col_indices, cols_of_blocks)
    return _transpose_by_sorting(crow_indices, col_indices, cols_of_blocks)


def _transpose_by_sorting(crow_indices: Tensor, col_indices: Tensor, cols_of_blocks: int) -> TransposedIndex:
    columns, order = col_indices.sort(stable=True)
    firsts = torch.arange(cols_of_blocks + 1, device=columns.device)
    rows = torch.searchsorted(crow_indices[1:], order, right=True)
    # Faults that the result would not show.
    sound = (crow_indices[0] == 0) & (crow_indices[-1] == len(order)) & (crow_indices.diff() >= 0).all()
    return TransposedIndex(torch.searchsorted(columns, firsts), torch.where(sound, rows, -1), order)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, crow_indices, col_indices, _, _, *transposed, ctx.allow_tf32 = inputs
    needs_x, needs_values, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        x if needs_values else None, values if needs_x else None, crow_indices, col_indices, *transposed
    )
    ctx.in_features = x.shape[-1]
    ctx.block_shape = values.shape[1:]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_values, *needs_others = ctx.needs_input_grad  # as many as were given: defaults are left out
    x, values, crow_indices, col_indices, *transposed = ctx.saved_tensors
    grad_x = grad_values = None
    if needs_x:
        if transposed[0] is None:
            lines = _blocks_across(ctx.in_features, ctx.block_shape[1])
            transposed = transposed_for_gradients(crow_indices, col_indices, lines)
        grad_x = backward_input(grad, values, *transposed, ctx.in_features, ctx.allow_tf32)
    if needs_values:
        grad_values = _backward_values(grad, x, crow_indices, col_indices, ctx.block_shape, ctx.allow_tf32)
    grad_bias = grad.sum_to_size(grad.shape[-1:]) if any(needs_others) else None
    return grad_x, grad_values, None, None, None, grad_bias, None, None, None, None


def _backward_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, values, *transposed, _, ctx.allow_tf32 = inputs
    needs_grad, needs_values, *_ = ctx.needs_input_grad
    ctx.save_for_backward(grad if needs_values else None, values if needs_grad else None, *transposed)
    ctx.out_features = grad.shape[-1]
    ctx.block_shape = values.shape[1:]


def _backward_input_backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
    grad, values, *transposed = ctx.saved_tensors
    ccol_indices, row_indices, _ = transposed
    block_rows = _blocks_across(ctx.out_features, ctx.block_shape[0])
    crow_indices, col_indices, _ = transposed_for_gradients(ccol_indices, row_indices, block_rows)
    grad_grad = grad_values = None
    if ctx.needs_input_grad[0]:
        index = (crow_indices, col_indices)
        grad_grad = _linear(grad_x, values, *index, ctx.out_features, None, *transposed, ctx.allow_tf32)
    if ctx.needs_input_grad[1]:
        grad_values = _backward_values(grad, grad_x, crow_indices, col_indices, ctx.block_shape, ctx.allow_tf32)
    return grad_grad, grad_values, None, None, None, None, None


def _backward_values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, crow_indices, col_indices, block_shape, ctx.allow_tf32 = inputs
    needs_grad, needs_x, *_ = ctx.needs_input_grad
    ctx.save_for_backward(grad if needs_x else None, x if needs_grad else None, crow_indices, col_indices)
    ctx.out_features, ctx.in_features = grad.shape[-1], x.shape[-1]
    ctx.block_cols = block_shape[1]


def _backward_values_backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, crow_indices, col_indices = ctx.saved_tensors
    grad_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        index = (crow_indices, col_indices)
        grad_grad = _linear(x, grad_values, *index, ctx.out_features, None, None, None, None, ctx.allow_tf32)
    if ctx.needs_input_grad[1]:
        lines = _blocks_across(ctx.in_features, ctx.block_cols)
        transposed = transposed_for_gradients(crow_indices, col_indices, lines)
        grad_x = backward_input(grad, grad_values, *transposed, ctx.in_features, ctx.allow_tf32)
    return grad_grad, grad_x, None, None, None, None


library.register_fake("bitmask::bsr_linear", _fake_linear)
library.register_fake("bitmask::bsr_linear_backward_input", _fake_backward_input)
library.register_fake("bitmask::bsr_linear_backward_values", _fake_backward_values)
library.register_fake("bitmask::bsr_transpose", _fake_transpose)
library.register_autograd("bitmask::bsr_linear", _linear_backward, setup_context=_linear_setup)
library.register_autograd(
    "bitmask::bsr_linear_backward_input", _backward_input_backward, setup_context=_backward_input_setup
)
library.register_autograd(
    "bitmask::bsr_linear_backward_values", _backward_values_backward, setup_context=_backward_values_setup
)
_implementations: Any = library.Library("bitmask", "FRAGMENT")  # type: ignore[no-untyped-call]  # die with it
register_autocast(_implementations, torch.ops.bitmask.bsr_linear)
