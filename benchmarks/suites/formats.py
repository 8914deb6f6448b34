"""Sparse formats beside each other: conversions between a bitmask and torch's layouts, sizes, and products in each.

The measured side of which format pays at which share of zeros. BSR gets zeros in whole blocks, and 2:4 has half of
them; the others get zeros at random places.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

from benchmarks.cases import DTYPES, Selection, Shape, shape_name
from benchmarks.formats.contenders import BLOCK, format_products, pattern_input, torch_status
from benchmarks.formats.measure import measure_conversions
from benchmarks.formats.plot import plot, speedups
from benchmarks.formats.result import BLOCKS, OURS, SCATTERED, TWO_FOUR, ConversionResult, FormatProductResult
from benchmarks.linear import measure as linear
from benchmarks.linear.contenders import Layers
from benchmarks.linear.result import DENSE
from benchmarks.machine import thread_count, uncached_nbytes
from benchmarks.report import CpuResult, Report, grouped, markdown_table, reader_of
from benchmarks.suites import Plan, Suite, UnavailableError
from benchmarks.timer import Budget
from bitmask.crossovers import crossing_words, format_crossovers
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


def _check(wanted: Selection) -> None:
    unknown = sorted(set(wanted.dtypes) - set(_DTYPES))
    if unknown:
        raise UnavailableError(f"has no products in {', '.join(unknown)}")
    odd = [shape_name(shape) for shape in wanted.shapes if any(size % BLOCK for size in shape)]
    if odd:
        raise UnavailableError(f"torch's BSR needs sizes that are multiples of {BLOCK}, unlike {', '.join(odd)}")


def _tables(report: Report[CpuResult]) -> str:
    converted = [result for result in report.results if isinstance(result, ConversionResult)]
    multiplied = [result for result in report.results if isinstance(result, FormatProductResult)]
    parts = [*_size_tables(report), *_conversion_tables(converted), *_product_tables(multiplied)]
    parts += _crossover_tables(multiplied)
    return "\n\n".join([*parts, *(f"{name}: {status}." for name, status in report.peers.items())])


def _size_tables(report: Report[CpuResult]) -> Iterable[str]:
    """Shares of the dense bytes by counting, one table for each shape and dtype."""
    cells = [
        (result.shape, result.dtype, result.sparsity)
        for result in report.results
        if isinstance(result, ConversionResult | FormatProductResult)
    ]
    for (shape, dtype), group in grouped(cells, lambda cell: cell[:2]):
        sparsities = sorted({sparsity for *_, sparsity in group})
        sizes = [_sizes(shape, dtype, sparsity) for sparsity in sparsities]
        names = dict.fromkeys(name for each in sizes for name in each)
        rows = [[name, *(f"{each[name]:.1%}" if name in each else "-" for each in sizes)] for name in names]
        columns = ["format", *(f"{sparsity:.0%} zeros" for sparsity in sparsities)]
        yield f"**{shape_name(shape)} {dtype}: bytes, of dense**\n\n{markdown_table(columns, rows)}"


def _sizes(shape: Shape, dtype: str, sparsity: float) -> dict[str, float]:
    """Of what torch makes, with int64 indices, and of the same with int32 ones."""
    census = Census.imagined(shape, DTYPES[dtype].itemsize, (BLOCK, BLOCK), 1 - sparsity)
    nbytes = census.nbytes()
    dense = nbytes.pop(DENSE_FORMAT)
    if sparsity != _HALF:
        del nbytes[TWO_FOUR]
    nbytes |= {f"{name}, int32": count for name, count in census.short_nbytes().items()}
    return {name: count / dense for name, count in nbytes.items()}


def _conversion_tables(results: Sequence[ConversionResult]) -> Iterable[str]:
    """Conversions below each other, sparsities side by side, one table for each shape, dtype and number of threads."""
    own = [result for result in results if result.contender == OURS]
    for (shape, dtype, threads), group in grouped(own, lambda r: (shape_name(r.shape), r.dtype, r.threads)):
        sparsities = sorted({result.sparsity for result in group})
        columns = ["conversion"]
        for sparsity in sparsities:
            columns += [f"{sparsity:.0%}: ms", "torch ms", "x torch"]
        rows = []
        for conversion, cell in grouped(group, lambda result: result.conversion):
            row = [conversion]
            for result in sorted(cell, key=lambda result: result.sparsity):
                row += [f"{result.summary.median_ms:.2f}", f"{result.torch_ms:.2f}", f"{result.speedup:.1f}"]
            rows.append(row)
        title = f"{shape} {dtype}, {thread_count(threads)}: between a bitmask and torch's layouts"
        yield f"**{title}**\n\n{markdown_table(columns, rows)}"


def _product_tables(results: Sequence[FormatProductResult]) -> Iterable[str]:
    """Formats below each other, sparsities side by side, one table for each shape, dtype, rows and threads."""
    for (shape, dtype, rows, threads), group in grouped(
        results, lambda r: (shape_name(r.shape), r.dtype, r.rows, r.threads)
    ):
        sparsities = sorted({result.sparsity for result in group})
        columns = ["format", "zeros"]
        for sparsity in sparsities:
            columns += [f"{sparsity:.0%}: ms", f"x {DENSE}"]
        lines = []
        for (name, pattern), cell in grouped(group, lambda result: (result.contender, result.pattern)):
            found = {result.sparsity: [f"{result.summary.median_ms:.3f}", f"{result.speedup:.2f}"] for result in cell}
            lines.append([name, pattern, *(text for each in sparsities for text in found.get(each, ["-", "-"]))])
        yield f"**{shape} {dtype}, m = {rows}, {thread_count(threads)}**\n\n{markdown_table(columns, lines)}"


def _crossover_tables(results: Sequence[FormatProductResult]) -> Iterable[str]:
    """From which share of zeros on a format is smaller, by counting, and from which faster, as measured."""
    for (shape, dtype), _ in grouped(results, lambda result: (result.shape, result.dtype)):
        counted = format_crossovers(shape, DTYPES[dtype], block_shape=(BLOCK, BLOCK))
        found = (counted.smaller_than_dense, counted.smaller_than_bitmask)
        rows = [[name, *(_share(each[name]) if name in each else "-" for each in found)] for name in found[0]]
        title = f"{shape_name(shape)} {dtype}: smaller from which share of zeros on"
        yield f"**{title}**\n\n{markdown_table(('format', 'than dense', 'than bitmask'), rows)}"
    for (size, dtype, threads), group in grouped(results, lambda r: (shape_name(r.shape), r.dtype, r.threads)):
        by_rows = [(rows, speedups(cell)) for rows, cell in grouped(group, lambda result: result.rows)]
        names = dict.fromkeys(name for _, found in by_rows for name in found)
        lines = [[name, *(crossing_words(found.get(name, ())) for _, found in by_rows)] for name in names]
        title = f"{size} {dtype}, {thread_count(threads)}: faster than {DENSE} from which share of zeros on"
        yield f"**{title}**\n\n{markdown_table(('format', *(f'm = {rows}' for rows, _ in by_rows)), lines)}"


def _share(found: float | None) -> str:
    return "never" if found is None else f"{found:.1%}"


SUITE = Suite(
    summary="convert to and from torch's sparse layouts, and multiply in every format, by share of zeros",
    default_threads=lambda every: (every,),
    peers=torch_status,
    read=reader_of(ConversionResult, FormatProductResult),
    run=_run,
    tables=_tables,
    plot=plot,
)
