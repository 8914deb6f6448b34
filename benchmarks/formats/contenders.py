"""Conversions between a bitmask and torch's sparse layouts, beside torch's own, and products in every format.

What is given BSR has zeros in whole blocks, what is given 2:4 is pruned to it; the others get zeros at random places.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.block_sparse.weights import BlockWeight
from benchmarks.cases import DTYPES, Workload, dense_input
from benchmarks.formats.result import BLOCKS, SCATTERED, TWO_FOUR
from benchmarks.linear.contenders import Layers, Product, products, short_csr
from benchmarks.semi_structured.contenders import packed_product, two_four_input
from bitmask import BitmaskTensor
from bitmask.format_timing import block_linear, torch_linear

BLOCK = 32  # rows and columns of BSR's blocks


@dataclass(frozen=True)
class Layout:
    """One of torch's sparse layouts: how a bitmask is converted to it, and how torch converts a dense matrix."""

    name: str
    from_bitmask: Callable[[BitmaskTensor], Tensor]
    from_dense: Callable[[Tensor], Tensor]


LAYOUTS = {
    SCATTERED: (
        Layout("COO", BitmaskTensor.to_coo, Tensor.to_sparse),
        Layout("CSR", BitmaskTensor.to_csr, Tensor.to_sparse_csr),
        Layout("CSC", BitmaskTensor.to_csc, Tensor.to_sparse_csc),
    ),
    BLOCKS: (
        Layout(
            "BSR",
            lambda packed: packed.to_bsr((BLOCK, BLOCK)),
            lambda dense: dense.to_sparse_bsr((BLOCK, BLOCK)),
        ),
    ),
}


def pattern_input(workload: Workload, pattern: str) -> Tensor:
    """A matrix of normal values with zeros in a pattern, where none but those is zero."""
    if pattern == TWO_FOUR:
        return two_four_input(workload)
    if pattern == SCATTERED:
        return dense_input(workload)
    full = dense_input(replace(workload, sparsity=0.0))
    return full.masked_fill_(~BlockWeight.cut_from(full, BLOCK, workload.sparsity).elements_mask, 0)


def format_products(layers: Layers, pattern: str, rows: int, uncached_nbytes: int) -> list[Product]:
    """The dense weight, the bitmask, and what else holds zeros in such a pattern and has a product in their dtype."""
    found = products(layers, rows)
    if pattern == TWO_FOUR:
        return [*found, packed_product(layers)]
    dtype = DTYPES[layers.workload.dtype]
    for layout in LAYOUTS[pattern]:
        ways = {f"torch {layout.name}": (layout.from_dense, torch_linear)}
        if layout.name == "CSR":
            ways["torch CSR, int32"] = (short_csr, torch_linear)
        if layout.name == "BSR":
            found.append(_product("BSR", layout.from_dense, block_linear, layers, uncached_nbytes))
        for name, (make, multiply) in ways.items():
            if _multiplies(make, multiply, dtype, rows):
                found.append(replace(_product(name, make, multiply, layers, uncached_nbytes), peer=True))
    return found


def torch_status() -> dict[str, str]:
    """For which dtypes torch multiplies in which of its layouts."""
    status = {}
    for layout in (layout for layouts in LAYOUTS.values() for layout in layouts):
        dtypes = [
            name for name in ("fp32", "bf16", "fp16") if _multiplies(layout.from_dense, torch_linear, DTYPES[name], 1)
        ]
        known = f"products in {', '.join(dtypes)}; left out where they are far off"
        status[f"torch {layout.name}"] = f"{torch.__version__} ({known})" if dtypes else "skipped: no products here"
    return status


def stored_nbytes(sparse: Tensor) -> int:
    """Bytes of the parts of a tensor in one of torch's sparse layouts."""
    if sparse.layout is torch.sparse_coo:
        return sparse._values().nbytes + sparse._indices().nbytes
    if sparse.layout is torch.sparse_csc:
        return sparse.values().nbytes + sparse.ccol_indices().nbytes + sparse.row_indices().nbytes
    return sparse.values().nbytes + sparse.crow_indices().nbytes + sparse.col_indices().nbytes


def _product(
    name: str, make: Callable[[Tensor], Tensor], multiply: Callable[[Tensor, Any], Tensor], layers: Layers, nbytes: int
) -> Product:
    """Weights that are too many for a cache of which `nbytes` are, in turn for as many layers as there are."""
    first = make(layers.dense[0])
    stored = stored_nbytes(first)
    distinct = [first, *(first.clone() for _ in range(min(len(layers.dense), -(-nbytes // max(stored, 1))) - 1))]
    return Product(name, multiply, [distinct[i % len(distinct)] for i in range(len(layers.dense))], stored)


@functools.cache
def _multiplies(
    make: Callable[[Tensor], Tensor], multiply: Callable[[Tensor, Any], Tensor], dtype: torch.dtype, rows: int
) -> bool:
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
    try:
        multiply(torch.ones(min(rows, 2), BLOCK, dtype=dtype), make(torch.ones(BLOCK, BLOCK, dtype=dtype)))
    except RuntimeError:
        return False
    return True
