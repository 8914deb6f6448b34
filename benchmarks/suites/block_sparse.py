"""The work of a layer with a block-sparse weight, part by part and as a training step, beside a dense one and torch's.

Forward is y = x W^T, dX = g W and dW = g^T x, in the kept blocks alone; a step is all three, and SGD. Forward 2:4 is
y = x W^T by what a trained layer becomes: two of every four columns of its kept blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

from benchmarks.block_sparse.contenders import BLOCK_DTYPES, Contest, torch_status
from benchmarks.block_sparse.measure import measure
from benchmarks.block_sparse.plot import plot, verdict
from benchmarks.block_sparse.result import BITMASK, DENSE, FORWARD, PRODUCTS, TORCH_BSR, BlockSparseResult
from benchmarks.block_sparse.weights import BlockWeight, Operands
from benchmarks.cases import Selection, Shape, Workload, dense_input, shape_name
from benchmarks.machine import thread_count, uncached_nbytes
from benchmarks.report import Report, grouped, markdown_table
from benchmarks.suites import Plan, Suite, UnavailableError
from benchmarks.timer import Budget

_SHAPES = ((1024, 1024), (4096, 4096), (4096, 14336))
_ROWS = (1, 16, 128, 512, 2048)
_BLOCKS = (32, 64)
_ALL_BLOCKS = (16, 32, 64, 128)
_WITH_ALL_BLOCKS = (4096, 4096)
_DEFAULT = Selection(_SHAPES, ("fp32", "bf16"), (0.0, 0.5, 0.75, 0.9), _ROWS, _BLOCKS)
_QUICK = Selection(((96, 64), (40, 130)), ("fp32", "bf16"), (0.0, 0.75), (1, 40), (16, 32))
_QUICK_UNCACHED_NBYTES = 2**16

_BUDGET = Budget(min_rounds=7, max_rounds=51, slow_rounds=5, seconds=1.0)
_LONG_BUDGET = Budget(min_rounds=3, max_rounds=15, slow_rounds=1, seconds=1.0)
_LONG_FLOP = 4e9
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)


def _run(plan: Plan, say: Callable[[str], None]) -> list[BlockSparseResult]:
    wanted = plan.selection.over(_QUICK if plan.quick else _DEFAULT)
    unknown = sorted(set(wanted.dtypes) - set(BLOCK_DTYPES))
    if unknown:
        raise UnavailableError(f"has no products in {', '.join(unknown)}")
    uncached = _QUICK_UNCACHED_NBYTES if plan.quick else uncached_nbytes(plan.header.cache_nbytes)
    results: list[BlockSparseResult] = []
    for shape, dtype in product(wanted.shapes, wanted.dtypes):
        dense = dense_input(Workload(shape, dtype, 0.0))
        weights = [BlockWeight.cut_from(dense, *cut) for cut in product(_blocks(plan, shape), wanted.sparsities)]
        for rows, part in product(wanted.rows, PRODUCTS):
            contest = Contest(part, dense, weights, Operands.of(shape, dtype, rows), uncached)
            for threads in plan.header.threads:
                found = measure(contest, dtype, threads, _budget(plan, shape, rows), say)
                say(f"\n{shape_name(shape)} {dtype}, {part}, m = {rows}, {thread_count(threads)}")
                for result in found:
                    say(result.line())
                results += found
    return results


def _blocks(plan: Plan, shape: Shape) -> Sequence[int]:
    """What was asked for, else all sizes for one shape and the usual ones for the others."""
    if plan.selection.blocks:
        return plan.selection.blocks
    if plan.quick:
        return _QUICK.blocks
    return _ALL_BLOCKS if shape == _WITH_ALL_BLOCKS else _BLOCKS


def _budget(plan: Plan, shape: Shape, rows: int) -> Budget:
    if plan.quick:
        return _QUICK_BUDGET
    return _LONG_BUDGET if 2.0 * rows * shape[0] * shape[1] > _LONG_FLOP else _BUDGET


def _tables(report: Report[BlockSparseResult]) -> str:
    own = [result for result in report.results if result.contender == BITMASK]
    torch_ms = {_cell(result): result for result in report.results if result.contender == TORCH_BSR}
    parts = [*_overviews(own), *_details(own, torch_ms)]
    return "\n\n".join([*parts, *(f"{name}: {status}." for name, status in report.peers.items())])


def _cell(result: BlockSparseResult) -> tuple[object, ...]:
    return (result.shape, result.dtype, result.threads, result.part, result.rows, result.block, result.sparsity)


def _overviews(own: Iterable[BlockSparseResult]) -> Iterable[str]:
    """Speedups, densities side by side, one table for each shape, dtype, size of blocks and number of threads."""
    for (shape, dtype, block, threads), group in grouped(own, lambda r: (r.shape, r.dtype, r.block, r.threads)):
        sparsities = [sparsity for sparsity, _ in grouped(group, lambda result: result.sparsity)]
        columns = ["part", "m", f"{DENSE} ms", *(f"{1 - sparsity:.0%}" for sparsity in sparsities), "break-even"]
        lines = []
        for (part, rows), cells in grouped(group, lambda result: (result.part, result.rows)):
            by_sparsity = {result.sparsity: f"{result.speedup:.2f}" for result in cells}
            speedups = [by_sparsity.get(sparsity, "-") for sparsity in sparsities]
            lines.append([part, str(rows), f"{cells[0].dense_ms:.3f}", *speedups, verdict(cells)])
        lines.sort(key=lambda line: list(PRODUCTS).index(line[0]))
        title = f"{shape_name(shape)} {dtype}, blocks of {block}, {thread_count(threads)}: x {DENSE} by density"
        yield f"**{title}**\n\n{markdown_table(columns, lines)}"


def _details(own: Iterable[BlockSparseResult], of_torch: dict[tuple[object, ...], BlockSparseResult]) -> Iterable[str]:
    """All figures, one table for each shape, dtype, part and number of threads."""
    columns = ("m", "block", "density", "ms", "quartiles", "GFLOP/s", f"x {DENSE}", "ideal", "of ideal")
    for (shape, dtype, part, threads), group in grouped(own, lambda r: (r.shape, r.dtype, r.part, r.threads)):
        lines = []
        absent = "-" if dtype in {result.dtype for result in of_torch.values()} else "does not run"
        for result in group:
            summary = result.summary
            line = [str(result.rows), str(result.block), f"{result.density:.0%}", f"{summary.median_ms:.3f}"]
            line += [f"{summary.q1_ms:.3f}..{summary.q3_ms:.3f}", f"{result.gflop_per_s:.0f}"]
            line += [f"{result.speedup:.2f}", f"{result.ideal:.2f}", f"{result.ideal_share:.0%}"]
            if part == FORWARD:
                torch_result = of_torch.get(_cell(result))
                line.append(f"{torch_result.speedup:.2f}" if torch_result else absent)
            lines.append(line)
        title = f"{shape_name(shape)} {dtype}, {part}, {thread_count(threads)}"
        torch_column = (f"{TORCH_BSR}: x {DENSE}",) if part == FORWARD else ()
        yield f"**{title}**\n\n{markdown_table((*columns, *torch_column), lines)}"


SUITE = Suite(
    summary="train with block-sparse weights: forward, both gradients and a whole step, by density and block",
    read=BlockSparseResult.from_json,
    default_threads=lambda every: (every,),
    peers=torch_status,
    run=_run,
    tables=_tables,
    plot=plot,
    fresh_memory=False,
)
