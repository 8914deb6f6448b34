"""Checkpoints in a temporary directory: saving, loading cold and warm, converting, dense against compressed."""

from collections.abc import Callable

from benchmarks.cases import Selection
from benchmarks.checkpoints.measure import Setting, measure
from benchmarks.checkpoints.result import CONVERT, CheckpointResult
from benchmarks.codec.peers import find_peers
from benchmarks.machine import thread_count
from benchmarks.report import Report, grouped, markdown_table
from benchmarks.suites import Plan, Suite
from benchmarks.timer import Budget

_DEFAULT = Selection(((14336, 4096),), ("bf16",), (0.5, 0.7, 0.9))
_QUICK = Selection(((256, 256),), ("bf16",), (0.5,))
_COUNT = 18  # matrices: 2.1 GB of bf16
_QUICK_COUNT = 4
_SHARDS = 2
_BUDGET = Budget(min_rounds=5, max_rounds=5, slow_rounds=1, seconds=0.0)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=1, seconds=0.0)
_PEER = "compressed-tensors"


def _peers() -> dict[str, str]:
    return {_PEER: find_peers().status[_PEER]}


def _run(plan: Plan, say: Callable[[str], None]) -> list[CheckpointResult]:
    budget = _QUICK_BUDGET if plan.quick else _BUDGET
    has_peer = not _peers()[_PEER].startswith("skipped")
    results: list[CheckpointResult] = []
    for workload in plan.selection.over(_QUICK if plan.quick else _DEFAULT).workloads():
        count = _QUICK_COUNT if plan.quick else _COUNT
        for threads in plan.header.threads:
            say(f"\n{count} matrices {workload}, {thread_count(threads)}")
            results += measure(workload, Setting(count, _SHARDS, threads, budget, has_peer), say)
    return results


def _tables(report: Report[CheckpointResult]) -> str:
    columns = ("contender", "zeros", "MB", "of dense", "what", "ms", "GB/s of dense data", "x safetensors, dense")
    parts = []
    for (dtype, threads), group in grouped(report.results, lambda result: (result.dtype, result.threads)):
        rows = [_row(result) for result in group if result.operation != CONVERT]
        parts.append(f"**{dtype}, {thread_count(threads)}**\n\n{markdown_table(columns, rows)}")
    parts += [_conversion(result) for result in report.results if result.operation == CONVERT]
    return "\n\n".join(parts)


def _row(result: CheckpointResult) -> list[str]:
    return [
        result.contender,
        f"{result.sparsity:.0%}",
        f"{result.file_nbytes / 1e6:.0f}",
        f"{result.size_ratio:.1%}",
        result.operation,
        f"{result.summary.median_ms:.0f}",
        f"{result.gb_per_s:.2f}",
        "-" if result.dense_ratio is None else f"{result.dense_ratio:.2f}",
    ]


def _conversion(result: CheckpointResult) -> str:
    peak = "unknown" if result.peak_nbytes is None else f"{result.peak_nbytes / 1e6:.0f} MB"
    shard = (result.shard_nbytes or 0) / 1e6
    return (
        f"`python -m bitmask compress` of {result.dense_nbytes / 1e6:.0f} MB in shards of {shard:.0f} MB, "
        f"{result.dtype}, {result.sparsity:.0%} zeros: {result.summary.median_ms / 1e3:.1f} s; "
        f"the process grew by {peak} at most, pages of the mapped source included."
    )


SUITE = Suite(
    summary="checkpoints saved, loaded cold and warm, and converted, dense against compressed",
    read=CheckpointResult.from_json,
    default_threads=lambda every: (every,),
    peers=_peers,
    run=_run,
    tables=_tables,
)
