"""From which share of zeros on each sparse format pays: in bytes by counting, in time by measuring."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bitmask.calls import LINEAR_DTYPES, check_block_shape
from bitmask.compare import aligned, check_rows, dtype_name
from bitmask.format_bytes import BITMASK, BSR, COO, CSC, CSR, DENSE, FORMATS, TWO_FOUR, Census
from bitmask.format_timing import formats, product_times
from bitmask.ops import DTYPES
from bitmask.ops_two_four import TWO_FOUR_DTYPES
from bitmask.prune import prune_24_

_SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_HALF = 0.5  # the only share of zeros that 2:4 has

Points = tuple[tuple[float, float], ...]  # share of zeros, times as fast as dense


@dataclass(frozen=True)
class FormatCrossovers:
    """What `format_crossovers` found; `str()` is a table.

    Attributes:
        smaller_than_dense: from which share of zeros on, by format; 0.5 for a 2:4 that is smaller; None for never, or
            for a 2:4 that such a matrix has not.
        smaller_than_bitmask: the same.
        speedups: by rows of x and format, how many times as fast as dense at each share of zeros that was measured.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    block_shape: tuple[int, int]
    smaller_than_dense: dict[str, float | None]
    smaller_than_bitmask: dict[str, float | None]
    speedups: dict[int, dict[str, Points]]

    def faster_than_dense(self, rows: int) -> dict[str, float | None]:
        """From which share of zeros on, by format, as far as measured; None for never. KeyError for other rows."""
        return {name: crossing_sparsity(points) for name, points in self.speedups[rows].items()}

    def __str__(self) -> str:
        """One line for each format but dense."""
        counted = [self.smaller_than_dense, self.smaller_than_bitmask]
        of_columns = [{name: _words(share) for name, share in found.items()} for found in counted]
        for found in self.speedups.values():
            of_columns.append({name: crossing_words(points) for name, points in found.items()})
        columns = [
            "format",
            "smaller than dense",
            "than bitmask",
            *(f"faster, m = {rows}" for rows in self.speedups),
            "",
        ]
        lines = [[name, *(texts.get(name, "-") for texts in of_columns), ""] for name in self.smaller_than_dense]
        height, width = self.block_shape
        past_edges = self.shape[0] % height != 0 or self.shape[1] % width != 0
        title = f"From which share of zeros on, {self.shape[0]}x{self.shape[1]} {dtype_name(self.dtype)}"
        notes = f"2:4 is half zeros. BSR: in whole blocks of {height}x{width}"
        notes += ", which reach past the edges; torch refuses that." if past_edges else "."
        return "\n".join([title, "", *aligned([columns, *lines]), "", notes])


def format_crossovers(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    time: bool = False,
    rows: Sequence[int] = (1, 128),
    sparsities: Sequence[float] = _SPARSITIES,
    block_shape: Sequence[int] = (32, 32),
) -> FormatCrossovers:
    """From which share of zeros on each format is smaller than dense, smaller than a bitmask, and multiplies faster.

    Args:
        shape: rows and columns of a weight.
        dtype: of its elements; with `time` float32, bfloat16, float16 or float64.
        time: whether to measure x W^T of random weights, on the CPU.
        rows: for which numbers of rows of x.
        sparsities: for which shares of zeros.
        block_shape: rows and columns of BSR's blocks, whole ones of which are zero.

    Raises:
        TypeError: a shape of other than two integers, a dtype without a codec or, with `time`, without products.
        ValueError: a size, a number of rows or a block below 1, or a share of zeros that is not between 0 and 1.

    >>> found = format_crossovers((4096, 4096), torch.bfloat16)
    >>> f"{found.smaller_than_dense['CSR']:.1%}", f"{found.smaller_than_bitmask['CSR']:.1%}"
    ('80.0%', '98.4%')
    """
    size, blocks, wanted = _check_shape(shape), check_block_shape(block_shape), check_rows(rows)
    shares = _check_sparsities(sparsities)
    if dtype not in (LINEAR_DTYPES if time else DTYPES):
        raise TypeError(f"dtype: got {dtype}, expected {'one with products' if time else 'one with a codec'}")
    names = [name for name in FORMATS if name != DENSE]
    has_two_four = size[1] % 4 == 0 and dtype in TWO_FOUR_DTYPES
    empty, full = (Census.imagined(size, dtype.itemsize, blocks, density).nbytes() for density in (0.0, 1.0))

    def smaller(other: str) -> dict[str, float | None]:
        possible = {name: name != TWO_FOUR or has_two_four for name in names if name != other}
        return {name: _smaller(name, other, empty, full) if each else None for name, each in possible.items()}

    return FormatCrossovers(
        size,
        dtype,
        blocks,
        smaller(DENSE),
        smaller(BITMASK),
        _speedups(size, dtype, blocks, wanted, shares) if time else {},
    )


def crossing_sparsity(points: Iterable[tuple[float, float]]) -> float | None:
    """From which share of zeros on ratios are 1 or more, between two points (share, ratio); None if the last is below.

    Where all are, it is the lowest share. In between, ratios are taken for powers of the density.
    """
    ordered = sorted(points)
    if not ordered or ordered[-1][1] < 1:
        return None
    for (share, ratio), (next_share, next_ratio) in reversed(list(pairwise(ordered))):
        if ratio < 1:
            if next_share == 1:
                return next_share
            way = -math.log(ratio) / math.log(next_ratio / ratio)
            return 1 - math.pow(1 - share, 1 - way) * math.pow(1 - next_share, way)
    return ordered[0][0]


def crossing_words(points: Sequence[tuple[float, float]]) -> str:
    """The same as text, which says where the lowest share bounds it that was measured."""
    found = crossing_sparsity(points)
    bounds = len(points) > 1 and found == min(share for share, _ in points)
    return f"at most {_words(found)}" if bounds else _words(found)


def _check_shape(shape: Sequence[int]) -> tuple[int, int]:
    try:
        rows, cols = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        raise TypeError(f"shape: got {shape!r}, expected two integers") from None
    if min(rows, cols) < 1:
        raise ValueError(f"shape: got {shape!r}, expected sizes of at least 1")
    return rows, cols


def _check_sparsities(sparsities: Sequence[float]) -> list[float]:
    try:
        shares = sorted({float(share) for share in sparsities})
    except (TypeError, ValueError):
        raise TypeError(f"sparsities: got {sparsities!r}, expected a sequence of numbers") from None
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"sparsities: got {sparsities!r}, expected shares of zeros from 0 to 1")
    return shares


def _smaller(name: str, other: str, empty: dict[str, int], full: dict[str, int]) -> float | None:
    """From which share of zeros on one format is smaller than another, given the bytes of both without and with all."""
    at_most, at_least = empty[name] - empty[other], full[name] - full[other]
    if name == TWO_FOUR:
        return _HALF if at_most + at_least < 0 else None
    if at_most >= 0:
        return None
    return 0.0 if at_least < 0 else 1 - at_most / (at_most - at_least)


def _speedups(
    shape: tuple[int, int], dtype: torch.dtype, blocks: tuple[int, int], rows: Sequence[int], shares: Sequence[float]
) -> dict[int, dict[str, Points]]:
    """By rows of x and format: each is measured on weights that suit it."""
    every = formats(blocks)
    found: dict[int, dict[str, list[tuple[float, float]]]] = {count: {} for count in rows}
    for share, dense, names in _weights(shape, blocks, shares):
        chosen = {name: every[name] for name in (DENSE, *names)}
        for count, milliseconds in product_times(dense.to(dtype), chosen, rows).milliseconds.items():
            for name in set(names) & milliseconds.keys():
                found[count].setdefault(name, []).append((share, milliseconds[DENSE] / milliseconds[name]))
    return {count: {name: tuple(points[name]) for name in FORMATS if name in points} for count, points in found.items()}


def _weights(
    shape: tuple[int, int], blocks: tuple[int, int], shares: Iterable[float]
) -> Iterator[tuple[float, Tensor, tuple[str, ...]]]:
    """Shares of zeros, normal weights with as many, and the formats that they suit."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator, device="cpu")
    for share in shares:
        scattered = torch.rand(shape, generator=generator, device="cpu") >= share
        yield share, normal * scattered, (COO, CSR, CSC, BITMASK)
        if shape[0] % blocks[0] == 0 and shape[1] % blocks[1] == 0:
            kept = torch.rand(shape[0] // blocks[0], shape[1] // blocks[1], generator=generator, device="cpu") >= share
            yield share, normal * kept.repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1), (BSR,)
    if shape[1] % 4 == 0:
        yield _HALF, prune_24_(normal), (TWO_FOUR,)


def _words(found: float | None) -> str:
    return "never" if found is None else f"{found:.1%}"
