"""What every plot shares: a canvas without a display, a caption that says where its figures come from, and a file."""

import importlib
import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.report import Report

COLUMNS = 2


class NothingToPlotError(ValueError):
    """The report has no line to draw."""


def have_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def crossing(points: Iterable[tuple[float, float]]) -> float | None:
    """Where speedups fall below 1, between two points (x, speedup) on logarithmic axes; None if they do not."""
    for (x, speedup), (next_x, next_speedup) in pairwise(sorted(points)):
        if speedup >= 1 > next_speedup:
            share = math.log(speedup) / math.log(speedup / next_speedup)
            return float(x * (next_x / x) ** share)
    return None


@contextmanager
def canvas(path: Path, panels: int, size: tuple[float, float], sharey: bool) -> Iterator[tuple[Any, Sequence[Any]]]:
    """A figure of `size` inches and its panels, two in a line; it is saved to `path` at the end."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    columns = min(panels, COLUMNS)
    figure, axes = pyplot.subplots(-(-panels // columns), columns, figsize=size, sharey=sharey, squeeze=False)
    for unused in axes.flat[panels:]:
        unused.remove()
    try:
        yield figure, axes.flat[:panels]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)


def logarithmic_speedups(panel: Any) -> None:
    """Put speedups on a logarithmic axis with plain numbers, and a line where there is none."""
    panel.set_yscale("log")
    panel.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(lambda value, _: "")
    panel.axhline(1, color="0.6", linewidth=1)


def finish_panel(panel: Any, title: str, xlabel: str) -> None:
    """Give a panel its title and the looks of all the others."""
    panel.set_title(title)
    panel.set_xlabel(xlabel)
    panel.grid(True, which="major", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def caption(figure: Any, report: Report[Any], bandwidth: str, with_peers: bool = False) -> None:
    """Say below the panels where the figures come from; `bandwidth` is what the suite compares with."""
    header = report.header
    found = report.peers.items() if with_peers else ()
    peers = [f"{name} {status}" for name, status in found if not status.startswith("skipped")]
    text = f"{header.hardware()}; {bandwidth}\n{header.software()}; {'; '.join([*peers, header.date[:10]])}"
    figure.text(0.5, 0.02, text, ha="center", fontsize=8, color="0.35", linespacing=1.4)
