"""2:4 weights: packed (as they are, or pruned meanwhile), unpacked, and multiplied by, beside the bitmask and peers.

Packing and unpacking are compared with a copy of the dense matrix, products with the dense weight and with the same
half-sparse weight as a bitmask.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

from benchmarks.cases import Selection, Workload, rotated, rotated_inputs, shape_name
from benchmarks.codec import measure as codec
from benchmarks.codec.result import COMPRESS, COPY, DECOMPRESS, CodecResult
from benchmarks.linear import measure as linear
from benchmarks.linear.contenders import products
from benchmarks.linear.result import BITMASK, DENSE, SATURATED, LinearResult
from benchmarks.linear.saturated import read_bandwidths, saturated_status
from benchmarks.machine import thread_count, uncached_nbytes
from benchmarks.report import CpuResult, Report, grouped, markdown_table, or_dash, reader_of
from benchmarks.semi_structured.contenders import (
    SEMI_STRUCTURED,
    checking_codec,
    find_peers,
    packed_product,
    pruning_codec,
    pruning_peers,
    two_four_input,
    two_four_layers,
)
from benchmarks.semi_structured.plot import plot
from benchmarks.suites import Plan, Suite, UnavailableError
from benchmarks.timer import Budget

_DTYPES = ("fp32", "bf16", "fp16")
_SHAPES = ((4096, 4096), (14336, 4096))
_DEFAULT = Selection(_SHAPES, _DTYPES, (0.5,), (1, 4, 16, 64, 256, 1024))
_QUICK = Selection(((64, 128), (40, 132)), _DTYPES, (0.5,), (1, 3, 40))
_QUICK_UNCACHED_NBYTES = 2**16
_WITH_PEERS = ((4096, 4096), *_QUICK.shapes)

_CODEC_BUDGET = Budget(min_rounds=7, max_rounds=31, slow_rounds=1, seconds=0.7)
_BUDGET = Budget(min_rounds=7, max_rounds=51, slow_rounds=5, seconds=0.5)
_LONG_BUDGET = Budget(min_rounds=3, max_rounds=15, slow_rounds=3, seconds=0.5)
_LONG_FLOP = 4e9
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)


def _run(plan: Plan, say: Callable[[str], None]) -> list[CpuResult]:
    wanted = plan.selection.over(_QUICK if plan.quick else _DEFAULT)
    _check(wanted)
    uncached = uncached_nbytes(plan.header.cache_nbytes)
    bandwidths = read_bandwidths(plan.header.threads, uncached, say)
    results: list[CpuResult] = []
    for workload in wanted.workloads():
        for threads in plan.header.threads:
            packed_and_unpacked = _codec_cells(plan, workload, threads, say)
            say(f"\n{workload}, then none, {thread_count(threads)}")
            for cell in packed_and_unpacked:
                say(cell.line())
            results += packed_and_unpacked
        layers = two_four_layers(workload, _QUICK_UNCACHED_NBYTES if plan.quick else uncached)
        packed = packed_product(layers)
        for rows, threads in product(wanted.rows, plan.header.threads):
            setting = linear.Setting(threads, _budget(plan, workload, rows), bandwidths[threads])
            multiplied = linear.measure(workload, rows, [*products(layers, rows), packed], setting, say)
            say(f"\n{workload}, m = {rows}, {thread_count(threads)}, {len(layers.dense)} layers")
            for result in multiplied:
                say(result.line())
            results += multiplied
    return results


def _check(wanted: Selection) -> None:
    unknown = sorted(set(wanted.dtypes) - set(_DTYPES))
    if unknown:
        raise UnavailableError(f"has no products in {', '.join(unknown)}")
    if set(wanted.sparsities) != {0.5}:
        raise UnavailableError("a 2:4 matrix is half zeros: --sparsities takes 0.5 alone")
    odd = [shape_name(shape) for shape in wanted.shapes if shape[1] % 4]
    if odd:
        raise UnavailableError(f"columns are a multiple of 4, unlike those of {', '.join(odd)}")


def _codec_cells(plan: Plan, workload: Workload, threads: int, say: Callable[[str], None]) -> list[CodecResult]:
    """Matrices that are 2:4, then ones without a zero, which are pruned while they are packed."""
    budget = _QUICK_BUDGET if plan.quick else _CODEC_BUDGET
    huge_pages = plan.header.only_some_get_huge_pages()
    setting = codec.Setting(threads, budget, plan.header.copy_bandwidth[threads], huge_pages)
    full = Workload(workload.shape, workload.dtype, 0.0)
    isa, has_peers = plan.header.isa, workload.shape in _WITH_PEERS
    nbytes = uncached_nbytes(plan.header.cache_nbytes)
    packing = [checking_codec(isa), *(find_peers().codecs if has_peers else ())]
    pruning = [pruning_codec(isa), *(pruning_peers() if has_peers else ())]
    results = codec.measure(workload, rotated(two_four_input(workload), nbytes), packing, setting, say)
    return [*results, *codec.measure(full, rotated_inputs(full, nbytes), pruning, setting, say)]


def _budget(plan: Plan, workload: Workload, rows: int) -> Budget:
    if plan.quick:
        return _QUICK_BUDGET
    return _LONG_BUDGET if 2.0 * rows * workload.elements > _LONG_FLOP else _BUDGET


def _tables(report: Report[CpuResult]) -> str:
    codecs = [result for result in report.results if isinstance(result, CodecResult)]
    products = [result for result in report.results if isinstance(result, LinearResult)]
    parts = [*_codec_tables(codecs), *_product_tables(products)]
    skipped = [f"{name}: {status}" for name, status in report.peers.items() if status.startswith("skipped")]
    return "\n\n".join(parts + skipped)


def _codec_tables(results: Sequence[CodecResult]) -> Iterable[str]:
    """One table for each shape and number of threads; times as multiples of a copy's are beside them."""
    columns = ["contender", "dtype", "size", "copy ms"]
    for name in ("pack", "prune and pack", "unpack"):
        columns += [f"{name} ms", "x copy"]
    timed = [result for result in results if result.operation != COPY]
    for (shape, threads), group in grouped(timed, lambda result: (shape_name(result.shape), result.threads)):
        rows = [_codec_row(cell) for _, cell in grouped(group, lambda result: (result.dtype, result.contender))]
        yield f"**{shape}, {thread_count(threads)}: packing**\n\n{markdown_table(columns, rows)}"


def _codec_row(cell: Sequence[CodecResult]) -> list[str]:
    row = [cell[0].contender, cell[0].dtype, f"{cell[0].size_ratio:.1%}", f"{cell[0].copy_ms:.2f}"]
    for operation, sparsity in ((COMPRESS, 0.5), (COMPRESS, 0.0), (DECOMPRESS, 0.5)):
        found = [result for result in cell if (result.operation, result.sparsity) == (operation, sparsity)]
        row += [f"{found[0].summary.median_ms:.2f}", f"{found[0].copy_ratio:.2f}"] if found else ["-", "-"]
    return row


def _product_tables(results: Sequence[LinearResult]) -> Iterable[str]:
    """Rows of x below each other, contenders side by side, one table for each shape, dtype and number of threads."""
    columns = ["m", f"{DENSE} ms", "saturated ms", f"{SEMI_STRUCTURED} ms", f"x {DENSE}", "x saturated"]
    columns += ["of ceiling", f"{BITMASK} ms", f"{SEMI_STRUCTURED} x {BITMASK}"]
    for (shape, dtype, threads), group in grouped(results, lambda r: (shape_name(r.shape), r.dtype, r.threads)):
        rows = [_product_row(cell) for _, cell in grouped(group, lambda result: result.rows)]
        own = next(result for result in group if result.contender == SEMI_STRUCTURED)
        ceiling = own.dense_nbytes / own.weight_nbytes
        title = f"{shape} {dtype}, {thread_count(threads)}: products; {ceiling:.2f} times fewer bytes"
        yield f"**{title}**\n\n{markdown_table(columns, rows)}"


def _product_row(cell: Sequence[LinearResult]) -> list[str]:
    by_contender = {result.contender: result for result in cell}
    own, bitmask_ms = by_contender[SEMI_STRUCTURED], by_contender[BITMASK].summary.median_ms
    speedup = own.saturated_speedup
    return [
        str(own.rows),
        f"{own.dense_ms:.3f}",
        or_dash(own.saturated_ms, ".3f"),
        f"{own.summary.median_ms:.3f}",
        f"{own.speedup:.2f}",
        or_dash(speedup, ".2f"),
        or_dash(None if speedup is None else speedup * own.weight_nbytes / own.dense_nbytes, ".0%"),
        f"{bitmask_ms:.3f}",
        f"{bitmask_ms / own.summary.median_ms:.2f}",
    ]


SUITE = Suite(
    summary="pack, unpack and multiply by 2:4 weights over shapes, dtypes and rows, beside the bitmask and peers",
    default_threads=lambda every: (every,),
    peers=lambda: {SATURATED: saturated_status(), **find_peers().status},
    read=reader_of(CodecResult, LinearResult),
    run=_run,
    tables=_tables,
    plot=plot,
)
