"""The everyday timings: copy a matrix, compress it and get it back, for this library and its slow reference."""

from collections.abc import Callable

from benchmarks.cases import Selection, Workload, rotated_inputs
from benchmarks.codec.measure import Setting, measure
from benchmarks.codec.peers import Codec, bitmask_codec, find_peers, naive_codec
from benchmarks.codec.plot import plot
from benchmarks.codec.result import COMPRESS, COPY, DECOMPRESS, CodecResult
from benchmarks.machine import thread_count, uncached_nbytes
from benchmarks.report import Report, markdown_table
from benchmarks.suites import Plan, Suite
from benchmarks.timer import Budget

_DEFAULT = Selection(shapes=((4096, 4096),), dtypes=("bf16",), sparsities=(0.5,))
_QUICK = Selection(shapes=((256, 256),), dtypes=("bf16",), sparsities=(0.5,))
_NAIVE_SHAPE = (1024, 1024)
_QUICK_NAIVE_SHAPE = (64, 72)
_BUDGET = Budget(min_rounds=9, max_rounds=51, slow_rounds=0, seconds=2.0)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=0, seconds=0.0)
_CLASSES = {"bitmask": "BitmaskTensor", "naive": "NaiveBitmaskTensor"}


def _run(plan: Plan, say: Callable[[str], None]) -> list[CodecResult]:
    selection = plan.selection.over(_QUICK if plan.quick else _DEFAULT)
    naive = Selection(shapes=(_QUICK_NAIVE_SHAPE if plan.quick else _NAIVE_SHAPE,)).over(selection)
    cells = [(workload, bitmask_codec(plan.header.isa)) for workload in selection.workloads()]
    cells += [(workload, naive_codec()) for workload in naive.workloads()]
    results: list[CodecResult] = []
    for threads in plan.header.threads:
        for workload, codec in cells:
            found = _cell(plan, workload, codec, threads, say)
            say(f"\n{workload.dtype}, {workload.sparsity:.0%} zeros, {thread_count(threads)}")
            say(f"SHAPE = {list(workload.shape)}")
            for result in found:
                say(_line(result))
            results += found
    return results


def _cell(plan: Plan, workload: Workload, codec: Codec, threads: int, say: Callable[[str], None]) -> list[CodecResult]:
    budget = _QUICK_BUDGET if plan.quick else _BUDGET
    setting = Setting(threads, budget, plan.header.copy_bandwidth[threads])
    inputs = rotated_inputs(workload, uncached_nbytes(plan.header.cache_nbytes))
    return measure(workload, inputs, [codec], setting, say)


def _title(result: CodecResult) -> str:
    titles = {COPY: "Create Regular Tensor", COMPRESS: "Create {}", DECOMPRESS: "Decompress {}"}
    return titles[result.operation].format(_CLASSES.get(result.contender, ""))


def _line(result: CodecResult) -> str:
    speed = f"{result.summary.median_ms:>9.2f} ms{result.gb_per_s:>9.2f} GB/s"
    return f"{_title(result):<31}{speed}{result.copy_ratio:>9.2f}x of a copy"


def _tables(report: Report[CodecResult]) -> str:
    rows = [
        [
            _title(result),
            str(list(result.shape)),
            result.dtype,
            f"{result.sparsity:.0%}",
            str(result.threads),
            f"{result.summary.median_ms:.2f}",
            f"{result.gb_per_s:.2f}",
            f"{result.copy_ratio:.2f}",
        ]
        for result in report.results
    ]
    return markdown_table(("operation", "shape", "dtype", "zeros", "threads", "ms", "GB/s", "x of a copy"), rows)


SUITE = Suite(
    summary="create and decompress one matrix, in under a minute",
    read=CodecResult.from_json,
    default_threads=lambda every: (every,),
    peers=lambda: find_peers().status,
    run=_run,
    tables=_tables,
    plot=plot,
)
