"""One model at one dtype and sparsity: pruned, compressed, compared, and both timed in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from benchmarks.cases import Selection
from benchmarks.memory import resident_nbytes
from benchmarks.models.networks import checkpoint_nbytes, compressed_twin, linear_nbytes, prune
from benchmarks.models.result import BITMASK, DENSE, Agreement, ModelResult, Sizes
from benchmarks.timer import Budget, Contender, Summary, interleave, torch_threads


@dataclass(frozen=True)
class Phase:
    """Something a model does: `start` gets the model and returns what does it once, which yields `items`."""

    name: str
    rows: int
    items: int
    unit: str
    start: Callable[[Any], Callable[[], object]]
    budget: Budget


@dataclass(frozen=True)
class Subject:
    """A model to measure: how it is made, which submodule is compressed, what it does, and how two are compared."""

    name: str
    dtype: str
    sparsity: float
    make: Callable[[], Any]
    body: str
    phases: Sequence[Phase]
    compare: Callable[[Any, Any], Agreement]


def measure_each(
    selection: Selection, subject: Callable[[str, float], Subject], threads: Sequence[int], say: Callable[[str], None]
) -> list[ModelResult]:
    """`measure` for the subject of every dtype and sparsity of the selection."""
    return [
        result
        for dtype, sparsity in product(selection.dtypes, selection.sparsities)
        for result in measure(subject(dtype, sparsity), threads, say)
    ]


def measure(subject: Subject, threads: Sequence[int], say: Callable[[str], None]) -> list[ModelResult]:
    """Time the pruned model and its compressed twin in every phase.

    No more is held at once than the two, which share all that is not compressed. Each is alone when the memory of the
    process is looked at.
    """
    dense = subject.make()
    prune(dense, subject.sparsity)
    with torch.inference_mode():
        subject.phases[0].start(dense)()  # so that what the libraries keep for themselves counts for both
    sizes = {DENSE: _sizes(dense)}
    twin = compressed_twin(dense, subject.body)
    with torch.inference_mode():
        agreement = subject.compare(dense, twin)
    say(f"\n{subject.name}, {subject.dtype}, {subject.sparsity:.0%} zeros: {agreement.words()}")
    timed = [(count, phase, _time(phase, dense, twin, count)) for count in threads for phase in subject.phases]
    del dense
    sizes[BITMASK] = _sizes(twin)
    results = [
        ModelResult(
            contender=contender,
            dtype=subject.dtype,
            sparsity=subject.sparsity,
            threads=count,
            summary=summary,
            model=subject.name,
            phase=phase.name,
            rows=phase.rows,
            items=phase.items,
            unit=phase.unit,
            dense_ms=summaries[0].median_ms,
            sizes=sizes[contender],
            agreement=agreement,
        )
        for count, phase, summaries in timed
        for contender, summary in zip((DENSE, BITMASK), summaries, strict=True)
    ]
    for result in results:
        say(result.line())
    for contender, size in sizes.items():
        say(f"{contender:<14}{_words(size)}")
    return results


def _time(phase: Phase, dense: Any, twin: Any, threads: int) -> list[Summary]:
    with torch.inference_mode(), torch_threads(threads):
        contenders = [_contender(phase.start(model)) for model in (dense, twin)]
        return interleave(contenders, 1, phase.budget)


def _contender(step: Callable[[], object]) -> Contender:
    return Contender(lambda _: step())


def _sizes(model: Any) -> Sizes:
    return Sizes(linear_nbytes(model), checkpoint_nbytes(model), resident_nbytes())


def _words(sizes: Sizes) -> str:
    resident = "unknown" if sizes.resident_nbytes is None else f"{sizes.resident_nbytes / 1e6:.1f} MB"
    return (
        f"linear weights {sizes.linear_nbytes / 1e6:.1f} MB, all parameters {sizes.checkpoint_nbytes / 1e6:.1f} MB, "
        f"process {resident}"
    )
