"""One checkpoint in a temporary directory: written and read by each contender in turn."""

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.cases import Workload, dense_input, rolled
from benchmarks.checkpoints.result import (
    BITMASK,
    CONVERT,
    COPIED,
    DENSE,
    KEPT,
    LOAD_COLD,
    LOAD_WARM,
    PEER,
    SAVE,
    CheckpointResult,
)
from benchmarks.memory import peak_growth
from benchmarks.timer import Budget, Contender, Summary, interleave, torch_threads
from bitmask import load_compressed, save_compressed
from bitmask.files import compress_checkpoint


class WrongCheckpointError(RuntimeError):
    """This library did not load what it saved."""


@dataclass(frozen=True)
class Setting:
    """How a checkpoint is made and timed: `count` matrices of the workload, in `shards` files where it is converted."""

    count: int
    shards: int
    threads: int
    budget: Budget
    peer: bool


def measure(workload: Workload, setting: Setting, say: Callable[[str], None]) -> list[CheckpointResult]:
    """Every contender's save and loads, and the conversion of a directory."""
    tensors = dict(_tensors(workload, setting.count))
    with tempfile.TemporaryDirectory() as name, torch_threads(setting.threads):
        cell = _Cell(workload, setting, tensors, Path(name))
        results = [*cell.saves(), *cell.loads(LOAD_COLD), *cell.loads(LOAD_WARM), cell.conversion()]
    for result in results:
        say(result.line())
    return results


def _tensors(workload: Workload, count: int) -> Iterator[tuple[str, Tensor]]:
    for index, tensor in enumerate(rolled(dense_input(workload), count)):
        yield f"layers.{index}.weight", tensor


def _ignore_index(call: Callable[[], object], index: int) -> object:
    return call()


def _forget(path: Path) -> None:
    """Write a file through, and drop it from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _synced(path: Path) -> None:
    """What this library does at the end of a save, for contenders that leave it to the system."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class _Cell:
    """The files of one checkpoint, and the contenders that write and read them."""

    def __init__(self, workload: Workload, setting: Setting, tensors: Mapping[str, Tensor], directory: Path) -> None:
        self._workload, self._setting, self._tensors, self._directory = workload, setting, dict(tensors), directory
        self._paths = {name: directory / f"{index}.safetensors" for index, name in enumerate((DENSE, BITMASK, PEER))}
        self._paths |= {KEPT: self._paths[BITMASK], COPIED: self._paths[DENSE]}
        self._dense_nbytes = sum(tensor.nbytes for tensor in tensors.values())

    def saves(self) -> list[CheckpointResult]:
        """Tensors in memory to a file on disk."""
        calls: dict[str, Callable[[], object]] = {DENSE: self._save_dense, BITMASK: self._save}
        if self._setting.peer:
            calls[PEER] = self._save_by_peer
        results = self._time(SAVE, {name: (call, lambda: None) for name, call in calls.items()})
        self._check()
        return results

    def loads(self, operation: str) -> list[CheckpointResult]:
        """A file to dense tensors in memory; `KEPT` leaves them compressed."""
        paths = self._paths
        calls: dict[str, Callable[[], object]] = {
            DENSE: lambda: _touched(load_file(paths[DENSE])),
            COPIED: lambda: {name: tensor.clone() for name, tensor in load_file(paths[DENSE]).items()},
            BITMASK: lambda: dict(load_compressed(paths[BITMASK])),
            KEPT: lambda: dict(load_compressed(paths[BITMASK], decompress=False)),
        }
        if self._setting.peer:
            calls[PEER] = self._load_by_peer

        def prepare(name: str) -> Callable[[], object]:
            return (lambda: _forget(paths[name])) if operation == LOAD_COLD else (lambda: None)

        return self._time(operation, {name: (call, prepare(name)) for name, call in calls.items()})

    def conversion(self) -> CheckpointResult:
        """A directory of shards compressed into another, once, with the growth of the process."""
        source, target = self._directory / "source", self._directory / "target"
        source.mkdir()
        names = list(self._tensors)
        weight_map: dict[str, str] = {}
        for shard in range(self._setting.shards):
            file = f"model-{shard + 1:05d}-of-{self._setting.shards:05d}.safetensors"
            part = names[shard :: self._setting.shards]
            save_file({name: self._tensors[name] for name in part}, source / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        self._tensors.clear()
        milliseconds, peak = peak_growth(lambda: compress_checkpoint(source, target))
        stored = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        summary = Summary.of([milliseconds])
        return self._result(CONVERT, BITMASK, summary, None, stored, peak, self._dense_nbytes // self._setting.shards)

    def _time(
        self, operation: str, calls: Mapping[str, tuple[Callable[[], object], Callable[[], object]]]
    ) -> list[CheckpointResult]:
        contenders = [
            Contender(partial(_ignore_index, call), prepare, slow=name == PEER)
            for name, (call, prepare) in calls.items()
        ]
        summaries = dict(zip(calls, interleave(contenders, 1, self._setting.budget), strict=True))
        dense_ms = summaries[DENSE].median_ms
        return [
            self._result(operation, name, summary, dense_ms, self._paths[name].stat().st_size)
            for name, summary in summaries.items()
        ]

    def _result(
        self,
        operation: str,
        contender: str,
        summary: Summary,
        dense_ms: float | None,
        file_nbytes: int,
        peak_nbytes: int | None = None,
        shard_nbytes: int | None = None,
    ) -> CheckpointResult:
        return CheckpointResult(
            contender=contender,
            dtype=self._workload.dtype,
            sparsity=self._workload.sparsity,
            threads=self._setting.threads,
            summary=summary,
            operation=operation,
            dense_nbytes=self._dense_nbytes,
            file_nbytes=file_nbytes,
            dense_ms=dense_ms,
            peak_nbytes=peak_nbytes,
            shard_nbytes=shard_nbytes,
        )

    def _check(self) -> None:
        for name, tensor in load_compressed(self._paths[BITMASK]):
            if not torch.equal(tensor, self._tensors[name]):
                raise WrongCheckpointError(f"{name} is not what was saved")

    def _save_dense(self) -> None:
        save_file(self._tensors, self._paths[DENSE])
        _synced(self._paths[DENSE])

    def _save(self) -> None:
        save_compressed(self._tensors, self._paths[BITMASK])

    def _save_by_peer(self) -> None:
        save_file(_peer().compress(self._tensors), self._paths[PEER])
        _synced(self._paths[PEER])

    def _load_by_peer(self) -> object:
        return dict(_peer().decompress(str(self._paths[PEER])))


def _touched(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read a byte of every page: what is only mapped has not been loaded yet."""
    for tensor in tensors.values():
        tensor.view(torch.uint8).flatten()[:: os.sysconf("SC_PAGESIZE")].sum()
    return tensors


def _peer() -> Any:
    """The compressor of compressed-tensors for whole state dicts."""
    compressors = importlib.import_module("compressed_tensors.compressors")
    config = importlib.import_module("compressed_tensors.config").BitmaskConfig()
    return compressors.BaseCompressor.load_from_registry("sparse-bitmask", config=config)
