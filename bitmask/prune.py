"""Making weights sparse: setting elements to zero by a rule."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmask.compressed_tensor import CompressedTensor
from bitmask.ops_two_four import TWO_FOUR_DTYPES, prune_24


def prune_by_magnitude(tensor: Tensor, sparsity: float) -> Tensor:
    """A copy of a real floating-point tensor with its smallest magnitudes set to zero.

    Exactly ``int(sparsity * numel)`` elements are zeroed; among equal magnitudes the first ones go; NaN is largest.

    Raises:
        TypeError: not a dense tensor of a real floating-point dtype that has a zero and a codec.
        ValueError: `sparsity` outside 0 to 1.

    >>> prune_by_magnitude(torch.tensor([[0.5, -2.0], [-0.25, 1.0]]), 0.5)
    tensor([[ 0., -2.],
            [ 0.,  1.]])
    """
    if isinstance(tensor, CompressedTensor):
        kind = type(tensor).__name__
        raise TypeError(f"tensor: got a {kind}, expected a dense tensor: prune to_dense() and compress again")
    if not tensor.is_floating_point() or tensor.dtype not in TWO_FOUR_DTYPES:
        raise TypeError(
            f"tensor: got dtype {tensor.dtype}, expected a floating-point dtype that has a zero and a codec"
        )
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: got {sparsity}, expected 0 to 1")
    pruned = tensor.detach().clone(memory_format=torch.contiguous_format)
    count = int(sparsity * tensor.numel())
    if count == 0:
        return pruned
    # float8 has no kernel for abs or comparison; float32 holds every narrower float exactly.
    wide = pruned.float() if pruned.element_size() < 4 else pruned
    magnitude = wide.reshape(-1).abs()
    threshold = magnitude.kthvalue(count).values
    below = magnitude < threshold
    tied = ((magnitude == threshold) | (magnitude.isnan() & threshold.isnan())).nonzero().squeeze(1)
    flat = pruned.view(-1)
    # Zeros written as bytes: float8 has no masked fill either.
    octets = flat.view(torch.uint8).view(flat.numel(), flat.element_size())
    octets[below] = 0
    octets[tied[: count - int(below.sum())]] = 0
    return pruned


def prune_24_(tensor: Tensor, *, transposable: bool = False) -> Tensor:
    """Prune in place to 2:4: of every four columns the two largest magnitudes stay; autograd takes no part.

    Of equal magnitudes the first stay; NaN is larger than anything.

    Args:
        tensor: [..., cols], cols a multiple of 4, of any strides and real dtype but float8_e8m0fnu.
        transposable: make the transposed tensor 2:4 as well: of each 4 x 4 elements the eight stay that have the
            largest sum of magnitudes, two in every row and column (Hubara et al., 2021,
            https://arxiv.org/abs/2102.08124); [..., rows, cols], both multiples of 4, in float32, bfloat16, float16 or
            float64.

    Returns:
        `tensor`.

    Raises:
        TypeError, ValueError: a tensor of the wrong kind, dtype or size, or whose elements share memory.

    >>> prune_24_(torch.tensor([[0.5, -2.0, 3.0, 1.0], [0.0, 0.0, 1.0, 0.0]]))
    tensor([[ 0., -2.,  3.,  0.],
            [ 0.,  0.,  1.,  0.]])
    """
    strided = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    if not strided or (tensor.is_contiguous() and not tensor.is_neg()):
        prune_24(tensor, transposable)
        return tensor
    if _elements_share_memory(tensor):
        raise ValueError(f"tensor: got strides {list(tensor.stride())}, expected memory for each element by itself")
    dense = tensor.detach().contiguous().resolve_neg()
    prune_24(dense, transposable)
    tensor.detach().copy_(dense)
    return tensor


def _elements_share_memory(tensor: Tensor) -> bool:
    """Whether strides are too short for all that they step over."""
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= span:
            return True
        span += (size - 1) * stride
    return False
