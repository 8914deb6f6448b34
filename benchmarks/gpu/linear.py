"""y = x W^T on a GPU with cold weights: bitmask beside the best dense product of cuBLAS, over rows of x."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import ClassVar

from torch import Tensor

from benchmarks.cases import DTYPES, Selection, Shape, Workload, dense_input, shape_name
from benchmarks.gpu.contest import Entrant, contest
from benchmarks.gpu.dense import DENSE, dense_entrants, fastest
from benchmarks.gpu.plan import GpuPlan, microseconds
from benchmarks.gpu.rivals import rival_entrants
from benchmarks.linear.measure import Reference
from benchmarks.linear.result import BITMASK, LinearTiming
from benchmarks.report import grouped, markdown_table
from benchmarks.timer import Budget
from bitmask import ops

_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (512, 2048))
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
_DEFAULT = Selection(_SHAPES, ("bf16", "fp16", "fp32"), (0.5, 0.7, 0.9), _ROWS)
_QUICK = Selection(((96, 64), (40, 130)), ("bf16", "fp32"), (0.5,), (1, 3))
_BUDGET = Budget(min_rounds=5, max_rounds=25, slow_rounds=3, seconds=0.15)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)
_FEWEST_LAYERS, _MOST_LAYERS = 2, 512
_MOST_DENSE_NBYTES = 4 * 2**30


@dataclass(frozen=True)
class GpuLinearResult(LinearTiming):
    """One contender in one cell on a GPU.

    The dense one is the fastest of all that were tried, `way` says which. A rival's `weight_nbytes` are those of
    bitmask. `copy_bandwidth` is in GB/s; `captured` says whether launch gaps are left out.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("speedup", "gb_per_s", "gflop_per_s", "bandwidth_share")

    way: str
    copy_bandwidth: float
    captured: bool

    @property
    def moved_nbytes(self) -> int:
        """What must be read and written at the least: the stored weight, x and y."""
        n, k = self.shape
        return self.weight_nbytes + self.rows * (n + k) * DTYPES[self.dtype].itemsize

    @property
    def bandwidth_share(self) -> float:
        """Bytes that must be moved per second as a share of the device's copy bandwidth."""
        return self.moved_nbytes / self.summary.median_ms / 1e6 / self.copy_bandwidth

    def line(self) -> str:
        """The result on one line of plain text."""
        summary = self.summary
        spread = f"[{microseconds(summary.q1_ms)}..{microseconds(summary.q3_ms)}]"
        how = self.way + ("" if self.captured else ", with launches")
        return (
            f"{self.contender:<14}{microseconds(summary.median_ms):>9} us {spread:<19}{self.speedup:>6.2f}x dense"
            f"{self.bandwidth_share:>6.0%} of bandwidth{self.gflop_per_s / 1e3:>8.1f} TFLOP/s  {how}"
        )


@dataclass(frozen=True)
class Layers:
    """Equal weights at different places, dense and compressed, so many that even compressed no cache holds them."""

    workload: Workload
    dense: Sequence[Tensor]
    packed: Sequence[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, plan: GpuPlan, workload: Workload) -> "Layers":
        """Made, and compressed, on the device."""
        first = dense_input(workload, plan.header.seed, plan.device.where)
        parts = ops.compress(first)
        needed = -(-plan.uncached_nbytes // sum(part.nbytes for part in parts))
        count = min(max(needed, _FEWEST_LAYERS), _MOST_LAYERS, _MOST_DENSE_NBYTES // workload.dense_nbytes)
        values, bitmasks, row_offsets = parts
        packed = [(values.clone(), bitmasks.clone(), row_offsets.clone()) for _ in range(count)]
        return cls(workload, [first.clone() for _ in range(count)], packed)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of one compressed weight."""
        return sum(part.nbytes for part in self.packed[0])


def run(plan: GpuPlan) -> list[GpuLinearResult]:
    """Every cell for which there is time, the dtypes one after the other."""
    results: list[GpuLinearResult] = []
    selection = plan.selection.over(_QUICK if plan.quick else _DEFAULT)
    workloads = [
        Workload(shape, dtype, sparsity)
        for dtype, shape, sparsity in product(selection.dtypes, selection.shapes, selection.sparsities)
    ]
    for workload in plan.in_time(workloads):
        layers = Layers.of(plan, workload)
        for rows in plan.in_time(selection.rows, within=f"{workload}, m = "):
            plan.say(f"\n{workload}, m = {rows}, {len(layers.dense)} layers")
            found = _cell(plan, layers, rows)
            for result in found:
                plan.say(result.line())
            results += found
        del layers
        plan.device.release()
    return results


def _cell(plan: GpuPlan, layers: Layers, rows: int) -> list[GpuLinearResult]:
    workload = layers.workload
    x = plan.random_rows(workload.dtype, rows, workload.shape[1])
    reference = Reference(x, layers.dense[0], rounded_parts=True)
    is_right = partial(reference.accepts, lossy=False)
    dense = dense_entrants(plan.device, x, layers.dense, is_right)
    own = [partial(ops.linear, x, *parts, workload.shape[1]) for parts in layers.packed]
    entrants = [*dense, Entrant(BITMASK, own, is_right)]
    if plan.rivals is not None:
        entrants += rival_entrants(plan.rivals, x, layers.dense, is_right, plan.say)
    budget = _QUICK_BUDGET if plan.quick else _BUDGET
    timings = contest(plan.device, entrants, budget, f"{workload}, m = {rows}", plan.say)

    best = fastest(dense, timings)
    dense_names = {entrant.name for entrant in dense}
    shown = {DENSE: best} | {name: name for name in timings if name not in dense_names}
    return [
        GpuLinearResult(
            contender=contender,
            dtype=workload.dtype,
            sparsity=workload.sparsity,
            summary=timings[name].summary,
            shape=workload.shape,
            rows=rows,
            layers=len(layers.dense),
            dense_nbytes=workload.dense_nbytes,
            weight_nbytes=workload.dense_nbytes if contender == DENSE else layers.packed_nbytes,
            dense_ms=timings[best].summary.median_ms,
            way=name if contender == DENSE else "",
            copy_bandwidth=plan.header.copy_bandwidth,
            captured=timings[name].captured,
        )
        for contender, name in shown.items()
    ]


def tables(results: Sequence[GpuLinearResult]) -> Iterable[str]:
    """Rows of x below each other, sparsities side by side, one table for each shape and dtype; then every rival."""
    own = [result for result in results if result.contender == BITMASK]
    ways = {_cell_of(result): result.way for result in results if result.contender == DENSE}
    for (shape, dtype), group in grouped(own, lambda result: (result.shape, result.dtype)):
        sparsities = [sparsity for sparsity, _ in grouped(group, lambda result: result.sparsity)]
        columns = ["m", "dense us"]
        for sparsity in sparsities:
            columns += [f"{sparsity:.0%}: us", "x dense", "of bandwidth"]
        columns.append("fastest dense")
        rows = [
            _row(m, cell, sparsities, ways[_cell_of(cell[0])]) for m, cell in grouped(group, lambda result: result.rows)
        ]
        yield f"**y = x Wᵀ, W {shape_name(shape)} {dtype}**\n\n{markdown_table(columns, rows)}"
    yield from _rival_tables(results)


def _cell_of(result: GpuLinearResult) -> tuple[Shape, str, float, int]:
    return result.shape, result.dtype, result.sparsity, result.rows


def _row(m: int, cell: Sequence[GpuLinearResult], sparsities: Sequence[float], way: str) -> list[str]:
    """The dense time is the median over the sparsities; each ratio is to the dense time of its own cell."""
    line = [str(m), microseconds(median(result.dense_ms for result in cell))]
    by_sparsity = {result.sparsity: result for result in cell}
    for sparsity in sparsities:
        found = by_sparsity.get(sparsity)
        line += (
            ["-", "-", "-"]
            if found is None
            else [microseconds(found.summary.median_ms), f"{found.speedup:.2f}", f"{found.bandwidth_share:.0%}"]
        )
    return [*line, way]


def _rival_tables(results: Sequence[GpuLinearResult]) -> Iterable[str]:
    with_rivals = {_cell_of(result) for result in results if result.contender not in (DENSE, BITMASK)}
    beside = [result for result in results if _cell_of(result) in with_rivals]
    columns = ("zeros", "m", "contender", "us", "x dense")
    for (shape, dtype), group in grouped(beside, lambda result: (shape_name(result.shape), result.dtype)):
        rows = [
            [
                f"{result.sparsity:.0%}",
                str(result.rows),
                result.contender + ("" if result.captured else " (with launches)"),
                microseconds(result.summary.median_ms),
                f"{result.speedup:.2f}",
            ]
            for result in group
        ]
        yield f"**Beside rivals, W {shape} {dtype}**\n\n{markdown_table(columns, rows)}"
