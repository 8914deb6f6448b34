"""Products against the number of rows, dtype by dtype, and packing and unpacking beside a copy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import shape_name
from benchmarks.codec.result import COMPRESS, DECOMPRESS, CodecResult
from benchmarks.linear.result import BITMASK, DENSE, SATURATED, LinearResult
from benchmarks.machine import thread_count
from benchmarks.plot import COLUMNS, NothingToPlotError, canvas, caption, finish_panel, logarithmic_speedups
from benchmarks.report import CpuResult, Report, grouped
from benchmarks.semi_structured.contenders import SEMI_STRUCTURED

_OPERATIONS = {"pack": (COMPRESS, 0.5), "prune and pack": (COMPRESS, 0.0), "unpack": (DECOMPRESS, 0.5)}


def plot(report: Report[CpuResult], path: Path) -> None:
    """Draw the slice (shape, threads) of the report with the most cells; needs matplotlib.

    Raises `NothingToPlotError` where nothing was multiplied with two numbers of rows.
    """
    products = [result for result in report.results if isinstance(result, LinearResult)]
    if len({result.rows for result in products}) < 2:
        raise NothingToPlotError("a plot needs results at two numbers of rows")
    (shape, threads), chosen = max(grouped(products, _slice), key=lambda group: (len(group[1]), group[0]))
    codecs = [
        result for result in report.results if isinstance(result, CodecResult) and _slice(result) == (shape, threads)
    ]
    by_dtype = grouped(chosen, lambda result: result.dtype)
    panels = len(by_dtype) + bool(codecs)
    size = 5.5 * min(panels, COLUMNS), 1.4 + 3.8 * -(-panels // COLUMNS)
    with canvas(path, panels, size, sharey=False) as (figure, axes):
        for panel, (dtype, results) in zip(axes, by_dtype, strict=False):
            _draw_products(panel, dtype, results)
        if codecs:
            _draw_codecs(axes[-1], codecs)
        figure.suptitle(f"2:4 weights {shape_name(shape)}, {thread_count(threads)}")
        caption(figure, report, f"copy bandwidth {report.header.copy_bandwidth[threads]:.1f} GB/s", with_peers=True)
        figure.subplots_adjust(
            left=0.07, right=0.985, top=1 - 0.8 / size[1], bottom=1.15 / size[1], wspace=0.15, hspace=0.35
        )


def _slice(result: LinearResult | CodecResult) -> tuple[tuple[int, int], int]:
    return result.shape, result.threads


def _draw_products(panel: Any, dtype: str, results: Sequence[LinearResult]) -> None:
    """2:4 and the bitmask against `F.linear`; a cross where 2:4 stands against dense weights at the pace of memory."""
    for name, style in ((SEMI_STRUCTURED, "C0o-"), (BITMASK, "C1s--")):
        points = sorted((result.rows, result.speedup) for result in results if result.contender == name)
        panel.plot(*zip(*points, strict=True), style, markersize=4, label=f"{name}, x {DENSE}")
    own = [result for result in results if result.contender == SEMI_STRUCTURED]
    saturated = [(result.rows, result.saturated_speedup) for result in own if result.saturated_speedup is not None]
    if saturated:
        panel.plot(*zip(*saturated, strict=True), "C0X", markersize=9, label=f"{SEMI_STRUCTURED}, x {SATURATED}")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xticks(sorted({result.rows for result in results}))
    logarithmic_speedups(panel)
    panel.legend(fontsize=8, frameon=False)
    finish_panel(panel, f"{dtype}: times faster (log scale)", "rows of x")


def _draw_codecs(panel: Any, results: Sequence[CodecResult]) -> None:
    """A group of bars for each operation, a bar for each dtype, of this library: peers take many times as long."""
    own = [result for result in results if result.contender == SEMI_STRUCTURED]
    by_dtype = grouped(own, lambda result: result.dtype)
    width = 0.8 / len(by_dtype)
    for index, (dtype, group) in enumerate(by_dtype):
        ratios = {(result.operation, result.sparsity): result.copy_ratio for result in group}
        places = [place + index * width for place in range(len(_OPERATIONS))]
        panel.bar(places, [ratios[key] for key in _OPERATIONS.values()], width, label=dtype)
    panel.axhline(1, color="0.6", linewidth=1)
    panel.set_xticks([place + 0.4 - width / 2 for place in range(len(_OPERATIONS))], list(_OPERATIONS))
    panel.legend(fontsize=8, frameon=False)
    finish_panel(panel, "Time as a multiple of clone()", "")
