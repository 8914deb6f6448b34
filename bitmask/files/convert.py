"""Checkpoints converted as they lie on disk: compressed, decompressed, listed and verified, one shard at a time."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.files.config import BITMASK_FORMAT, DENSE_FORMAT, BitmaskConfig
from bitmask.files.contents import Contents, OpenFiles, read_contents, shape_of
from bitmask.files.load import read_compressed
from bitmask.files.save import FileContent, KeyStyle
from bitmask.files.shards import CONFIG_FILE, INDEX_FILE, read_json, shard_files, write_json
from bitmask.ops import FormatError
from bitmask.prune import prune_by_magnitude

Change = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """One line of a listing; `sparsity` is None where the tensor is stored dense."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float | None
    dense_nbytes: int
    stored_nbytes: int


def compress_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    min_sparsity: float = 0.0,
    keep_negative_zero: bool = False,
    prune: float = 0.0,
    key_style: KeyStyle = "module",
    config: BitmaskConfig | None = None,
    show_progress: bool = False,
) -> None:
    """Compress a safetensors file, or a directory of shards with its other files, into a new file or directory.

    Args:
        source: a file or a directory.
        target: what to write; a directory must be absent or empty, a file is replaced.
        min_sparsity, keep_negative_zero, key_style: as for `save_compressed`.
        config: what config.json is to say, but for the sparsity, which is counted.
        prune: set this fraction of the smallest magnitudes of each weight of two or more dimensions to zero first.
        show_progress: draw progress bars.

    Raises:
        FormatError: a source that contradicts itself; FileExistsError: a target that would be mixed with other files.
    """
    if not 0 <= prune <= 1:
        raise ValueError(f"prune: got {prune}, expected 0 to 1")

    def change(name: str, tensor: Tensor) -> Tensor:
        weight = tensor.ndim >= 2 and tensor.is_floating_point() and name.endswith("weight")
        return prune_by_magnitude(tensor, prune) if prune > 0 and weight else tensor

    def content() -> FileContent:
        return FileContent(BITMASK_FORMAT, key_style, min_sparsity, keep_negative_zero)

    _convert(Path(source), Path(target), content, change, config or BitmaskConfig(), show_progress)


def decompress_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, show_progress: bool = False
) -> None:
    """The inverse of `compress_checkpoint`: ordinary safetensors of dense tensors, for everything that reads those."""

    def content() -> FileContent:
        return FileContent(DENSE_FORMAT)

    _convert(
        Path(source), Path(target), content, lambda name, tensor: tensor, BitmaskConfig(DENSE_FORMAT), show_progress
    )


def _convert(
    source: Path,
    target: Path,
    content: Callable[[], FileContent],
    change: Change,
    config: BitmaskConfig,
    progress: bool,
) -> None:
    paths = shard_files(source)
    is_directory = source.is_dir()
    if is_directory:
        _make_empty(target)
    with OpenFiles("cpu") as files:
        contents = read_contents(files, paths)
        zeros = elements = 0
        keys: dict[str, dict[str, int]] = {}
        for path in paths:
            shard = content()
            for name in tqdm(_names_in(contents, path), desc=path.name, unit="tensor", disable=not progress):
                shard.add(name, change(name, _dense(files, contents, name)))
            for alias, name in contents.aliases.items():
                if _file_of(contents, name) == path:
                    shard.add_alias(alias, name)
            shard.write(target / path.name if is_directory else target)
            keys[path.name] = shard.sizes
            counts = shard.counts
            zeros, elements = zeros + counts[0], elements + counts[1]
            files.close(path)
    if is_directory:
        _write_index(source, target, keys)
        _copy_the_rest(source, target, paths)
        sparsity = zeros / elements if elements and config.format == BITMASK_FORMAT else 0.0
        _write_config(source, target, replace(config, global_sparsity=sparsity))


def _make_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: is there already, expected an empty directory or none")
    target.mkdir(parents=True, exist_ok=True)


def _file_of(contents: Contents, name: str) -> Path:
    """The file that a tensor is in; of a compressed one, whose components may be spread, where its values are."""
    return contents.plain[name].file if name in contents.plain else contents.compressed[name]["compressed"].file


def _names_in(contents: Contents, path: Path) -> list[str]:
    return [name for name in contents.names() if _file_of(contents, name) == path]


def _dense(files: OpenFiles, contents: Contents, name: str) -> Tensor:
    if name in contents.plain:
        return files.tensor(contents.plain[name])
    return read_compressed(files, contents.compressed[name]).to_dense()


def _write_index(source: Path, target: Path, keys: dict[str, dict[str, int]]) -> None:
    """An index of the new keys, where the source has one."""
    if not (source / INDEX_FILE).exists():
        return
    metadata = read_json(source / INDEX_FILE).get("metadata")
    total = sum(size for sizes in keys.values() for size in sizes.values())
    weight_map = {key: name for name, sizes in keys.items() for key in sizes}
    others = metadata if isinstance(metadata, dict) else {}
    write_json(target / INDEX_FILE, {"metadata": {**others, "total_size": total}, "weight_map": weight_map})


def _copy_the_rest(source: Path, target: Path, shards: list[Path]) -> None:
    """Tokenizer and other files; weights in other formats would not be those that were converted."""
    done = {INDEX_FILE, CONFIG_FILE, *(path.name for path in shards)}
    for entry in sorted(source.iterdir()):
        other_weights = entry.suffix in (".bin", ".safetensors", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        if entry.name in done or other_weights or entry.name.endswith(".bin.index.json"):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name)
        else:
            shutil.copy2(entry, target / entry.name)


def _write_config(source: Path, target: Path, config: BitmaskConfig) -> None:
    """The model's config.json with what it says of sparsity replaced."""
    if (source / CONFIG_FILE).exists():
        write_json(target / CONFIG_FILE, config.in_model_config(read_json(source / CONFIG_FILE)))


def list_checkpoint(source: str | os.PathLike[str]) -> Iterator[StoredTensor]:
    """Name, shape and sizes of every tensor, from headers and shapes alone."""
    with OpenFiles("cpu") as files:
        contents = read_contents(files, shard_files(Path(source)))
        for name, parts in contents.compressed.items():
            shape = shape_of(files, parts)
            values, numel = parts["compressed"], math.prod(shape)
            sparsity = 1 - values.numel / numel if numel else 0.0
            stored = sum(part.nbytes for part in parts.values())
            yield StoredTensor(name, tuple(shape), values.dtype, sparsity, math.ceil(numel * values.itemsize), stored)
        for name, plain in contents.plain.items():
            yield StoredTensor(name, plain.sizes, plain.dtype, None, plain.nbytes, plain.nbytes)


def verify_checkpoint(
    source: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, *, show_progress: bool = False
) -> int:
    """Prove every tensor of a checkpoint consistent and, given a dense one, equal to it; returns how many there are.

    Raises:
        FormatError: the first tensor that is not, or that only one of both has.
    """
    with OpenFiles("cpu") as files:
        contents = read_contents(files, shard_files(Path(source)))
        others = read_contents(files, shard_files(Path(against))) if against is not None else None
        names = contents.names()
        if others is not None:
            _check_same_names(str(against), {*names, *contents.aliases}, {*others.names(), *others.aliases})
        for name in tqdm(names, desc="Verifying", unit="tensor", disable=not show_progress):
            dense = _dense(files, contents, name)
            if others is not None:
                _check_equal(name, dense, _dense(files, others, others.aliases.get(name, name)), str(against))
    return len(names)


def _check_same_names(against: str, names: set[str], others: set[str]) -> None:
    for missing in sorted(others - names):
        raise FormatError(f"{missing}: is only in {against}")
    for extra in sorted(names - others):
        raise FormatError(f"{extra}: is not in {against}")


def _check_equal(name: str, tensor: Tensor, expected: Tensor, against: str) -> None:
    kinds = [(tuple(each.shape), each.dtype) for each in (tensor, expected)]
    if kinds[0] != kinds[1]:
        raise FormatError(f"{name}: got shape and dtype {kinds[0]}, expected {kinds[1]} as in {against}")
    differing = _differing(tensor, expected)
    if differing:
        raise FormatError(f"{name}: {differing} of {tensor.numel()} elements differ from those in {against}")


def _differing(tensor: Tensor, expected: Tensor) -> int:
    """Elements whose bits differ, but for zeros of either sign: what compressing them by default leaves equal."""
    compressed = [BitmaskTensor.from_dense(each) for each in (tensor, expected)]
    bits = [each.to_dense().view(-1).view(torch.uint8).view(tensor.numel(), -1) for each in compressed]
    return int((bits[0] != bits[1]).any(dim=1).sum()) if tensor.numel() else 0
