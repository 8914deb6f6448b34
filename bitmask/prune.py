"""Making weights sparse: setting elements to zero by a rule."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmask.bitmask_tensor import BitmaskTensor


def prune_by_magnitude(tensor: Tensor, sparsity: float) -> Tensor:
    """A copy of a real floating-point tensor with its smallest magnitudes set to zero.

    Exactly ``int(sparsity * numel)`` elements are zeroed; among equal magnitudes the first ones go; NaN is largest.

    Raises:
        TypeError: not a dense tensor of a real floating-point dtype that has a zero.
        ValueError: `sparsity` outside 0 to 1.

    >>> prune_by_magnitude(torch.tensor([[0.5, -2.0], [-0.25, 1.0]]), 0.5)
    tensor([[ 0., -2.],
            [ 0.,  1.]])
    """
    if isinstance(tensor, BitmaskTensor):
        raise TypeError("tensor: got a BitmaskTensor, expected a dense tensor: prune to_dense() and compress again")
    if not tensor.is_floating_point() or tensor.dtype is torch.float8_e8m0fnu:
        raise TypeError(f"tensor: got dtype {tensor.dtype}, expected a real floating-point dtype that has a zero")
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
