"""Compression and decompression of whole matrices over shapes, dtypes, sparsities, threads and ISAs, beside peers.

The best ISA runs everywhere. The other ISAs, and the peers, which are slow, run on one shape and few dtypes.
"""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.cases import Selection, Workload, rotated_inputs, shape_name
from benchmarks.codec.measure import Setting, measure
from benchmarks.codec.peers import Codec, bitmask_codec, find_peers
from benchmarks.codec.plot import plot
from benchmarks.codec.result import COMPRESS, COPY, DECOMPRESS, HUGE_PAGE_COPY, CodecResult
from benchmarks.machine import thread_count, uncached_nbytes
from benchmarks.report import Report, grouped, markdown_table
from benchmarks.suites import Plan, Suite
from benchmarks.timer import Budget

_DTYPES = ("bf16", "fp16", "fp32", "fp8", "int8")
_SPARSITIES = (0.0, 0.5, 0.7, 0.9, 1.0)
_DEFAULT = Selection(((4096, 4096), (14336, 4096)), _DTYPES, _SPARSITIES)
_QUICK = Selection(((256, 256), (96, 130)), _DTYPES, (0.0, 0.5, 1.0))
_BUDGET = Budget(min_rounds=9, max_rounds=31, slow_rounds=5, seconds=1.0)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)

_ISA_DTYPES = ("fp16", "fp32", "int8")  # one for each element width
_PEER_DTYPES = ("fp16", "fp32")
_PEER_SPARSITIES = (0.5, 0.7, 0.9)
_SIDE_BY_SIDE_ELEMENTS = 4096 * 4096  # larger matrices are left to the best ISA


def _run(plan: Plan, say: Callable[[str], None]) -> list[CodecResult]:
    results: list[CodecResult] = []
    for workload in plan.selection.over(_QUICK if plan.quick else _DEFAULT).workloads():
        inputs = rotated_inputs(workload, uncached_nbytes(plan.header.cache_nbytes))
        for threads in plan.header.threads:
            budget = _QUICK_BUDGET if plan.quick else _BUDGET
            bandwidth = plan.header.copy_bandwidth[threads]
            setting = Setting(threads, budget, bandwidth, plan.header.only_some_get_huge_pages())
            found = measure(workload, inputs, _codecs(plan, workload), setting, say)
            say(f"\n{workload}, {thread_count(threads)}")
            for result in found:
                say(result.line())
            results += found
    return results


def _codecs(plan: Plan, workload: Workload) -> list[Codec]:
    small = workload.elements <= _SIDE_BY_SIDE_ELEMENTS
    isas = [plan.header.isa]
    if small and workload.dtype in _ISA_DTYPES and not plan.only_isa:
        isas += [isa for isa in plan.header.available_isas if isa != plan.header.isa]
    codecs = [bitmask_codec(isa) for isa in isas]
    if small and workload.dtype in _PEER_DTYPES and workload.sparsity in _PEER_SPARSITIES:
        codecs += find_peers().codecs
    return codecs


def _tables(report: Report[CodecResult]) -> str:
    parts = [*_main_tables(report), *_side_by_side_tables(report)]
    skipped = [f"{name}: {status}" for name, status in report.peers.items() if status.startswith("skipped")]
    return "\n\n".join(parts + skipped)


def _main_tables(report: Report[CodecResult]) -> Iterable[str]:
    """One table for each shape and number of threads: the ISA in use against a copy."""
    columns = ["dtype", "zeros", "size", "copy ms", "huge-page copy ms"]
    for name in (COMPRESS, DECOMPRESS):
        columns += [f"{name} ms", "GB/s", "x copy", "floor", "of bandwidth"]
    own = [result for result in report.results if result.isa == report.header.isa or result.operation == COPY]
    for (shape, threads), group in grouped(own, lambda result: (shape_name(result.shape), result.threads)):
        rows = [_main_row(cell) for _, cell in grouped(group, lambda result: (result.dtype, result.sparsity))]
        yield f"**{shape}, {thread_count(threads)}, {report.header.isa}**\n\n{markdown_table(columns, rows)}"


def _main_row(cell: Sequence[CodecResult]) -> list[str]:
    compress, decompress = (_only(cell, operation) for operation in (COMPRESS, DECOMPRESS))
    huge = [f"{result.summary.median_ms:.2f}" for result in cell if result.contender == HUGE_PAGE_COPY]
    row = [compress.dtype, f"{compress.sparsity:.0%}", f"{compress.size_ratio:.1%}", f"{compress.copy_ms:.2f}"]
    row += huge or ["-"]
    for result in (compress, decompress):
        row += [
            f"{result.summary.median_ms:.2f}",
            f"{result.gb_per_s:.1f}",
            f"{result.copy_ratio:.2f}",
            f"{result.floor_ratio:.2f}",
            f"{result.bandwidth_share:.0%}",
        ]
    return row


def _side_by_side_tables(report: Report[CodecResult]) -> Iterable[str]:
    """One table for each cell group that has more than the ISA in use: contenders below each other."""
    columns = ("contender", "zeros", "size", "compress ms", "x copy", "decompress ms", "x copy")
    timed = [result for result in report.results if result.operation != COPY]
    for (shape, dtype, threads), group in grouped(timed, lambda r: (shape_name(r.shape), r.dtype, r.threads)):
        if len({result.label for result in group}) < 2:
            continue
        cells = grouped(group, lambda result: (result.sparsity, result.label))
        rows = [_side_by_side_row(cell) for _, cell in cells]
        yield f"**{shape} {dtype}, {thread_count(threads)}**\n\n{markdown_table(columns, rows)}"


def _side_by_side_row(cell: Sequence[CodecResult]) -> list[str]:
    row = [cell[0].label, f"{cell[0].sparsity:.0%}", f"{cell[0].size_ratio:.1%}"]
    for operation in (COMPRESS, DECOMPRESS):
        result = _only(cell, operation)
        row += [f"{result.summary.median_ms:.2f}", f"{result.copy_ratio:.2f}"]
    return row


def _only(cell: Sequence[CodecResult], operation: str) -> CodecResult:
    (result,) = (result for result in cell if result.operation == operation)
    return result


SUITE = Suite(
    summary="compress and decompress over shapes, dtypes, sparsities, threads and ISAs, beside peers",
    read=CodecResult.from_json,
    default_threads=lambda every: sorted({1, every}),
    peers=lambda: find_peers().status,
    run=_run,
    tables=_tables,
    plot=plot,
)
