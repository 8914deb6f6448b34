"""Checkpoints compressed and decompressed as they lie on disk, one shard at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from bitmask.calls import FormatError, check_fraction
from bitmask.files.config import BITMASK_FORMAT, DENSE_FORMAT, BitmaskConfig, check_config, format_of, quantization_of
from bitmask.files.contents import Contents, OpenFiles, read_contents
from bitmask.files.load import read_dense
from bitmask.files.save import FileContent, KeyStyle
from bitmask.files.shards import CONFIG_FILE, INDEX_FILE, read_json, shard_files, write_json
from bitmask.ops_two_four import TWO_FOUR_DTYPES
from bitmask.prune import prune_24_, prune_by_magnitude

Change = Callable[[str, Tensor], Tensor]

# Weights in other formats, which would not be those that are converted.
_OTHER_WEIGHTS = (".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")


def compress_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    compression_format: str | None = None,
    *,
    min_sparsity: float = 0.0,
    keep_negative_zero: bool = False,
    prune: float = 0.0,
    prune_24: bool = False,
    key_style: KeyStyle = "module",
    config: BitmaskConfig | None = None,
    show_progress: bool = False,
) -> dict[str, str]:
    """Compress a safetensors file, or a directory of shards with its other files, into a new file or directory.

    Args:
        source: a file or a directory, dense or compressed in either format.
        target: what to write; a directory must be absent or empty, a file is replaced.
        compression_format: "sparse-bitmask" or "sparse-24-bitmask"; by default that of `config`, or the former.
        min_sparsity, keep_negative_zero, key_style: as for `save_compressed`.
        config: what config.json is to say, but for the sparsity, which is counted.
        prune: set this fraction of the smallest magnitudes of each weight of two or more dimensions to zero first; as
            with `prune_24`, of floating-point dtypes that have a zero and a codec, others are left alone.
        prune_24: then set two of every four neighbours in a row to zero, the smallest ones, in weights that are
            matrices with columns in fours.
        show_progress: draw progress bars.

    Returns:
        Which tensors of two or more dimensions stay dense, and why.

    Raises:
        TypeError, ValueError: arguments of a wrong kind, a format that compresses nothing, or another one than that of
            `config`.
        FormatError: a source that contradicts itself, or is quantized: no loader expects bitmasks there.
        FileExistsError: a target that would be mixed with other files.

    >>> import tempfile
    >>> import torch
    >>> from bitmask import save_compressed
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_compressed({"layer.weight": torch.eye(64)}, folder / "dense", "dense")
    >>> compress_checkpoint(folder / "dense", folder / "small")
    {}
    >>> (folder / "small").stat().st_size < (folder / "dense").stat().st_size / 8
    True
    """
    check_fraction("prune", prune)
    config = _config_for(compression_format, config)

    def change(name: str, tensor: Tensor) -> Tensor:
        has_zero = tensor.is_floating_point() and tensor.dtype in TWO_FOUR_DTYPES
        if tensor.ndim < 2 or not has_zero or not name.endswith("weight"):
            return tensor
        if prune > 0:
            tensor = prune_by_magnitude(tensor, prune)
        in_fours = tensor.ndim == 2 and tensor.shape[1] % 4 == 0
        return prune_24_(tensor.clone()) if prune_24 and in_fours else tensor  # what is mapped is not written to

    def content(metadata: Mapping[str, str]) -> FileContent:
        return FileContent(config.format, key_style, min_sparsity, keep_negative_zero, metadata)

    _refuse_quantized(Path(source) / CONFIG_FILE)
    return _convert(Path(source), Path(target), content, change, config, show_progress)


def _config_for(compression_format: str | None, config: BitmaskConfig | None) -> BitmaskConfig:
    check_config("config", config)
    wanted = None if compression_format is None else format_of(compression_format)
    config = config or BitmaskConfig(wanted or BITMASK_FORMAT)
    if DENSE_FORMAT in (wanted, config.format):
        raise ValueError(f"compression_format: got {DENSE_FORMAT!r}, expected one that compresses")
    if wanted not in (None, config.format):
        raise ValueError(f"compression_format: got {wanted!r}, expected {config.format!r}, that of config")
    return config


def decompress_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, show_progress: bool = False
) -> None:
    """The inverse of `compress_checkpoint`: ordinary safetensors of dense tensors, for everything that reads those.

    Raises:
        FormatError, FileExistsError: as for `compress_checkpoint`.

    >>> import tempfile, torch
    >>> from bitmask import save_compressed
    >>> from safetensors.torch import load_file
    >>> with tempfile.TemporaryDirectory() as name:
    ...     save_compressed({"layer.weight": torch.eye(64)}, f"{name}/small.safetensors")
    ...     decompress_checkpoint(f"{name}/small.safetensors", f"{name}/dense.safetensors")
    ...     torch.equal(load_file(f"{name}/dense.safetensors")["layer.weight"], torch.eye(64))
    True
    """

    def content(metadata: Mapping[str, str]) -> FileContent:
        return FileContent(DENSE_FORMAT, metadata=metadata)

    _convert(
        Path(source), Path(target), content, lambda name, tensor: tensor, BitmaskConfig(DENSE_FORMAT), show_progress
    )


def _refuse_quantized(config: Path) -> None:
    quantization = read_json(config).get("quantization_config") if config.exists() else None
    if isinstance(quantization, dict) and quantization_of(quantization):
        raise FormatError(f"{config}: quantization_config: got quantization, expected none beside bitmasks")


def _convert(
    source: Path,
    target: Path,
    content: Callable[[Mapping[str, str]], FileContent],
    change: Change,
    config: BitmaskConfig,
    progress: bool,
) -> dict[str, str]:
    """Returns what stays dense, and why."""
    shards = shard_files(source)
    if not source.is_dir():
        return _kept_dense(_convert_shards(shards, lambda path: target, content, change, progress))
    if target.resolve().is_relative_to(source.resolve()) and target.resolve() != source.resolve():
        raise FileExistsError(f"{target}: is inside of {source}, expected a directory outside")
    with _filling(target):
        written = _convert_shards(shards, lambda path: target / path.name, content, change, progress)
        _write_index(source, target, {path.name: shard.sizes for path, shard in written.items()})
        _copy_the_rest(source, target, shards)
        zeros, elements = (sum(counts) for counts in zip(*(shard.counts for shard in written.values()), strict=True))
        sparsity = zeros / elements if elements else 0.0
        with OpenFiles("cpu") as files:
            read_contents(files, shard_files(target))  # together the shards must make sense too
        _write_config(source, target, replace(config, global_sparsity=sparsity))
    return _kept_dense(written)


@dataclass(frozen=True)
class _Written:
    """What is to be told of a shard."""

    sizes: dict[str, int]
    counts: tuple[int, int]
    kept_dense: dict[str, str]


def _kept_dense(written: Mapping[Path, _Written]) -> dict[str, str]:
    return {name: reason for shard in written.values() for name, reason in shard.kept_dense.items()}


def _convert_shards(
    shards: Mapping[Path, Collection[str]],
    target: Callable[[Path], Path],
    content: Callable[[Mapping[str, str]], FileContent],
    change: Change,
    progress: bool,
) -> dict[Path, _Written]:
    """Only one shard is in memory at a time."""
    written = {}
    with OpenFiles("cpu") as files:
        contents = read_contents(files, shards)
        for path in shards:
            shard = content(files.metadata(path))
            for name in tqdm(_names_in(contents, path), desc=path.name, unit="tensor", disable=not progress):
                shard.add(name, change(name, read_dense(files, contents, name)))
            for alias, name in contents.aliases.items():
                if _file_of(contents, name) == path:
                    shard.add_alias(alias, name)
            shard.write(target(path))
            written[path] = _Written(shard.sizes, shard.counts, shard.kept_dense)
            files.close(path)
    return written


@contextmanager
def _filling(target: Path) -> Iterator[None]:
    """A directory that is empty before, and again after an error."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: is there already, expected an empty directory or none")
    was_there = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for entry in target.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not was_there:
            target.rmdir()
        raise


def _file_of(contents: Contents, name: str) -> Path:
    """The file that a tensor is in; of a compressed one, whose components may be spread, where its values are."""
    return contents.plain[name].file if name in contents.plain else contents.compressed[name]["compressed"].file


def _names_in(contents: Contents, path: Path) -> list[str]:
    return [name for name in contents.names() if _file_of(contents, name) == path]


def _write_index(source: Path, target: Path, keys: dict[str, dict[str, int]]) -> None:
    """An index of the new keys, where the source has one."""
    if not (source / INDEX_FILE).exists():
        return
    metadata = read_json(source / INDEX_FILE).get("metadata")
    total = sum(size for sizes in keys.values() for size in sizes.values())
    weight_map = {key: name for name, sizes in keys.items() for key in sizes}
    others = metadata if isinstance(metadata, dict) else {}
    write_json(target / INDEX_FILE, {"metadata": {**others, "total_size": total}, "weight_map": weight_map})


def _copy_the_rest(source: Path, target: Path, shards: Collection[Path]) -> None:
    """Tokenizer and other files, but for weights and what is hidden, such as a repository's history of them."""
    done = {INDEX_FILE, CONFIG_FILE, *(path.name for path in shards)}
    for entry in sorted(source.iterdir()):
        other_weights = entry.suffix in _OTHER_WEIGHTS and entry.is_file()
        if entry.name in done or other_weights or entry.name.startswith(".") or entry.name.endswith(".bin.index.json"):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name)
        else:
            shutil.copy2(entry, target / entry.name)


def _write_config(source: Path, target: Path, config: BitmaskConfig) -> None:
    """The model's config.json with what it says of sparsity replaced."""
    if (source / CONFIG_FILE).exists():
        write_json(target / CONFIG_FILE, config.in_model_config(read_json(source / CONFIG_FILE)))
