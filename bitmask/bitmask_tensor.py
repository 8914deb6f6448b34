"""BitmaskTensor: a `torch.Tensor` whose storage is the bitmask layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitmask import ops, sparse_layouts
from bitmask.calls import uncompiled
from bitmask.compressed_tensor import CompressedTensor, detached, mark_parameter, part_property


def _rebuild(
    values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int], is_parameter: bool
) -> BitmaskTensor:
    """Unpickle: what a file says is proven first."""
    return mark_parameter(BitmaskTensor.from_parts(values, bitmasks, row_offsets, shape), is_parameter)


torch.serialization.add_safe_globals([_rebuild])


class BitmaskTensor(CompressedTensor):
    """A tensor stored as its non-zero elements and one bit per element that says where they go (FORMAT.md).

    It has the shape, dtype and device of the dense tensor, can be an `nn.Parameter(..., requires_grad=False)`, and
    travels through `state_dict`, `to`, `deepcopy`, pickling and `torch.save`. Its elements are immutable but for
    `copy_`. An operation without a kernel here runs on a dense copy and says so with a `DecompressWarning`; that goes
    for views too, other than rows, so writing to such a result does not change the tensor.

    Attributes:
        values: [nnz] in the dense dtype, row by row.
        bitmasks: uint8 [..., ceil(cols / 8)], least significant bit first.
        row_offsets: int64 [rows], index of each row's first value; rows are all dimensions but the last, flattened.

    >>> dense = torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 0.0]])
    >>> compressed = BitmaskTensor.from_dense(dense)
    >>> compressed.values
    tensor([1., 2., 5., 3.])
    >>> torch.equal(compressed.to_dense(), dense)
    True
    """

    part_names = ("values", "bitmasks", "row_offsets")
    bitmasks = part_property(1)
    row_offsets = part_property(2)
    _check_parts = staticmethod(ops.check_parts)
    _check_part_sizes = staticmethod(ops.check_part_sizes)
    _rebuild = staticmethod(_rebuild)

    @staticmethod
    def __new__(
        cls: type[BitmaskTensor], values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]
    ) -> BitmaskTensor:
        """Wrap parts as they are; `from_dense` and `from_parts` are the public ways in."""
        return cls._wrap((values, bitmasks, row_offsets), shape)

    @classmethod
    def from_dense(cls, tensor: Tensor, *, keep_negative_zero: bool = False) -> BitmaskTensor:
        """Compress a dense tensor of any shape, strides and supported dtype; gradients do not flow through.

        Args:
            tensor: what to compress; it is not kept.
            keep_negative_zero: store -0.0 (bit-exact); by default it counts as zero and comes back as +0.0.

        Raises:
            TypeError: a sparse, quantized, nested or already compressed tensor, or a dtype without a codec.
        """
        return cls._wrap(ops.compress(detached(tensor), keep_negative_zero), tensor.shape)

    @classmethod
    def from_parts(cls, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> BitmaskTensor:
        """Wrap existing parts (not copied) of a tensor of `shape`, after proving them consistent.

        `bitmasks` may be [rows, ceil(cols / 8)] or keep the leading dimensions of `shape`.

        Raises:
            FormatError: parts that contradict each other or the shape.
            TypeError, ValueError: a part of the wrong kind, dtype or device.

        >>> bits = torch.tensor([[0b101]], dtype=torch.uint8)
        >>> BitmaskTensor.from_parts(torch.tensor([7, 8]), bits, torch.tensor([0]), [1, 3]).to_dense()
        tensor([[7, 0, 8]])
        """
        values, bitmasks, row_offsets = (
            part.detach() if isinstance(part, Tensor) else part for part in (values, bitmasks, row_offsets)
        )
        sizes = ops.validate(values, bitmasks, row_offsets, shape)
        return cls._wrap((values, bitmasks.reshape(ops.bitmask_sizes(sizes)), row_offsets), sizes)

    @classmethod
    @uncompiled
    def from_sparse(cls, tensor: Tensor, *, keep_negative_zero: bool = False) -> BitmaskTensor:
        """Convert a tensor of any of PyTorch's sparse layouts, without a dense copy: `from_dense(tensor.to_dense())`.

        Stored zeros are dropped. COO tensors are coalesced first; dense dimensions become the last ones.

        Args:
            tensor: torch.sparse_coo, sparse_csr, sparse_csc, sparse_bsr, sparse_bsc, or
                torch.sparse.SparseSemiStructuredTensorCUTLASS; on the CPU.
            keep_negative_zero: keep stored -0.0, which by default counts as zero; PyTorch's own `to_dense` loses it.

        Raises:
            FormatError: indices that are out of range, out of order or repeated, or contradict the shape.
            TypeError: a dense tensor, or a dtype without a codec.
            NotImplementedError: a tensor on another device.

        >>> dense = torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 0.0]])
        >>> BitmaskTensor.from_sparse(dense.to_sparse()).values
        tensor([1., 2., 5., 3.])
        """
        return cls._wrap(sparse_layouts.from_sparse(tensor, keep_negative_zero), tensor.shape)

    @uncompiled
    def to_coo(self) -> Tensor:
        """This tensor as a coalesced torch.sparse_coo tensor of int64 indices, as `to_dense().to_sparse()` makes it.

        Nothing is shared. Zeros that are stored here stay stored.

        Raises:
            FormatError: the parts were changed since they were proven.
            NotImplementedError: a tensor on another device than the CPU.

        >>> BitmaskTensor.from_dense(torch.tensor([[0.0, 7.0], [8.0, 0.0]])).to_coo().indices()
        tensor([[0, 1],
                [1, 0]])
        """
        return sparse_layouts.to_coo(self._parts(), self.shape)

    @uncompiled
    def to_csr(self) -> Tensor:
        """The same as torch.sparse_csr: a matrix, or a batch of them that store as many elements each.

        Raises:
            ValueError: a tensor of fewer than two dimensions, without matrices, or whose matrices store more or fewer
                elements than others, which PyTorch's layout has no room for.
            FormatError, NotImplementedError: as for `to_coo`.

        >>> BitmaskTensor.from_dense(torch.tensor([[0.0, 7.0], [8.0, 0.0]])).to_csr().col_indices()
        tensor([1, 0])
        """
        return sparse_layouts.to_csr(self._parts(), self.shape)

    @uncompiled
    def to_csc(self) -> Tensor:
        """The same as torch.sparse_csc: column by column; raises what `to_csr` raises.

        >>> BitmaskTensor.from_dense(torch.tensor([[0.0, 7.0], [8.0, 0.0]])).to_csc().values()
        tensor([8., 7.])
        """
        return sparse_layouts.to_csc(self._parts(), self.shape)

    @uncompiled
    def to_bsr(self, block_shape: Sequence[int]) -> Tensor:
        """The same as torch.sparse_bsr: all elements of the blocks that store any.

        Args:
            block_shape: rows and columns of a block, which divide those of a matrix.

        Raises:
            ValueError: as for `to_csr`, of blocks; a block_shape that does not divide; a meta tensor.
            FormatError, NotImplementedError: as for `to_coo`.

        >>> BitmaskTensor.from_dense(torch.tensor([[0.0, 7.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]])).to_bsr((2, 2)).values()
        tensor([[[0., 7.],
                 [8., 0.]]])
        """
        return sparse_layouts.to_bsr(self._parts(), self.shape, block_shape)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        values, bitmasks, row_offsets = super()._parts()
        return values, bitmasks, row_offsets

    def _decompress(self) -> Tensor:
        values, bitmasks, row_offsets = self._parts()
        return ops.decompress(values, bitmasks, row_offsets, self.shape)

    def _rows(self, start: int, stop: int, shape: Sequence[int]) -> BitmaskTensor:
        """Values and bitmasks are views.

        Where a part was written to, all of them are proven again first; writes that torch does not count (through
        NumPy or `.data`) are the writer's business here. `to_dense` always proves.
        """
        values, bitmasks, offsets = self._parts()
        if offsets.is_meta:
            raise ValueError("tensor: got a meta tensor, expected one with data, which says where rows begin")
        if not self._held.untouched():
            ops.validate(values, bitmasks, offsets, self.shape)
            self._held.replace((values, bitmasks, offsets))
        begin, end = (int(offsets[row]) if row < len(offsets) else values.numel() for row in (start, stop))
        bitmasks = bitmasks.reshape(len(offsets), bitmasks.shape[-1])[start:stop].reshape(ops.bitmask_sizes(shape))
        return self._wrap((values[begin:end], bitmasks, offsets[start:stop] - begin), shape, borrowed=True)

    @staticmethod
    def _linear(x: Tensor, parts: Sequence[Tensor], in_features: int, bias: Tensor | None) -> Tensor:
        values, bitmasks, row_offsets = parts
        return ops.linear(x, values, bitmasks, row_offsets, in_features, bias)

    @staticmethod
    def _converts(source: torch.dtype, target: torch.dtype) -> bool:
        """Not to or from the one dtype without a zero: elements that are not stored convert to something else."""
        return torch.float8_e8m0fnu not in (source, target)
