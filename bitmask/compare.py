"""Which format a sparse tensor is best kept in: bytes by counting, times by measuring."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmask.calls import LINEAR_DTYPES, check_block_shape, check_strided, uncompiled
from bitmask.format_bytes import BITMASK, BSR, COO, CSC, CSR, DENSE, TWO_FOUR, Census
from bitmask.format_timing import ProductTimes, convert_times, formats, product_times
from bitmask.ops import DTYPES
from bitmask.ops_two_four import TWO_FOUR_DTYPES

_MANY_ROWS = 16  # of x, from which on arithmetic rather than memory takes the time of a product


@dataclass(frozen=True)
class FormatRow:
    """One format of one tensor.

    Attributes:
        name: dense, COO, CSR, CSC, BSR, 2:4 or bitmask.
        nbytes: what it stores, None where the tensor does not fit; indices are int64, as torch makes them.
        short_nbytes: the same with int32 indices, None where there are none or they do not suffice.
        ratio: `nbytes` as a share of the dense bytes, None where there are none.
        convert_ms: median time of making it from the dense tensor, None where not measured.
        product_ms: median time of x W^T by rows of x, as far as measured; of CSR and CSC with int32 indices where
            they suffice.
        note: what there is to say about it here.
    """

    name: str
    nbytes: int | None
    short_nbytes: int | None
    ratio: float | None
    convert_ms: float | None
    product_ms: Mapping[int, float]
    note: str


@dataclass(frozen=True)
class FormatComparison:
    """What `compare_formats` found; `str()` is a table with the winners below it.

    Attributes:
        shape, dtype, sparsity: of the matrix that was compared.
        block_shape: rows and columns of BSR's blocks.
        rows: for which numbers of rows of x products were measured.
        formats: one row for each format, in the order of iteration; `comparison["CSR"]` is that of CSR.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    sparsity: float
    block_shape: tuple[int, int]
    rows: tuple[int, ...]
    formats: tuple[FormatRow, ...]

    def __getitem__(self, name: str) -> FormatRow:
        """The row of a format; KeyError for a name that is none."""
        return {row.name: row for row in self.formats}[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is a format of that name."""
        return any(row.name == name for row in self.formats)

    def __iter__(self) -> Iterator[FormatRow]:
        """The rows, as in `formats`."""
        return iter(self.formats)

    @property
    def smallest(self) -> FormatRow:
        """The format of the fewest bytes."""
        return min(self.formats, key=lambda row: math.inf if row.nbytes is None else row.nbytes)

    def fastest(self, rows: int) -> FormatRow:
        """The format with the fastest product with so many rows of x; ValueError where it was not measured."""
        if rows not in self.rows:
            raise ValueError(f"rows: got {rows}, expected one of those measured, {list(self.rows)}")
        return min(self.formats, key=lambda row: row.product_ms.get(rows, math.inf))

    def __str__(self) -> str:
        """The table, and which format wins, and why."""
        columns = ["format", "bytes", "of dense", "int32 indices"]
        columns += ["convert ms", *(f"m = {rows} ms" for rows in self.rows)] if self.rows else []
        verdicts = [f"Smallest: {self.smallest.name}: {self._why_smallest()}.{self._smaller_with_short_indices()}"]
        verdicts += [f"Fastest at m = {rows}: {self._why_fastest(rows)}." for rows in self.rows]
        title = f"{self.shape[0]}x{self.shape[1]} {dtype_name(self.dtype)}, {self.sparsity:.1%} zeros"
        title += f", times on {torch.get_num_threads()} threads" if self.rows else ""
        return "\n".join([title, "", *aligned([[*columns, ""], *map(self._cells, self.formats)]), "", *verdicts])

    def _cells(self, row: FormatRow) -> list[str]:
        cells = [row.name, _or_dash(row.nbytes, ","), _or_dash(row.ratio, ".1%"), _or_dash(row.short_nbytes, ",")]
        if self.rows:
            cells += [_or_dash(time, ".3f") for time in (row.convert_ms, *map(row.product_ms.get, self.rows))]
        return [*cells, row.note]

    def _smaller_with_short_indices(self) -> str:
        """Which format is smaller than all of them once its indices are int32, if any is."""
        short = {row.name: row.short_nbytes for row in self.formats if row.short_nbytes is not None}
        best = min(short, key=lambda name: short[name], default=None)
        if best is None or self.smallest.nbytes is None or short[best] >= self.smallest.nbytes:
            return ""
        return f" With int32 indices {best} is smaller: {short[best]:,} bytes."

    def _why_smallest(self) -> str:
        index = f"an int64 column index costs 8 bytes for each value of {self.dtype.itemsize}"
        return {
            DENSE: f"with {self.sparsity:.1%} zeros, every other format adds more than the zeros that it leaves out",
            COO: "with no more values than rows, a second index for each costs less than an offset for each row",
            CSR: "so few values are left that 8 bytes of index for each are less than a bit for each element",
            CSC: "an index for each value and an offset for each column are less than the bits and row offsets of a "
            "bitmask",
            BSR: f"one index of 8 bytes serves the {math.prod(self.block_shape)} elements of a block",
            TWO_FOUR: f"it marks an element by one bit and needs no offsets, while {index}",
            BITMASK: f"it marks an element by one bit, while {index}",
        }[self.smallest.name]

    def _why_fastest(self, rows: int) -> str:
        best, dense = self.fastest(rows), self[DENSE]
        if best is dense:
            return f"{DENSE}: finding where values belong takes the others longer than multiplying by zeros takes it"
        gain = f"{best.name}, {dense.product_ms[rows] / best.product_ms[rows]:.2f} times as fast as dense"
        return f"{gain}: {self._why_faster_than_dense(best, rows)}"

    def _why_faster_than_dense(self, best: FormatRow, rows: int) -> str:
        # CSR and CSC are multiplied by with int32 indices.
        read = best.short_nbytes if best.name in (CSR, CSC) and best.short_nbytes is not None else best.nbytes
        dense = self[DENSE].nbytes
        if best.name == TWO_FOUR and rows >= _MANY_ROWS:
            return "it multiplies by half of the elements, which counts for more than bytes with so many rows"
        if read is not None and dense and read < dense:
            return f"it reads {read / dense:.1%} of the bytes"
        if best.name in (COO, CSR, CSC) and self.sparsity > 0:
            return "it skips the elements that are zero, though it reads no fewer bytes"
        return "it reads no fewer bytes, its kernel is what is faster"


def compare_formats(
    tensor: Tensor,
    *,
    time: bool = False,
    rows: Sequence[int] = (1, 128),
    block_shape: Sequence[int] = (32, 32),
) -> FormatComparison:
    """Compare what a tensor takes dense, in torch's sparse layouts, 2:4 and as a bitmask, and how fast it multiplies.

    Bytes follow from counts: without `time` only the bitmask is made. A tensor of other than two dimensions counts as
    the matrix of its rows. Times are medians of calls in turn after a first one, on torch's threads; conversions to
    torch's layouts and 2:4 are those of this library.

    Args:
        tensor: any shape, strides and supported dtype; with `time` in float32, bfloat16, float16 or
            float64, on the CPU.
        time: whether to convert, and to multiply x W^T, too.
        rows: for which numbers of rows of x to multiply.
        block_shape: rows and columns of BSR's blocks.

    Raises:
        TypeError: a tensor that is not dense, or whose dtype has no codec or, with `time`, no products.
        ValueError: a tensor without data or, with `time`, without elements or on another device; numbers of rows, or
            sizes of blocks, below 1.

    >>> found = compare_formats(torch.ones(64, 64).tril())
    >>> found.smallest.name, found["bitmask"].nbytes, found["CSR"].nbytes
    ('bitmask', 9344, 25480)
    >>> found["2:4"].note
    '512 of 1,024 groups of four have more than two non-zeros'
    """
    return _compare(tensor, time, rows, block_shape)


@uncompiled
def _compare(tensor: Tensor, time: bool, rows: Sequence[int], block_shape: Sequence[int]) -> FormatComparison:
    wanted, blocks = check_rows(rows), check_block_shape(block_shape)
    _check_tensor(tensor, time)
    matrix = tensor.detach().reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.ndim else 1).contiguous()
    census = Census.of(matrix, blocks)
    notes = _notes(census, tensor)
    chosen = {name: each for name, each in formats(blocks).items() if name not in notes}
    converted = convert_times(matrix, chosen) if time else {}
    products = product_times(matrix, chosen, wanted) if time else ProductTimes({}, {})
    short, dense_nbytes = census.short_nbytes(), matrix.nbytes
    table = []
    for name, nbytes in census.nbytes().items():
        stored = None if name == TWO_FOUR and name in notes else nbytes
        table.append(
            FormatRow(
                name,
                stored,
                short.get(name),
                stored / dense_nbytes if stored is not None and dense_nbytes else None,
                converted.get(name),
                {count: found[name] for count, found in products.milliseconds.items() if name in found},
                notes.get(name) or products.problems.get(name, ""),
            )
        )
    shape = census.rows, census.cols
    return FormatComparison(shape, tensor.dtype, census.sparsity, blocks, wanted if time else (), tuple(table))


def check_rows(rows: Sequence[int]) -> tuple[int, ...]:
    """Numbers of rows of x as a tuple, each once; raises TypeError or ValueError."""
    try:
        wanted = tuple(dict.fromkeys(operator.index(count) for count in rows))
    except TypeError:
        raise TypeError(f"rows: got {rows!r}, expected a sequence of integers") from None
    if not wanted or min(wanted) < 1:
        raise ValueError(f"rows: got {rows!r}, expected numbers of rows of at least 1")
    return wanted


def _check_tensor(tensor: Tensor, time: bool) -> None:
    check_strided("tensor", tensor)
    if tensor.dtype not in DTYPES:
        raise TypeError(f"tensor: got dtype {tensor.dtype}, expected one that bitmask compresses")
    if tensor.is_meta:
        raise ValueError("tensor: got a meta tensor, expected one with data")
    if time and tensor.dtype not in LINEAR_DTYPES:
        kinds = "float32, bfloat16, float16 or float64"
        raise TypeError(f"tensor: got dtype {tensor.dtype}, expected {kinds} for time=True")
    if time and tensor.device.type != "cpu":
        raise ValueError(f"tensor: got device {tensor.device}, expected cpu for time=True")
    if time and tensor.numel() == 0:
        raise ValueError(f"tensor: got size {list(tensor.shape)}, expected elements for time=True")


def _notes(census: Census, tensor: Tensor) -> dict[str, str]:
    """Why formats do not hold such a matrix, or torch does not know them of it."""
    notes = {}
    if tensor.dtype not in TWO_FOUR_DTYPES:
        notes[TWO_FOUR] = f"not stored in {dtype_name(tensor.dtype)}"
    elif census.cols % 4:
        notes[TWO_FOUR] = f"its {census.cols} columns are not a multiple of 4"
    elif census.crowded:
        groups = census.rows * (census.cols // 4)
        notes[TWO_FOUR] = f"{census.crowded:,} of {groups:,} groups of four have more than two non-zeros"
    if not census.blocks_divide:
        notes[BSR] = "blocks reach past the edges, as in BlockSparseLinear; torch refuses that"
    return notes


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a text table: the first and last columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<", *">" * (len(widths) - 2), "<"]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    ]


def _or_dash(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
