"""Whether a part of a layer's work is right: compared with products in float64, in places spread over the result."""

import torch
from torch import Tensor

from benchmarks.block_sparse.weights import BlockWeight
from benchmarks.linear.measure import Reference

_CHECKED_ROWS = 64  # of a result: a product in float64 of all of them would take longer than the timing
_CHECKED_BLOCKS = 64


def product_is_right(left: Tensor, weight: Tensor, result: Tensor) -> bool:
    """Whether `result` is left @ weight.T."""
    rows = _spread(len(left), _CHECKED_ROWS)
    return result.shape == (len(left), len(weight)) and _agrees(left[rows], weight, result[rows])


def blocks_are_right(x: Tensor, grad: Tensor, weight: BlockWeight, result: Tensor) -> bool:
    """Whether `result` holds the kept blocks of grad.T @ x, and zeros beyond the edges of W."""
    if result.shape != weight.values.shape:
        return False
    n, k = weight.dense.shape
    places = (weight.block * weight.mask.nonzero()).tolist()
    for which in _spread(len(places), _CHECKED_BLOCKS).tolist():
        line, column = places[which]
        grad_lines, x_columns = grad[:, line : line + weight.block].T, x[:, column : column + weight.block].T
        inside = result[which, : n - line, : k - column]
        beyond = result[which].count_nonzero() - inside.count_nonzero()
        if beyond or not _agrees(grad_lines, x_columns, inside):
            return False
    return True


def _agrees(left: Tensor, weight: Tensor, result: Tensor) -> bool:
    return Reference(left, weight).accepts(result, lossy=False)


def _spread(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most)).long()
