"""BlockLinear: what all layers with a block-sparse weight have in common, however their blocks are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitmask import block_layout
from bitmask.block_layout import Index
from bitmask.calls import FormatError, check_strided
from bitmask.dense_copy import DenseCopy

_Layer = TypeVar("_Layer", bound=nn.Module)


class BlockLinear(nn.Module):
    """An `nn.Linear` whose weight exists in some blocks alone; subclasses store, unpack and multiply these."""

    values: Tensor
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    dense_shape: Tensor
    in_features: int
    out_features: int
    block_shape: tuple[int, int]
    _index_of_meta: Index | None

    def _blocks(self) -> Tensor:
        """The kept blocks [blocks, rows and columns of a block], dense."""
        raise NotImplementedError

    def _multiply(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        raise NotImplementedError

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def _grid(self) -> tuple[int, int]:
        return block_layout.grid_of(self._shape, self.block_shape)

    @property
    def _index(self) -> Index:
        """crow_indices and col_indices with their numbers, on device meta too."""
        known = self._index_of_meta if self.crow_indices.is_meta else None
        return known or (self.crow_indices, self.col_indices)

    @torch.inference_mode(False)  # which loading may happen in: its tensors could not be trained with, nor written to
    def _set_index(self, crow_indices: Tensor, col_indices: Tensor) -> None:
        """Take over a pattern; on device meta its numbers are kept aside."""
        index = (crow_indices.cpu(), col_indices.cpu())
        device = self.values.device
        self.crow_indices, self.col_indices = crow_indices.to(device), col_indices.to(device)
        self.dense_shape = torch.tensor(self._shape, device=device)
        self._index_of_meta = index if self.values.is_meta else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockLinear:
        """Indices keep their numbers where others lose theirs: on device meta, and in what `to_empty` reserves."""
        index, before = self._index, self.crow_indices
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.crow_indices is not before:
            self._set_index(*index)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Take over what subclasses have proven, and a bias. Buffers stay buffers without a gradient, also assigned."""
        values, bias = f"{prefix}values", f"{prefix}bias"
        if bias in state_dict and self.bias is not None and not hasattr(self.bias, "__tensor_flatten__"):
            check_strided(bias, state_dict[bias])
            if values in state_dict and local_metadata.get("assign_to_params_buffers"):
                block_layout.check_device(bias, state_dict[bias], state_dict[values])
        data = dict(state_dict)
        for name in self._buffers.keys() - self._non_persistent_buffers_set:
            if prefix + name in data:
                data[prefix + name] = data[prefix + name].detach()
        super()._load_from_state_dict(data, prefix, local_metadata, *args)
        self._set_index(*self._index)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]; gradients reach `x` and all parameters."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
        if x.is_nested:
            return self._over_parts(x)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got size {list(x.shape)}, expected [..., {self.in_features}] (in_features)")
        return self._multiply(x)

    def _over_parts(self, x: Any) -> Tensor:
        """A nested `x`, if jagged and without holes as a whole: torch adds to it only what has the same offsets.

        Hooks have run, or will, on all of it.
        """
        if x.layout is not torch.jagged or x.lengths() is not None or x._ragged_idx == x.ndim - 1:
            return torch.nested.as_nested_tensor([self.forward(part) for part in x.unbind()], layout=x.layout)
        sizes = {"jagged_dim": x._ragged_idx, "min_seqlen": x._maybe_min_seqlen, "max_seqlen": x._maybe_max_seqlen}
        return torch.nested.nested_tensor_from_jagged(self.forward(x.values()), x.offsets(), **sizes)

    @property
    def density(self) -> float:
        """Share of the weight's elements that lie in a block."""
        self._prove_index()
        inputs = block_layout.inputs_of(self._index, self.in_features, self.block_shape[1])
        outputs = block_layout.block_sizes(self.out_features, self.block_shape[0])
        return int(inputs @ outputs) / max(self.out_features * self.in_features, 1)

    @property
    def pattern(self) -> Tensor:
        """Which blocks exist: bool [block rows, block columns]."""
        self._prove_index()
        pattern = torch.zeros(self._grid, dtype=torch.bool, device=self._index[1].device)
        pattern[block_layout.rows_of(self._index), self._index[1]] = True
        return pattern

    @property
    def weight(self) -> Tensor:
        """The weight as a dense copy, made when something is done with it; differentiable, writing to it raises."""
        return self._dense() if torch.compiler.is_compiling() else DenseCopy(self._dense, self._shape, self.values)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a weight, of which torch would say, where a parameter is set, that the attribute exists."""
        if name == "weight":
            raise TypeError(
                f"weight: got a {type(value).__name__} to set, expected none: it is a dense copy; make a layer of "
                "another weight with BlockSparseLinear.from_dense; to tie layers, use the same one in both places"
            )
        super().__setattr__(name, value)

    def _prove_index(self) -> None:
        """Raise FormatError unless the index is one still: buffers can be written to. Compiled code does not ask."""
        if not torch.compiler.is_compiling():
            block_layout.prove_index(self._index, self._shape, self.block_shape[1])

    def _dense(self) -> Tensor:
        self._prove_index()
        return block_layout.dense_of(self._blocks(), (self.crow_indices, self.col_indices), self._shape)

    def to_dense(self) -> nn.Linear:
        """The dense twin of this layer, of which it shares nothing; hooks stay behind."""
        layer = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.values.dtype
        )
        layer.weight = nn.Parameter(self._dense().detach().clone(memory_format=torch.contiguous_format))
        return copy_the_rest(self, layer)

    def extra_repr(self) -> str:
        """Sizes, blocks, density and dtype."""
        try:
            density = f"{self.density:.4f}"
        except (FormatError, RuntimeError):  # a model must print, above all where something is wrong with it
            density = "unknown"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_shape={self.block_shape}, blocks={len(self.values)}, density={density}, "
            f"dtype={self.values.dtype}"
        )


def copy_the_rest(source: BlockLinear | nn.Linear, target: _Layer) -> _Layer:
    """Give `target` everything but the weight: a copy of the bias, whether that takes a gradient, and the mode."""
    bias = source.bias
    if bias is not None:
        bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    target.register_parameter("bias", bias)
    return target.train(source.training)


def describe(values: Sequence[int], shape: tuple[int, int]) -> str:
    """The sizes of a weight of `shape` whose kept blocks have these, for messages."""
    blocks, rows, cols = values
    return f"{blocks} blocks of {rows} x {cols} in a weight of {shape[0]} x {shape[1]}"
