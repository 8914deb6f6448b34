"""Linear layers in Triton, on GPUs that the native library has no kernels for.

Few rows of x: a program walks along a block of rows of the weight, expands a tile at a time and multiplies it at once.
The walk proves the weight, too: the first row starts at 0, each one's popcount leads to the offset of the next, that of
the last to nnz. No offset is trusted before the host has read the verdict: values are loaded from [0, nnz) alone.
More rows of x: the weight is decompressed, and multiplied by the vendor's library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmask.calls import LINEAR_DTYPES
from bitmask.ops import check_linear, check_parts
from bitmask.triton_codec import bits_of, check_shape, contiguous, decompress, launch, places_of, refuse

# Rows of x up to which a tile is multiplied as it is expanded: their sums fit into registers.
_MOST_ROWS = 64
_DOT_ROWS = 16  # the least that tl.dot takes
_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def multiply(
    x: tl.tensor,  # [m, cols]
    values: tl.tensor,  # [nnz]
    bitmasks: tl.tensor,  # [rows, row_bytes]
    row_offsets: tl.tensor,  # [rows]
    bias: tl.tensor,  # [rows], or anything without BIAS
    y: tl.tensor,  # [m, rows], written
    sound: tl.tensor,  # bool [rows], written: whether the row leads from its offset to the next
    nnz: tl.int64,
    m: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    row_bytes: tl.int64,
    OPERAND: tl.constexpr,  # type in which tl.dot multiplies
    BIAS: tl.constexpr,  # whether there is a bias
    M: tl.constexpr,  # rows of x that sums are kept for, at least m; 1: no tl.dot
    ROWS: tl.constexpr,  # of a tile of the weight
    COLS: tl.constexpr,  # of a tile of the weight
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, COLS)[None, :]
    batch = tl.arange(0, M)[:, None]
    start = tl.load(row_offsets + row, mask=row < rows, other=0)
    place = start
    sums = tl.zeros([ROWS, COLS if M == 1 else M], tl.float32)
    for first in range(0, cols, COLS):
        within = lane < cols - first
        bits = bits_of(bitmasks + row * row_bytes + first // 8, lane, (row < rows) & within)
        source = places_of(bits, place)
        w = tl.load(values + source, mask=(bits != 0) & (source >= 0) & (source < nnz), other=0)
        rows_of_x = tl.load(x + batch * cols + first + lane, mask=(batch < m) & within, other=0)
        if M == 1:
            sums += w.to(tl.float32) * rows_of_x.to(tl.float32)
        else:
            sums = tl.dot(w.to(OPERAND), tl.trans(rows_of_x.to(OPERAND)), sums, input_precision="ieee")
        place += tl.sum(bits, 1)[:, None]

    if M == 1:
        sums = tl.sum(sums, 1)[:, None]
    if BIAS:
        sums += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    column_of_y = tl.trans(batch)
    tl.store(y + column_of_y * rows + row, sums.to(y.dtype.element_ty), mask=(column_of_y < m) & (row < rows))

    expected = tl.load(row_offsets + row + 1, mask=row + 1 < rows, other=nnz)
    last_octet = tl.load(bitmasks + row * row_bytes + row_bytes - 1, mask=row < rows, other=0)
    padding = last_octet.to(tl.int32) >> (cols - row_bytes * 8 + 8).to(tl.int32)
    tl.store(sound + row, (place == expected) & ((row > 0) | (start == 0)) & (padding == 0), mask=row < rows)


def _tile_sizes(m: int) -> dict[str, int]:
    """Sizes of the tiles of `multiply` for m rows of x: a dot product alone takes them long, and keeps GPUs busier."""
    if m == 1:
        return {"M": 1, "ROWS": 8, "COLS": 256}
    return {"M": max(triton.next_power_of_2(m), _DOT_ROWS), "ROWS": 32, "COLS": 64}


def _dense(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, in_features: int) -> Tensor:
    return decompress(values, bitmasks, row_offsets, [row_offsets.numel(), in_features])


def _multiply(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, y: Tensor) -> bool:
    """Fills y [m, rows] from x [m, cols], all contiguous; whether the weight has proven sound."""
    values, bitmasks, _ = weight
    m, cols = x.shape
    rows, row_bytes = bitmasks.shape
    sound = torch.empty(rows, dtype=torch.bool, device=x.device)
    sizes = _tile_sizes(m)
    # Triton's interpreter has no product of bfloat16; in float32 it is the same number.
    operand = tl.float32 if triton.knobs.runtime.interpret else _OPERANDS[x.dtype]
    tensors = (x, *weight, x if bias is None else bias, y, sound)
    constants = {"OPERAND": operand, "BIAS": bias is not None, **sizes}
    launch(multiply, triton.cdiv(rows, sizes["ROWS"]), *tensors, values.numel(), m, rows, cols, row_bytes, **constants)
    return bool(sound.all())


def linear(
    x: Tensor,
    values: Tensor,
    bitmasks: Tensor,
    row_offsets: Tensor,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The op of that name."""
    check_linear(x, values, bitmasks, row_offsets, in_features, bias)
    sizes = [*x.shape[:-1], row_offsets.numel()]
    check_shape(sizes)
    m = x.shape[:-1].numel()
    if values.dtype not in _OPERANDS or m > _MOST_ROWS or 0 in (m, in_features, *sizes):
        return torch.nn.functional.linear(x, _dense(values, bitmasks, row_offsets, in_features), bias)
    weight = [contiguous("values", values), contiguous("bitmasks", bitmasks), contiguous("row_offsets", row_offsets)]
    y = torch.empty(sizes, dtype=x.dtype, device=x.device)
    offset = None if bias is None else contiguous("bias", bias)
    if not _multiply(contiguous("x", x).view(m, in_features), weight, offset, y):
        refuse(values, bitmasks, row_offsets, [row_offsets.numel(), in_features])
    return y


def linear_backward_input(
    grad: Tensor, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, in_features: int
) -> Tensor:
    """The op of that name."""
    check_parts(values, bitmasks, row_offsets)
    rows = row_offsets.numel()
    if values.dtype not in LINEAR_DTYPES or grad.dtype != values.dtype:
        raise TypeError(f"grad: got dtype {grad.dtype} for values of {values.dtype}, expected one floating-point dtype")
    if grad.ndim == 0 or grad.shape[-1] != rows:
        raise ValueError(f"grad: got size {list(grad.shape)}, expected [..., {rows}] (out_features)")
    return grad @ _dense(values, bitmasks, row_offsets, in_features)
