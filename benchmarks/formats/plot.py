"""Bytes, and the speed of products, of each format against the share of zeros."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES, Shape, shape_name
from benchmarks.formats.contenders import BLOCK
from benchmarks.formats.result import SCATTERED, FormatProductResult
from benchmarks.linear.result import BITMASK, DENSE, SATURATED
from benchmarks.machine import thread_count
from benchmarks.plot import COLUMNS, NothingToPlotError, canvas, caption, finish_panel, logarithmic_speedups
from benchmarks.report import CpuResult, Report, grouped
from bitmask.crossovers import FormatCrossovers
from bitmask.format_bytes import DENSE as DENSE_FORMAT
from bitmask.format_bytes import FORMATS, TWO_FOUR, Census

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
    dtypes = [dtype for dtype, _ in grouped(chosen, lambda result: result.dtype)]
    cells = [
        (dtype, rows, cell)
        for rows, group in grouped(chosen, lambda result: result.rows)
        for dtype, cell in grouped(group, lambda result: result.dtype)
    ]
    with _figure(path, len(dtypes) + len(cells)) as (figure, axes):
        for panel, dtype in zip(axes, dtypes, strict=False):
            _draw_sizes(panel, dtype, shape, DTYPES[dtype], (BLOCK, BLOCK))
        for panel, (dtype, rows, cell) in zip(axes[len(dtypes) :], cells, strict=True):
            _draw_speedups(panel, f"{dtype}, m = {rows}: times as fast as {DENSE}", speedups(cell))
        figure.suptitle(f"Sparse formats, {shape_name(shape)}, {thread_count(threads)}; BSR: zeros in whole blocks")
        caption(figure, report, f"copy bandwidth {report.header.copy_bandwidth[threads]:.1f} GB/s")


def plot_crossovers(crossovers: FormatCrossovers, path: Path) -> None:
    """Draw what `format_crossovers` found; needs matplotlib."""
    with _figure(path, 1 + len(crossovers.speedups)) as (figure, axes):
        _draw_sizes(axes[0], "bytes", crossovers.shape, crossovers.dtype, crossovers.block_shape)
        for panel, (rows, found) in zip(axes[1:], crossovers.speedups.items(), strict=True):
            _draw_speedups(panel, f"m = {rows}: times as fast as {DENSE}", found)
        dtype = str(crossovers.dtype).removeprefix("torch.")
        figure.suptitle(f"Sparse formats, {shape_name(crossovers.shape)} {dtype}; BSR: zeros in whole blocks")


@contextmanager
def _figure(path: Path, panels: int) -> Iterator[tuple[Any, Sequence[Any]]]:
    size = 5.5 * min(panels, COLUMNS), 1.4 + 3.8 * -(-panels // COLUMNS)
    with canvas(path, panels, size, sharey=False) as (figure, axes):
        yield figure, axes
        figure.subplots_adjust(
            left=0.08, right=0.985, top=1 - 0.8 / size[1], bottom=1.15 / size[1], wspace=0.18, hspace=0.35
        )


def _draw_sizes(panel: Any, title: str, shape: Shape, dtype: torch.dtype, block_shape: tuple[int, int]) -> None:
    """One line for each format, by counting; a dot for 2:4, which has half of the zeros."""
    counted = [Census.imagined(shape, dtype.itemsize, block_shape, 1 - share).nbytes() for share in _CURVE]
    dense = counted[0][DENSE_FORMAT]
    for name in counted[0]:
        ratios = [100 * nbytes[name] / dense for nbytes in counted]
        if name == TWO_FOUR:
            panel.plot([50], ratios[:1], marker="X", markersize=9, linestyle="", color=_colour(name), label=name)
        elif name != DENSE_FORMAT:
            panel.plot([100 * share for share in _CURVE], ratios, color=_colour(name), label=name)
    panel.axhline(100, color="0.6", linewidth=1)
    panel.set_ylim(0, 200)
    panel.legend(fontsize=8, frameon=False)
    finish_panel(panel, f"{title}: bytes, % of dense (int64 indices)", "zeros (%)")


def _draw_speedups(panel: Any, title: str, found: Mapping[str, Points]) -> None:
    """One line for each contender."""
    for name, points in found.items():
        shares, ratios = zip(*points, strict=True)
        style = {"color": _colour(name), "marker": "X" if len(points) == 1 else "o", "markersize": 4}
        panel.plot([100 * share for share in shares], ratios, **style, linestyle=_style(name), label=name)
    logarithmic_speedups(panel)
    panel.legend(fontsize=8, frameon=False)
    finish_panel(panel, title, "zeros (%)")


def _colour(name: str) -> str:
    """The same one for a format in every panel, whoever multiplies."""
    return f"C{FORMATS.index(name.removeprefix('torch ').removesuffix(', int32'))}"


def _style(name: str) -> str:
    return ":" if name.endswith("int32") else "--" if name.startswith("torch ") else "-"
