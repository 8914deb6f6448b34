"""The ways to pack a matrix as 2:4, and to multiply by it: this library, torch on the CPU, compressed-tensors.

Peers are optional: one that cannot be imported is skipped in a word. They are used the way their documentation shows.
"""

import functools
import importlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import Workload, dense_input
from benchmarks.codec.peers import Codec, Peers, those_that_import
from benchmarks.linear.contenders import Layers, Product
from bitmask import SemiStructuredTensor
from bitmask.prune import prune_24_

SEMI_STRUCTURED = "2:4"

_TORCH = "torch CUTLASS layout"


def two_four_input(workload: Workload) -> Tensor:
    """A matrix of normal values, none of them zero, of which the two largest of every four columns are kept."""
    return prune_24_(dense_input(replace(workload, sparsity=0.0)))


def is_pruned(dense: Tensor, back: Tensor) -> bool:
    """Whether the two largest magnitudes of every four columns came back; of equal ones any may."""
    kept = back != 0
    largest = [each.float().abs().view(-1, 4).sort(dim=1).values[:, 2:] for each in (dense, back)]
    return (
        torch.equal(back[kept], dense[kept])
        and torch.equal(*largest)
        and 2 * int(kept.sum()) == dense.numel()
        and bool((kept.view(-1, 4).sum(dim=1) == 2).all())
    )


def checking_codec(isa: str) -> Codec:
    """This library, which refuses what is not 2:4."""
    return Codec(SEMI_STRUCTURED, SemiStructuredTensor.from_dense, _to_dense, _compressed_nbytes, isa=isa)


def pruning_codec(isa: str) -> Codec:
    """This library, which prunes while it packs."""
    prune = partial(SemiStructuredTensor.from_dense, prune=True)
    return Codec(SEMI_STRUCTURED, prune, _to_dense, _compressed_nbytes, isa=isa, brings_back=is_pruned)


def _to_dense(packed: SemiStructuredTensor) -> Tensor:
    return packed.to_dense()


def _compressed_nbytes(packed: SemiStructuredTensor) -> int:
    return packed.compressed_nbytes


@functools.cache
def find_peers() -> Peers:
    """Every peer that can be imported here, as it packs a matrix that is 2:4."""
    return those_that_import(
        ("compressed-tensors", "compressed-tensors", _compressed_tensors), (_TORCH, "torch", _torch_cutlass)
    )


def pruning_peers() -> list[Codec]:
    """The same, as they prune while they pack: torch in plain operations, the others by themselves."""
    peers = [replace(codec, brings_back=is_pruned) for codec in find_peers().codecs]
    return [_torch_pruning(codec) if codec.name == _TORCH else codec for codec in peers]


def _compressed_tensors(name: str) -> Codec:
    module = importlib.import_module("compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask")
    return Codec(
        name,
        module.Sparse24BitMaskTensor.from_dense,
        lambda packed: packed.decompress(),
        lambda packed: packed.curr_memory_size_bytes(),
        peer=True,
    )


def _torch_cutlass(name: str) -> Codec:
    module: Any = importlib.import_module("torch.sparse._semi_structured_conversions")
    return Codec(
        name,
        module.sparse_semi_structured_from_dense_cutlass,
        lambda packed: module.sparse_semi_structured_to_dense_cutlass(*packed),
        lambda packed: sum(part.nbytes for part in packed),
        peer=True,
    )


def _torch_pruning(codec: Codec) -> Codec:
    def prune(dense: Tensor) -> Any:
        groups = dense.view(-1, 4)
        kept = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1)
        return codec.compress((groups * kept).view(dense.shape))

    return replace(codec, name=f"topk, {codec.name}", compress=prune)


def two_four_layers(workload: Workload, uncached_nbytes: int) -> Layers:
    """Layers of 2:4 weights, so many that even packed they are too large for a cache."""
    return Layers.like(workload, two_four_input(workload), uncached_nbytes)


def packed_product(layers: Layers) -> Product:
    """This library's 2:4 product with those layers."""
    packed = [SemiStructuredTensor.from_dense(dense) for dense in layers.dense]
    return Product(SEMI_STRUCTURED, functional.linear, packed, packed[0].compressed_nbytes)
