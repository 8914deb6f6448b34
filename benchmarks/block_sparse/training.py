"""A whole training step of one layer, dense or block-sparse."""

import torch
from torch import Tensor, nn

from benchmarks.block_sparse.weights import BlockWeight, Operands
from bitmask import BlockSparseLinear

_LEARNING_RATE = 1e-3


class TrainedLayer:
    """A layer without bias and its optimizer; what it is trained on is the same in each step."""

    def __init__(self, layer: nn.Module, operands: Operands) -> None:
        self._layer = layer
        (self._parameter,) = layer.parameters()
        self._optimizer = torch.optim.SGD([self._parameter], lr=_LEARNING_RATE)
        self._x = operands.x.detach().requires_grad_()
        self._grad = operands.grad

    @classmethod
    def of(cls, dense: Tensor, weight: BlockWeight | None, operands: Operands) -> "TrainedLayer":
        """An `nn.Linear`, or a `BlockSparseLinear` of the blocks that are kept of it."""
        linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(dense.clone() if weight is None else dense)
        if weight is None:
            return cls(linear, operands)
        block_shape = (weight.block, weight.block)
        return cls(BlockSparseLinear.from_dense(linear, block_shape=block_shape, pattern=weight.mask), operands)

    def step(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Forward, backward of all, and SGD: the result, the gradient of x, and that of the weight."""
        y = self._layer(self._x)
        y.backward(self._grad)
        self._optimizer.step()
        found = y.detach(), self._x.grad, self._parameter.grad
        self._optimizer.zero_grad()
        self._x.grad = None
        return found
