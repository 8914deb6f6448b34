"""Block-sparse weights cut from one dense matrix, and what is multiplied with them."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import DTYPES, Shape
from bitmask.ops_block import TransposedIndex, bsr_transpose
from bitmask.prune import prune_24_


class Operands(NamedTuple):
    """What a layer is given: x [m, k], and the gradient [m, n] of its result."""

    x: Tensor
    grad: Tensor

    @classmethod
    def of(cls, shape: Shape, dtype: str, rows: int) -> "Operands":
        """Normal values."""
        generator = torch.Generator().manual_seed(1)
        n, k = shape
        x, grad = (torch.randn(rows, columns, generator=generator).to(DTYPES[dtype]) for columns in (k, n))
        return cls(x, grad)


@dataclass(frozen=True)
class BlockWeight:
    """The blocks of a dense W [n, k] that `mask` [block rows, block columns] keeps; `index` is (crow, col)."""

    dense: Tensor
    block: int
    sparsity: float
    mask: Tensor
    values: Tensor
    index: tuple[Tensor, Tensor]
    transposed: TransposedIndex

    @classmethod
    def cut_from(cls, dense: Tensor, block: int, sparsity: float) -> "BlockWeight":
        """Drop so large a share of the blocks, at random places; at least one is kept."""
        n, k = dense.shape
        lines, columns = -(-n // block), -(-k // block)
        kept = max(1, round((1 - sparsity) * lines * columns))
        mask = torch.zeros(lines * columns, dtype=torch.bool)
        mask[torch.randperm(len(mask), generator=torch.Generator().manual_seed(2))[:kept]] = True
        mask = mask.view(lines, columns)
        padded = functional.pad(dense, (0, columns * block - k, 0, lines * block - n))
        values = padded.view(lines, block, columns, block).transpose(1, 2)[mask].contiguous()
        crow = functional.pad(mask.sum(dim=1).cumsum(0), (1, 0))
        col = mask.nonzero()[:, 1].contiguous()
        return cls(dense, block, sparsity, mask, values, (crow, col), bsr_transpose(crow, col, columns))

    @cached_property
    def elements_mask(self) -> Tensor:
        """Which elements of W are in kept blocks."""
        n, k = self.dense.shape
        return self.mask.repeat_interleave(self.block, 0)[:n].repeat_interleave(self.block, 1)[:, :k]

    @cached_property
    def kept_elements(self) -> int:
        """How many elements of W are in kept blocks."""
        return int(self.elements_mask.sum())

    @cached_property
    def two_four(self) -> "BlockWeight":
        """The same blocks, of each four columns the two largest magnitudes."""
        columns = self.dense.shape[1]
        pruned = prune_24_(functional.pad(self.dense, (0, -columns % 4)))
        return BlockWeight.cut_from(pruned[:, :columns].contiguous(), self.block, self.sparsity)

    def masked(self) -> Tensor:
        """W as a dense matrix, zero where blocks are dropped."""
        return self.dense * self.elements_mask

    def torch_bsr(self, values: Tensor) -> Tensor:
        """W with these values as torch stores it, which needs blocks that divide its shape."""
        return torch.sparse_bsr_tensor(*self.index, values, self.dense.shape, check_invariants=True)
