"""How much faster than dense against density: by part, by rows of x and by size of the blocks."""

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.block_sparse.result import BITMASK, BlockSparseResult
from benchmarks.cases import shape_name
from benchmarks.machine import thread_count
from benchmarks.plot import COLUMNS, NothingToPlotError, canvas, caption, crossing, finish_panel, logarithmic_speedups
from benchmarks.report import Report, grouped

_ROWS = 512  # what panels show that compare something else, or else what is nearest
_BLOCK = 32

_Results = Sequence[BlockSparseResult]


def plot(report: Report[BlockSparseResult], path: Path) -> None:
    """Draw the slice (shape, threads) of the report with the most cells; needs matplotlib.

    Raises `NothingToPlotError` where there is no second density.
    """
    own = [result for result in report.results if result.contender == BITMASK]
    if len({result.sparsity for result in own}) < 2:
        raise NothingToPlotError("a plot needs results at two densities")
    (shape, threads), results = max(grouped(own, lambda r: (r.shape, r.threads)), key=lambda group: len(group[1]))
    of_dtypes = [_panels(group) for _, group in grouped(results, lambda result: result.dtype)]
    panels = [panel for side_by_side in zip_longest(*of_dtypes) for panel in side_by_side if panel]
    lines = -(-len(panels) // COLUMNS)
    size = 5.5 * min(len(panels), COLUMNS), 1.4 + 3.8 * lines
    with canvas(path, len(panels), size, sharey=True) as (figure, axes):
        for axis, (title, key, group) in zip(axes, panels, strict=True):
            _draw(axis, title, key, group)
        figure.suptitle(
            f"Block-sparse W {shape_name(shape)}, {thread_count(threads)}: times faster than dense, log scale"
        )
        caption(figure, report, "dashed: 1 / density")
        figure.subplots_adjust(
            left=0.05, right=0.985, top=1 - 0.8 / size[1], bottom=1.15 / size[1], wspace=0.1, hspace=0.32
        )


_Panel = tuple[str, Callable[[BlockSparseResult], str], _Results]


def _panels(results: _Results) -> list[_Panel]:
    """By part, by rows and by blocks, each where there is more than one, for the same of the others."""
    dtype = results[0].dtype
    part = results[0].part
    rows = _nearest([result.rows for result in results], _ROWS)
    block = _nearest([result.block for result in results], _BLOCK)
    panels: list[_Panel] = [
        (
            f"{dtype}, m = {rows}, blocks of {block}",
            lambda result: result.part,
            [result for result in results if (result.rows, result.block) == (rows, block)],
        ),
        (
            f"{dtype}, {part}, blocks of {block}",
            lambda result: f"m = {result.rows}",
            [result for result in results if (result.part, result.block) == (part, block)],
        ),
        (
            f"{dtype}, {part}, m = {rows}",
            lambda result: f"blocks of {result.block}",
            [result for result in results if (result.part, result.rows) == (part, rows)],
        ),
    ]
    several = [panel for panel in panels if len(grouped(panel[2], panel[1])) > 1]
    return several or panels[:1]


def _nearest(values: Sequence[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(math.log(value / wanted)))


def _draw(panel: Any, title: str, key: Callable[[BlockSparseResult], str], results: _Results) -> None:
    """One line for each key, with a cross where it falls below the dense one; dashed the ideal."""
    for index, (name, points) in enumerate(grouped(results, key)):
        points = sorted(points, key=lambda point: point.density)
        equal_at = break_even(points)
        densities, speedups = [point.density for point in points], [point.speedup for point in points]
        label = f"{name}: {verdict(points)}"
        panel.plot(densities, speedups, color=f"C{index}", marker="o", markersize=4, label=label)
        if equal_at is not None:
            panel.plot([equal_at], [1], color=f"C{index}", marker="X", markersize=9, linestyle="")
    ideal = sorted({(result.density, result.ideal) for result in results})
    panel.plot(*zip(*ideal, strict=True), color="0.4", linestyle="--", label="1 / density")
    panel.set_xscale("log")
    panel.set_xticks(sorted({1 - result.sparsity for result in results}))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.xaxis.set_minor_formatter(lambda value, _: "")
    logarithmic_speedups(panel)
    panel.legend(fontsize=8, frameon=False)
    finish_panel(panel, title, "density")


def break_even(results: _Results) -> float | None:
    """The density above which the dense way is the faster one, between two measured ones; None if it is not."""
    return crossing((result.density, result.speedup) for result in results)


def verdict(results: _Results) -> str:
    """Up to which density the results are faster than dense ones, in words."""
    equal_at = break_even(results)
    if equal_at is not None:
        return f"even at {equal_at:.0%}"
    faster = {result.speedup >= 1 for result in results}
    return "no break-even" if len(faster) > 1 else "faster throughout" if faster == {True} else "slower throughout"
