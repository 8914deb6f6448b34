"""One cell of a benchmark: a copy and both directions of each codec, timed in turn on the same inputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.cases import Workload
from benchmarks.codec.peers import Codec
from benchmarks.codec.result import COMPRESS, COPY, DECOMPRESS, HUGE_PAGE_COPY, CodecResult
from benchmarks.memory import huge_page_clone
from benchmarks.timer import Budget, Contender, interleave, torch_threads


class WrongRoundTripError(RuntimeError):
    """This library did not give back the bits it was given."""


@dataclass(frozen=True)
class Setting:
    """How a cell is run.

    `copy_bandwidth` is what bytes are compared with, in GB/s; `huge_page_copy` adds a copy into huge pages.
    """

    threads: int
    budget: Budget
    copy_bandwidth: float
    huge_page_copy: bool = False


@dataclass(frozen=True)
class _Entry:
    name: str
    isa: str | None
    operation: str
    compressed_nbytes: int
    moved_nbytes: int
    contender: Contender


def measure(
    workload: Workload,
    inputs: Sequence[Tensor],
    codecs: Iterable[Codec],
    setting: Setting,
    say: Callable[[str], None],
) -> list[CodecResult]:
    """Time `dense.clone()` and the two directions of every codec; the copy comes first.

    Each codec must first bring `inputs[0]` back bit by bit: `say` tells of a peer that does not, and is left out, while
    this library raises `WrongRoundTripError`.
    """
    with torch_threads(setting.threads):
        entries = _copies(workload, inputs, setting.huge_page_copy)
        entries += _entries(workload, inputs, [codec for codec in codecs if _is_right(codec, inputs[0], workload, say)])
        summaries = interleave([entry.contender for entry in entries], len(inputs), setting.budget)
    copy_ms = summaries[0].median_ms
    return [
        CodecResult(
            contender=entry.name,
            isa=entry.isa,
            operation=entry.operation,
            shape=workload.shape,
            dtype=workload.dtype,
            sparsity=workload.sparsity,
            threads=setting.threads,
            summary=summary,
            dense_nbytes=workload.dense_nbytes,
            compressed_nbytes=entry.compressed_nbytes,
            moved_nbytes=entry.moved_nbytes,
            copy_ms=copy_ms,
            copy_bandwidth=setting.copy_bandwidth,
        )
        for entry, summary in zip(entries, summaries, strict=True)
    ]


def _is_right(codec: Codec, dense: Tensor, workload: Workload, say: Callable[[str], None]) -> bool:
    try:
        if codec.round_trips(dense):
            return True
        problem = "it changes the values"
    except (RuntimeError, TypeError, ValueError) as error:
        if not codec.peer:
            raise
        problem = str(error)
    if not codec.peer:
        raise WrongRoundTripError(f"{codec.name} {codec.isa or ''} changes the values of {workload}")
    say(f"{codec.name} left out of {workload}: {problem}")
    return False


def _copies(workload: Workload, inputs: Sequence[Tensor], huge_page_copy: bool) -> list[_Entry]:
    clones: dict[str, Callable[[Tensor], Tensor]] = {COPY: Tensor.clone}
    if huge_page_copy:
        clones[HUGE_PAGE_COPY] = huge_page_clone
    nbytes = workload.dense_nbytes
    return [
        _Entry(name, None, COPY, nbytes, 2 * nbytes, Contender(partial(_nth, clone, inputs)))
        for name, clone in clones.items()
    ]


def _entries(workload: Workload, inputs: Sequence[Tensor], codecs: Sequence[Codec]) -> list[_Entry]:
    entries: list[_Entry] = []
    packed: dict[str, list[Any]] = {}
    for codec in codecs:
        if codec.name not in packed:  # every ISA makes the same bytes
            packed[codec.name] = [codec.compress(dense) for dense in inputs]
        compressed_nbytes = codec.nbytes(packed[codec.name][0])
        calls = {
            COMPRESS: partial(_nth, codec.compress, inputs),
            DECOMPRESS: partial(_nth, codec.decompress, packed[codec.name]),
        }
        for operation, call in calls.items():
            contender = Contender(call, codec.prepare, slow=codec.peer)
            moved_nbytes = workload.dense_nbytes + compressed_nbytes
            entries.append(_Entry(codec.name, codec.isa, operation, compressed_nbytes, moved_nbytes, contender))
    return entries


def _nth(function: Callable[[Any], object], arguments: Sequence[Any], index: int) -> object:
    return function(arguments[index])
