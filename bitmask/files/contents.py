"""What safetensors files hold: their headers, sorted into plain tensors and components of compressed ones.

A compressed tensor is four entries of a file: `P.compressed` (the values), `P.bitmask`, `P.shape`, `P.row_offsets`;
a 2:4 one is the first three, and its values have two dimensions. P is the tensor's name (releases of compressed-tensors
up to 0.8) or that name without its `.weight` (0.9 to 0.14, which compress nothing else). No header is trusted: all that
it says is checked before anything is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitmask import ops
from bitmask.calls import FormatError
from bitmask.reference import rows_and_columns

COMPONENTS = ("compressed", "bitmask", "shape", "row_offsets")
COMPONENTS_24 = COMPONENTS[:3]
WEIGHT = ".weight"

# Entries of a file's metadata, whose names begin alike.
OURS = "bitmask_"
KEY_STYLE = "bitmask_keys"  # "module" or "parameter": what P is
VERSION = "bitmask_version"  # that wrote the file
ALIAS = "bitmask_alias:"  # followed by another name of a tensor that is stored once

_MOST_DIMENSIONS = 64

# The device on which safetensors makes tensors of what it reads; it asks for none and would get torch's default one.
_ON_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, as its header declares it."""

    file: Path
    key: str
    dtype: str
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def itemsize(self) -> float:
        """Bytes of an element, which the digits of a dtype's name give in bits: BF16, F8_E4M3, C64."""
        bits = re.match(r"[A-Z]+(\d+)", self.dtype)
        return int(bits[1]) / 8 if bits else 1  # BOOL

    @property
    def nbytes(self) -> int:
        return math.ceil(self.numel * self.itemsize)

    def fault(self, message: str) -> FormatError:
        return FormatError(f"{self.file}: {self.key}: {message}")


@dataclass
class Contents:
    """What a checkpoint holds, by the names that its tensors have in the model."""

    plain: dict[str, Stored] = field(default_factory=dict)
    compressed: dict[str, dict[str, Stored]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    prefixed: bool = False  # P is the whole name of a tensor

    def names(self) -> list[str]:
        return [*self.compressed, *self.plain]


class OpenFiles:
    """Open safetensors files, each opened when it is first asked for."""

    def __init__(self, device: str, read_ahead: bool = False) -> None:
        """`read_ahead` has whole files read while the first of their tensors are worked on."""
        self._device = device
        self._read_ahead = read_ahead
        self._open: dict[Path, ExitStack] = {}
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for path in list(self._open):
            self.close(path)

    def __getitem__(self, path: Path) -> Any:
        if path not in self._open:
            with _named(path), ExitStack() as stack:
                self._handles[path] = stack.enter_context(safe_open(path, framework="pt", device=self._device))
                self._open[path] = stack.pop_all()
            if self._read_ahead:
                _read_ahead(path)
        return self._handles[path]

    def close(self, path: Path) -> None:
        """Give back what is held of a file; it may be asked for again."""
        if path in self._open:
            self._open.pop(path).close()
            del self._handles[path]

    def tensor(self, stored: Stored) -> Tensor:
        with _named(stored.file, stored.key), _ON_CPU:
            tensor: Tensor = self[stored.file].get_tensor(stored.key)
            return tensor

    def rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        """Part of the first dimension; the bounds are clamped without a word, so the caller has checked them."""
        with _named(stored.file, stored.key), _ON_CPU:
            tensor: Tensor = self[stored.file].get_slice(stored.key)[start:stop]
            return tensor

    def stored(self, file: Path) -> Iterator[Stored]:
        """What the header declares, in the order of the file's keys."""
        handle = self[file]
        for key in handle.keys():  # noqa: SIM118  # not a dict
            with _named(file, key):
                entry = handle.get_slice(key)
                yield Stored(file, key, entry.get_dtype(), tuple(entry.get_shape()))

    def metadata(self, file: Path) -> dict[str, str]:
        return dict(self[file].metadata() or {})


def _read_ahead(path: Path) -> None:
    """Ask the system to begin reading a file; advice only, where there is such a thing."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        os.close(descriptor)


@contextmanager
def _named(file: Path, key: str | None = None) -> Iterator[None]:
    """Let what safetensors refuses come out as a FormatError that names file and tensor."""
    try:
        yield
    except SafetensorError as error:
        raise FormatError(f"{file}: {f'{key}: ' if key else ''}{error}") from error


def read_contents(files: OpenFiles, shards: Mapping[Path, Collection[str]]) -> Contents:
    """Sort the keys of all files into plain tensors and components of compressed ones.

    `shards` are the files and, for each, keys that must be in it.
    """
    stored: dict[str, Stored] = {}
    for path, promised in shards.items():
        missing = set(promised)
        for entry in files.stored(path):
            if entry.key in stored:
                raise entry.fault(f"is in {stored[entry.key].file} too, expected it once")
            stored[entry.key] = entry
            missing.discard(entry.key)
        if missing:
            raise FormatError(f"{path}: {min(missing)}: is not there, expected it as the index says")

    metadata = {path: files.metadata(path) for path in shards}
    prefixes = prefixes_of(stored)
    parameter_style = _is_parameter_style(prefixes, metadata)
    contents = Contents(prefixed=parameter_style)
    for prefix in prefixes:
        name = prefix if parameter_style else prefix + WEIGHT
        parts = {component: stored.pop(f"{prefix}.{component}", None) for component in COMPONENTS}
        contents.compressed[name] = _complete(prefix, parts)
    for name in contents.compressed:
        if name in stored:
            raise stored[name].fault("is stored both dense and compressed, expected one of them")
    contents.plain = stored
    for path in shards:
        _add_aliases(contents, path, metadata[path])
    return contents


def prefixes_of(keys: Iterable[str]) -> list[str]:
    """What stands before the component names, in the order of the keys; `.shape` alone is an ordinary name."""
    ends = [key.rpartition(".") for key in keys]
    prefixes = {prefix: None for prefix, dot, end in ends if dot and end in COMPONENTS and end != "shape"}
    if prefixes:  # beside such keys a shape belongs to something
        prefixes |= {prefix: None for prefix, dot, end in ends if dot and end == "shape"}
    return list(prefixes)


def _is_parameter_style(prefixes: Iterable[str], metadata: Mapping[Path, Mapping[str, str]]) -> bool:
    """Whether prefixes are whole names of tensors; files of others do not say, but only then do any end so."""
    expected = ["module", "parameter"]
    for path, entries in metadata.items():
        told = entries.get(KEY_STYLE)
        if told is not None:
            if told not in expected:
                raise FormatError(f"{path}: metadata {KEY_STYLE!r}: got {told!r}, expected {' or '.join(expected)}")
            expected = [told]
    if len(expected) == 1:
        return expected == ["parameter"]
    return any(prefix.rpartition(".")[2] in ("weight", "bias") for prefix in prefixes)


def _add_aliases(contents: Contents, file: Path, metadata: Mapping[str, str]) -> None:
    for key, name in metadata.items():
        if not key.startswith(ALIAS):
            continue
        alias = key.removeprefix(ALIAS)
        if any(alias in names for names in (contents.compressed, contents.plain, contents.aliases)):
            raise FormatError(f"{file}: metadata {key!r}: got a name that a tensor has, expected another one")
        if name not in contents.compressed and name not in contents.plain:
            raise FormatError(f"{file}: metadata {key!r}: got the name {name!r}, which no tensor has")
        contents.aliases[alias] = name


def _complete(prefix: str, parts: Mapping[str, Stored | None]) -> dict[str, Stored]:
    """The components of one tensor: none missing, and of the dtype and rank that they must have."""
    there = {component: part for component, part in parts.items() if part is not None}
    any_part = next(iter(there.values()))
    two_four = "compressed" in there and len(there["compressed"].sizes) == 2
    needed = COMPONENTS_24 if two_four else COMPONENTS
    missing = [f"{prefix}.{component}" for component in needed if component not in there]
    if missing:
        raise FormatError(f"{any_part.file}: got {any_part.key} without {', '.join(missing)}, expected all components")
    if two_four and "row_offsets" in there:
        raise there["row_offsets"].fault("is beside values of 2 dimensions, expected none there, as 2:4 has it")
    for component, dtype in (("bitmask", "U8"), ("shape", "I64"), ("row_offsets", "I64")):
        part = there.get(component)
        if part is not None and part.dtype != dtype:
            raise part.fault(f"got dtype {part.dtype}, expected {dtype}")
    values, shape = there["compressed"], there["shape"]
    if len(values.sizes) not in (1, 2):
        raise values.fault(f"got {len(values.sizes)} dimensions, expected 1 (or 2 for 2:4)")
    if shape.sizes not in ((shape.numel,), (shape.numel, 1)) or shape.numel > _MOST_DIMENSIONS:
        raise shape.fault(f"got size {list(shape.sizes)}, expected [dimensions]")
    return there


def shape_of(files: OpenFiles, parts: Mapping[str, Stored]) -> list[int]:
    """The dense shape, held against the sizes of the components, so that no lie about it reserves memory."""
    stored = parts["shape"]
    shape: list[int] = files.tensor(stored).flatten().tolist()
    if any(size < 0 for size in shape) or math.prod(shape) >= 2**63:
        raise stored.fault(f"got {shape}, expected sizes of a tensor of less than 2^63 elements")
    rows, cols = rows_and_columns(shape)
    bitmask, offsets = parts["bitmask"], parts.get("row_offsets")
    row_bytes = -(-cols // 8)
    if list(bitmask.sizes) not in ([rows, row_bytes], ops.bitmask_sizes(shape)):
        expected = ops.bitmask_sizes(shape)
        raise bitmask.fault(f"got size {list(bitmask.sizes)}, expected {expected} for shape {shape}")
    values = parts["compressed"]
    if len(values.sizes) == 2:
        check_halved(f"{values.file}: {values.key}", values.sizes, shape)
    if cols == 0 and (offsets is None or offsets.numel != rows):
        raise stored.fault(f"got {shape}, expected a row offset for each of {rows} rows")
    if values.numel > rows * cols:
        raise values.fault(f"got {values.numel} values, expected at most {rows * cols}")
    return shape


def check_halved(name: str, value_sizes: Sequence[int], shape: Sequence[int]) -> None:
    """Raise FormatError unless values of two dimensions are half as many as a matrix of that shape has elements."""
    rows, width = value_sizes
    if [rows, 2 * width] != list(shape):
        raise FormatError(f"{name}: got size {list(value_sizes)}, expected [rows, columns / 2] for shape {list(shape)}")


def is_two_four(value_sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether the values are those of a 2:4 tensor, two for every four columns.

    Where the columns are no multiple of four, compressed-tensors lets fours reach into the next row: what it writes
    then is a bitmask without row offsets.
    """
    return len(value_sizes) == 2 and shape[-1] % 4 == 0
