"""BitmaskLinear: `nn.Linear` whose weight is stored compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitmask import ops
from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.compressed_tensor import CompressedTensor
from bitmask.semi_structured import SemiStructuredTensor


def frozen_parameter(tensor: CompressedTensor) -> nn.Parameter:
    """A compressed tensor as a parameter."""
    return nn.Parameter(tensor, requires_grad=False)


def _without_contents(shape: tuple[int, int], dtype: torch.dtype) -> BitmaskTensor:
    """A BitmaskTensor on device meta, as large as one without zeros."""
    values = torch.empty(shape[0] * shape[1], dtype=dtype, device="meta")
    bitmasks = torch.empty(ops.bitmask_sizes(shape), dtype=torch.uint8, device="meta")
    return BitmaskTensor(values, bitmasks, torch.empty(shape[0], dtype=torch.int64, device="meta"), shape)


class BitmaskLinear(nn.Linear):
    """`nn.Linear` with a weight that is a frozen BitmaskTensor, multiplied straight from its compressed form.

    Everything else is as in `nn.Linear`: [..., in_features] to [..., out_features], a trainable bias, initialisation,
    `state_dict` keys. Loading a dense `state_dict` compresses it. On device meta the weight has the size of one
    without zeros, until `load_state_dict(..., assign=True)`, or `to_empty` and `reset_parameters`.

    >>> dense = nn.Linear(4, 2)
    >>> _ = dense.weight.data.copy_(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 0.0]]))
    >>> layer = BitmaskLinear.from_dense(dense)
    >>> layer
    BitmaskLinear(in_features=4, out_features=2, bias=True, sparsity=0.6250, dtype=torch.float32)
    >>> torch.allclose(layer(torch.ones(3, 4)), dense(torch.ones(3, 4)))
    True
    """

    def reset_parameters(self) -> None:
        """Draw new numbers, as `nn.Linear` does, and compress the weight."""
        shape, dtype, device = (self.out_features, self.in_features), self.weight.dtype, self.weight.device
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        super().reset_parameters()
        on_meta = device.type == "meta"
        self.weight = frozen_parameter(
            _without_contents(shape, dtype) if on_meta else BitmaskTensor.from_dense(self.weight)
        )

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, keep_negative_zero: bool = False) -> BitmaskLinear:
        """The compressed twin of a layer, of which it shares nothing; hooks stay behind.

        Raises:
            TypeError: not an `nn.Linear`, or one whose weight is already compressed.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, expected an nn.Linear")
        if isinstance(linear.weight, CompressedTensor):
            raise TypeError(f"linear: got a {type(linear).__name__} whose weight is compressed, expected a dense one")
        weight = BitmaskTensor.from_dense(linear.weight, keep_negative_zero=keep_negative_zero)
        rows, columns = weight.shape
        layer = cls(columns, rows, linear.bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = frozen_parameter(weight)
        _copy_the_rest(linear, layer)
        return layer

    def to_dense(self) -> nn.Linear:
        """The dense twin of this layer, ready to be trained, of which it shares nothing; hooks stay behind."""
        layer = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        layer.weight = nn.Parameter(self.weight.to_dense())
        _copy_the_rest(self, layer)
        return layer

    def extra_repr(self) -> str:
        """Sizes, sparsity and dtype; sparsity only while the weight is compressed."""
        weight = self.weight
        sparsity = f", sparsity={weight.sparsity:.4f}" if isinstance(weight, CompressedTensor) else ""
        return f"{super().extra_repr()}{sparsity}, dtype={weight.dtype}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Compress what came in dense, by assigning or into the dense memory that `to_empty` leaves, or came as 2:4."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        loaded = f"{prefix}weight" in state_dict and not self.weight.is_meta
        if loaded and not isinstance(self.weight, BitmaskTensor):
            self.weight = frozen_parameter(_as_bitmask(self.weight))


def _as_bitmask(weight: Tensor) -> BitmaskTensor:
    return weight.to_bitmask() if isinstance(weight, SemiStructuredTensor) else BitmaskTensor.from_dense(weight)


def _copy_the_rest(source: nn.Linear, target: nn.Linear) -> None:
    """Everything but the weight."""
    if source.bias is not None:
        target.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=source.bias.requires_grad)
    target.train(source.training)
