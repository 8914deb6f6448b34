"""SemiStructuredBlockLinear: a block-sparse layer for inference, whose kept blocks are 2:4 as well."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitmask import block_layout, ops_block_two_four, ops_two_four
from bitmask.block_layout import Index
from bitmask.block_linear import BlockLinear, copy_the_rest, describe
from bitmask.block_sparse import BlockSparseLinear
from bitmask.calls import FormatError, check_strided

# What a layer consists of, beside its bias.
PARTS = ("values", "metadata", "crow_indices", "col_indices", "dense_shape")


class SemiStructuredBlockLinear(BlockLinear):
    """`nn.Linear` whose weight is zero but for some blocks, in which two of every four columns are stored.

    For inference: the weight is frozen, and its parts are buffers: `values` [blocks, rows of a block, columns / 2],
    `metadata` uint8 [blocks, rows of a block, ceil(columns / 8)], `crow_indices`, `col_indices` and `dense_shape`
    (FORMAT.md). `bias` is a parameter; gradients reach it and `x`; for that of `x` a GPU is waited for, unless
    a CUDA graph is captured. Made by `from_block_sparse`, or by `from_state_dict` of what was saved.

    >>> layer = BlockSparseLinear(64, 128, density=0.25, bias=False)
    >>> SemiStructuredBlockLinear.from_block_sparse(layer, prune=True)
    SemiStructuredBlockLinear(in_features=64, out_features=128, bias=False, block_shape=(32, 32), blocks=2,
    density=0.2500, dtype=torch.float32)
    """

    metadata: Tensor

    def __init__(self) -> None:
        raise TypeError("SemiStructuredBlockLinear: made by from_block_sparse or from_state_dict")

    @classmethod
    def _of_parts(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> SemiStructuredBlockLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = shape
        for name in PARTS:
            layer.register_buffer(name, parts[name])
        layer.block_shape = (layer.values.shape[1], 2 * layer.values.shape[2])
        layer._set_index(layer.crow_indices, layer.col_indices)
        layer.register_parameter("bias", None)
        return layer

    @classmethod
    def from_block_sparse(cls, layer: BlockSparseLinear, prune: bool = False) -> SemiStructuredBlockLinear:
        """The frozen twin of a layer, of which it shares nothing; hooks stay behind.

        Args:
            layer: whose blocks have a multiple of 4 columns.
            prune: keep the two largest magnitudes of each group of four columns, as `prune_24_` does.

        Raises:
            TypeError: not a BlockSparseLinear.
            ValueError: blocks of other widths, a layer on device meta or sharded, or, unless `prune`, a group of more
                than two non-zeros.

        >>> dense = nn.Linear(4, 2, bias=False)
        >>> _ = dense.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 6.0, 0.0]]))
        >>> layer = BlockSparseLinear.from_dense(dense, density=1.0, block_shape=(2, 4))
        >>> SemiStructuredBlockLinear.from_block_sparse(layer, prune=True).to_dense().weight.detach()
        tensor([[0., 0., 3., 4.],
                [5., 0., 6., 0.]])
        """
        if not isinstance(layer, BlockSparseLinear):
            raise TypeError(f"layer: got {type(layer).__name__}, expected a BlockSparseLinear")
        if layer.block_shape[1] % 4 != 0:
            raise ValueError(f"block_shape: got {layer.block_shape}, expected columns that are a multiple of 4")
        if layer.values.is_meta:
            raise ValueError("layer: got a layer on device meta, expected one with data")
        layer._prove_index()
        index: Index = (layer.crow_indices.clone(), layer.col_indices.clone())
        shape = (layer.out_features, layer.in_features)
        blocks = layer._blocks().detach().clone()
        block_layout.zero_past_edges(blocks, index, shape)
        try:
            values, metadata = ops_two_four.pack_24(blocks, prune)
        except ValueError as error:
            message = _by_block(str(error), layer.block_shape[0]).replace("dense", "layer.values")
            raise ValueError(f"{message}, or prune=True") from None
        parts = (values, metadata, *index, layer.dense_shape.clone())
        return copy_the_rest(layer, cls._of_parts(dict(zip(PARTS, parts, strict=True)), shape))

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any],
        prefix: str = "",
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> SemiStructuredBlockLinear:
        """The layer that `state_dict` describes, with copies of its tensors, which are proven.

        Arguments and errors are those of `BlockSparseLinear.from_state_dict`.

        >>> layer = SemiStructuredBlockLinear.from_block_sparse(BlockSparseLinear(64, 128, density=0.25), prune=True)
        >>> model = nn.Sequential(layer, nn.ReLU())
        >>> torch.equal(SemiStructuredBlockLinear.from_state_dict(model.state_dict(), "0.").values, layer.values)
        True
        """
        parts = block_layout.parts_of(state_dict, PARTS, prefix)
        expected = block_layout.known_sizes(out_features, in_features)
        shape = _check_parts(parts, prefix)
        block_layout.check_known_sizes(shape, expected, prefix)
        _prove(parts, prefix)
        bias = state_dict.get(f"{prefix}bias")
        block_layout.check_device(f"{prefix}metadata", parts["metadata"], parts["values"])
        if bias is not None:
            block_layout.check_bias(bias, parts["values"], shape[0], prefix)
            bias = nn.Parameter(bias.detach().clone())
        copies = {name: part.detach().clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
        layer = cls._of_parts(copies, shape)
        layer.bias = bias
        return layer

    def _multiply(self, x: Tensor) -> Tensor:
        return ops_block_two_four.bsr_linear_24(
            x, self.values, self.metadata, self.crow_indices, self.col_indices, self.out_features, self.bias
        )

    def _blocks(self) -> Tensor:
        try:
            return ops_two_four.unpack_24(self.values, self.metadata)
        except FormatError as error:
            raise FormatError(_by_block(str(error), self.block_shape[0])) from None

    def to_block_sparse(self) -> BlockSparseLinear:
        """The twin of this layer that can be trained, of which it shares nothing; hooks stay behind."""
        parts = {name: getattr(self, name) for name in block_layout.PARTS} | {"values": self._blocks()}
        return copy_the_rest(self, BlockSparseLinear.from_state_dict(parts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SemiStructuredBlockLinear:
        """Metadata stay bits where all tensors get another dtype: `nn.Module.type`."""
        before = self.metadata
        super()._apply(fn, recurse)
        if self.metadata.dtype != before.dtype:
            self.metadata = before.to(self.values.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check everything first: what contradicts itself raises, what has other sizes is reported by torch."""
        if prefix + "values" in state_dict and prefix + "metadata" not in state_dict:
            error_msgs.append(
                f"{prefix}metadata: not in the state_dict, expected it with values, which else may be dense blocks"
            )
            return
        own = {
            "crow_indices": self._index[0],
            "col_indices": self._index[1],
            "dense_shape": torch.tensor(self._shape, device="cpu"),
        }
        parts = {name: state_dict.get(prefix + name, own.get(name, getattr(self, name))) for name in PARTS}
        if any(prefix + name in state_dict for name in PARTS):
            shape = _check_parts(parts, prefix)
            got = describe(_dense_sizes(parts["values"]), shape)
            expected = describe((len(self.values), *self.block_shape), self._shape)
            if got != expected:
                error_msgs.append(
                    f"{prefix}values: got {got}, expected {expected}; SemiStructuredBlockLinear.from_state_dict makes "
                    "a layer of any sizes"
                )
                return
            _prove(parts, prefix)
            if local_metadata.get("assign_to_params_buffers"):
                block_layout.check_device(f"{prefix}metadata", parts["metadata"], parts["values"])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _dense_sizes(values: Tensor) -> tuple[int, int, int]:
    blocks, rows, half = values.shape
    return blocks, rows, 2 * half


def _check_parts(parts: Mapping[str, Any], prefix: str) -> tuple[int, int]:
    """Raise TypeError, ValueError or FormatError unless the parts are those of a weight, but for what they hold.

    Returns its shape.
    """
    values, metadata = parts["values"], parts["metadata"]
    check_strided(f"{prefix}values", values)
    check_strided(f"{prefix}metadata", metadata)
    block_layout.check_dtype(prefix + "values", values.dtype)
    if metadata.dtype != torch.uint8:
        raise TypeError(f"{prefix}metadata: got dtype {metadata.dtype}, expected torch.uint8")
    if metadata.is_meta:
        raise FormatError(f"{prefix}metadata: got a meta tensor, expected one with data")
    if values.ndim != 3 or 0 in values.shape[1:] or values.shape[2] % 2 != 0:
        raise FormatError(
            f"{prefix}values: got size {list(values.shape)}, expected [blocks, rows, columns / 2] of blocks, their "
            "columns a multiple of 4"
        )
    expected = [*values.shape[:2], -(-2 * values.shape[2] // 8)]
    if list(metadata.shape) != expected:
        raise FormatError(f"{prefix}metadata: got size {list(metadata.shape)}, expected {expected}")
    dense = values.detach().as_strided(_dense_sizes(values), (0, 0, 0))  # only its size counts
    return block_layout.check_parts({name: parts[name] for name in block_layout.PARTS} | {"values": dense}, prefix)


def _by_block(message: str, rows: int) -> str:
    """A message of the 2:4 layout, with the block and its row in place of the row among those of all blocks."""
    return re.sub(r"\brow (\d+)", lambda found: "block {}, row {}".format(*divmod(int(found[1]), rows)), message)


def _prove(parts: Mapping[str, Tensor], prefix: str) -> None:
    """Raise FormatError unless metadata and index of parts that passed `_check_parts` are such."""
    values, metadata = parts["values"], parts["metadata"]
    dense = torch.empty(1, dtype=values.dtype, device="cpu").as_strided(values.shape, (0, 0, 0))  # of which sizes count
    try:
        ops_two_four.validate_24(dense, metadata.cpu())
    except FormatError as error:
        raise FormatError(prefix + _by_block(str(error), values.shape[1])) from None
    out_features, in_features = parts["dense_shape"].tolist()
    index = (parts["crow_indices"], parts["col_indices"])
    block_layout.prove_index(index, (out_features, in_features), 2 * values.shape[2], prefix)
