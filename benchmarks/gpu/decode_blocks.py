"""Whole decoders on a GPU, dense against block-sparse, as `decode` has them compressed."""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from benchmarks.cases import Selection
from benchmarks.gpu.decode import DecodeResult, decode
from benchmarks.gpu.decode import tables as decode_tables
from benchmarks.gpu.decoder import BODY, Decoder
from benchmarks.gpu.plan import GpuPlan
from bitmask import BlockSparseLinear

_DEFAULT = Selection(dtypes=("bf16",), sparsities=(0.9,), rows=(1, 8), blocks=(64,))
_QUICK_BLOCK = 16


def run(plan: GpuPlan) -> list[DecodeResult]:
    """Every model for which there is time; single weights are not pruned before blocks are."""
    selection = plan.selection.over(_DEFAULT)
    blocks = (_QUICK_BLOCK,) if plan.quick else selection.blocks
    twins = [
        (sparsity, 0.0, partial(block_sparse_twin, sparsity, block))
        for sparsity in selection.sparsities
        for block in blocks
    ]
    return decode(plan, selection, twins)


def block_sparse_twin(sparsity: float, block: int, dense: Decoder) -> Any:
    """Shares everything with the model but the linear layers of its body, from which it takes the blocks they lose."""
    body = dense.get_submodule(BODY)
    layers = {name: module for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    shared = {id(tensor): tensor for tensor in chain(dense.parameters(), dense.buffers())}
    twin = copy.deepcopy(dense, shared)
    for name, linear in layers.items():
        layer = BlockSparseLinear.from_dense(linear, 1 - sparsity, (block, block))
        linear.weight.data.copy_(layer.weight)
        twin.get_submodule(BODY).set_submodule(name, layer)
    return twin


def tables(results: Sequence[DecodeResult]) -> Iterable[str]:
    """One table: speed and memory, dense beside block-sparse."""
    return decode_tables(results, "block-sparse")
