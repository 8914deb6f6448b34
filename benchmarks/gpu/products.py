"""What is found about products with sparse weights on a GPU, beside the dense ones of the same run; and its tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from benchmarks.cases import DTYPES, shape_name
from benchmarks.gpu.dense import DENSE
from benchmarks.gpu.plan import microseconds
from benchmarks.linear.result import BITMASK, LinearTiming
from benchmarks.report import grouped, markdown_table


@dataclass(frozen=True)
class GpuProductResult(LinearTiming):
    """One contender in one cell: part of the work of a layer with W [n, k], which is `shape`, and x [rows, k].

    `part` is which product, `block` the height and width of the blocks of W, 0 where it has none. `density` is the
    share of the dense way's work that is the least for this one: of the elements of W, in kept blocks. The dense one is
    the fastest of all that were tried, `way` says which. `tf32` says whether float32 may be multiplied as that.
    `captured` says whether launch gaps are left out.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("speedup", "target_ms", "target_share", "gflop_per_s")

    part: str
    block: int
    density: float
    tf32: bool
    way: str
    captured: bool

    @property
    def target_ms(self) -> float:
        """What it would take if the least work went as fast as the dense way does its own."""
        return self.dense_ms * self.density

    @property
    def target_share(self) -> float:
        """How much of the target was reached."""
        return self.target_ms / self.summary.median_ms

    @property
    def precision(self) -> str:
        """The dtype, and whether it is multiplied as tf32."""
        return "tf32" if self.tf32 else self.dtype

    def line(self) -> str:
        """The result on one line of plain text."""
        summary = self.summary
        spread = f"[{microseconds(summary.q1_ms)}..{microseconds(summary.q3_ms)}]"
        how = self.way + ("" if self.captured else ", with launches")
        text = f"{self.contender:<20}{microseconds(summary.median_ms):>9} us {spread:<19}{self.speedup:>6.2f}x dense"
        reached = "" if self.contender == DENSE else f", target {microseconds(self.target_ms)} us"
        return f"{text}{reached}  {how}"


def product_tables(results: Sequence[GpuProductResult]) -> Iterable[str]:
    """Rows of x below each other, densities side by side, a table for each product; then every other contender."""
    ways = {_cell_of(result): result.way for result in results if result.contender == DENSE}
    own = [result for result in results if result.contender == BITMASK]
    for key, group in grouped(own, lambda each: (each.part, each.block, each.shape, each.precision)):
        densities = [density for density, _ in grouped(group, lambda each: each.density)]
        columns = ["m", "dense us"]
        for density in densities:
            columns += [f"{density:.0%}: us", "x dense", "target us"]
        columns.append("fastest dense")
        rows = [_row(m, cell, densities, ways[_cell_of(cell[0])]) for m, cell in grouped(group, lambda each: each.rows)]
        part, block, shape, precision = key
        blocks = f", blocks of {block}" if block else ""
        yield f"**{part}, W {shape_name(shape)} {precision}{blocks}**\n\n{markdown_table(columns, rows)}"
    yield from _other_tables(results)


def _cell_of(result: GpuProductResult) -> tuple[object, ...]:
    return result.part, result.block, result.shape, result.precision, result.density, result.rows


def _row(m: int, cell: Sequence[GpuProductResult], densities: Sequence[float], way: str) -> list[str]:
    """The dense time is the median over the densities; each ratio is to the dense time of its own cell."""
    line = [str(m), microseconds(median(result.dense_ms for result in cell))]
    by_density = {result.density: result for result in cell}
    for density in densities:
        found = by_density.get(density)
        line += (
            ["-", "-", "-"]
            if found is None
            else [microseconds(found.summary.median_ms), f"{found.speedup:.2f}", microseconds(found.target_ms)]
        )
    return [*line, way]


def _other_tables(results: Sequence[GpuProductResult]) -> Iterable[str]:
    beside = {_cell_of(result) for result in results if result.contender not in (DENSE, BITMASK)}
    shown = [result for result in results if _cell_of(result) in beside]
    columns = ("density", "block", "m", "contender", "us", "x dense")
    for (part, shape, precision), group in grouped(shown, lambda each: (each.part, each.shape, each.precision)):
        rows = [
            [
                f"{result.density:.0%}",
                str(result.block or "-"),
                str(result.rows),
                (f"dense ({result.way})" if result.contender == DENSE else result.contender)
                + ("" if result.captured else " (with launches)"),
                microseconds(result.summary.median_ms),
                f"{result.speedup:.2f}",
            ]
            for result in group
        ]
        yield f"**Beside others: {part}, W {shape_name(shape)} {precision}**\n\n{markdown_table(columns, rows)}"


def dense_nbytes(shape: tuple[int, int], dtype: str) -> int:
    """Bytes of a dense W."""
    return shape[0] * shape[1] * DTYPES[dtype].itemsize
