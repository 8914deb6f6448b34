"""Slow, obviously right twins of the native ops in plain PyTorch: the oracle of the tests.

Bits are looked at as bytes, never through a floating-point comparison, so that subnormals and NaN payloads are safe
whatever mode the CPU is in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Dtypes with a sign bit to ignore, and the bytes of each of their numbers (little-endian, the sign on top).
_SIGNED_WIDTHS = {
    torch.float8_e4m3fn: 1,
    torch.float8_e5m2: 1,
    torch.float16: 2,
    torch.bfloat16: 2,
    torch.complex32: 2,
    torch.float32: 4,
    torch.complex64: 4,
    torch.float64: 8,
    torch.complex128: 8,
}


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns behind a shape: all dimensions but the last flattened, and the last; a scalar is one element."""
    return math.prod(shape[:-1]), shape[-1] if len(shape) > 0 else 1


def nonzero_mask(dense: Tensor, keep_negative_zero: bool = False) -> Tensor:
    """Bool tensor of the shape of `dense`: which elements are stored."""
    flat = dense.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    octets = flat.view(torch.uint8).reshape(flat.numel(), dense.element_size()).clone()
    width = _SIGNED_WIDTHS.get(dense.dtype)
    if width is not None and not keep_negative_zero:
        octets[:, width - 1 :: width] &= 0x7F
    return (octets != 0).any(dim=1).reshape(dense.shape)


def pack_bits(mask: Tensor) -> Tensor:
    """Bool [..., cols] as uint8 [..., ceil(cols / 8)], least significant bit first, padding bits zero."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    octets = padded.reshape(*mask.shape[:-1], padded.shape[-1] // 8, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (octets * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(bitmasks: Tensor, cols: int) -> Tensor:
    """The inverse of `pack_bits`: bool [..., cols]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmasks.device)
    bits = (bitmasks.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :cols].to(torch.bool)


def compress(dense: Tensor, keep_negative_zero: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `bitmask.ops.compress`: values [nnz], bitmasks [..., ceil(cols / 8)], row_offsets [rows]."""
    source = dense.detach().resolve_conj().resolve_neg().contiguous()
    source = source.reshape(1) if source.ndim == 0 else source
    rows, cols = rows_and_columns(source.shape)
    mask = nonzero_mask(source, keep_negative_zero)
    counts = mask.reshape(rows, cols).sum(dim=1, dtype=torch.int64)
    marked = mask.reshape(-1).nonzero().squeeze(1)
    # Gathered as bytes: indexing has no kernel for some float8 and unsigned dtypes.
    octets = source.reshape(-1).view(torch.uint8).reshape(source.numel(), source.element_size())
    values = octets[marked].reshape(-1).view(source.dtype)
    return values, pack_bits(mask), counts.cumsum(0) - counts


def decompress(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """Twin of `bitmask.ops.decompress` for valid parts."""
    rows, cols = rows_and_columns(shape)
    mask = unpack_bits(bitmasks.reshape(rows, (cols + 7) // 8), cols).reshape(-1)
    octets = torch.zeros(rows * cols, values.element_size(), dtype=torch.uint8, device=values.device)
    octets[mask.nonzero().squeeze(1)] = values.view(torch.uint8).reshape(values.numel(), values.element_size())
    return octets.reshape(-1).view(values.dtype).reshape(list(shape))


def linear(
    x: Tensor,
    values: Tensor,
    bitmasks: Tensor,
    row_offsets: Tensor,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Twin of `bitmask.ops.linear` for valid parts: calculated in float64 and rounded once, to the dtype of `x`."""
    weight = decompress(values, bitmasks, row_offsets, [row_offsets.numel(), in_features])
    y = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return y.to(x.dtype)


def linear_backward_input(
    grad: Tensor, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, in_features: int
) -> Tensor:
    """Twin of the op of that name: the gradient of x [..., in_features], from that of y [..., out_features]."""
    weight = decompress(values, bitmasks, row_offsets, [row_offsets.numel(), in_features])
    return (grad.double() @ weight.double()).to(grad.dtype)


def block_rows_of(crow_indices: Tensor) -> Tensor:
    """The block row of each block: int64 [blocks]."""
    return torch.repeat_interleave(torch.arange(len(crow_indices) - 1), crow_indices.diff())


def bsr_to_dense(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight [out_features, in_features] of kept blocks; what lies past its edges is left out."""
    _, block_rows, block_cols = values.shape
    down, across = len(crow_indices) - 1, -(-shape[1] // block_cols)
    grid = values.new_zeros(down, across, block_rows, block_cols)
    grid[block_rows_of(crow_indices), col_indices] = values
    return grid.transpose(1, 2).reshape(down * block_rows, across * block_cols)[: shape[0], : shape[1]]


def bsr_transpose(crow_indices: Tensor, col_indices: Tensor, cols_of_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `bitmask.ops_block.bsr_transpose` for a valid index."""
    order = col_indices.argsort(stable=True)
    counts = col_indices.bincount(minlength=cols_of_blocks)
    ccol_indices = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ccol_indices, block_rows_of(crow_indices)[order], order


def bsr_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Twin of `bitmask.ops_block.bsr_linear` for a valid index: calculated in float64 and rounded once."""
    weight = bsr_to_dense(values, crow_indices, col_indices, [out_features, x.shape[-1]])
    y = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return y.to(x.dtype)


def bsr_linear_backward_input(
    grad: Tensor, values: Tensor, ccol_indices: Tensor, row_indices: Tensor, order: Tensor, in_features: int
) -> Tensor:
    """Twin of the op of that name: the gradient of x [..., in_features], from that of y [..., out_features]."""
    by_column = values[order].transpose(1, 2)  # the blocks of the transposed weight
    weight = bsr_to_dense(by_column, ccol_indices, row_indices, [in_features, grad.shape[-1]])
    return (grad.double() @ weight.double().t()).to(grad.dtype)


def bsr_linear_backward_values(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block_shape: Sequence[int]
) -> Tensor:
    """Twin of the op of that name: the gradient of the kept blocks, zero past the edges of the weight."""
    (rows, out_features), in_features = rows_and_columns(grad.shape), x.shape[-1]
    dense = grad.double().reshape(rows, out_features).t() @ x.double().reshape(rows, in_features)
    block_rows, block_cols = block_shape
    padded = torch.nn.functional.pad(dense, (0, -in_features % block_cols, 0, -out_features % block_rows))
    down, across = padded.shape[0] // block_rows, padded.shape[1] // block_cols
    grid = padded.reshape(down, block_rows, across, block_cols).transpose(1, 2)
    return grid[block_rows_of(crow_indices), col_indices].to(x.dtype)


# Which two columns a group of four stores, by the columns that are not zero (FORMAT.md).
_STORED = {
    (): (2, 3),
    (0,): (0, 2),
    (1,): (1, 2),
    (2,): (2, 3),
    (3,): (2, 3),
}


def _magnitude_order(dense: Tensor) -> Tensor:
    """An int64 for each element: the lower, the larger the magnitude. Floats compare by their bits, NaN above all."""
    if not dense.is_floating_point():
        if dense.dtype == torch.uint64:
            return ~(dense.view(torch.int64) ^ torch.iinfo(torch.int64).min)
        wide = dense.to(torch.int64)
        return torch.where(wide < 0, wide, -wide)
    words = dense.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dense.element_size()])
    sign = 1 << (8 * dense.element_size() - 1)
    magnitudes = words.to(torch.int64) & (sign - 1)
    has_negative_zero = dense.dtype in _SIGNED_WIDTHS
    return -magnitudes if has_negative_zero else -torch.where(words == sign, sign, magnitudes)


def largest_two(dense: Tensor, keep_negative_zero: bool = False) -> Tensor:
    """Bool [..., cols]: the two largest of the non-zeros of each group of four; of equal ones the first."""
    groups = dense.contiguous().reshape(*dense.shape[:-1], dense.shape[-1] // 4, 4)
    nonzero = nonzero_mask(groups, keep_negative_zero)
    order = torch.where(nonzero, _magnitude_order(groups), torch.iinfo(torch.int64).max)  # zeros come last
    largest = torch.zeros_like(nonzero).scatter(-1, order.argsort(dim=-1, stable=True)[..., :2], True)
    return (largest & nonzero).reshape(dense.shape)


def stored_columns(metadata: Tensor, cols: int) -> Tensor:
    """The two columns, of 0 to 3, that each group of 2:4 metadata stores: int64 [..., cols / 4, 2]."""
    groups = unpack_bits(metadata, cols).to(torch.uint8).reshape(*metadata.shape[:-1], cols // 4, 4)
    return torch.stack([groups.argmax(dim=-1), 3 - groups.flip(-1).argmax(dim=-1)], dim=-1)


def pack_24(dense: Tensor, prune: bool = False, keep_negative_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Twin of `bitmask.ops_two_four.pack_24`: values [..., cols / 2], metadata [..., ceil(cols / 8)]."""
    source = dense.detach().resolve_neg().contiguous()
    rows, cols = rows_and_columns(source.shape)
    nonzero = largest_two(source, keep_negative_zero) if prune else nonzero_mask(source, keep_negative_zero)
    stored = torch.zeros(rows, cols, dtype=torch.bool)
    for row, marks in enumerate(nonzero.reshape(rows, cols).tolist()):
        for col in range(0, cols, 4):
            columns = tuple(i for i in range(4) if marks[col + i])
            if len(columns) > 2:
                raise ValueError(f"row {row}, columns {col} to {col + 3}: {len(columns)} non-zeros")
            for column in _STORED.get(columns, columns):
                stored[row, col + column] = True
    octets = source.reshape(-1).view(torch.uint8).reshape(source.numel(), source.element_size())
    kept = octets[stored.reshape(-1).nonzero().squeeze(1)]
    values = kept.reshape(-1).view(source.dtype).reshape(*source.shape[:-1], cols // 2)
    return values, pack_bits(stored.reshape(source.shape))


def unpack_24(values: Tensor, metadata: Tensor) -> Tensor:
    """Twin of `bitmask.ops_two_four.unpack_24` for valid parts: what a bitmask with these bits decompresses to."""
    shape = [*values.shape[:-1], 2 * values.shape[-1]]
    return decompress(values.contiguous().reshape(-1), metadata, torch.empty(0), shape)


def prune_24(weight: Tensor) -> None:
    """Twin of `bitmask.ops_two_four.prune_24`, in rows only."""
    weight.copy_(unpack_24(*pack_24(weight, prune=True)))


def prune_24_transposable(weight: Tensor) -> None:
    """Twin of `bitmask.ops_two_four.prune_24`, in rows and in columns: every pattern is tried on every 4 x 4."""
    rows_of_two = [torch.tensor([bool(mask >> i & 1) for i in range(4)]) for mask in (3, 5, 6, 9, 10, 12)]
    grids = [torch.stack(rows) for rows in itertools.product(rows_of_two, repeat=4)]
    patterns = [grid for grid in grids if (grid.sum(dim=0) == 2).all()]
    matrix = weight.view(*rows_and_columns(weight.shape))
    for row, col in itertools.product(range(0, matrix.shape[0], 4), range(0, matrix.shape[1], 4)):
        tile = matrix[row : row + 4, col : col + 4]
        ranks = (
            tile.isinf() + 16 * tile.isnan()
        )  # any NaN is worth more than all infinities, and these than all numbers
        numbers = tile.double().abs().where(ranks == 0, 0)
        numbers *= 2.0**-8 if numbers.max() >= 2.0**1000 else 1.0  # so that no sum overflows
        scores = [(ranks[pattern].sum().item(), numbers[pattern].sum().item()) for pattern in patterns]
        tile[~patterns[scores.index(max(scores))]] = 0


def linear_24(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    """Twin of `bitmask.ops_two_four.linear_24` for valid parts: calculated in float64 and rounded once."""
    weight = unpack_24(values, metadata).double()
    return torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double()).to(x.dtype)


def linear_24_backward_input(grad: Tensor, values: Tensor, metadata: Tensor) -> Tensor:
    """Twin of the op of that name: the gradient of x [..., in_features], from that of y [..., out_features]."""
    return (grad.double() @ unpack_24(values, metadata).double()).to(grad.dtype)


def bsr_linear_24(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Twin of `bitmask.ops_block_two_four.bsr_linear_24` for valid parts: calculated in float64 and rounded once."""
    return bsr_linear(x, unpack_24(values, metadata), crow_indices, col_indices, out_features, bias)


class NaiveBitmaskTensor:
    """The face of `BitmaskTensor` over the reference ops; not a tensor.

    >>> dense = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    >>> naive = NaiveBitmaskTensor.from_dense(dense)
    >>> naive.values, naive.row_offsets
    (tensor([1., 2., 3.]), tensor([0, 2]))
    >>> torch.equal(naive.to_dense(), dense)
    True
    """

    def __init__(self, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> None:
        self.values = values
        self.bitmasks = bitmasks
        self.row_offsets = row_offsets
        self.shape = torch.Size(shape)

    @classmethod
    def from_dense(cls, dense: Tensor, *, keep_negative_zero: bool = False) -> NaiveBitmaskTensor:
        """Compress a dense tensor."""
        return cls(*compress(dense, keep_negative_zero), dense.shape)

    def to_dense(self) -> Tensor:
        """The dense tensor."""
        return decompress(self.values, self.bitmasks, self.row_offsets, self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values and of the dense tensor."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.values.device

    @property
    def nnz(self) -> int:
        """Number of stored elements."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        """Fraction of elements that are not stored, 0 to 1 (0 for a tensor without elements)."""
        return 1 - self.nnz / self.shape.numel() if self.shape.numel() > 0 else 0.0

    @property
    def compressed_nbytes(self) -> int:
        """Bytes of the three parts."""
        return self.values.nbytes + self.bitmasks.nbytes + self.row_offsets.nbytes
