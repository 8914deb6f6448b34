"""Multiplying by sparse weights, y = x W^T, over shapes of Llama 3, rows of x, dtypes and sparsities, beside peers.

One row is what a model does for each token, on every shape. Many rows, and the peers, are left to two of the shapes.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from benchmarks.cases import Selection, Workload, shape_name
from benchmarks.linear.contenders import Layers, peer_products, peer_status, products
from benchmarks.linear.measure import Setting, measure
from benchmarks.linear.plot import plot
from benchmarks.linear.result import BITMASK, DENSE, SATURATED, LinearResult
from benchmarks.linear.saturated import read_bandwidths
from benchmarks.machine import thread_count, uncached_nbytes
from benchmarks.report import Report, grouped, markdown_table, or_dash
from benchmarks.suites import Plan, Suite
from benchmarks.timer import Budget

_THOROUGH = ((14336, 4096), (2048, 2048))
_LLAMA_3_8B = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096))
_LLAMA_3_2_1B = ((8192, 2048), (2048, 8192), (2048, 2048), (512, 2048))
_ROWS = (1, 2, 4, 8, 16, 32, 128, 512, 2048)
_DTYPES = ("bf16", "fp16", "fp32")
_DEFAULT = Selection(_LLAMA_3_8B + _LLAMA_3_2_1B, _DTYPES, (0.5, 0.7, 0.8, 0.9), _ROWS)
_QUICK = Selection(((96, 64), (40, 130)), _DTYPES, (0.5, 0.9), (1, 3, 40))
_QUICK_UNCACHED_NBYTES = 2**16

_PEER_ROWS = (1, 8, 128)
_MOST_FLOP = 64e9  # of one product, where a dtype is so slow that larger ones would take most of the run
_BUDGET = Budget(min_rounds=7, max_rounds=51, slow_rounds=5, seconds=0.5)
_LONG_BUDGET = Budget(min_rounds=3, max_rounds=15, slow_rounds=3, seconds=0.5)
_LONG_FLOP = 4e9
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)


def _run(plan: Plan, say: Callable[[str], None]) -> list[LinearResult]:
    uncached = _QUICK_UNCACHED_NBYTES if plan.quick else uncached_nbytes(plan.header.cache_nbytes)
    bandwidths = read_bandwidths(plan.header.threads, uncached_nbytes(plan.header.cache_nbytes), say)
    results: list[LinearResult] = []
    for workload in plan.selection.over(_QUICK if plan.quick else _DEFAULT).workloads():
        layers = Layers.of(workload, uncached)
        peers = peer_products(layers) if plan.quick or workload.shape in _THOROUGH else []
        for rows in _rows(plan, workload):
            contenders = products(layers, rows) + (peers if plan.quick or rows in _PEER_ROWS else [])
            for threads in plan.header.threads:
                setting = Setting(threads, _budget(plan, workload, rows), bandwidths[threads])
                found = measure(workload, rows, contenders, setting, say)
                say(f"\n{workload}, m = {rows}, {thread_count(threads)}, {len(layers.dense)} layers")
                for result in found:
                    say(result.line())
                results += found
    return results


def _rows(plan: Plan, workload: Workload) -> Sequence[int]:
    """What was asked for, else one row for every shape, and all of them for some and for shapes asked for."""
    if plan.selection.rows:
        return plan.selection.rows
    if plan.quick:
        return _QUICK.rows
    if workload.shape not in _THOROUGH and not plan.selection.shapes:
        return _ROWS[:1]
    return [rows for rows in _ROWS if workload.dtype == "bf16" or _flop(workload, rows) <= _MOST_FLOP]


def _budget(plan: Plan, workload: Workload, rows: int) -> Budget:
    if plan.quick:
        return _QUICK_BUDGET
    return _LONG_BUDGET if _flop(workload, rows) > _LONG_FLOP else _BUDGET


def _flop(workload: Workload, rows: int) -> float:
    return 2.0 * rows * workload.elements


def _tables(report: Report[LinearResult]) -> str:
    parts = [_bandwidth_line(report), *_one_row_tables(report), *_rows_tables(report), *_peer_tables(report)]
    skipped = [f"{name}: {status}" for name, status in report.peers.items() if status.startswith("skipped")]
    return "\n\n".join(parts + skipped)


def _bandwidth_line(report: Report[LinearResult]) -> str:
    found = {result.threads: result.read_bandwidth for result in report.results}
    texts = [f"{value:.1f} GB/s on {thread_count(threads)}" for threads, value in found.items() if value is not None]
    return f"Read bandwidth: {', '.join(texts) or 'not measured'}."


def _one_row_tables(report: Report[LinearResult]) -> Iterable[str]:
    """One row of x, one table for each dtype and number of threads."""
    columns = ["shape", "zeros", f"{DENSE} ms", "saturated ms", "bitmask ms", "GB/s"]
    columns += [f"x {DENSE}", "x saturated", "ceiling", "of ceiling"]
    own = [result for result in report.results if result.contender == BITMASK and result.rows == 1]
    for (dtype, threads), group in grouped(own, lambda result: (result.dtype, result.threads)):
        rows = [
            [
                shape_name(result.shape),
                f"{result.sparsity:.0%}",
                f"{result.dense_ms:.3f}",
                or_dash(result.saturated_ms, ".3f"),
                f"{result.summary.median_ms:.3f}",
                f"{result.gb_per_s:.1f}",
                f"{result.speedup:.2f}",
                or_dash(result.saturated_speedup, ".2f"),
                f"{result.ceiling:.2f}",
                or_dash(result.ceiling_share, ".0%"),
            ]
            for result in group
        ]
        yield f"**m = 1, {dtype}, {thread_count(threads)}**\n\n{markdown_table(columns, rows)}"


def _rows_tables(report: Report[LinearResult]) -> Iterable[str]:
    """Rows of x below each other, sparsities side by side, one table for each shape, dtype and number of threads."""
    own = [result for result in report.results if result.contender == BITMASK]
    for (shape, dtype, threads), group in grouped(own, lambda r: (shape_name(r.shape), r.dtype, r.threads)):
        by_rows = grouped(group, lambda result: result.rows)
        if len(by_rows) < 2:
            continue
        sparsities = [sparsity for sparsity, _ in grouped(group, lambda result: result.sparsity)]
        columns = ["m", f"{DENSE} ms"]
        for sparsity in sparsities:
            columns += [f"{sparsity:.0%}: ms", f"x {DENSE}"]
        lines = [_rows_line(rows, cell, sparsities) for rows, cell in by_rows]
        yield f"**{shape} {dtype}, {thread_count(threads)}**\n\n{markdown_table(columns, lines)}"


def _rows_line(rows: int, cell: Sequence[LinearResult], sparsities: Sequence[float]) -> list[str]:
    """The dense time is the median over the sparsities; each ratio is to the dense time of its own cell."""
    line = [str(rows), f"{median(result.dense_ms for result in cell):.3f}"]
    by_sparsity = {result.sparsity: result for result in cell}
    for sparsity in sparsities:
        found = by_sparsity.get(sparsity)
        line += ["-", "-"] if found is None else [f"{found.summary.median_ms:.3f}", f"{found.speedup:.2f}"]
    return line


def _peer_tables(report: Report[LinearResult]) -> Iterable[str]:
    """All contenders of the cells that have peers."""
    columns = ("contender", "zeros", "m", "MB", "ms", f"x {DENSE}")
    cells = grouped(report.results, lambda r: (shape_name(r.shape), r.dtype, r.threads, r.sparsity, r.rows))
    with_peers = [
        result
        for _, cell in cells
        if {result.contender for result in cell} - {DENSE, SATURATED, BITMASK}
        for result in cell
    ]
    for (shape, dtype, threads), group in grouped(with_peers, lambda r: (shape_name(r.shape), r.dtype, r.threads)):
        rows = [
            [
                result.contender,
                f"{result.sparsity:.0%}",
                str(result.rows),
                f"{result.weight_nbytes / 1e6:.1f}",
                f"{result.summary.median_ms:.3f}",
                f"{result.speedup:.2f}",
            ]
            for result in group
        ]
        yield f"**{shape} {dtype} beside peers, {thread_count(threads)}**\n\n{markdown_table(columns, rows)}"


SUITE = Suite(
    summary="multiply by sparse weights over shapes of Llama 3, rows, dtypes and sparsities, beside peers",
    read=LinearResult.from_json,
    default_threads=lambda every: (every,),
    peers=peer_status,
    run=_run,
    tables=_tables,
    plot=plot,
    fresh_memory=False,
)
