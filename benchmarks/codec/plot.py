"""Speed against sparsity: one panel for compressing, one for decompressing, one line for each contender."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Shape, shape_name
from benchmarks.codec.result import COMPRESS, COPY, DECOMPRESS, HUGE_PAGE_COPY, CodecResult
from benchmarks.machine import thread_count
from benchmarks.plot import NothingToPlotError, canvas, caption, finish_panel
from benchmarks.report import Report

_MARKERS = "os^Dvp*X"
_COLOURS = 7  # the eighth of the default cycle is grey, as the copies are
_LINES = {COPY: "--", HUGE_PAGE_COPY: ":"}
_Slice = tuple[Shape, str, int]


def plot(report: Report[CodecResult], path: Path) -> None:
    """Draw the slice (shape, dtype, threads) of the report with the most contenders and sparsities; needs matplotlib.

    Raises `NothingToPlotError` where no slice has two sparsities.
    """
    shape, dtype, threads = chosen = _widest_slice(report.results)
    results = [result for result in report.results if _slice(result) == chosen]
    with canvas(path, 2, (11, 5.6), sharey=True) as (figure, axes):
        for panel, operation in zip(axes, (COMPRESS, DECOMPRESS), strict=True):
            _draw_panel(panel, operation, [result for result in results if result.operation in (operation, COPY)])
        axes[0].set_ylabel("GB/s of dense data (log scale)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.suptitle(f"{shape_name(shape)} {dtype}, {thread_count(threads)}: higher is faster")
        figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.09), ncols=4, frameon=False)
        bandwidth = report.header.copy_bandwidth[threads]
        caption(figure, report, f"copy bandwidth {bandwidth:.1f} GB/s on {thread_count(threads)}", with_peers=True)
        figure.subplots_adjust(left=0.07, right=0.98, top=0.87, bottom=0.31, wspace=0.06)


def _slice(result: CodecResult) -> _Slice:
    return result.shape, result.dtype, result.threads


def _widest_slice(results: Sequence[CodecResult]) -> _Slice:
    def width(chosen: _Slice) -> tuple[int, int, int]:
        inside = [result for result in results if _slice(result) == chosen]
        return len({result.label for result in inside}), len({result.sparsity for result in inside}), chosen[2]

    slices = sorted({_slice(result) for result in results})
    widest = max(slices, key=width, default=None)
    if widest is None or width(widest)[1] < 2:
        raise NothingToPlotError("a plot needs results at two sparsities or more: run --suite codec")
    return widest


def _draw_panel(panel: Any, operation: str, results: Sequence[CodecResult]) -> None:
    ordered = sorted(results, key=lambda result: result.sparsity)
    labels = list(dict.fromkeys(result.label for result in results))
    for index, label in enumerate(labels):
        points = [result for result in ordered if result.label == label]
        is_copy = points[0].operation == COPY
        panel.plot(
            [100 * point.sparsity for point in points],
            [point.gb_per_s for point in points],
            label=label,
            color="0.45" if is_copy else f"C{index % _COLOURS}",
            linestyle=_LINES[label] if is_copy else "-",
            marker=None if is_copy else _MARKERS[index % len(_MARKERS)],
            markersize=5,
        )
    panel.set_yscale("log")
    panel.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xticks(sorted({round(100 * result.sparsity) for result in results}))
    finish_panel(panel, operation.capitalize(), "zeros (%)")
