"""The codec in Triton: compress, decompress and validate on GPUs that the native library has no kernels for.

A matrix [rows, cols] is cut into tiles: a part of one row where rows are long, several whole rows where they are short.
Both directions take two passes over the tiles, with torch's cumsum in between:

    bits set in each row of a tile → where its values start → an element's place: start + bits set before it in that row

Starts are counted from the bits that are then used, and the caller's row_offsets only compared with them: so nothing
outside of `values` is touched, whatever the parts hold. Elements are moved as integers of their width, 16 bytes as two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmask.calls import FormatError
from bitmask.ops import (
    bitmask_sizes,
    check_dense,
    check_into,
    check_part_sizes,
    check_parts,
)
from bitmask.ops import (
    validate as native_validate,
)
from bitmask.reference import rows_and_columns

_TILE_ELEMENTS = 1024
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WITHOUT_NEGATIVE_ZERO = {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu}


@triton.jit
def bits_of(octets: tl.tensor, lane: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """0 or 1 for each lane, of the mask bytes from `octets` on: lane 0 is the lowest bit of the first. 0 outside."""
    return (tl.load(octets + (lane >> 3), mask=inside, other=0).to(tl.int32) >> (lane & 7)) & 1


@triton.jit
def places_of(bits: tl.tensor, start: tl.tensor) -> tl.tensor:
    """Index in `values` of each set bit of a tile, whose rows start at `start` [rows, 1]."""
    return start + tl.cumsum(bits, 1) - bits


@triton.jit
def _tile(parts: tl.int64, ROWS: tl.constexpr, COLS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's tile: rows [ROWS, 1], its first column, its index among all parts of rows [ROWS, 1]."""
    program = tl.program_id(0).to(tl.int64)
    row = (program // parts * ROWS + tl.arange(0, ROWS))[:, None]
    part = program % parts
    return row, part * COLS, row * parts + part


@triton.jit
def mark_nonzero(
    dense: tl.tensor,  # [rows, cols, WORDS]
    bitmasks: tl.tensor,  # [rows, row_bytes], written
    counts: tl.tensor,  # [rows, parts], written: bits set in each part of a row
    rows: tl.int64,
    cols: tl.int64,
    row_bytes: tl.int64,
    parts: tl.int64,
    TESTED: tl.constexpr,  # bits of a word that make it non-zero
    WORDS: tl.constexpr,  # of an element
    ROWS: tl.constexpr,  # of a tile
    COLS: tl.constexpr,  # of a tile
) -> None:
    row, first, part = _tile(parts, ROWS, COLS)
    lane = tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (lane < cols - first)
    nonzero = tl.zeros([ROWS, COLS], tl.int32)
    for word in tl.static_range(WORDS):
        bits = tl.load(dense + (row * cols + first + lane) * WORDS + word, mask=inside, other=0) & TESTED
        nonzero |= (bits != 0).to(tl.int32)
    octets = tl.sum(tl.reshape(nonzero, [ROWS, COLS // 8, 8]) << tl.arange(0, 8)[None, None, :], 2)
    octet = first // 8 + tl.arange(0, COLS // 8)[None, :]
    tl.store(bitmasks + row * row_bytes + octet, octets.to(tl.uint8), mask=(row < rows) & (octet < row_bytes))
    tl.store(counts + part, tl.sum(nonzero, 1)[:, None].to(tl.int64), mask=row < rows)


@triton.jit
def count_bits(
    bitmasks: tl.tensor,  # [rows, row_bytes]
    counts: tl.tensor,  # [rows, parts], written: bits set in each part of a row, padding left out
    rows: tl.int64,
    cols: tl.int64,
    row_bytes: tl.int64,
    parts: tl.int64,
    ROWS: tl.constexpr,  # of a tile
    COLS: tl.constexpr,  # of a tile
) -> None:
    row, first, part = _tile(parts, ROWS, COLS)
    lane = tl.arange(0, COLS)[None, :]
    bits = bits_of(bitmasks + row * row_bytes + first // 8, lane, (row < rows) & (lane < cols - first))
    tl.store(counts + part, tl.sum(bits, 1)[:, None].to(tl.int64), mask=row < rows)


@triton.jit
def pack_values(
    dense: tl.tensor,  # [rows, cols, WORDS]
    bitmasks: tl.tensor,  # [rows, row_bytes]
    starts: tl.tensor,  # [rows, parts]
    values: tl.tensor,  # [capacity, WORDS], written as far as it reaches
    capacity: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    row_bytes: tl.int64,
    parts: tl.int64,
    WORDS: tl.constexpr,  # of an element
    ROWS: tl.constexpr,  # of a tile
    COLS: tl.constexpr,  # of a tile
) -> None:
    row, first, part = _tile(parts, ROWS, COLS)
    lane = tl.arange(0, COLS)[None, :]
    bits = bits_of(bitmasks + row * row_bytes + first // 8, lane, (row < rows) & (lane < cols - first))
    place = places_of(bits, tl.load(starts + part, mask=row < rows, other=0))
    stored = (bits != 0) & (place < capacity)
    for word in tl.static_range(WORDS):
        bits_moved = tl.load(dense + (row * cols + first + lane) * WORDS + word, mask=stored, other=0)
        tl.store(values + place * WORDS + word, bits_moved, mask=stored)


@triton.jit
def expand_values(
    values: tl.tensor,  # [nnz, WORDS]
    bitmasks: tl.tensor,  # [rows, row_bytes]
    starts: tl.tensor,  # [rows, parts]
    dense: tl.tensor,  # [rows, cols, WORDS], written
    nnz: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    row_bytes: tl.int64,
    parts: tl.int64,
    WORDS: tl.constexpr,  # of an element
    ROWS: tl.constexpr,  # of a tile
    COLS: tl.constexpr,  # of a tile
) -> None:
    row, first, part = _tile(parts, ROWS, COLS)
    lane = tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (lane < cols - first)
    bits = bits_of(bitmasks + row * row_bytes + first // 8, lane, inside)
    place = places_of(bits, tl.load(starts + part, mask=row < rows, other=0))
    stored = (bits != 0) & (place < nnz)  # masks that are written to meanwhile may lead past the last value
    for word in tl.static_range(WORDS):
        bits_moved = tl.load(values + place * WORDS + word, mask=stored, other=0)
        tl.store(dense + (row * cols + first + lane) * WORDS + word, bits_moved, mask=inside)


class Tiling(NamedTuple):
    """How a matrix is cut into tiles: `parts` for each row of tiles."""

    rows: int
    cols: int
    row_bytes: int
    parts: int
    tile_rows: int
    tile_cols: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Tiling:
        """The tiling for a dense shape."""
        rows, cols = rows_and_columns(shape)
        tile_cols = min(max(triton.next_power_of_2(cols), 8), _TILE_ELEMENTS)
        parts = max(-(-cols // tile_cols), 1)
        return cls(rows, cols, (cols + 7) // 8, parts, _TILE_ELEMENTS // tile_cols, tile_cols)

    def launch(self, kernel: Any, *arguments: Tensor | int, **constants: int) -> None:
        """Run a kernel on every tile."""
        programs = -(-self.rows // self.tile_rows) * self.parts
        sizes = (self.rows, self.cols, self.row_bytes, self.parts)
        launch(kernel, programs, *arguments, *sizes, **constants, ROWS=self.tile_rows, COLS=self.tile_cols)


def launch(kernel: Any, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
    """Run a kernel on the GPU where its first argument is."""
    if programs > 0:
        # Triton launches on the current GPU. It may contract products and sums, but wants to be told so.
        with torch.accelerator.device_index(arguments[0].device.index):  # type: ignore[union-attr]
            kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def contiguous(name: str, tensor: Tensor) -> Tensor:
    """Row-major and without gaps; refuses a tensor whose storage was shrunk under it."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    expected = (tensor.storage_offset() + steps + 1) * tensor.element_size()
    got = tensor.untyped_storage().nbytes()
    if tensor.numel() > 0 and got < expected:
        raise ValueError(f"{name}: got a storage of {got} bytes, expected at least {expected}")
    return tensor.contiguous()


def _words(tensor: Tensor) -> Tensor:
    """The elements of a contiguous tensor as integers."""
    return tensor.reshape(-1).view(_INTEGERS[min(tensor.element_size(), 8)])


def _words_per_element(tensor: Tensor) -> int:
    return max(tensor.element_size() // 8, 1)


def _tested_bits(dtype: torch.dtype, keep_negative_zero: bool) -> int:
    """The zero rule: bits of a word, as a signed integer, that make an element non-zero."""
    if keep_negative_zero or dtype in _WITHOUT_NEGATIVE_ZERO or not (dtype.is_floating_point or dtype.is_complex):
        return -1
    number = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    all_but_the_sign = (1 << 8 * number - 1) - 1
    word = min(dtype.itemsize, 8)
    return sum(all_but_the_sign << 8 * byte for byte in range(0, word, number))


def _starts(counts: Tensor) -> Tensor:
    """Where the values of each part of a row begin: exclusive prefix sums [rows, parts]."""
    return (counts.view(-1).cumsum(0) - counts.view(-1)).view(counts.shape)


def _mark(dense: Tensor, keep_negative_zero: bool, bitmasks: Tensor, tiling: Tiling) -> Tensor:
    """Writes the bitmasks of a contiguous tensor; how many values each part of a row has [rows, parts]."""
    counts = torch.empty([tiling.rows, tiling.parts], dtype=torch.int64, device=dense.device)
    tested = _tested_bits(dense.dtype, keep_negative_zero)
    tiling.launch(mark_nonzero, _words(dense), bitmasks, counts, TESTED=tested, WORDS=_words_per_element(dense))
    return counts


def _pack(dense: Tensor, bitmasks: Tensor, starts: Tensor, values: Tensor, tiling: Tiling) -> None:
    """Writes the values of a contiguous tensor, as many as there is room for."""
    arguments = (_words(dense), bitmasks, starts, _words(values), values.numel())
    tiling.launch(pack_values, *arguments, WORDS=_words_per_element(dense))


def compress(dense: Tensor, keep_negative_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op of that name."""
    check_dense(dense)
    source, tiling = contiguous("dense", dense), Tiling.of(dense.shape)
    bitmasks = torch.empty(bitmask_sizes(dense.shape), dtype=torch.uint8, device=dense.device)
    counts = _mark(source, keep_negative_zero, bitmasks, tiling)
    starts = _starts(counts)
    values = torch.empty(int(counts.sum()), dtype=dense.dtype, device=dense.device)
    _pack(source, bitmasks, starts, values, tiling)
    return values, bitmasks, starts[:, 0].clone(memory_format=torch.contiguous_format)


def compress_into(
    dense: Tensor, keep_negative_zero: bool, values: Tensor, bitmasks: Tensor, row_offsets: Tensor
) -> Tensor:
    """The op of that name."""
    check_dense(dense)
    source, tiling = contiguous("dense", dense), Tiling.of(dense.shape)
    check_into(dense, keep_negative_zero, values, bitmasks, row_offsets)
    _check_memory(dense=source, values=values, bitmasks=bitmasks, row_offsets=row_offsets)
    counts = _mark(source, keep_negative_zero, bitmasks, tiling)
    starts = _starts(counts)
    row_offsets.copy_(starts[:, 0])
    _pack(source, bitmasks, starts, values, tiling)
    return counts.sum()


def _check_memory(**tensors: Tensor) -> None:
    """Raise unless the tensors have no gaps and do not overlap each other."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {list(tensor.stride())}, expected contiguous memory to write to")
        contiguous(name, tensor)
    for (other_name, other), (name, tensor) in itertools.combinations(tensors.items(), 2):
        begin, other_begin = tensor.data_ptr(), other.data_ptr()
        if begin < other_begin + other.nbytes and other_begin < begin + tensor.nbytes:
            raise ValueError(f"{name}: got memory that overlaps that of {other_name}, expected memory of its own")


def check_shape(shape: Sequence[int]) -> None:
    """Raise FormatError unless all sizes and the product of those that are not zero are indices."""
    if any(size < 0 for size in shape):
        raise FormatError(f"shape: got {list(shape)}, expected no negative size")
    if math.prod(size for size in shape if size > 0) >= 2**63:
        raise FormatError(f"shape: got {list(shape)}, expected fewer than 2^63 elements")


def refuse(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> NoReturn:
    """Raise what the CPU op says of parts that have proven faulty; it looks at the values' number alone."""
    unread = torch.empty(values.shape, dtype=values.dtype, device="cpu")
    native_validate(unread, bitmasks.cpu(), row_offsets.cpu(), shape)
    raise FormatError("bitmasks or row_offsets: changed while they were read")


class _Proven(NamedTuple):
    """Parts that agree with each other, contiguous, and where the values of each part of a row begin."""

    values: Tensor
    bitmasks: Tensor
    starts: Tensor
    tiling: Tiling


def _prove(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> _Proven:
    check_shape(shape)
    check_parts(values, bitmasks, row_offsets)
    check_part_sizes(values, bitmasks, row_offsets, shape)
    packed, offsets, tiling = contiguous("values", values), contiguous("row_offsets", row_offsets), Tiling.of(shape)
    masks = contiguous("bitmasks", bitmasks).view(tiling.rows, tiling.row_bytes)
    counts = torch.empty([tiling.rows, tiling.parts], dtype=torch.int64, device=values.device)
    tiling.launch(count_bits, masks, counts)
    starts = _starts(counts)
    faulty = (offsets != starts[:, 0]).any() | (counts.sum() != values.numel())
    if tiling.cols % 8 != 0:
        faulty |= (masks[:, -1] >= 1 << tiling.cols % 8).any()  # padding bits
    if bool(faulty):
        refuse(values, bitmasks, row_offsets, shape)
    return _Proven(packed, masks, starts, tiling)


def decompress(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """The op of that name."""
    proven = _prove(values, bitmasks, row_offsets, shape)
    dense = torch.empty(list(shape), dtype=values.dtype, device=values.device)
    arguments = (_words(proven.values), proven.bitmasks, proven.starts, _words(dense), values.numel())
    proven.tiling.launch(expand_values, *arguments, WORDS=_words_per_element(values))
    return dense


def validate(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> None:
    """The op of that name."""
    _prove(values, bitmasks, row_offsets, shape)
