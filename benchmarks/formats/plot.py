"""Bytes, and the speed of products, of each format against the share of zeros."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES, shape_name
from benchmarks.formats.contenders import BLOCK
from benchmarks.formats.result import BLOCKS, FormatProductResult
from benchmarks.linear.result import BITMASK, DENSE, SATURATED
from benchmarks.machine import thread_count
from benchmarks.plot import COLUMNS, NothingToPlotError, canvas, caption, finish_panel, logarithmic_speedups
from benchmarks.report import CpuResult, Report, grouped
from bitmask.crossovers import FormatCrossovers
from bitmask.format_bytes import DENSE as DENSE_FORMAT
from bitmask.format_bytes import TWO_FOUR, Census

_CURVE = [share / 200 for share in range(200)]  # of which bytes are counted

Points = Sequence[tuple[float, float]]  # shares of zeros, times as fast as dense


def speedups(results: Iterable[FormatProductResult]) -> dict[str, Points]:
    """By contender, how many times as fast as `F.linear`; the bitmask's with zeros at random places."""
    found: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        stands_for_others = result.contender == BITMASK and result.pattern != SCATTERED
        if result.contender not in (DENSE, SATURATED) and not stands_for_others:
            found.setdefault(result.contender, []).append((result.sparsity, result.speedup))
    return {name: sorted(points) for name, points in found.items()}


def plot(report: Report[CpuResult], path: Path) -> None:
    """Draw the slice (shape, threads) of the report with the most products; needs matplotlib.

    Raises `NothingToPlotError` where there is no second share of zeros.
    """
    products = [result for result in report.results if isinstance(result, FormatProductResult)]
    if len({result.sparsity for result in products}) < 2:
        raise NothingToPlotError("a plot needs results at two shares of zeros")
    (shape, threads), chosen = max(grouped(products, lambda r: (r.shape, r.threads)), key=lambda group: len(group[1]))
    by_dtype = grouped(chosen, lambda result: result.dtype)
    by_rows = grouped(chosen, lambda result: result.rows)
    panels = _panel_grid(len(by_dtype) * (1 + len(by_rows)))
    with canvas(path, len(by_dtype) * (1 + len(by_rows)), panels, sharey=False) as (figure, axes):
        remaining = iter(axes)
        for dtype, _ in by_dtype:
            draw_sizes(next(remaining), shape, DTYPES[dtype], (BLOCK, BLOCK), dtype)
        for rows, results in by_rows:
            for dtype, cell in grouped(results, lambda result: result.dtype):
                draw_speedups(next(remaining), speedups(cell), f"{dtype}, m = {rows}: times as fast as {DENSE}")
        figure.suptitle(f"Sparse formats, {shape_name(shape)}, {thread_count(threads)}; BSR: zeros in whole blocks")
        caption(figure, report, f"copy bandwidth {report.header.copy_bandwidth[threads]:.1f} GB/s")
        _margins(figure, panels)
