"""Random block-sparse weights, and what products with them must give."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from conftest import random_numbers
from torch import Tensor

from bitmask import reference
from bitmask.ops_block import bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values, bsr_transpose


class Blocks(NamedTuple):
    """The kept blocks of a weight."""

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, int]

    @property
    def index(self):
        return self.crow_indices, self.col_indices

    @property
    def block_shape(self):
        return tuple(self.values.shape[1:])

    @property
    def transposed(self):
        return bsr_transpose(*self.index, -(-self.shape[1] // self.values.shape[2]))

    @property
    def dense(self):
        return reference.bsr_to_dense(self.values, *self.index, self.shape)

    @property
    def kept(self):
        """Bool [out_features, in_features]: what lies in a kept block."""
        return reference.bsr_to_dense(torch.ones_like(self.values, dtype=torch.bool), *self.index, self.shape)

    @property
    def inside(self):
        """Bool [blocks, block rows, block columns]: what of the blocks lies in the weight."""
        (rows, cols), (block_rows, block_cols) = self.shape, self.block_shape
        row = reference.block_rows_of(self.crow_indices)[:, None, None] * block_rows + torch.arange(block_rows)[:, None]
        col = self.col_indices[:, None, None] * block_cols + torch.arange(block_cols)
        return (row < rows) & (col < cols)

    def with_padding(self, number):
        return self._replace(values=self.values.masked_fill(~self.inside, number))


def random_blocks(n, k, block_shape, density=0.5, seed=0, dtype=torch.float32):
    """Random kept blocks of a weight [n, k], the last row and column of blocks among them; NaN past its edges."""
    generator = torch.Generator().manual_seed(seed)
    down, across = -(-n // block_shape[0]), -(-k // block_shape[1])
    kept = torch.rand(down, across, generator=generator) < density
    if 0 < density < 1:
        kept[-1:, -1:] = True
    crow_indices = F.pad(kept.sum(1).cumsum(0), (1, 0))
    col_indices = kept.nonzero()[:, 1].clone()
    values = random_numbers(len(col_indices), *block_shape, density=1.0, seed=seed, dtype=dtype)
    return Blocks(values, crow_indices, col_indices, (n, k)).with_padding(math.nan)


def assert_is_product(got, left, right, bias=None, kept=None, tf32=False):
    """`got` is left @ right + bias, where `kept`, within the rounding that a product may do. Returns the error in norm.

    Products of 16-bit numbers are exact in the float32 of the sums, so each addition and a conversion or two are the
    only roundings there, each relative to a partial sum, which the sum of magnitudes bounds; the result is rounded once
    to its dtype. For float64 the yardstick has the same error, hence the factor of two. With `tf32`, both factors of a
    product were rounded to nearest before, to 11 significant bits.
    """
    left, right, bias = (None if t is None else t.detach().double() for t in (left, right, bias))
    exact, magnitude = left @ right, left.abs() @ right.abs()
    if bias is not None:
        exact, magnitude = exact + bias, magnitude + bias.abs()
    if kept is not None:
        exact, magnitude = exact.masked_fill(~kept, 0), magnitude.masked_fill(~kept, 0)
    unit = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
    info = torch.finfo(got.dtype)
    bound = 2 * (right.shape[0] + 3) * unit * magnitude + 0.51 * info.eps * exact.abs() + info.tiny * info.eps
    if tf32:
        bound += 2.0**-10 * magnitude
    assert got.shape == exact.shape
    error = (got.detach().cpu().double() - exact).abs()
    assert bool((error <= bound).all()), f"off by {float((error / bound).max()):.1f} times the bound"
    return float(error.norm() / exact.norm())


def rows_of(tensor):
    """[..., size] as [rows, size]."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def check_gradient_of_x(got, blocks, grad, tf32=False):
    assert (got.shape, got.dtype) == ((*grad.shape[:-1], blocks.shape[1]), grad.dtype)
    return assert_is_product(rows_of(got), rows_of(grad), blocks.dense, tf32=tf32)


def check_gradient_of_values(got, blocks, grad, x, tf32=False):
    assert (got.shape, got.dtype) == (blocks.values.shape, x.dtype)
    got = got.cpu()
    assert not got[~blocks.inside].any(), "expected zeros past the edges"
    found = reference.bsr_to_dense(got, *blocks.index, blocks.shape)
    return assert_is_product(found, rows_of(grad).t(), rows_of(x), kept=blocks.kept, tf32=tf32)


def check_product(got, blocks, x, bias=None, tf32=False):
    assert (got.shape, got.dtype) == ((*x.shape[:-1], blocks.shape[0]), x.dtype)
    return assert_is_product(rows_of(got), rows_of(x), blocks.dense.t(), bias, tf32=tf32)


def operands(blocks, m, seed=0):
    """x [m, in_features], a gradient [m, out_features] and a bias."""
    sizes = ((m, blocks.shape[1]), (m, blocks.shape[0]), (blocks.shape[0],))
    dtype = blocks.values.dtype
    return [random_numbers(*size, density=1.0, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]


def products(blocks, x, grad, bias=None):
    """y, and the gradients of x and values, each from its op."""
    return (
        bsr_linear(x, blocks.values, *blocks.index, blocks.shape[0], bias),
        bsr_linear_backward_input(grad, blocks.values, blocks.transposed, blocks.shape[1]),
        bsr_linear_backward_values(grad, x, *blocks.index, blocks.block_shape),
    )


def check(blocks, x, grad, bias=None):
    """All three products against float64."""
    y, grad_x, grad_values = products(blocks, x, grad, bias)
    check_product(y, blocks, x, bias)
    check_gradient_of_x(grad_x, blocks, grad)
    check_gradient_of_values(grad_values, blocks, grad, x)
