"""The contenders: this library, its slow reference, and what one might use instead.

Peers are optional: one that cannot be imported is skipped in a word. Each is used the way its documentation shows,
except that numpy works on the integers under the elements: it knows neither bfloat16 nor fp8, and is faster that way.
"""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bitmask
from bitmask.reference import NaiveBitmaskTensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(dense: Tensor, back: Tensor) -> bool:
    """Whether a round trip was lossless."""
    return torch.equal(back.contiguous().view(torch.uint8), dense.view(torch.uint8))


@dataclass(frozen=True)
class Codec:
    """A way to compress a dense matrix and get it back; `isa` is forced before each call, where given.

    `brings_back(dense, back)` says whether that is what should come back.
    """

    name: str
    compress: Callable[[Tensor], Any]
    decompress: Callable[[Any], Tensor]
    nbytes: Callable[[Any], int]
    isa: str | None = None
    peer: bool = False
    brings_back: Callable[[Tensor, Tensor], bool] = same_bits

    def prepare(self) -> None:
        """Force the instruction set this codec stands for."""
        if self.isa is not None:
            bitmask.set_isa(self.isa)

    def round_trips(self, dense: Tensor) -> bool:
        """Whether decompressing what was compressed gives what it should."""
        self.prepare()
        back = self.decompress(self.compress(dense))
        return back.shape == dense.shape and back.dtype == dense.dtype and self.brings_back(dense, back)


@dataclass(frozen=True)
class Peers:
    """The peers found, and for every known one its version or why it is skipped."""

    codecs: tuple[Codec, ...]
    status: dict[str, str]


def bitmask_codec(isa: str) -> Codec:
    """This library, with the given instruction set."""
    return Codec(
        "bitmask",
        bitmask.BitmaskTensor.from_dense,
        lambda packed: packed.to_dense(),
        lambda packed: packed.compressed_nbytes,
        isa=isa,
    )


def naive_codec() -> Codec:
    """The pure-torch reference of this library."""
    return Codec(
        "naive",
        NaiveBitmaskTensor.from_dense,
        lambda packed: packed.to_dense(),
        lambda packed: packed.compressed_nbytes,
    )


@functools.cache
def find_peers() -> Peers:
    """Every peer that can be imported here."""
    return those_that_import(
        ("compressed-tensors", "compressed-tensors", _compressed_tensors),
        ("torch CSR", "torch", _torch_csr),
        ("numpy packbits", "numpy", _numpy_packbits),
    )


def those_that_import(*candidates: tuple[str, str, Callable[[str], Codec]]) -> Peers:
    """The peers that can be made here, of names, distributions and what makes them."""
    codecs: list[Codec] = []
    status: dict[str, str] = {}
    for name, distribution, make in candidates:
        try:
            codecs.append(make(name))
            status[name] = importlib.metadata.version(distribution)
        except (ImportError, AttributeError, RuntimeError) as error:  # what imports raise among unmatched versions
            status[name] = _why_skipped(error, distribution)
    return Peers(tuple(codecs), status)


def _why_skipped(error: Exception, distribution: str) -> str:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "skipped: not installed"
    return f"skipped: version {version} does not have or cannot import it ({error})"


def _compressed_tensors(name: str) -> Codec:
    module = importlib.import_module("compressed_tensors.compressors.sparse_compressors.sparse_bitmask")
    return Codec(
        name,
        module.BitmaskTensor.from_dense,
        lambda packed: packed.decompress(),
        lambda packed: packed.curr_memory_size_bytes(),
        peer=True,
    )


def _torch_csr(name: str) -> Codec:
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    return Codec(name, Tensor.to_sparse_csr, Tensor.to_dense, _csr_nbytes, peer=True)


def _csr_nbytes(packed: Tensor) -> int:
    return packed.values().nbytes + packed.col_indices().nbytes + packed.crow_indices().nbytes


def _numpy_packbits(name: str) -> Codec:
    numpy = importlib.import_module("numpy")

    def compress(dense: Tensor) -> _PackedArrays:
        array = dense.view(_INTEGERS[dense.element_size()]).numpy()
        mask = array != 0
        return _PackedArrays(array[mask], numpy.packbits(mask, axis=-1, bitorder="little"), dense.shape, dense.dtype)

    def decompress(packed: _PackedArrays) -> Tensor:
        mask = numpy.unpackbits(packed.bits, axis=-1, count=packed.shape[-1], bitorder="little").view(bool)
        array = numpy.zeros(tuple(packed.shape), dtype=packed.values.dtype)
        array[mask] = packed.values
        return torch.from_numpy(array).view(packed.dtype)

    return Codec(name, compress, decompress, lambda packed: packed.values.nbytes + packed.bits.nbytes, peer=True)


@dataclass(frozen=True)
class _PackedArrays:
    values: Any  # numpy array of the elements that are not zero
    bits: Any  # numpy array of the packed mask
    shape: torch.Size
    dtype: torch.dtype
