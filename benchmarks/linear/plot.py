"""How much faster than dense: against sparsity for one row of x, and against the number of rows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Shape, shape_name
from benchmarks.linear.result import BITMASK, DENSE, LinearResult
from benchmarks.machine import thread_count
from benchmarks.plot import (
    COLUMNS,
    NothingToPlotError,
    canvas,
    caption,
    crossing,
    finish_panel,
    logarithmic_speedups,
)
from benchmarks.report import Report, grouped

_Slice = tuple[Shape, int]


def plot(report: Report[LinearResult], path: Path) -> None:
    """Draw the slice (shape, threads) of the report with the most cells; needs matplotlib.

    Raises `NothingToPlotError` where there is neither a second sparsity nor a second number of rows.
    """
    own = [result for result in report.results if result.contender == BITMASK]
    (shape, threads), results = max(grouped(own, _slice), key=lambda group: (len(group[1]), group[0]))
    single = [result for result in results if result.rows == 1]
    by_dtype = [
        (dtype, group)
        for dtype, group in grouped(results, lambda result: result.dtype)
        if len({result.rows for result in group}) > 1
    ]
    has_sparsities = len({result.sparsity for result in single}) > 1
    panels = has_sparsities + len(by_dtype)
    if panels == 0:
        raise NothingToPlotError("a plot needs results at two sparsities or two numbers of rows")
    lines = -(-panels // COLUMNS)
    size = 5.5 * min(panels, COLUMNS), 1.4 + 3.8 * lines
    with canvas(path, panels, size, sharey=False) as (figure, axes):
        if has_sparsities:
            _draw_against_sparsity(axes[0], single)
        for panel, (dtype, group) in zip(axes[has_sparsities:], by_dtype, strict=True):
            _draw_against_rows(panel, dtype, group)
        figure.suptitle(f"y = x Wᵀ, W {shape_name(shape)} cold, {thread_count(threads)}: times faster, log scale")
        bandwidth = results[0].read_bandwidth
        measured = "not measured" if bandwidth is None else f"{bandwidth:.1f} GB/s on {thread_count(threads)}"
        caption(figure, report, f"read bandwidth {measured}")
        figure.subplots_adjust(
            left=0.05, right=0.985, top=1 - 0.8 / size[1], bottom=1.15 / size[1], wspace=0.1, hspace=0.32
        )


def crossover(results: Sequence[LinearResult]) -> float | None:
    """Number of rows at which `F.linear` becomes the faster one, between two measured numbers; None if it does not."""
    return crossing((result.rows, result.speedup) for result in results)


def _slice(result: LinearResult) -> _Slice:
    return result.shape, result.threads


def _draw_against_sparsity(panel: Any, results: Sequence[LinearResult]) -> None:
    """One colour for each dtype; dashed what bytes alone would allow."""
    for index, (dtype, points) in enumerate(grouped(results, lambda result: result.dtype)):
        points = sorted(points, key=lambda point: point.sparsity)
        zeros = [100 * point.sparsity for point in points]
        panel.plot(zeros, [point.speedup for point in points], f"C{index}o:", markersize=4)
        panel.plot(zeros, [point.ceiling for point in points], f"C{index}--")
        # What could not be measured is not a number, which leaves a gap.
        saturated = [math.nan if point.saturated_speedup is None else point.saturated_speedup for point in points]
        panel.plot(zeros, saturated, f"C{index}o-", markersize=4, label=dtype)
    for name, style in ((f"x {DENSE}", ":"), ("x saturated dense", "-"), ("ceiling by bytes", "--")):
        panel.plot([], [], color="0.4", linestyle=style, label=name)
    _finish(panel, "m = 1", "zeros (%)", sorted({round(100 * result.sparsity) for result in results}))


def _draw_against_rows(panel: Any, dtype: str, results: Sequence[LinearResult]) -> None:
    """One line for each sparsity, with a cross where it falls below the dense one."""
    for index, (sparsity, points) in enumerate(grouped(results, lambda result: result.sparsity)):
        points = sorted(points, key=lambda point: point.rows)
        equal_at = crossover(points)
        colour = f"C{3 + index}"
        panel.plot(
            [point.rows for point in points],
            [point.speedup for point in points],
            color=colour,
            marker="o",
            markersize=4,
            label=f"{sparsity:.0%}: {_verdict(points, equal_at)}",
        )
        if equal_at is not None:
            panel.plot([equal_at], [1], color=colour, marker="X", markersize=9, linestyle="")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _finish(panel, f"{dtype}: x {DENSE}", "rows of x", sorted({result.rows for result in results}))


def _verdict(points: Sequence[LinearResult], equal_at: float | None) -> str:
    if equal_at is not None:
        return f"crossover at {equal_at:.0f} rows"
    return "faster throughout" if all(point.speedup >= 1 for point in points) else "no crossover"


def _finish(panel: Any, title: str, xlabel: str, ticks: Sequence[int]) -> None:
    logarithmic_speedups(panel)
    panel.set_xticks(ticks)
    panel.legend(fontsize=8, frameon=False)
    finish_panel(panel, title, xlabel)
