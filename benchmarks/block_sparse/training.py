"""A whole training step of one layer, dense or block-sparse."""

import torch
from torch import Tensor, nn

from benchmarks.block_sparse.weights import BlockWeight, Operands
from bitmask import BlockSparseLinear

_LEARNING_RATE = 1e-3


class TrainedLayer:
    """An `nn.Linear` of `dense`, or a `BlockSparseLinear` of the blocks kept of it, and its optimizer."""

    def __init__(self, dense: Tensor, weight: BlockWeight | None, operands: Operands) -> None:
        n, k = dense.shape
        self._x = operands.x.clone().requires_grad_()
        self._grad = operands.grad
        TODO
        self._optimizer = torch.optim.SGD([self._parameter], lr=_LEARNING_RATE)

    def step(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Forward, backward of all, and SGD: the result, the gradient of x, and that of the weight."""
        y = self._module(self._x)
        y.backward(self._grad)
        self._optimizer.step()
        found = y.detach(), self._x.grad, self._parameter.grad
        self._optimizer.zero_grad()
        self._x.grad = None
        return found
