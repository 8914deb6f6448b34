"""Reading checkpoints: whole, tensor by tensor, or some rows of one tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from bitmask import ops_two_four
from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.calls import FormatError
from bitmask.compressed_tensor import CompressedTensor
from bitmask.files.config import DENSE_FORMAT, BitmaskConfig, check_config
from bitmask.files.contents import (
    COMPONENTS_24,
    Contents,
    OpenFiles,
    Stored,
    check_halved,
    is_two_four,
    read_contents,
    shape_of,
)
from bitmask.files.shards import shard_files
from bitmask.reference import rows_and_columns
from bitmask.semi_structured import SemiStructuredTensor


def load_compressed(
    path: str | os.PathLike[str],
    compression_config: BitmaskConfig | None = None,
    *,
    decompress: bool = True,
    device: str | torch.device = "cpu",
    show_progress: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a safetensors file, or of a directory of shards, one tensor in memory at a time.

    Args:
        path: a file, or a directory with `model.safetensors` or `model.safetensors.index.json`.
        compression_config: unused but for its format, which the files must not contradict; they say all by themselves.
        decompress: yield dense tensors; otherwise what is stored compressed comes as a BitmaskTensor or, in 2:4 form
            and where that has kernels, as a SemiStructuredTensor.
        device: where the tensors go.
        show_progress: draw a progress bar.

    Raises:
        TypeError, ValueError: another config, or device meta.
        FormatError: a file that contradicts itself; names file, tensor, what was got and what was expected.
        OSError: a file that is missing or cannot be read.

    >>> import tempfile
    >>> from bitmask import save_compressed
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_compressed({"layer.weight": torch.eye(64)}, path)
    >>> for name, tensor in load_compressed(path):
    ...     print(name, torch.equal(tensor, torch.eye(64)))
    layer.weight True
    """
    check_config("compression_config", compression_config)
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("device: got meta, expected one that has memory; list_checkpoint reads no more than shapes")
    shards = shard_files(Path(path))
    with OpenFiles(str(device), read_ahead=True) as files:
        contents = read_contents(files, shards)
        if compression_config is not None and compression_config.format == DENSE_FORMAT and contents.compressed:
            name = next(iter(contents.compressed))
            raise FormatError(f"{path}: {name}: is stored compressed, expected format {DENSE_FORMAT!r} as configured")
        other_names: dict[str, list[str]] = {}
        for alias, name in contents.aliases.items():
            other_names.setdefault(name, []).append(alias)
        for name in tqdm(contents.names(), desc="Loading", unit="tensor", disable=not show_progress):
            tensor: Tensor
            if name in contents.compressed:
                compressed = read_compressed(files, contents.compressed[name])
                tensor = compressed.to_dense() if decompress else compressed
            else:
                tensor = files.tensor(contents.plain[name])
            for known_as in (name, *other_names.get(name, ())):
                yield known_as, tensor


def load_rows(path: str | os.PathLike[str], name: str, start: int, stop: int, *, decompress: bool = True) -> Tensor:
    """Rows [start, stop) of one tensor of two or more dimensions, of which only their bytes and row offsets are read.

    So the rows before them are not proven to have as many values as the row offsets say; `load_compressed` and
    `python -m bitmask verify` prove all. `decompress` is as for `load_compressed`.

    Raises:
        KeyError: no tensor of that name.
        IndexError: rows outside of the tensor.
        FormatError: a file that contradicts itself.

    >>> import tempfile
    >>> from bitmask import save_compressed
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_compressed({"layer.weight": torch.eye(64)}, path)
    >>> torch.equal(load_rows(path, "layer.weight", 8, 16), torch.eye(64)[8:16])
    True
    """
    with OpenFiles("cpu") as files:
        contents = read_contents(files, shard_files(Path(path)))
        name = contents.aliases.get(name, name)
        if name in contents.plain:
            stored = contents.plain[name]
            _check_rows(name, stored.sizes, start, stop)
            return files.rows(stored, start, stop)
        if name not in contents.compressed:
            raise KeyError(f"{path}: no tensor named {name!r}")
        parts = contents.compressed[name]
        shape = shape_of(files, parts)
        _check_rows(name, shape, start, stop)
        rows = _read_rows(files, parts, shape, start, stop)
    return rows.to_dense() if decompress else rows


def _check_rows(name: str, shape: Sequence[int], start: int, stop: int) -> None:
    if len(shape) < 2:
        raise IndexError(f"{name}: got {len(shape)} dimensions, expected 2 or more")
    if not 0 <= start <= stop <= shape[0]:
        raise IndexError(f"{name}: got rows {start} to {stop}, expected some of 0 to {shape[0]}")


def _read_rows(
    files: OpenFiles, parts: Mapping[str, Stored], shape: Sequence[int], start: int, stop: int
) -> CompressedTensor:
    """Rows of the first dimension, proven as far as their own bits and all row offsets tell."""
    rows = torch.tensor([stop - start, *shape[1:]], device="cpu")
    if is_two_four(parts["compressed"].sizes, shape):
        stored = {component: parts[component] for component in ("compressed", "bitmask")}
        cut = {component: files.rows(part, start, stop) for component, part in stored.items()}
        return _assemble_of(parts, {**cut, "shape": rows})
    inner, cols = math.prod(shape[1:-1]), shape[-1]
    per_row = 1 if parts["bitmask"].sizes[0] == shape[0] else inner  # leading sizes of the bitmask, per row
    bitmasks = files.rows(parts["bitmask"], start * per_row, stop * per_row)
    counts = _row_counts(bitmasks, cols)
    if _has_row_offsets(parts, rows_and_columns(shape)[0]):
        begin = _checked_offsets(files, parts, counts, start * inner, cols)
    else:
        begin = int(_row_counts(files.rows(parts["bitmask"], 0, start * per_row), cols).sum())
    values, end = parts["compressed"], begin + int(counts.sum())
    if end > values.numel:
        raise values.fault(f"got {values.numel} values, expected {end} or more for rows {start} to {stop}")
    part = _flat_values(files, values, begin, end)
    found = {"compressed": part, "bitmask": bitmasks, "shape": rows, "row_offsets": _exclusive_sums(counts)}
    return _assemble_of(parts, found)


def _checked_offsets(files: OpenFiles, parts: Mapping[str, Stored], counts: Tensor, first: int, cols: int) -> int:
    """Where the values of row `first` begin, of rows that have `counts` values."""
    offsets = parts["row_offsets"]
    nnz = parts["compressed"].numel
    bounds = torch.cat([files.tensor(offsets), torch.tensor([nnz], device="cpu")])
    in_order = int(bounds[0]) == 0 or offsets.numel == 0
    in_order = in_order and bool((bounds >= 0).all()) and bool((bounds <= nnz).all())
    lengths = bounds.diff()
    if not in_order or bool((lengths < 0).any()) or bool((lengths > cols).any()):
        raise offsets.fault(f"got offsets that are not 0 first, in order, at most {cols} apart and below {nnz}")
    wrong = (lengths[first : first + len(counts)] != counts).nonzero()
    if len(wrong) > 0:
        row = int(wrong[0])
        raise offsets.fault(f"got {lengths[first + row]} values for row {first + row}, expected {counts[row]}")
    return int(bounds[first])


def _flat_values(files: OpenFiles, values: Stored, begin: int, end: int) -> Tensor:
    """Values [begin, end) of the flattened component."""
    if len(values.sizes) == 1:
        return files.rows(values, begin, end)
    width = max(values.sizes[1], 1)
    first = begin // width
    return files.rows(values, first, -(-end // width)).flatten()[begin - first * width : end - first * width]


def _row_counts(bitmasks: Tensor, cols: int) -> Tensor:
    """Set bits of each row: popcounts by adding neighbouring bits, pairs and nibbles of each byte."""
    row_bytes = -(-cols // 8)
    bits = bitmasks.reshape(bitmasks.numel() // max(row_bytes, 1), row_bytes)
    pairs = (bits & 0x55) + (bits >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return ((nibbles & 0x0F) + (nibbles >> 4)).sum(dim=1, dtype=torch.int64)


def _has_row_offsets(parts: Mapping[str, Stored], rows: int) -> bool:
    """Early releases wrote row offsets of another meaning for other than two dimensions, and 2:4 has none."""
    offsets = parts.get("row_offsets")
    return offsets is not None and offsets.sizes == (rows,)


def read_compressed(files: OpenFiles, parts: Mapping[str, Stored]) -> CompressedTensor:
    """One compressed tensor, proven."""
    shape_of(files, parts)  # held against the headers before anything larger is read
    return _assemble_of(parts, {component: files.tensor(part) for component, part in parts.items()})


def _assemble_of(parts: Mapping[str, Stored], components: Mapping[str, Tensor]) -> CompressedTensor:
    """`assemble`, naming the file too in what it raises."""
    values = parts["compressed"]
    return assemble(f"{values.file}: {values.key}", components)


def read_dense(files: OpenFiles, contents: Contents, name: str) -> Tensor:
    """One tensor, dense however it is stored."""
    if name in contents.plain:
        return files.tensor(contents.plain[name])
    return read_compressed(files, contents.compressed[name]).to_dense()


def assemble(name: str, components: Mapping[str, Tensor]) -> CompressedTensor:
    """The tensor of its components, proven: a SemiStructuredTensor if they are of 2:4 form, else a BitmaskTensor.

    Where there are kernels for a BitmaskTensor only, what is 2:4 is one, too.

    Raises:
        FormatError: components that are missing or contradict each other.
    """
    missing = set(COMPONENTS_24) - components.keys()
    if missing:
        raise FormatError(f"{name}: got no {', '.join(sorted(missing))}, expected all components")
    shape, values = components["shape"].flatten().tolist(), components["compressed"]
    if any(size < 0 for size in shape):
        raise FormatError(f"{name}: got shape {shape}, expected no negative size")
    if values.ndim == 2:
        check_halved(name, values.shape, shape)
    try:
        if is_two_four(values.shape, shape):
            if values.device.type in ops_two_four.DEVICES:
                return SemiStructuredTensor.from_parts(values, components["bitmask"])
            two_four = SemiStructuredTensor.from_parts(values.cpu(), components["bitmask"].cpu())
            return cast(BitmaskTensor, two_four.to_bitmask().to(values.device))
        return _bitmask(values, components["bitmask"], components.get("row_offsets"), shape)
    except (TypeError, ValueError) as error:
        raise FormatError(_named_as_stored(name, str(error))) from error


def _named_as_stored(name: str, fault: str) -> str:
    """What is wrong, of the component that is at fault: files call the metadata of 2:4 a bitmask."""
    stored = fault.removeprefix("metadata: ")
    return f"{name}: {fault}" if stored == fault else f"{name.removesuffix('.compressed')}.bitmask: {stored}"


def _bitmask(values: Tensor, bitmasks: Tensor, row_offsets: Tensor | None, shape: Sequence[int]) -> BitmaskTensor:
    """Row offsets are counted anew where they are of another meaning, or where there need not be any."""
    rows, cols = rows_and_columns(shape)
    if bitmasks.numel() != rows * -(-cols // 8):
        raise FormatError(f"got a bitmask of {bitmasks.numel()} bytes, expected {rows * -(-cols // 8)}")
    if row_offsets is None and values.ndim == 1:
        raise FormatError("got no row_offsets, expected all components")
    if row_offsets is None or tuple(row_offsets.shape) != (rows,):
        row_offsets = _exclusive_sums(_row_counts(bitmasks, cols))
    return BitmaskTensor.from_parts(values.flatten(), bitmasks, row_offsets, shape)


def _exclusive_sums(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
