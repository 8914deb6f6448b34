"""torch's CUTLASS layout of 2:4 tensors, that of torch.sparse.SparseSemiStructuredTensorCUTLASS, both ways (FORMAT.md).

Its metadata are codes of four bits for two stored elements, in the order in which NVIDIA's instructions read them; its
float32 tensors are 1:2: each pair of columns has one stored. torch makes both in
torch.sparse._semi_structured_conversions, after CUTLASS (tools/util/include/cutlass/util/host_reorder.h).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from bitmask.calls import FormatError, check_strided
from bitmask.ops_two_four import unpack_24, validate_24


class _Layout(NamedTuple):
    rows: int  # whose multiples the sizes must be
    cols: int
    meta_dtype: torch.dtype
    code_columns: int  # of a code


_LAYOUTS = {
    torch.float16: _Layout(32, 64, torch.int16, 4),
    torch.bfloat16: _Layout(32, 64, torch.int16, 4),
    torch.float32: _Layout(32, 32, torch.int16, 2),
    torch.int8: _Layout(16, 128, torch.int32, 4),
}

# The code of each mask of two columns of four: the lower column, and above it the higher one, two bits each.
_CODES = {1 << low | 1 << high: low | high << 2 for high in range(4) for low in range(high)}
# A pair of float32 is taken for four columns of 16 bits, of which the first or the last two are stored.
_FIRST, _SECOND = _CODES[0b0011], _CODES[0b1100]


def to_cutlass(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a 2:4 tensor as torch's `packed` and `meta`.

    Only metadata are rewritten, except in float32, where both non-zeros of a group may have been stored for one pair.

    Args:
        values: [rows, cols / 2] in float16, bfloat16 (rows a multiple of 32, cols of 64), float32 (32 and 32) or int8
            (16 and 128).
        metadata: uint8 [rows, cols / 8].

    Returns:
        packed [rows, cols / 2]: `values` itself but for float32; meta int16 [rows, cols / 16], in float32
        [rows, cols / 8], in int8 int32 [rows, cols / 32].

    Raises:
        FormatError: parts that contradict each other or the layout.
        ValueError: sizes that the layout has not, or a pair of float32 with two non-zeros.
        TypeError: parts of the wrong kind or dtype.

    >>> values = torch.ones(32, 32, dtype=torch.float16)
    >>> packed, meta = to_cutlass(values, torch.full((32, 8), 0b11000011, dtype=torch.uint8))
    >>> packed is values, hex(int(meta[0, 0]) & 0xFFFF)
    (True, '0xe4e4')
    """
    layout = _layout_of("values", values)
    if layout.code_columns == 2:
        packed, codes = _pack_pairs(unpack_24(values, metadata))
    else:
        validate_24(values, metadata)
        packed, codes = values, _look_up(_byte_table(_CODES), metadata)
    return packed.contiguous(), _reorder(codes.contiguous().view(layout.meta_dtype))


def from_cutlass(packed: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_cutlass`: values, which share the memory of `packed`, and metadata.

    Raises:
        FormatError: metadata of the wrong dtype or size, or whose codes are none of those of the layout.
        ValueError: sizes that the layout has not.
        TypeError: tensors of the wrong kind or dtype.

    >>> packed, meta = torch.ones(32, 32, dtype=torch.float16), torch.full((32, 4), -0x1B1C, dtype=torch.int16)
    >>> values, metadata = from_cutlass(packed, meta)
    >>> bin(metadata[0, 0])
    '0b11000011'
    """
    layout = _layout_of("packed", packed)
    check_strided("meta", meta)
    rows, cols = packed.shape[0], 2 * packed.shape[1]
    size = [rows, cols // (2 * layout.code_columns * layout.meta_dtype.itemsize)]
    if meta.dtype != layout.meta_dtype:
        raise FormatError(f"meta: got dtype {meta.dtype}, expected {layout.meta_dtype} for {packed.dtype}")
    if list(meta.shape) != size:
        raise FormatError(f"meta: got size {list(meta.shape)}, expected {size} for packed of size {list(packed.shape)}")
    if meta.device != packed.device:
        raise ValueError(f"meta: got device {meta.device}, expected {packed.device}, the device of packed")
    codes = _restore(meta).view(torch.uint8)
    if layout.code_columns == 2:
        known = {_FIRST: 0b01, _SECOND: 0b10}
        halves = _masks_of(codes, known, 2).reshape(rows, cols // 8, 2)
        return packed.contiguous(), halves[..., 0] | halves[..., 1] << 4
    return packed.contiguous(), _masks_of(codes, {code: mask for mask, code in _CODES.items()}, 4)


def parts_of_torch(tensor: SparseSemiStructuredTensorCUTLASS) -> tuple[Tensor, Tensor]:
    """`packed` and `meta` of a tensor of torch's, whose sizes are held against its shape.

    Raises:
        TypeError: anything but a `torch.sparse.SparseSemiStructuredTensorCUTLASS`.
        ValueError: one that has lost its elements by being transposed.
        FormatError: `packed` of a size that is not that of the shape.
    """
    if not isinstance(tensor, SparseSemiStructuredTensorCUTLASS):
        raise TypeError(f"tensor: got {type(tensor).__name__}, expected a SparseSemiStructuredTensorCUTLASS")
    if tensor.packed is None or tensor.meta is None:
        raise ValueError("tensor: got one without packed and meta, expected one that is not transposed")
    packed, shape = tensor.packed.detach(), list(tensor.shape)
    if [*packed.shape[:-1], 2 * packed.shape[-1]] != shape:
        expected = [*shape[:-1], shape[-1] // 2]
        raise FormatError(f"packed: got size {list(packed.shape)}, expected {expected} for shape {shape}")
    return packed, tensor.meta


def _layout_of(name: str, packed: Tensor) -> _Layout:
    """The layout of a dtype, which the sizes of the stored elements are held against."""
    check_strided(name, packed)
    layout = _LAYOUTS.get(packed.dtype)
    if layout is None:
        raise TypeError(f"{name}: got dtype {packed.dtype}, expected float16, bfloat16, float32 or int8")
    if packed.ndim != 2:
        raise ValueError(f"{name}: got size {list(packed.shape)}, expected [rows, cols / 2]")
    rows, cols = packed.shape[0], 2 * packed.shape[1]
    if min(rows, cols) == 0 or rows % layout.rows != 0 or cols % layout.cols != 0:
        raise ValueError(
            f"{name}: got size {list(packed.shape)}, {rows} rows of {cols} columns, expected multiples of "
            f"{layout.rows} rows and {layout.cols} columns for {packed.dtype} (torch's CUTLASS kernels)"
        )
    return layout


def _byte_table(codes: dict[int, int], columns: int = 4) -> Tensor:
    """uint8 [256]: what each byte of two entries becomes, the first one in its low bits; zero for those not known."""
    table = torch.zeros(256, dtype=torch.uint8, device="cpu")
    for low, low_code in codes.items():
        for high, high_code in codes.items():
            table[low | high << 4] = low_code | high_code << columns
    return table


def _look_up(table: Tensor, octets: Tensor) -> Tensor:
    return table.to(octets.device, non_blocking=True)[octets.int()]


def _masks_of(codes: Tensor, masks: dict[int, int], columns: int) -> Tensor:
    """Bytes of two codes each as masks of stored columns; raises FormatError for codes that are not known."""
    found = _look_up(_byte_table(masks, columns), codes)
    if not found.all():
        row, octet = (found == 0).nonzero()[0].tolist()
        pair = int(codes[row, octet])
        first = pair & 15 not in masks
        code, col = (pair & 15, 2 * octet * columns) if first else (pair >> 4, (2 * octet + 1) * columns)
        expected = ", ".join(f"{code & 3} and {code >> 2}" for code in sorted(masks))
        raise FormatError(
            f"meta: row {row}, columns {col} to {col + columns - 1}: got indices {code & 3} and {code >> 2}, "
            f"expected one of {expected}"
        )
    return found


def _pack_pairs(dense: Tensor) -> tuple[Tensor, Tensor]:
    """The element that is stored of each pair of columns, and bytes of two codes: of two zeros torch takes the last."""
    rows, cols = dense.shape
    pairs = dense.view(torch.int32).reshape(rows, cols // 2, 2)  # as bits: comparisons may flush subnormals
    nonzero = (pairs & 0x7FFFFFFF) != 0
    if nonzero.all(dim=-1).any():
        row, pair = nonzero.all(dim=-1).nonzero()[0].tolist()
        raise ValueError(
            f"values: row {row}, columns {2 * pair} to {2 * pair + 1}: got 2 non-zeros, expected at most 1: "
            "torch's float32 tensors are 1:2"
        )
    first = nonzero[..., 0]
    packed = torch.where(first, pairs[..., 0], pairs[..., 1]).view(torch.float32)
    codes = torch.where(first, _FIRST, _SECOND).to(torch.uint8).reshape(rows, cols // 4, 2)
    return packed, codes[..., 0] | codes[..., 1] << 4


# Rows of meta are dealt out by eights and column pairs swapped with row pairs, so that each thread of a GPU finds what
# it needs next to each other. With a row taken apart as [groups, halves, 2, 8] and a column as [pairs, 2], memory holds
# [pairs, groups, 8, halves, 2 (of the column), 2 (of the row)].


def _reorder(meta: Tensor) -> Tensor:
    rows, cols = meta.shape
    halves = 4 // meta.element_size()
    apart = meta.reshape(rows // (16 * halves), halves, 2, 8, cols // 2, 2)
    return apart.permute(4, 0, 3, 1, 5, 2).reshape(rows, cols)


def _restore(meta: Tensor) -> Tensor:
    rows, cols = meta.shape
    halves = 4 // meta.element_size()
    apart = meta.reshape(cols // 2, rows // (16 * halves), 8, halves, 2, 2)
    return apart.permute(1, 3, 5, 2, 0, 4).reshape(rows, cols)
