"""Writing safetensors files whose weights are stored compressed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm import tqdm

from bitmask import ops, ops_two_four
from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.calls import check_fraction
from bitmask.compressed_tensor import CompressedTensor
from bitmask.files.config import BITMASK_24_FORMAT, BITMASK_FORMAT, DENSE_FORMAT, format_of
from bitmask.files.contents import ALIAS, COMPONENTS, COMPONENTS_24, KEY_STYLE, OURS, VERSION, WEIGHT, prefixes_of
from bitmask.files.replacing import replacing
from bitmask.semi_structured import SemiStructuredTensor

KeyStyle = Literal["module", "parameter"]


class FileContent:
    """What one safetensors file is going to hold; arguments and errors are those of `save_compressed`."""

    def __init__(
        self,
        compression_format: str = BITMASK_FORMAT,
        key_style: KeyStyle = "module",
        min_sparsity: float = 0.0,
        keep_negative_zero: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._format = format_of(compression_format)
        if key_style not in ("module", "parameter"):
            raise ValueError(f"key_style: got {key_style!r}, expected 'module' or 'parameter'")
        check_fraction("min_sparsity", min_sparsity)
        _check_metadata(metadata)
        self._style = key_style
        self._min_sparsity = min_sparsity
        self._keep_negative_zero = keep_negative_zero
        others = {key: text for key, text in (metadata or {}).items() if not key.startswith(OURS)}
        self._header = {"format": "pt", **others, VERSION: version("bitmask")}
        if self._format != DENSE_FORMAT:
            self._header[KEY_STYLE] = key_style
        self._entries: dict[str, Tensor] = {}
        self._prefixes: set[str] = set()
        self._zeros = self._elements = 0
        self.kept_dense: dict[str, str] = {}  # which tensors of two or more dimensions are not compressed, and why

    @property
    def counts(self) -> tuple[int, int]:
        """How many elements of the tensors are zero, and how many there are; not counted where all are stored dense."""
        return self._zeros, self._elements

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each entry."""
        return {key: entry.nbytes for key, entry in self._entries.items()}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in a tensor, compressed if it is one to compress."""
        compressed = self._compressed(name, tensor)
        if compressed is None:
            self._add_entry(name, tensor.to_dense() if isinstance(tensor, CompressedTensor) else tensor)
            return
        prefix = name.removesuffix(WEIGHT) if self._style == "module" else name
        for component, part in _components_of(compressed).items():
            self._add_entry(f"{prefix}.{component}", part)
        self._prefixes.add(prefix)

    def add_alias(self, name: str, of: str) -> None:
        """Take in another name of a tensor."""
        self._header[ALIAS + name] = of

    def write(self, path: str | os.PathLike[str]) -> None:
        """Replace the file, whole or not at all."""
        for prefix in prefixes_of(self._entries):
            if prefix not in self._prefixes:
                raise ValueError(f"{prefix}: got a tensor named like a component of it, expected none")
        with replacing(path) as temporary:
            try:
                save_file(_unshared(self._entries), temporary, self._header)
            except KeyError as error:
                raise TypeError(f"{path}: got dtype {error}, which safetensors files cannot hold") from error

    def _compressed(self, name: str, tensor: Tensor) -> BitmaskTensor | SemiStructuredTensor | None:
        """What to store of a tensor, or None if it is to be stored dense."""
        if self._format == DENSE_FORMAT:
            return None
        compress = _as_two_four if self._format == BITMASK_24_FORMAT else _as_bitmask
        candidate = compress(tensor, self._keep_negative_zero)
        zeros = _zeros_of(tensor if isinstance(candidate, str) else candidate)
        self._elements += tensor.numel()
        self._zeros += zeros
        reason = candidate if isinstance(candidate, str) else self._reason_against(name, tensor, candidate, zeros)
        if not isinstance(candidate, str) and not reason:
            return candidate
        if tensor.ndim >= 2:
            self.kept_dense[name] = reason
        return None

    def _reason_against(self, name: str, tensor: Tensor, compressed: CompressedTensor, zeros: int) -> str:
        """Why a tensor is to be stored dense that could be stored compressed; empty if nothing speaks against it."""
        if self._style == "module" and not name.endswith(WEIGHT):
            return f"its name does not end in {WEIGHT}"
        if isinstance(tensor, CompressedTensor):
            return ""
        if compressed.compressed_nbytes >= tensor.nbytes:
            return "it would not shrink"
        sparsity = zeros / tensor.numel()
        return f"{sparsity:.2%} of it is zero" if sparsity < self._min_sparsity else ""

    def _add_entry(self, key: str, tensor: Tensor) -> None:
        if key in self._entries:
            raise ValueError(f"{key}: is an entry of two tensors, expected names that differ")
        self._entries[key] = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _as_bitmask(tensor: Tensor, keep_negative_zero: bool) -> BitmaskTensor | str:
    """A tensor as a bitmask, or why there is none."""
    if isinstance(tensor, BitmaskTensor | SemiStructuredTensor):
        return tensor.to_bitmask() if isinstance(tensor, SemiStructuredTensor) else tensor
    if tensor.dtype not in ops.DTYPES:
        return f"there is no bitmask of {tensor.dtype}"
    if tensor.numel() == 0 or tensor.ndim == 0:
        return "it has no elements in rows"
    return BitmaskTensor.from_dense(tensor, keep_negative_zero=keep_negative_zero)


def _as_two_four(tensor: Tensor, keep_negative_zero: bool) -> SemiStructuredTensor | str:
    """A matrix in 2:4 form, or why it has none."""
    shape = tuple(tensor.shape)
    if tensor.ndim != 2 or tensor.numel() == 0 or shape[1] % 4 != 0:
        return f"its shape is {shape}, not that of a matrix whose columns are a multiple of 4"
    if tensor.dtype not in ops_two_four.TWO_FOUR_DTYPES:
        return f"there is no 2:4 form of {tensor.dtype}"
    if isinstance(tensor, SemiStructuredTensor):
        return tensor
    given = isinstance(tensor, BitmaskTensor)  # which stores -0.0 only if it is to be kept
    dense = (tensor.to_dense() if given else tensor).cpu()  # where there are kernels for it, and a file is written from
    try:
        return SemiStructuredTensor.from_dense(dense, keep_negative_zero=given or keep_negative_zero)
    except ValueError as error:
        return str(error).removeprefix("dense: ")  # the argument's name


def _zeros_of(tensor: Tensor) -> int:
    """How many elements are zero; none where that cannot be told."""
    if isinstance(tensor, BitmaskTensor):
        return tensor.numel() - tensor.nnz
    stored = tensor.values if isinstance(tensor, SemiStructuredTensor) else tensor
    if stored.dtype not in ops.DTYPES:
        return 0
    return tensor.numel() - ops.compress(stored.detach())[0].numel()


def _components_of(tensor: BitmaskTensor | SemiStructuredTensor) -> dict[str, Tensor]:
    shape = torch.tensor(list(tensor.shape), dtype=torch.int64, device="cpu")
    if isinstance(tensor, SemiStructuredTensor):  # whose shape is a column in files
        return dict(zip(COMPONENTS_24, (tensor.values, tensor.metadata, shape[:, None]), strict=True))
    parts = (tensor.values, tensor.bitmasks, shape, tensor.row_offsets)
    return dict(zip(COMPONENTS, parts, strict=True))


def save_compressed(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    compression_format: str = BITMASK_FORMAT,
    *,
    key_style: KeyStyle | None = None,
    min_sparsity: float = 0.0,
    keep_negative_zero: bool = False,
    metadata: Mapping[str, str] | None = None,
    show_progress: bool = False,
) -> None:
    """Write tensors to a safetensors file, compressed where that makes it smaller.

    The file replaces an old one whole or not at all. Tensors that are one tensor under several names are stored once.

    Args:
        tensors: dense ones are compressed if at least `min_sparsity` of them is zero and it saves bytes; a
            compressed one is written as it is, or in the other format where that is the file's.
        path: the file; its directory must exist.
        compression_format: "sparse-bitmask"; "sparse-24-bitmask", which compresses matrices that are 2:4 and leaves all
            else dense; or "dense" for an ordinary file of dense tensors.
        key_style: "module" writes `layer.bitmask` for `layer.weight`, as the latest releases of compressed-tensors do,
            and compresses nothing but weights; "parameter" writes `layer.weight.bitmask`, as the early ones did. By
            default "module", unless no name ends in `.weight`, or that of a compressed tensor does not.
        min_sparsity: fraction of zeros, 0 to 1, below which a tensor stays dense.
        keep_negative_zero: store -0.0, which by default comes back as +0.0.
        metadata: more text for the file's header.
        show_progress: draw a progress bar.

    Raises:
        TypeError, ValueError: arguments of a wrong kind; FormatError: an unknown format.
        OSError: the file cannot be written; an old one is untouched then.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_compressed({"layer.weight": torch.eye(64)}, path)
    >>> os.path.getsize(path) < torch.eye(64).nbytes / 8
    True
    """
    _check_tensors(tensors)
    style = _style_for(tensors) if key_style is None else key_style
    content = FileContent(compression_format, style, min_sparsity, keep_negative_zero, metadata)
    first_names: dict[Any, str] = {}
    for name, tensor in tqdm(tensors.items(), desc="Compressing", unit="tensor", disable=not show_progress):
        first = first_names.setdefault(_identity(tensor), name)
        if first == name:
            content.add(name, tensor)
        else:
            content.add_alias(name, first)
    content.write(path)


def save_compressed_model(
    model: nn.Module, path: str | os.PathLike[str], compression_format: str = BITMASK_FORMAT, **options: Any
) -> None:
    """Write the `state_dict` of a model; options and errors as for `save_compressed`.

    >>> import tempfile
    >>> from bitmask import load_compressed
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_compressed_model(nn.Sequential(nn.Linear(3, 2)), path)
    >>> [name for name, tensor in load_compressed(path)]
    ['0.bias', '0.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    save_compressed(model.state_dict(), path, compression_format, **options)


def _check_metadata(metadata: Mapping[str, str] | None) -> None:
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"metadata: got {type(metadata).__name__}, expected a mapping of str to str")
    for entry in (metadata or {}).items():
        if not all(isinstance(text, str) for text in entry):
            raise TypeError(f"metadata: got the entry {entry!r}, expected two of str")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    if not hasattr(tensors, "items"):  # nn.ParameterDict has, and is no Mapping
        raise TypeError(f"tensors: got {type(tensors).__name__}, expected a mapping of names to tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: got the name {name!r}, expected a str")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.is_meta:
            raise ValueError(f"{name}: got a meta tensor, expected one with data")
        if isinstance(tensor, CompressedTensor):
            continue
        if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"{name}: got a {type(tensor).__name__} of layout {tensor.layout}, expected a dense (strided) tensor"
            )


def _style_for(tensors: Mapping[str, Tensor]) -> KeyStyle:
    fits = [name.endswith(WEIGHT) for name in tensors]
    must = [fit for fit, tensor in zip(fits, tensors.values(), strict=True) if isinstance(tensor, CompressedTensor)]
    return "module" if any(fits) and all(must) else "parameter"


def _identity(tensor: Tensor) -> Any:
    """Equal for two names of one tensor."""
    if isinstance(tensor, CompressedTensor):
        return id(tensor._held)
    if tensor.numel() == 0:
        return id(tensor)
    lazy = tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, lazy


def _unshared(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries that share memory with no other, as safetensors asks; the first one of each storage stays as it is."""
    seen: set[int] = set()
    unshared = {}
    for key, tensor in entries.items():
        pointer = tensor.untyped_storage().data_ptr()
        unshared[key] = tensor.clone() if tensor.numel() > 0 and pointer in seen else tensor
        seen.add(pointer)
    return unshared
