"""Checkpoints examined: listed from their headers, and verified."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bitmask import ops
from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.calls import FormatError
from bitmask.files.config import BITMASK_24_FORMAT, BITMASK_FORMAT, DENSE_FORMAT
from bitmask.files.contents import OpenFiles, is_two_four, read_contents, shape_of
from bitmask.files.load import read_dense
from bitmask.files.shards import shard_files


@dataclass(frozen=True)
class StoredTensor:
    """One line of a listing; `sparsity` is the part that is not stored, None where the tensor is stored dense."""

    name: str
    format: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float | None
    dense_nbytes: int
    stored_nbytes: int


def list_checkpoint(source: str | os.PathLike[str]) -> Iterator[StoredTensor]:
    """Name, shape and sizes of every tensor, from headers and shapes alone.

    Raises:
        FormatError: a source that contradicts itself as far as that tells.

    >>> import tempfile
    >>> from bitmask import save_compressed
    >>> with tempfile.TemporaryDirectory() as name:
    ...     save_compressed({"layer.weight": torch.eye(64)}, f"{name}/small.safetensors")
    ...     [(each.name, each.sparsity, each.dense_nbytes) for each in list_checkpoint(f"{name}/small.safetensors")]
    [('layer.weight', 0.984375, 16384)]
    """
    with OpenFiles("cpu") as files:
        contents = read_contents(files, shard_files(Path(source)))
        for name, parts in contents.compressed.items():
            shape = shape_of(files, parts)
            values, numel = parts["compressed"], math.prod(shape)
            kind = BITMASK_24_FORMAT if is_two_four(values.sizes, shape) else BITMASK_FORMAT
            sparsity = 1 - values.numel / numel if numel else 0.0
            sizes = math.ceil(numel * values.itemsize), sum(part.nbytes for part in parts.values())
            yield StoredTensor(name, kind, tuple(shape), values.dtype, sparsity, *sizes)
        for name, plain in contents.plain.items():
            yield StoredTensor(name, DENSE_FORMAT, plain.sizes, plain.dtype, None, plain.nbytes, plain.nbytes)


def verify_checkpoint(
    source: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, *, show_progress: bool = False
) -> int:
    """Prove every tensor of a checkpoint consistent and, given a dense one, equal to it; returns how many there are.

    Raises:
        FormatError: the first tensor that is not, or that only one of both has.

    >>> import tempfile
    >>> from bitmask import save_compressed
    >>> with tempfile.TemporaryDirectory() as name:
    ...     save_compressed({"layer.weight": torch.eye(64)}, f"{name}/small.safetensors")
    ...     verify_checkpoint(f"{name}/small.safetensors")
    1
    """
    with OpenFiles("cpu") as files:
        contents = read_contents(files, shard_files(Path(source)))
        others = read_contents(files, shard_files(Path(against))) if against is not None else None
        names = contents.names()
        if others is not None:
            _check_same_names(str(against), {*names, *contents.aliases}, {*others.names(), *others.aliases})
        for name in tqdm(names, desc="Verifying", unit="tensor", disable=not show_progress):
            dense = read_dense(files, contents, name)
            if others is not None:
                _check_equal(name, dense, read_dense(files, others, others.aliases.get(name, name)), str(against))
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
    if tensor.numel() == 0:
        return 0
    if tensor.dtype in ops.DTYPES:
        tensor, expected = (BitmaskTensor.from_dense(each).to_dense() for each in (tensor, expected))
    bits = [each.reshape(-1).view(torch.uint8).view(each.numel(), -1) for each in (tensor, expected)]
    return int((bits[0] != bits[1]).any(dim=1).sum())
