"""The product with a block-sparse weight whose kept blocks are 2:4: half of what kept blocks take (FORMAT.md).

Kept blocks are `values` [blocks, block rows, block columns / 2] and `metadata` uint8 [blocks, block rows, ceil(block
columns / 8)], each block as `ops_two_four` has a matrix; `crow_indices` and `col_indices` are those of `ops_block`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from bitmask.calls import FormatError, call_past_autograd, refuse_frozen_gradient, refuse_transforms, register_autocast
from bitmask.ops_block import backward_input, check_linear, transposed_for_gradients
from bitmask.ops_two_four import check_parts_24, unpack_24


def bsr_linear_24(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias)` straight from the kept 2:4 blocks of a weight [out_features, in_features].

    The parts are proven while they are used. Gradients flow to `x` and `bias`; the weight is frozen. Under autocast,
    `x`, the values and `bias` are cast as for `F.linear`. The gradient of `x` proves the values first, for which it
    waits for a GPU, unless a CUDA graph is captured.

    An infinity or NaN of `x` that meets an element of a kept block that is not stored makes NaN, as from a dense block,
    but not in the 2:4 kernels of GPUs: there it takes no part, unless the blocks have to be unpacked first.

    Args:
        x: [..., in_features], in the dtype of `values`: float32, bfloat16, float16 or float64.
        values: [blocks, block rows, block columns / 2]; block columns are a multiple of 4.
        metadata: uint8 [blocks, block rows, ceil(block columns / 8)].
        crow_indices: int64 [ceil(out_features / block rows) + 1].
        col_indices: int64 [blocks].
        out_features: rows of the weight.
        bias: [out_features], in the dtype of `values`.

    Returns:
        [..., out_features] in the dtype of `x`; sums are kept in float32 (float64 for float64) and rounded once.

    Raises:
        FormatError: parts that contradict themselves, each other or the sizes of the weight. What parts on a GPU hold
            is not waited for: where it contradicts, the result is NaN.
        TypeError, ValueError: a tensor of the wrong kind, dtype, device or size.
        NotImplementedError: gradients under torch.func, derivatives in forward mode.

    >>> from bitmask import pack_24
    >>> values, metadata = pack_24(torch.tensor([[[1.0, 0.0, 2.0, 0.0], [0.0, 5.0, 0.0, 3.0]]]))
    >>> x = torch.tensor([9.0, 9.0, 9.0, 9.0, 1.0, 10.0, 100.0, 1000.0])
    >>> bsr_linear_24(x, values, metadata, torch.tensor([0, 0, 1]), torch.tensor([1]), 4)
    tensor([   0.,    0.,  201., 3050.])
    """
    args = (x, values, metadata, crow_indices, col_indices, out_features, bias)
    if not type(values) is type(metadata) is Tensor:
        _check(*args)
    op = torch.ops.bitmask.bsr_linear_24.default
    refuse_transforms(op, args)
    try:
        y: Tensor = call_past_autograd(op, *args, invalid=FormatError)
    except (RuntimeError, TypeError, ValueError):
        _check(*args)
        raise
    return y


# What is wrong with a call, for all that can be seen without looking at what the parts hold. Fake kernels ask first,
# the function above only when the native op has refused: so small products stay fast.


def _check(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
) -> None:
    check_parts_24(values, metadata)
    if values.ndim != 3 or 0 in values.shape[1:]:
        raise FormatError(
            f"values: got size {list(values.shape)}, expected [blocks, block rows, block columns / 2], of which only "
            "blocks may be 0"
        )
    blocks, block_rows, half = values.shape
    dense = values.detach().as_strided([blocks, block_rows, 2 * half], [0, 0, 0])  # only its size counts
    check_linear(x, dense, crow_indices, col_indices, out_features, bias)


def _fake(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    _check(x, values, metadata, crow_indices, col_indices, out_features, bias)
    return x.new_empty([*x.shape[:-1], out_features])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, metadata, crow_indices, col_indices, *_ = inputs
    refuse_frozen_gradient(ctx.needs_input_grad[1])
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(values, metadata, crow_indices, col_indices)
    ctx.in_features = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, _, _, _, _, _, *needs_bias = ctx.needs_input_grad  # as many as were given
    grad_x = None
    if needs_x:
        values, metadata, crow_indices, col_indices = ctx.saved_tensors
        dense = unpack_24(values, metadata)
        block_cols = dense.shape[2]
        lines = (ctx.in_features + block_cols - 1) // block_cols
        transposed = transposed_for_gradients(crow_indices, col_indices, lines)
        # Not in tf32, even where torch allows it: neither is the product.
        grad_x = backward_input(grad, dense, *transposed, ctx.in_features, False)
    grad_bias = grad.sum_to_size(grad.shape[-1:]) if any(needs_bias) else None
    return grad_x, None, None, None, None, None, grad_bias


library.register_fake("bitmask::bsr_linear_24", _fake)
library.register_autograd("bitmask::bsr_linear_24", _backward, setup_context=_setup)
_implementations: Any = library.Library("bitmask", "FRAGMENT")  # type: ignore[no-untyped-call]  # die with it
register_autocast(_implementations, torch.ops.bitmask.bsr_linear_24)
