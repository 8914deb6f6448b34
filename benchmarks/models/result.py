"""What is found about a model: its speed and its sizes, dense or compressed, and how far both agree."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.machine import thread_count
from benchmarks.report import CpuResult, Report, grouped, markdown_table

DENSE = "dense"
BITMASK = "bitmask"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the linear layers' weights, of all parameters, and of the process that holds just this model."""

    linear_nbytes: int
    checkpoint_nbytes: int
    resident_nbytes: int | None


@dataclass(frozen=True)
class Agreement:
    """How far the compressed model's outputs are from those of the dense one, which has the same zeros.

    `largest` is the largest magnitude of the dense outputs. Generating models also tell in how many of
    `compared_tokens` steps both choose the same token, the others the least cosine between two outputs.
    """

    largest: float
    max_difference: float
    equal_tokens: int | None = None
    compared_tokens: int | None = None
    least_cosine: float | None = None

    def words(self) -> str:
        """The agreement on one line of plain text."""
        text = f"outputs up to {self.largest:.3g} differ by {self.max_difference:.2g} at most"
        if self.compared_tokens is not None:
            text += f", {self.equal_tokens} of {self.compared_tokens} greedy tokens equal"
        return text if self.least_cosine is None else f"{text}, least cosine {self.least_cosine:.6f}"


@dataclass(frozen=True)
class ModelResult(CpuResult):
    """One phase of a model, dense or compressed, on `rows` sequences at once.

    Each sample is a forward pass that yields `items` tokens or sentences (`unit`); `dense_ms` is the dense model's
    median in the same cell.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("speedup", "per_second")
    PARTS: ClassVar[Mapping[str, type]] = {**CpuResult.PARTS, "sizes": Sizes, "agreement": Agreement}

    model: str
    phase: str
    rows: int
    items: int
    unit: str
    dense_ms: float
    sizes: Sizes
    agreement: Agreement

    @property
    def speedup(self) -> float:
        """How many times faster than the dense model."""
        return self.dense_ms / self.summary.median_ms

    @property
    def per_second(self) -> float:
        """Tokens or sentences per second, at the median."""
        return 1e3 * self.items / self.summary.median_ms

    def line(self) -> str:
        """The result on one line of plain text."""
        spread = f"[{self.summary.q1_ms:.2f}..{self.summary.q3_ms:.2f}]"
        time = f"{self.summary.median_ms:>10.2f} ms {spread:<21}"
        speed = f"{self.per_second:>10.2f} {self.unit}/s{self.speedup:>7.2f}x dense"
        return f"{self.phase:<14}batch {self.rows:<4}{self.contender:<9}{time}{speed}"


def tables(report: Report[ModelResult]) -> str:
    """Speed, sizes and agreement of every model, dense beside compressed."""
    parts = [*_speed_tables(report), *_size_tables(report), *_agreement_tables(report)]
    return "\n\n".join(parts)


_Pair = tuple[ModelResult, ModelResult]


def _pairs(results: Iterable[ModelResult]) -> list[_Pair]:
    """Dense and compressed of each cell."""
    cells = grouped(results, lambda r: (r.model, r.dtype, r.sparsity, r.threads, r.phase, r.rows))
    return [(dense, packed) for _, (dense, packed) in cells]


def _speed_tables(report: Report[ModelResult]) -> Iterable[str]:
    for (model, threads), group in grouped(report.results, lambda result: (result.model, result.threads)):
        unit = group[0].unit
        columns = ["dtype", "zeros", "phase", "batch", "dense ms", "bitmask ms"]
        columns += [f"dense {unit}/s", f"bitmask {unit}/s", "x dense"]
        rows = [
            [
                *_kind(packed),
                packed.phase,
                str(packed.rows),
                *(f"{result.summary.median_ms:.2f}" for result in (dense, packed)),
                *(f"{result.per_second:.2f}" for result in (dense, packed)),
                f"{packed.speedup:.2f}",
            ]
            for dense, packed in _pairs(group)
        ]
        yield f"**{model}, {thread_count(threads)}**\n\n{markdown_table(columns, rows)}"


def _size_tables(report: Report[ModelResult]) -> Iterable[str]:
    columns = ["dtype", "zeros"]
    for what in ("linear weights", "all parameters", "process"):
        columns += [f"{what}: dense MB", "bitmask MB"]

    def row(pair: _Pair) -> list[str]:
        sizes = [result.sizes for result in pair]
        cells = [size.linear_nbytes for size in sizes] + [size.checkpoint_nbytes for size in sizes]
        return [_megabytes(nbytes) for nbytes in [*cells, *(size.resident_nbytes for size in sizes)]]

    return _tables_of_kinds(report, "memory", columns, row)


def _agreement_tables(report: Report[ModelResult]) -> Iterable[str]:
    columns = ("dtype", "zeros", "largest output", "largest difference", "equal greedy tokens", "least cosine")

    def row(pair: _Pair) -> list[str]:
        found = pair[1].agreement
        tokens = "-" if found.compared_tokens is None else f"{found.equal_tokens} of {found.compared_tokens}"
        cosine = "-" if found.least_cosine is None else f"{found.least_cosine:.6f}"
        return [f"{found.largest:.3g}", f"{found.max_difference:.2g}", tokens, cosine]

    return _tables_of_kinds(report, "compressed against dense with the same zeros", columns, row)


def _tables_of_kinds(
    report: Report[ModelResult], title: str, columns: Sequence[str], row: Callable[[_Pair], list[str]]
) -> Iterable[str]:
    """One table for each model, with one row for each dtype and sparsity."""
    for model, group in grouped(report.results, lambda result: result.model):
        firsts = [pairs[0] for _, pairs in grouped(_pairs(group), lambda pair: (pair[1].dtype, pair[1].sparsity))]
        rows = [[*_kind(pair[1]), *row(pair)] for pair in firsts]
        yield f"**{model}: {title}**\n\n{markdown_table(columns, rows)}"


def _kind(result: ModelResult) -> list[str]:
    return [result.dtype, f"{result.sparsity:.0%}"]


def _megabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.1f}"
