"""What every plot shares: a canvas without a display, a caption that says where its figures come from, and a file."""

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import Report


class NothingToPlotError(ValueError):
    """The report has no line to draw."""


def have_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def canvas(path: Path, panels: int, size: tuple[float, float], sharey: bool) -> Iterator[tuple[Any, Sequence[Any]]]:
    """A figure of `size` inches and its panels, side by side; it is saved to `path` at the end."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, panels, figsize=size, sharey=sharey, squeeze=False)
    try:
        yield figure, axes[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)


def finish_panel(panel: Any, title: str, xlabel: str) -> None:
    """Give a panel its title and the looks of all the others."""
    panel.set_title(title)
    panel.set_xlabel(xlabel)
    panel.grid(True, which="major", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def caption(figure: Any, report: Report[Any], bandwidth: str) -> None:
    """Say below the panels where the figures come from; `bandwidth` is what the suite compares with."""
    header = report.header
    peers = [f"{name} {status}" for name, status in report.peers.items() if not status.startswith("skipped")]
    text = f"{header.hardware()}; {bandwidth}\n{header.software()}; {'; '.join([*peers, header.date[:10]])}"
    figure.text(0.5, 0.02, text, ha="center", fontsize=8, color="0.35", linespacing=1.4)
