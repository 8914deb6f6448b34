"""Whole decoders on a GPU, dense against sparse: a token's step captured as a CUDA graph, replayed in turn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.cases import DTYPES, Selection
from benchmarks.gpu.contest import Entrant, WrongResultError, contest
from benchmarks.gpu.decoder import BODY, LLAMA_1B, LLAMA_8B, TOY, Decoder, Shape, State, make_decoder
from benchmarks.gpu.plan import GpuPlan
from benchmarks.models.networks import checkpoint_nbytes, compressed_twin, linear_layers, linear_nbytes
from benchmarks.models.result import BITMASK, DENSE
from benchmarks.report import Result, markdown_table
from benchmarks.timer import Budget, Summary
from bitmask import BitmaskTensor

_DEFAULT = Selection(dtypes=("bf16",), sparsities=(0.5,), rows=(1, 8))
_CONTEXT = 128  # tokens that are there before
_TOKENS = 64  # that are timed
_COMPARED_TOKENS = 16
_BUDGET = Budget(min_rounds=_TOKENS, max_rounds=_TOKENS, slow_rounds=0, seconds=0.0)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=0, seconds=0.0)
_LARGEST_DIFFERENCE = 0.1  # of the logits, relative in norm: rounding stays far below, a wrong product far above


@dataclass(frozen=True)
class DecodeResult(Result):
    """Steps of a decoder, dense or with sparse weights, for `rows` sequences; each yields a token for each of them.

    `dense_ms` is the dense one's median in the same cell, `peak_nbytes` the most memory that tensors take in a step
    while this one is alone on the device, and `difference` that of the logits, relative in norm, over some steps.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("speedup", "per_second")

    model: str
    rows: int
    dense_ms: float
    linear_nbytes: int
    checkpoint_nbytes: int
    peak_nbytes: int
    difference: float

    @property
    def speedup(self) -> float:
        """How many times faster than the dense model."""
        return self.dense_ms / self.summary.median_ms

    @property
    def per_second(self) -> float:
        """Tokens per second, at the median."""
        return 1e3 * self.rows / self.summary.median_ms

    def line(self) -> str:
        """The result on one line of plain text."""
        summary = self.summary
        spread = f"[{summary.q1_ms:.3f}..{summary.q3_ms:.3f}]"
        return (
            f"batch {self.rows:<4}{self.contender:<9}{summary.median_ms:>9.3f} ms {spread:<18}"
            f"{self.per_second:>9.1f} tokens/s{self.speedup:>7.2f}x dense, peak {self.peak_nbytes / 1e9:.2f} GB"
        )


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the linear layers' weights, of all parameters, and at the peak of a step by number of rows."""

    linear_nbytes: int
    checkpoint_nbytes: int
    peaks: dict[int, int]


@dataclass(frozen=True)
class Subject:
    """A decoder to measure: its share of zeros, and that of single weights that are set to zero when it is made."""

    shape: Shape
    dtype: str
    sparsity: float
    pruned: float

    def __str__(self) -> str:
        """The model in words."""
        return f"{self.shape.name}, {self.dtype}, {self.sparsity:.0%} zeros"


# Makes the sparse twin of a dense model, which may lose weights by that: both are to compute the same.
MakeTwin = Callable[[Decoder], Any]


def run(plan: GpuPlan) -> list[DecodeResult]:
    """Every model for which there is time."""
    selection = plan.selection.over(_DEFAULT)
    return decode(plan, selection, [(sparsity, sparsity, _compressed) for sparsity in selection.sparsities])


def _compressed(dense: Decoder) -> Any:
    twin: Any = compressed_twin(dense, BODY)
    if not all(isinstance(layer.weight, BitmaskTensor) for layer in linear_layers(twin.get_submodule(BODY))):
        raise WrongResultError("some weights did not get compressed")
    return twin


def decode(plan: GpuPlan, selection: Selection, twins: Sequence[tuple[float, float, MakeTwin]]) -> list[DecodeResult]:
    """Every model for which there is time, beside each of the twins: `sparsity`, `pruned`, and what makes the twin."""
    shapes = (TOY,) if plan.quick else (LLAMA_1B, LLAMA_8B)
    subjects = [
        (Subject(shape, dtype, sparsity, pruned), make)
        for shape, dtype, (sparsity, pruned, make) in product(shapes, selection.dtypes, twins)
    ]
    results: list[DecodeResult] = []
    for subject, make_twin in plan.in_time(subjects):
        plan.say(f"\n{subject}")
        found = _measure(plan, subject, make_twin, selection.rows)
        for result in found:
            plan.say(result.line())
        results += found
        plan.device.release()
    return results


def _measure(plan: GpuPlan, subject: Subject, make_twin: MakeTwin, batches: Sequence[int]) -> list[DecodeResult]:
    """The dense model is alone first, then its twin beside it, which shares all but the body, then the twin alone."""
    dense = make_decoder(
        subject.shape,
        _CONTEXT + _TOKENS + _COMPARED_TOKENS,
        DTYPES[subject.dtype],
        subject.pruned,
        plan.device.where,
        plan.header.seed,
    )
    sizes = {DENSE: _sizes(plan, subject, dense, batches)}
    twin = make_twin(dense)
    differences = {rows: _difference(plan, subject, dense, twin, rows) for rows in batches}
    cells = {rows: _time(plan, subject, (dense, twin), rows) for rows in batches}
    del dense
    sizes[BITMASK] = _sizes(plan, subject, twin, batches)
    return [
        DecodeResult(
            contender=contender,
            dtype=subject.dtype,
            sparsity=subject.sparsity,
            summary=summaries[contender],
            model=subject.shape.name,
            rows=rows,
            dense_ms=summaries[DENSE].median_ms,
            linear_nbytes=sizes[contender].linear_nbytes,
            checkpoint_nbytes=sizes[contender].checkpoint_nbytes,
            peak_nbytes=sizes[contender].peaks[rows],
            difference=differences[rows],
        )
        for rows, summaries in cells.items()
        for contender in (DENSE, BITMASK)
    ]


def _state(plan: GpuPlan, subject: Subject, model: Decoder, rows: int) -> State:
    return State(subject.shape, rows, _CONTEXT, model.length, model.embedding.weight, plan.header.seed)


def _step(model: Decoder, state: State) -> Tensor:
    """Logits of the next tokens, of which the greedy ones are taken."""
    logits: Tensor = model(state)
    state.advance(logits.argmax(-1))
    return logits


def _sizes(plan: GpuPlan, subject: Subject, model: Decoder, batches: Sequence[int]) -> _Sizes:
    peaks = {rows: _peak_nbytes(plan, subject, model, rows) for rows in batches}
    return _Sizes(linear_nbytes(model), checkpoint_nbytes(model), peaks)


def _peak_nbytes(plan: GpuPlan, subject: Subject, model: Decoder, rows: int) -> int:
    step = partial(_step, model, _state(plan, subject, model, rows))
    step()  # what libraries keep from the first call on is there for both
    return plan.device.peak_nbytes(step)


def _difference(plan: GpuPlan, subject: Subject, dense: Decoder, twin: Decoder, rows: int) -> float:
    """Both continue the dense model's greedy tokens; the largest difference of any step."""
    states = [_state(plan, subject, model, rows) for model in (dense, twin)]
    largest = 0.0
    for _ in range(_COMPARED_TOKENS):
        expected, found = (model(state).double() for model, state in zip((dense, twin), states, strict=True))
        difference = float((found - expected).norm() / expected.norm())
        if not difference <= _LARGEST_DIFFERENCE:
            raise WrongResultError(f"{subject}: the sparse model's logits are off by {difference:.2g} of their norm")
        largest = max(largest, difference)
        for state in states:
            state.advance(expected.argmax(-1))
    return largest


def _time(plan: GpuPlan, subject: Subject, models: tuple[Decoder, Decoder], rows: int) -> dict[str, Summary]:
    """Steps of both, by name: figures alone, which keep neither model alive."""
    entrants = [
        Entrant(name, [partial(_step, model, _state(plan, subject, model, rows))], _is_finite)
        for name, model in zip((DENSE, BITMASK), models, strict=True)
    ]
    budget = _QUICK_BUDGET if plan.quick else _BUDGET
    timings = contest(plan.device, entrants, budget, f"{subject}, batch {rows}", plan.say)
    return {name: timing.summary for name, timing in timings.items()}


def _is_finite(logits: Tensor) -> bool:
    return bool(logits.isfinite().all())


def tables(results: Sequence[DecodeResult], sparse: str = BITMASK) -> Iterable[str]:
    """One table: speed and memory, dense beside sparse, which is called that."""
    if not results:
        return
    columns = ["model", "dtype", "zeros", "batch", "dense tokens/s", f"{sparse} tokens/s", "x dense"]
    columns += ["dense peak GB", f"{sparse} peak GB", "largest difference of logits"]
    pairs = zip(results[::2], results[1::2], strict=True)
    rows = [
        [
            packed.model,
            packed.dtype,
            f"{packed.sparsity:.0%}",
            str(packed.rows),
            *(f"{result.per_second:.1f}" for result in (dense, packed)),
            f"{packed.speedup:.2f}",
            *(f"{result.peak_nbytes / 1e9:.2f}" for result in (dense, packed)),
            f"{packed.difference:.1%}",
        ]
        for dense, packed in pairs
    ]
    yield f"**Decoding with CUDA graphs, {_CONTEXT} tokens of context, head and embedding dense**\n\n" + markdown_table(
        columns, rows
    )
