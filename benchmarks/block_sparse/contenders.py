"""The ways to do one part of a layer's work: with a dense weight, with block-sparse ones, and with torch's.

Each goes through layers of its own in turn, so that no weight is in a cache, as in a model. What weights are multiplied
with is warm; the x of dW is not, as a model has put it away since its forward pass.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.block_sparse.checks import blocks_are_right, product_is_right
from benchmarks.block_sparse.result import BITMASK, DENSE, FORWARD, FORWARD_24, GRAD_INPUT, GRAD_WEIGHT, STEP, TORCH_BSR
from benchmarks.block_sparse.training import TrainedLayer
from benchmarks.block_sparse.weights import BlockWeight, Operands
from benchmarks.cases import DTYPES
from bitmask.ops_block import bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values
from bitmask.ops_block_two_four import bsr_linear_24
from bitmask.ops_two_four import pack_24

BLOCK_DTYPES = ("fp32", "bf16", "fp16")
_MOST_LAYERS = 1024
_MOST_TRAINED_LAYERS = 16
_MOST_TORCH_FLOP = 8e9  # of one product of torch's, which is so slow that larger ones would take most of the run


@dataclass(frozen=True)
class Way:
    """A contender, which does its part by `work(layer)` for each of its layers; its W is dense if `weight` is None."""

    contender: str
    weight: BlockWeight | None
    layers: Sequence[Any]
    work: Callable[[Any], Any]

    def in_turn(self) -> Callable[[int], object]:
        """A function that does the work with the next layer each time."""
        layers = cycle(self.layers)
        return lambda _: self.work(next(layers))


@dataclass(frozen=True)
class Contest:
    """One part of a layer's work, with a dense W or block-sparse ones cut from it, and what they are to work on.

    `uncached_nbytes` are too many for a cache.
    """

    part: str
    dense: Tensor
    weights: Sequence[BlockWeight]
    operands: Operands
    uncached_nbytes: int

    def ways(self) -> list[Way]:
        """Every contender, the dense one first."""
        build = {
            FORWARD: self._forward,
            FORWARD_24: self._forward_24,
            GRAD_INPUT: self._grad_input,
            GRAD_WEIGHT: self._grad_weight,
            STEP: self._step,
        }
        return list(build[self.part]())

    def is_right(self, weight: BlockWeight | None, result: Any) -> bool:
        """Whether a contender with this weight brought the right result."""
        if self.part == STEP:
            parts = zip((FORWARD, GRAD_INPUT, GRAD_WEIGHT), result, strict=True)
            return all(self._part_is_right(part, weight, tensor) for part, tensor in parts)
        return self._part_is_right(self.part, weight, result)

    def _part_is_right(self, part: str, weight: BlockWeight | None, result: Tensor) -> bool:
        x, grad = self.operands
        if part == GRAD_WEIGHT:
            return (
                product_is_right(grad.T, x.T, result) if weight is None else blocks_are_right(x, grad, weight, result)
            )
        dense = self.dense if weight is None else weight.masked()
        if part == GRAD_INPUT:
            return product_is_right(grad, dense.T, result)
        return product_is_right(x, dense, result)

    def _forward(self) -> Iterator[Way]:
        x = self.operands.x
        yield Way(DENSE, None, self._cold(self.dense), functools.partial(functional.linear, x))
        for weight in self.weights:
            layers = self._cold(weight.values)
            yield Way(BITMASK, weight, layers, functools.partial(_forward, weight, x))
            if torch_multiplies(weight) and 2 * len(x) * weight.kept_elements <= _MOST_TORCH_FLOP:
                bsr_layers = [weight.torch_bsr(values) for values in layers]
                yield Way(TORCH_BSR, weight, bsr_layers, functools.partial(functional.linear, x))

    def _forward_24(self) -> Iterator[Way]:
        x = self.operands.x
        yield Way(DENSE, None, self._cold(self.dense), functools.partial(functional.linear, x))
        for weight in (each.two_four for each in self.weights if each.block % 4 == 0):
            values, metadata = pack_24(weight.values)
            count = _layer_count(values.nbytes + metadata.nbytes, self.uncached_nbytes, _MOST_LAYERS)
            layers = [(values.clone(), metadata.clone()) for _ in range(count)]
            yield Way(BITMASK, weight, layers, functools.partial(_forward_24, weight, x))

    def _grad_input(self) -> Iterator[Way]:
        grad = self.operands.grad
        yield Way(DENSE, None, self._cold(self.dense), functools.partial(torch.matmul, grad))
        for weight in self.weights:
            yield Way(BITMASK, weight, self._cold(weight.values), functools.partial(_grad_input, weight, grad))

    def _grad_weight(self) -> Iterator[Way]:
        grad = self.operands.grad
        layers = self._cold(self.operands.x)
        yield Way(DENSE, None, layers, functools.partial(torch.matmul, grad.T))
        for weight in self.weights:
            yield Way(BITMASK, weight, layers, functools.partial(_grad_values, weight, grad))

    def _step(self) -> Iterator[Way]:
        for weight in (None, *self.weights):
            stored_nbytes = 2 * (self.dense if weight is None else weight.values).nbytes  # with gradients
            count = _layer_count(stored_nbytes, self.uncached_nbytes, _MOST_TRAINED_LAYERS)
            layers = [TrainedLayer.of(self.dense, weight, self.operands) for _ in range(count)]
            yield Way(DENSE if weight is None else BITMASK, weight, layers, TrainedLayer.step)

    def _cold(self, stored: Tensor) -> list[Tensor]:
        """So many copies that together they are too large for a cache."""
        return [stored.clone() for _ in range(_layer_count(stored.nbytes, self.uncached_nbytes, _MOST_LAYERS))]


def torch_status() -> dict[str, str]:
    """For which dtypes torch multiplies by a BSR weight here."""
    dtypes = [name for name in BLOCK_DTYPES if _torch_knows(DTYPES[name])]
    known = f"{', '.join(dtypes)}; square blocks that divide the shape; forward only"
    return {TORCH_BSR: f"{torch.__version__} ({known})" if dtypes else "skipped: it does not run here"}


def torch_multiplies(weight: BlockWeight) -> bool:
    """Whether torch multiplies by such a weight: its dtype is known, and the blocks divide its shape."""
    return _torch_knows(weight.dense.dtype) and not any(size % weight.block for size in weight.dense.shape)


@functools.cache
def _torch_knows(dtype: torch.dtype) -> bool:
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
    try:
        functional.linear(torch.ones(1, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype).to_sparse_bsr((2, 2)))
    except RuntimeError:
        return False
    return True


def _layer_count(nbytes: int, uncached_nbytes: int, most: int) -> int:
    return max(1, min(most, -(-uncached_nbytes // nbytes)))


def _forward(weight: BlockWeight, x: Tensor, values: Tensor) -> Tensor:
    return bsr_linear(x, values, *weight.index, len(weight.dense))


def _forward_24(weight: BlockWeight, x: Tensor, parts: tuple[Tensor, Tensor]) -> Tensor:
    return bsr_linear_24(x, *parts, *weight.index, len(weight.dense))


def _grad_input(weight: BlockWeight, grad: Tensor, values: Tensor) -> Tensor:
    return bsr_linear_backward_input(grad, values, weight.transposed, weight.dense.shape[1])


def _grad_values(weight: BlockWeight, grad: Tensor, x: Tensor) -> Tensor:
    return bsr_linear_backward_values(grad, x, *weight.index, [weight.block, weight.block])
