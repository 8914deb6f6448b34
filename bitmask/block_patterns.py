"""Block patterns: which blocks of a weight are kept, as bool [block rows, block columns]."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from bitmask.block_layout import grid_of
from bitmask.calls import check_block_shape


def check_density(density: float) -> None:
    """Raise TypeError or ValueError unless 0 < density <= 1."""
    if isinstance(density, bool) or not isinstance(density, Real):
        raise TypeError(f"density: got {density!r}, expected a number")
    if not 0 < density <= 1:
        raise ValueError(f"density: got {density}, expected more than 0 and at most 1")


def check_pattern(pattern: Tensor, grid: tuple[int, int] | None = None) -> None:
    """Raise TypeError or ValueError unless the pattern is a bool matrix, of the size of the grid if that is known."""
    if not isinstance(pattern, Tensor):
        raise TypeError(f"pattern: got {type(pattern).__name__}, expected a torch.Tensor")
    if pattern.dtype != torch.bool:
        raise TypeError(f"pattern: got dtype {pattern.dtype}, expected torch.bool")
    if pattern.ndim != 2:
        raise ValueError(f"pattern: got {pattern.ndim} dimensions, expected 2 (block rows, block columns)")
    if grid is not None and tuple(pattern.shape) != grid:
        raise ValueError(f"pattern: got size {list(pattern.shape)}, expected {list(grid)} (blocks of the weight)")
    if pattern.is_meta:
        raise ValueError("pattern: got a meta tensor, expected one with data")


def count_blocks(density: float, total: int, layer: str = "", stacklevel: int = 3) -> int:
    """How many of `total` blocks a density keeps, but one rather than none, with a warning that names the layer."""
    count = nearest_count(density, total)
    if count == 0 and total > 0:
        prefix = f"{layer}: " if layer else ""
        warnings.warn(
            f"{prefix}density: {density} of {total} blocks is less than half a block; one is kept",
            stacklevel=stacklevel,
        )
        return 1
    return count


def nearest_count(density: float, total: int) -> int:
    """The number of blocks that comes nearest to a density; of two, the larger one."""
    check_density(density)
    return math.floor(float(density) * total + 0.5)


def block_norms(weight: Tensor, block_shape: Sequence[int] = (32, 32)) -> Tensor:
    """Frobenius norm of each block of a matrix.

    Args:
        weight: [out_features, in_features], of a real floating-point dtype; no gradient flows.
        block_shape: rows and columns of a block; blocks at the edges count what lies in the matrix.

    Returns:
        [ceil(out_features / rows), ceil(in_features / columns)]; float64 for float64, else float32.

    Raises:
        TypeError, ValueError: not a dense floating-point matrix, or sizes that are not positive integers.

    >>> block_norms(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -2.0]]), (1, 2))
    tensor([[5., 0.],
            [0., 2.]])
    """
    height, width = check_block_shape(block_shape)
    check_matrix("weight", weight)
    rows, cols = grid_of(weight.shape, (height, width))
    wide = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    padded = F.pad(wide, (0, cols * width - weight.shape[1], 0, rows * height - weight.shape[0]))
    norms: Tensor = torch.linalg.vector_norm(padded.view(rows, height, cols, width), dim=(1, 3))
    return norms


def check_matrix(name: str, matrix: Tensor) -> None:
    """Raise TypeError or ValueError unless it is a dense floating-point matrix."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: got {type(matrix).__name__}, expected a torch.Tensor")
    if matrix.layout is not torch.strided or hasattr(matrix, "__tensor_flatten__"):
        raise TypeError(f"{name}: got a {type(matrix).__name__} that is not dense, expected a plain tensor")
    if not matrix.is_floating_point():
        raise TypeError(f"{name}: got dtype {matrix.dtype}, expected a real floating-point dtype")
    if matrix.ndim != 2:
        raise ValueError(f"{name}: got {matrix.ndim} dimensions, expected 2")


def largest_blocks(scores: Tensor, density: float) -> Tensor:
    """The pattern of the blocks with the largest scores.

    Args:
        scores: [block rows, block columns], of a real floating-point dtype, such as `block_norms` gives.
        density: share of the blocks to keep, above 0 and at most 1; one block at least is kept, with a warning.

    Returns:
        bool, of the size of `scores`; among equal scores the first ones in row-major order, NaN is largest.

    Raises:
        TypeError, ValueError: scores that are no floating-point matrix, or a density out of range.

    >>> largest_blocks(torch.tensor([[5.0, 0.0, 1.0], [0.0, 2.0, 1.0]]), 0.5)
    tensor([[ True, False,  True],
            [False,  True, False]])
    """
    check_matrix("scores", scores)
    return largest(scores, count_blocks(density, scores.numel()))


def largest(scores: Tensor, count: int) -> Tensor:
    """The pattern of the `count` largest scores."""
    best = scores.detach().reshape(-1).argsort(descending=True, stable=True)[:count]
    pattern = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    pattern[best] = True
    return pattern.view(scores.shape)


def spread_blocks(grid: tuple[int, int], count: int) -> Tensor:
    """A random pattern of `count` blocks, as even as can be: block rows differ by one at most, block columns too.

    Rows are filled one after the other, each from the columns that have the fewest blocks, in random order.
    """
    rows, cols = grid
    pattern = torch.zeros(grid, dtype=torch.bool, device="cpu")
    if count == 0:
        return pattern
    loads = torch.zeros(cols, device="cpu", dtype=torch.float64)
    per_row = torch.full((rows,), count // rows, device="cpu")
    per_row[torch.randperm(rows, device="cpu")[: count % rows]] += 1
    for row, kept in enumerate(per_row.tolist()):
        chosen = (loads + torch.rand(cols, dtype=torch.float64, device="cpu")).topk(kept, largest=False).indices
        loads[chosen] += 1
        pattern[row, chosen] = True
    return pattern
