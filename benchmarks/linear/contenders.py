"""The ways to multiply by a sparse weight: dense, at the pace of memory, from the compressed weight, and peers.

Each has weights of its own for several layers, which are used in turn, so that none of them is in a cache. Peers are
optional; one that cannot be used is skipped in a word.
"""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import DTYPES, Workload, dense_input, rolled
from benchmarks.linear.result import BITMASK, DENSE, SATURATED
from benchmarks.linear.saturated import saturated_linear, saturated_status
from benchmarks.memory import huge_page_clone
from bitmask import BitmaskTensor
from bitmask.format_timing import torch_linear, with_short_indices

_MOST_DENSE_NBYTES = 2 * 2**30
_FEWEST_LAYERS = 2
_INT8_COLUMNS = 32  # torch's int8 kernel reads beyond rows of other lengths

CSR = "torch CSR"
INT8 = "int8 kernel (lossy)"
TORCHAO = "torchao int8 (lossy)"


@dataclass(frozen=True)
class Product:
    """A contender: `multiply(x, weight)` for each of its weights, one for each layer."""

    name: str
    multiply: Callable[[Tensor, Any], Tensor]
    weights: Sequence[Any]
    weight_nbytes: int
    peer: bool = False
    lossy: bool = False


@dataclass(frozen=True)
class Layers:
    """The same weights, dense and compressed."""

    workload: Workload
    dense: Sequence[Tensor]
    packed: Sequence[BitmaskTensor]

    @classmethod
    def of(cls, workload: Workload, uncached_nbytes: int) -> "Layers":
        """So many layers that even compressed they are too large for a cache.

        Dense weights get huge pages, as large parts of a compressed one have them, too.
        """
        return cls.like(workload, dense_input(workload), uncached_nbytes)

    @classmethod
    def like(cls, workload: Workload, first: Tensor, uncached_nbytes: int) -> "Layers":
        """The same, of the elements of `first`."""
        needed = -(-uncached_nbytes // max(BitmaskTensor.from_dense(first).compressed_nbytes, 1))
        count = max(_FEWEST_LAYERS, min(needed, _MOST_DENSE_NBYTES // workload.dense_nbytes))
        dense = [huge_page_clone(layer) for layer in rolled(first, count)]
        return cls(workload, dense, [BitmaskTensor.from_dense(layer) for layer in dense])


def products(layers: Layers, rows: int) -> list[Product]:
    """The dense weight, the same at the pace of memory (for one row, where it can be built), and bitmask."""
    dense_nbytes = layers.workload.dense_nbytes
    found = [Product(DENSE, functional.linear, layers.dense, dense_nbytes)]
    if rows == 1 and not saturated_status().startswith("skipped"):
        found.append(Product(SATURATED, saturated_linear, layers.dense, dense_nbytes))
    return [*found, Product(BITMASK, functional.linear, layers.packed, layers.packed[0].compressed_nbytes)]


def peer_status() -> dict[str, str]:
    """For every contender beside torch and this library its version, or why it is skipped."""
    return {SATURATED: saturated_status(), CSR: _csr_status(), INT8: torch.__version__, TORCHAO: _torchao_status()}


def peer_products(layers: Layers) -> list[Product]:
    """The peers that know the dtype of these layers."""
    dtype = layers.workload.dtype
    found = [_csr_product(layers)] if dtype in _csr_dtypes() else []
    if dtype == "bf16":  # the one dtype that torch's int8 kernel is made for
        if layers.workload.shape[1] % _INT8_COLUMNS == 0:
            found.append(_int8_product(layers))
        if not _torchao_status().startswith("skipped"):
            found.append(_torchao_product(layers))
    return found


@functools.cache
def _csr_dtypes() -> tuple[str, ...]:
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    return tuple(name for name in ("bf16", "fp16", "fp32") if _csr_multiplies(DTYPES[name]))


def _csr_multiplies(dtype: torch.dtype) -> bool:
    try:
        torch_linear(torch.ones(1, 2, dtype=dtype), short_csr(torch.ones(2, 2, dtype=dtype)))
        torch_linear(torch.ones(2, 2, dtype=dtype), short_csr(torch.ones(2, 2, dtype=dtype)))
    except RuntimeError:
        return False
    return True


def _csr_status() -> str:
    dtypes = _csr_dtypes()
    return f"{torch.__version__} ({', '.join(dtypes)})" if dtypes else "skipped: this torch cannot multiply by it"


def short_csr(dense: Tensor) -> Tensor:
    """CSR with int32 indices, which are fewer bytes."""
    return with_short_indices(dense.to_sparse_csr())


def _csr_product(layers: Layers) -> Product:
    first = short_csr(layers.dense[0])
    nbytes = first.values().nbytes + first.col_indices().nbytes + first.crow_indices().nbytes
    return Product(CSR, torch_linear, [first, *(first.clone() for _ in layers.dense[1:])], nbytes, peer=True)


def _int8_product(layers: Layers) -> Product:
    """One scale for each row, and the kernel behind torchao's compiled int8 weights."""
    largest = layers.dense[0].float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    first = (layers.dense[0].float() / largest * 127).round_().to(torch.int8)
    scales = (largest.flatten() / 127).to(layers.dense[0].dtype)
    return Product(
        INT8,
        lambda x, weight: torch._weight_int8pack_mm(x, weight, scales),
        [huge_page_clone(first) for _ in layers.dense],
        first.nbytes + scales.nbytes,
        peer=True,
        lossy=True,
    )


@functools.cache
def _torchao() -> Any:
    return importlib.import_module("torchao.quantization")


@functools.cache
def _torchao_status() -> str:
    try:
        _torchao()
        return importlib.metadata.version("torchao")
    except Exception as error:  # whatever its import raises among unmatched versions
        return f"skipped: {error}"


def _torchao_product(layers: Layers) -> Product:
    """Weight only, eager, as its documentation shows."""
    n, k = layers.workload.shape
    linear = torch.nn.Linear(k, n, bias=False, device="meta")
    weights = []
    for dense in layers.dense:
        linear.weight = torch.nn.Parameter(dense, requires_grad=False)
        _torchao().quantize_(linear, _torchao().Int8WeightOnlyConfig())
        weights.append(linear.weight)
    return Product(TORCHAO, functional.linear, weights, n * k + n * layers.dense[0].element_size(), True, True)
