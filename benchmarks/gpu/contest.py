"""A cell on a GPU: every contender proven right, then all of them timed in turn.

A contender is a pass over several inputs, which together are several times as large as the cache, so that none is in
it when its turn comes. Passes are captured once and replayed, so that launch gaps count for no one; what cannot be
captured, because it waits for the host, is called as it is. What is checked is what is timed: a replay, into memory
that was filled with NaNs before.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.device import Device
from benchmarks.timer import Budget, Contender, Summary, interleave

_POISON = 0xFF  # in every byte: NaN in every floating-point dtype, -1 in every integer one


class WrongResultError(RuntimeError):
    """This library, or the yardstick, got something wrong."""


@dataclass(frozen=True)
class Entrant:
    """A contender: `calls` are its pass, one for each input, and `is_right` judges what the first of them returns."""

    name: str
    calls: Sequence[Callable[[], object]]
    is_right: Callable[[Any], bool]
    captured: bool = True
    peer: bool = False


@dataclass(frozen=True)
class Timing:
    """What was found about one entrant, for one call; `captured` says whether launch gaps are left out."""

    entrant: Entrant
    summary: Summary
    captured: bool


@dataclass(frozen=True)
class _Runner:
    entrant: Entrant
    run: Callable[[], object]
    captured: bool


def contest(
    device: Device, entrants: Iterable[Entrant], budget: Budget, cell: str, say: Callable[[str], None]
) -> dict[str, Timing]:
    """Time the entrants in turn, by name. A peer that fails is left out and named, anyone else's failure is raised."""
    runners = [runner for entrant in entrants if (runner := _admitted(device, entrant, cell, say)) is not None]
    contenders = [Contender(_numbered(runner.run), slow=runner.entrant.peer) for runner in runners]
    summaries = interleave(contenders, 1, budget, device.milliseconds)
    return {
        runner.entrant.name: Timing(runner.entrant, summary.per(len(runner.entrant.calls)), runner.captured)
        for runner, summary in zip(runners, summaries, strict=True)
    }


def poison(result: object) -> None:
    """Overwrite the memory of every plain tensor in the result."""
    for leaf in tree_leaves(result):
        if type(leaf) is Tensor and leaf.layout is torch.strided:
            whole = torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(leaf.untyped_storage())
            whole.fill_(_POISON)


def _admitted(device: Device, entrant: Entrant, cell: str, say: Callable[[str], None]) -> _Runner | None:
    try:
        return _ready(device, entrant, cell)
    except (RuntimeError, TypeError, ValueError) as error:
        if not entrant.peer:
            raise
        say(f"{entrant.name} left out of {cell}: {error}")
        return None


def _ready(device: Device, entrant: Entrant, cell: str) -> _Runner:
    run = _pass(entrant.calls)
    captured = entrant.captured
    if captured:
        try:
            recording = device.record(run)
        except RuntimeError:
            if not entrant.peer:
                raise
            captured = False
    if captured:
        run, result = recording.replay, recording.result
        poison(result)
        run()
    else:
        poison(run())  # freed at once, its memory is what the next call gets
        result = run()
    if not entrant.is_right(result):
        raise WrongResultError(f"{entrant.name} is wrong for {cell}")
    return _Runner(entrant, run, captured)


def _pass(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def run() -> object:
        first, *others = calls
        result = first()
        for call in others:
            call()
        return result

    return run


def _numbered(run: Callable[[], object]) -> Callable[[int], object]:
    return lambda _: run()
