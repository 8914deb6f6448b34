"""Compress and decompress on a GPU, beside a copy and what torch offers, against the bytes that must be moved."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.cases import Selection, Workload, dense_input, rolled, shape_name
from benchmarks.codec.peers import Codec, find_peers
from benchmarks.codec.result import COMPRESS, COPY, DECOMPRESS, CodecTiming
from benchmarks.gpu.contest import Entrant, Timing, contest
from benchmarks.gpu.plan import GpuPlan, microseconds
from benchmarks.report import grouped, markdown_table
from benchmarks.timer import Budget
from bitmask import ops

COMPRESS_INTO = "compress_into"
BITMASK = "bitmask"

_DEFAULT = Selection(((4096, 4096), (14336, 4096)), ("bf16", "fp16", "fp32"), (0.5, 0.7, 0.9))
_QUICK = Selection(((96, 130),), ("bf16", "fp32"), (0.5,))
_BUDGET = Budget(min_rounds=7, max_rounds=31, slow_rounds=3, seconds=0.3)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)
_FEWEST_INPUTS, _MOST_INPUTS = 2, 16
_WITHOUT_A_GPU = ("numpy packbits",)

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class GpuCodecResult(CodecTiming):
    """One contender in one cell on a GPU; `captured` says whether launch gaps are left out."""

    FIGURES: ClassVar[tuple[str, ...]] = CodecTiming.FIGURES

    captured: bool

    def line(self) -> str:
        """The result on one line of plain text."""
        summary = self.summary
        spread = f"[{microseconds(summary.q1_ms)}..{microseconds(summary.q3_ms)}]"
        how = "" if self.captured else ", with launches"
        return (
            f"{self.contender:<20}{self.operation:<15}{microseconds(summary.median_ms):>9} us {spread:<19}"
            f"{self.copy_ratio:>6.2f}x copy (floor {self.floor_ratio:.2f}x)"
            f"{self.bandwidth_share:>6.0%} of bandwidth{how}"
        )


@dataclass(frozen=True)
class _Entry:
    """An entrant, and the bytes of its compressed form."""

    contender: str
    operation: str
    compressed_nbytes: int
    entrant: Entrant


def run(plan: GpuPlan) -> list[GpuCodecResult]:
    """Every cell for which there is time."""
    results: list[GpuCodecResult] = []
    selection = plan.selection.over(_QUICK if plan.quick else _DEFAULT)
    for workload in plan.in_time(selection.workloads()):
        plan.say(f"\n{workload}")
        found = _cell(plan, workload)
        for result in found:
            plan.say(result.line())
        results += found
        plan.device.release()
    return results


def _cell(plan: GpuPlan, workload: Workload) -> list[GpuCodecResult]:
    needed = -(-plan.uncached_nbytes // (2 * workload.dense_nbytes))
    count = min(max(needed, _FEWEST_INPUTS), _MOST_INPUTS)
    inputs = rolled(dense_input(workload, plan.header.seed, plan.device.where), count)
    entries = [_copy(inputs), *_own(inputs)]
    for codec in [*find_peers().codecs, _masked_select()]:
        if codec.name not in _WITHOUT_A_GPU:
            entries += _peer(codec, inputs, workload, plan.say)
    budget = _QUICK_BUDGET if plan.quick else _BUDGET
    timings = contest(plan.device, [entry.entrant for entry in entries], budget, str(workload), plan.say)
    copy_ms = timings[COPY].summary.median_ms
    return [
        _result(plan, workload, entry, timings[entry.entrant.name], copy_ms)
        for entry in entries
        if entry.entrant.name in timings
    ]


def _result(plan: GpuPlan, workload: Workload, entry: _Entry, timing: Timing, copy_ms: float) -> GpuCodecResult:
    return GpuCodecResult(
        contender=entry.contender,
        dtype=workload.dtype,
        sparsity=workload.sparsity,
        summary=timing.summary,
        operation=entry.operation,
        shape=workload.shape,
        dense_nbytes=workload.dense_nbytes,
        compressed_nbytes=entry.compressed_nbytes,
        moved_nbytes=workload.dense_nbytes + entry.compressed_nbytes,
        copy_ms=copy_ms,
        copy_bandwidth=plan.header.copy_bandwidth,
        captured=timing.captured,
    )


def _copy(inputs: Sequence[Tensor]) -> _Entry:
    calls = [dense.clone for dense in inputs]
    return _Entry(COPY, COPY, inputs[0].nbytes, Entrant(COPY, calls, partial(_same_bits, inputs[0])))


def _own(inputs: Sequence[Tensor]) -> Iterable[_Entry]:
    """The parts must be those that the CPU makes, which does it with other kernels."""
    expected = ops.compress(inputs[0].cpu())
    nbytes = sum(part.nbytes for part in expected)
    packed = [ops.compress(dense) for dense in inputs]
    compress = [partial(ops.compress, dense) for dense in inputs]
    room = [_room_for(dense, parts) for dense, parts in zip(inputs, packed, strict=True)]
    into = [partial(_compress_into, *each) for each in zip(inputs, room, strict=True)]
    decompress = [partial(ops.decompress, *parts, inputs[0].shape) for parts in packed]
    same_parts, same_dense = partial(_same_parts, expected), partial(_same_bits, inputs[0])
    for entrant in (
        Entrant(COMPRESS, compress, same_parts, captured=False),
        Entrant(COMPRESS_INTO, into, same_parts),
        Entrant(DECOMPRESS, decompress, same_dense),
    ):
        yield _Entry(BITMASK, entrant.name, nbytes, entrant)


def _room_for(dense: Tensor, parts: Parts) -> Parts:
    """Buffers for the parts of any tensor of this shape."""
    _, bitmasks, row_offsets = parts
    return dense.new_empty(dense.numel()), torch.empty_like(bitmasks), torch.empty_like(row_offsets)


def _compress_into(dense: Tensor, buffers: Parts) -> tuple[Tensor, ...]:
    return (*buffers, torch.ops.bitmask.compress_into(dense, False, *buffers))


def _same_parts(expected: Parts, found: tuple[Tensor, ...]) -> bool:
    """Values may have room at the end; then a fourth tensor tells how many there are."""
    values, bitmasks, row_offsets, *nnz = found
    count = int(nnz[0]) if nnz else values.numel()
    return all(
        _same_bits(part, got.cpu())
        for part, got in zip(expected, (values[: max(count, 0)], bitmasks, row_offsets), strict=True)
    )


def _same_bits(expected: Tensor, found: Tensor) -> bool:
    same_kind = found.shape == expected.shape and found.dtype == expected.dtype
    return same_kind and torch.equal(_octets(found), _octets(expected))


def _octets(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _masked_select() -> Codec:
    """What torch has for this: a mask of bytes, `masked_select` and `masked_scatter`."""

    def compress(dense: Tensor) -> Any:
        mask = dense != 0
        return dense.masked_select(mask), mask

    def decompress(packed: Any) -> Tensor:
        values, mask = packed
        dense: Tensor = values.new_zeros(mask.shape).masked_scatter_(mask, values)
        return dense

    return Codec("torch masked_select", compress, decompress, lambda packed: sum(p.nbytes for p in packed), peer=True)


def _peer(codec: Codec, inputs: Sequence[Tensor], workload: Workload, say: Callable[[str], None]) -> list[_Entry]:
    try:
        packed = [codec.compress(dense) for dense in inputs]
        nbytes = codec.nbytes(packed[0])
    except (RuntimeError, TypeError, ValueError) as error:
        say(f"{codec.name} left out of {workload}: {error}")
        return []

    def comes_back(found: Any) -> bool:
        return _same_bits(inputs[0], codec.decompress(found))

    compress = Entrant(
        f"{codec.name} {COMPRESS}", [partial(codec.compress, dense) for dense in inputs], comes_back, False, True
    )
    decompress = Entrant(
        f"{codec.name} {DECOMPRESS}",
        [partial(codec.decompress, each) for each in packed],
        partial(_same_bits, inputs[0]),
        False,
        True,
    )
    return [
        _Entry(codec.name, operation, nbytes, entrant)
        for operation, entrant in ((COMPRESS, compress), (DECOMPRESS, decompress))
    ]


def tables(results: Sequence[GpuCodecResult]) -> Iterable[str]:
    """One table for each shape; every contender of a cell below the other."""
    columns = ("dtype", "zeros", "contender", "operation", "size", "us", "x copy", "floor", "of bandwidth")
    for shape, group in grouped(results, lambda result: shape_name(result.shape)):
        rows = [
            [
                result.dtype,
                f"{result.sparsity:.0%}",
                result.contender,
                result.operation + ("" if result.captured else " *"),
                f"{result.size_ratio:.1%}",
                microseconds(result.summary.median_ms),
                f"{result.copy_ratio:.2f}",
                f"{result.floor_ratio:.2f}",
                f"{result.bandwidth_share:.0%}",
            ]
            for result in group
        ]
        yield f"**Compress and decompress, {shape}**\n\n{markdown_table(columns, rows)}"
    if results:
        yield "\\* called as it is, launches and waits for the host included; the others are replayed as CUDA graphs."
