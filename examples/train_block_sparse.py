"""Trains a small language model of characters, dense and with block-sparse layers of 50%, 25% and 10% density.

Each density is trained from scratch, and from the trained dense model, pruned by blocks and trained for half as long
again, as the dense model is for comparison. The text is Python's own documentation, which comes with it. Takes about
two minutes on two cores:

python examples/train_block_sparse.py [--steps 600] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitmask import BlockSparseLinear, prune_blocks

DENSITIES = (0.5, 0.25, 0.1)
CONTEXT = 32  # characters from which the next one is told
HIDDEN_LAYERS = 3
HELD_OUT = 0.1  # of the text, at its end
JUDGED = 4096  # characters of it
LEARNING_RATE = 1e-3
CURVE_POINTS = 10


@dataclass(frozen=True)
class Settings:
    """How wide the hidden layers are, how large their blocks, and how long to train with batches of what size."""

    steps: int
    width: int
    block: int
    batch: int


@dataclass
class Run:
    """What came of one training: losses and accuracy are of the held-out text, `curve` holds (step, loss)."""

    name: str
    density: float
    fine_tuned: bool
    parameters: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    accuracy: float = 0.0
    milliseconds: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """At the end."""
        return self.curve[-1][1]

    @property
    def step_ms(self) -> float:
        """The median step: forward, backward and optimizer."""
        return statistics.median(self.milliseconds)


class Text:
    """Python's documentation as numbers of characters."""

    def __init__(self) -> None:
        text = "".join(topics[name] for name in sorted(topics))
        characters = sorted(set(text))
        numbers = {character: number for number, character in enumerate(characters)}
        codes = torch.tensor([numbers[character] for character in text])
        self.characters = len(characters)
        self._known = codes[: int(len(codes) * (1 - HELD_OUT))]
        self._held_out = codes[len(self._known) :]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Contexts [size, CONTEXT] at random places, and the character after each."""
        return _cut(self._known, torch.randint(len(self._known) - CONTEXT, (size,)))

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The same of the held-out text, at places spread over it."""
        return _cut(self._held_out, torch.linspace(0, len(self._held_out) - CONTEXT - 1, JUDGED).long())

    def loss_by_frequency(self) -> float:
        """The loss of a guess that knows how frequent characters are, and no context."""
        shares = torch.bincount(self._known, minlength=self.characters).double() + 1
        return float(functional.cross_entropy(shares.log().expand(JUDGED, -1), self.held_out()[1]))


def _cut(codes: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    return codes[starts[:, None] + torch.arange(CONTEXT)], codes[starts + CONTEXT]


class Residual(nn.Module):
    """x + relu(layer(norm(x)))."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width] to the same."""
        return x + functional.relu(self.layer(self.norm(x)))


def network(characters: int, width: int, hidden: Callable[[], nn.Module]) -> nn.Sequential:
    """From contexts [batch, CONTEXT] to scores [batch, characters]; `hidden()` makes a layer of [width, width]."""
    embedding = nn.Embedding(characters, width // CONTEXT)
    body = [Residual(hidden(), width) for _ in range(HIDDEN_LAYERS)]
    return nn.Sequential(embedding, nn.Flatten(), *body, nn.LayerNorm(width), nn.Linear(width, characters))


def train(model: nn.Module, text: Text, steps: int, settings: Settings, run: Run) -> None:
    """Train a model and write down how it goes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    run.parameters = sum(parameter.numel() for parameter in model.parameters())
    run.curve.append((0, _judge(model, text)[0]))
    for step in range(1, steps + 1):
        contexts, following = text.batch(settings.batch)
        start = time.perf_counter()
        functional.cross_entropy(model(contexts), following).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        run.milliseconds.append((time.perf_counter() - start) * 1e3)
        schedule.step()
        if step % max(1, steps // CURVE_POINTS) == 0 or step == steps:
            loss, run.accuracy = _judge(model, text)
            run.curve.append((step, loss))


@torch.no_grad()
def _judge(model: nn.Module, text: Text) -> tuple[float, float]:
    contexts, following = text.held_out()
    scores = model(contexts)
    accuracy = (scores.argmax(dim=1) == following).double().mean()
    return float(functional.cross_entropy(scores, following)), float(accuracy)


def train_all(text: Text, settings: Settings, finished: Callable[[Run], None]) -> list[Run]:
    """Dense, then each density from scratch, then the dense model for longer, as it is and pruned to each density."""
    width, shape = settings.width, (settings.block, settings.block)
    runs = []

    def trained(run: Run, model: nn.Module, steps: int) -> None:
        train(model, text, steps, settings, run)
        finished(run)
        runs.append(run)

    torch.manual_seed(0)
    dense = network(text.characters, width, partial(nn.Linear, width, width))
    trained(Run("dense", 1.0, fine_tuned=False), dense, settings.steps)
    for density in DENSITIES:
        torch.manual_seed(0)
        hidden = partial(BlockSparseLinear, width, width, density=density, block_shape=shape)
        model = network(text.characters, width, hidden)
        trained(Run(f"{density:.0%} from scratch", density, fine_tuned=False), model, settings.steps)
    for density in (1.0, *DENSITIES):
        torch.manual_seed(0)
        model = deepcopy(dense)
        if density < 1:
            prune_blocks(model, density, shape, filter_fn=lambda name, _: name.endswith(".layer"))
        trained(Run(f"{density:.0%} of trained", density, fine_tuned=True), model, max(1, settings.steps // 2))
    return runs


HEADER = (
    f"{'':<18}{'steps':>7}{'loss before':>13}{'loss':>8}{'accuracy':>10}{'ms per step':>13}{'x':>7}{'parameters':>12}"
)


def line(run: Run, dense_ms: float) -> str:
    """The run as a line of the table."""
    return (
        f"{run.name:<18}{len(run.milliseconds):>7}{run.curve[0][1]:>13.3f}{run.loss:>8.3f}{run.accuracy:>10.1%}"
        f"{run.step_ms:>13.2f}{dense_ms / run.step_ms:>7.2f}{run.parameters:>12,}"
    )


def plot(runs: list[Run], path: Path) -> None:
    """Losses against steps, from scratch and of the pruned, and the time of a step; needs matplotlib."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    figure, (scratch, tuned, times) = importlib.import_module("matplotlib.pyplot").subplots(1, 3, figsize=(15, 4.6))
    colours = {run.density: f"C{index}" for index, run in enumerate(runs) if not run.fine_tuned}
    lowest = min(run.loss for run in runs)
    for run in runs:
        panel = tuned if run.fine_tuned else scratch
        panel.plot(*zip(*run.curve[not run.fine_tuned :], strict=True), colours[run.density], label=run.name)
    tuned.axhline(runs[0].loss, color="0.6", linewidth=1, label="dense, before")
    for panel, title in ((scratch, "From scratch"), (tuned, "Trained dense, then pruned by blocks and trained on")):
        _finish(panel, title, "steps", "loss of held-out text")
        panel.set_ylim(lowest - 0.05, None)
        panel.legend(frameon=False)
    _draw_times(times, [run for run in runs if not run.fine_tuned], colours)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_times(panel: Any, runs: list[Run], colours: dict[float, str]) -> None:
    names, times = [f"{run.density:.0%}" for run in runs], [run.step_ms for run in runs]
    bars = panel.bar(names, times, color=[colours[run.density] for run in runs])
    panel.bar_label(bars, [f"{time:.1f} ms\n{times[0] / time:.1f}x" for time in times])
    panel.margins(y=0.15)
    _finish(panel, "A training step (median)", "density of the hidden layers", "ms")


def _finish(panel: Any, title: str, xlabel: str, ylabel: str) -> None:
    panel.set(title=title, xlabel=xlabel, ylabel=ylabel)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of training (default: 600)")
    parser.add_argument("--width", type=int, default=1024, help=f"of the hidden layers, a multiple of {CONTEXT}")
    parser.add_argument("--block", type=int, default=32, help="rows and columns of a block (default: 32)")
    parser.add_argument("--batch", type=int, default=256, help="contexts in a batch (default: 256)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw losses and times (needs matplotlib)")
    arguments = parser.parse_args()
    settings = Settings(arguments.steps, arguments.width, arguments.block, arguments.batch)
    if min(vars(settings).values()) < 1 or settings.width % CONTEXT:
        parser.error(f"sizes are at least 1, and --width is a multiple of {CONTEXT}")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    text = Text()
    print(
        f"{HIDDEN_LAYERS} hidden layers of {settings.width}x{settings.width}, blocks of {settings.block}, batches of "
        f"{settings.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"Loss of guessing among all characters {math.log(text.characters):.3f}, by frequency alone "
        f"{text.loss_by_frequency():.3f}\n\n{HEADER}"
    )
    dense_ms: list[float] = []

    def finished(run: Run) -> None:
        dense_ms.append(run.step_ms)
        print(line(run, dense_ms[0]), flush=True)

    runs = train_all(text, settings, finished)
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
