"""Sparse formats beside each other: conversions between a bitmask and torch's layouts, sizes, and products in each.

The measured side of which format pays at which share of zeros. BSR gets zeros in whole blocks, and 2:4 has half of
them; the others get zeros at random places.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

from benchmarks.cases import DTYPES, Selection, Shape, Workload, shape_name
from benchmarks.formats.contenders import BLOCK, format_products, pattern_input, torch_status
from benchmarks.formats.measure import measure_conversions
from benchmarks.formats.plot import plot, speedups
from benchmarks.formats.result import BLOCKS, OURS, SCATTERED, TWO_FOUR, ConversionResult, FormatProductResult
from benchmarks.linear import measure as linear
from benchmarks.linear.contenders import Layers
from benchmarks.linear.result import DENSE, SATURATED
from benchmarks.machine import thread_count, uncached_nbytes
from benchmarks.report import CpuResult, Report, grouped, markdown_table, reader_of
from benchmarks.suites import Plan, Suite, UnavailableError
from benchmarks.timer import Budget
from bitmask.crossovers import crossing_sparsity, format_crossovers
from bitmask.format_bytes import DENSE as DENSE_FORMAT
from bitmask.format_bytes import Census

_DTYPES = ("fp32", "bf16", "fp16")
_DEFAULT = Selection(((4096, 4096),), ("fp32", "bf16"), (0.5, 0.7, 0.9, 0.95, 0.99), (1, 128))
_QUICK = Selection(((64, 96),), ("fp32", "bf16"), (0.5, 0.9), (1, 3))
_QUICK_UNCACHED_NBYTES = 2**16
_HALF = 0.5

_CONVERSION_BUDGET = Budget(min_rounds=5, max_rounds=15, slow_rounds=3, seconds=0.3)
_BUDGET = Budget(min_rounds=5, max_rounds=31, slow_rounds=1, seconds=0.3)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)


def _run(plan: Plan, say: Callable[[str], None]) -> list[CpuResult]:
    wanted = plan.selection.over(_QUICK if plan.quick else _DEFAULT)
    _check(wanted)
    uncached = _QUICK_UNCACHED_NBYTES if plan.quick else uncached_nbytes(plan.header.cache_nbytes)
    results: list[CpuResult] = []
    for workload, threads in product(wanted.workloads(), plan.header.threads):
        for pattern in (SCATTERED, BLOCKS, TWO_FOUR):
            if pattern == TWO_FOUR and workload.sparsity != _HALF:
                continue
            if pattern != TWO_FOUR:
                budget = _QUICK_BUDGET if plan.quick else _CONVERSION_BUDGET
                converted = measure_conversions(workload, pattern, threads, budget, uncached)
                say(f"\n{workload} ({pattern}), {thread_count(threads)}")
                for conversion in converted:
                    say(conversion.line())
                results += converted
            layers = Layers.like(workload, pattern_input(workload, pattern), uncached)
            for rows in wanted.rows:
                setting = linear.Setting(threads, _QUICK_BUDGET if plan.quick else _BUDGET, None)
                contenders = format_products(layers, pattern, rows, uncached)
                found = [
                    FormatProductResult(**vars(result), pattern=pattern)
                    for result in linear.measure(workload, rows, contenders, setting, say)
                ]
                say(f"\n{workload} ({pattern}), m = {rows}, {thread_count(threads)}, {len(layers.dense)} layers")
                for multiplied in found:
                    say(multiplied.line())
                results += found
    return results
