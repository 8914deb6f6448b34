"""SemiStructuredTensor: a `torch.Tensor` whose storage is the 2:4 layout, two stored elements in every four columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from bitmask import ops, ops_two_four
from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.calls import FormatError
from bitmask.compressed_tensor import CompressedTensor, detached, mark_parameter, part_property
from bitmask.cutlass_layout import from_cutlass, parts_of_torch, to_cutlass


def _check_part_sizes(values: Tensor, metadata: Tensor, shape: Sequence[int]) -> None:
    """Raise FormatError unless values are of the shape; `check_parts_24` compares metadata with values."""
    if _dense_sizes(values) != list(shape):
        expected = [*shape[:-1], shape[-1] // 2]
        raise FormatError(f"values: got size {list(values.shape)}, expected {expected} for shape {list(shape)}")


def _dense_sizes(values: Tensor) -> list[int]:
    return [*values.shape[:-1], 2 * values.shape[-1]]


def _rebuild(values: Tensor, metadata: Tensor, shape: Sequence[int], is_parameter: bool) -> SemiStructuredTensor:
    """Unpickle: what a file says is proven first."""
    tensor = SemiStructuredTensor.from_parts(values, metadata)
    if not isinstance(shape, Sequence) or len(shape) == 0 or not all(isinstance(size, int) for size in shape):
        raise FormatError(f"shape: got {shape!r}, expected {list(tensor.shape)}")
    _check_part_sizes(values, metadata, shape)
    return mark_parameter(tensor, is_parameter)


torch.serialization.add_safe_globals([_rebuild])


class SemiStructuredTensor(CompressedTensor):
    """A tensor of which two elements are stored in every four neighbours of a row, and a bit per element says which.

    That is half of the elements: the pattern that GPUs from NVIDIA's Ampere on multiply in hardware
    (https://arxiv.org/abs/2104.08378). In all else it is like a BitmaskTensor: a `torch.Tensor` with the shape, dtype
    and device of the dense one, frozen, immutable but for `copy_`, decompressed with a `DecompressWarning` where an
    operation has no kernel.

    Attributes:
        values: [..., cols / 2] in the dense dtype.
        metadata: uint8 [..., ceil(cols / 8)], least significant bit first, with two bits set in every four.

    >>> dense = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 5.0, 0.0, 3.0]])
    >>> compressed = SemiStructuredTensor.from_dense(dense)
    >>> compressed.values, compressed.metadata.tolist()
    (tensor([[1., 2.],
            [5., 3.]]), [[5], [10]])
    >>> torch.nn.functional.linear(torch.ones(4), compressed)
    tensor([3., 8.])
    """

    part_names = ("values", "metadata")
    metadata = part_property(1)
    _check_parts = staticmethod(ops_two_four.check_parts_24)
    _check_part_sizes = staticmethod(_check_part_sizes)
    _rebuild = staticmethod(_rebuild)

    @staticmethod
    def __new__(cls: type[SemiStructuredTensor], values: Tensor, metadata: Tensor) -> SemiStructuredTensor:
        """Wrap parts without proving what they hold; `from_dense` and `from_parts` are the public ways in."""
        ops_two_four.check_parts_24(values, metadata)
        return cls._wrap((values, metadata), _dense_sizes(values))

    @classmethod
    def from_dense(
        cls, tensor: Tensor, *, prune: bool = False, keep_negative_zero: bool = False
    ) -> SemiStructuredTensor:
        """Pack a dense tensor [..., cols] that is 2:4, losslessly; gradients do not flow through.

        Args:
            tensor: of any strides, cols a multiple of 4, real and not of float8_e8m0fnu; it is not kept.
            prune: keep the two largest magnitudes of each group that has more non-zeros, as `prune_24_` does.
            keep_negative_zero: -0.0 is not a zero; by default it is one, and comes back as +0.0 where not stored.

        Raises:
            ValueError: a group of four columns with more than two non-zeros, named in the message, unless `prune`; cols
                that are no multiple of 4.
            TypeError: a sparse, quantized, nested or already compressed tensor, or a dtype that has no 2:4 layout.

        >>> SemiStructuredTensor.from_dense(torch.tensor([[1.0, 4.0, 2.0, 0.0]]), prune=True).to_dense()
        tensor([[0., 4., 2., 0.]])
        """
        return cls(*ops_two_four.pack_24(detached(tensor), prune, keep_negative_zero))

    @classmethod
    def from_parts(cls, values: Tensor, metadata: Tensor) -> SemiStructuredTensor:
        """Wrap existing parts (not copied), after proving them consistent.

        Raises:
            FormatError: parts that contradict each other or the layout.
            TypeError, ValueError: a part of the wrong kind, dtype or device.

        >>> metadata = torch.tensor([[0b0110]], dtype=torch.uint8)
        >>> SemiStructuredTensor.from_parts(torch.tensor([[7, 8]]), metadata).to_dense()
        tensor([[0, 7, 8, 0]])
        """
        values, metadata = (part.detach() if isinstance(part, Tensor) else part for part in (values, metadata))
        ops_two_four.validate_24(values, metadata)
        return cls._wrap((values, metadata), _dense_sizes(values))

    @classmethod
    def from_bitmask(cls, tensor: BitmaskTensor) -> SemiStructuredTensor:
        """The same tensor in the 2:4 layout; values and bitmasks are shared.

        Raises:
            ValueError: a group of four columns that does not store exactly two elements, named in the message. One with
                fewer non-zeros than that is taken by `from_dense(tensor.to_dense())`.
            TypeError: no BitmaskTensor, or one of a dtype that has no 2:4 layout.
            FormatError: the parts were changed since they were proven.

        >>> SemiStructuredTensor.from_bitmask(BitmaskTensor.from_dense(torch.tensor([[0.0, 7.0, 0.0, 8.0]]))).values
        tensor([[7., 8.]])
        """
        if not isinstance(tensor, BitmaskTensor):
            raise TypeError(f"tensor: got {type(tensor).__name__}, expected a BitmaskTensor")
        values, bitmasks, row_offsets = tensor._parts()
        if tensor.ndim == 0 or tensor.shape[-1] % 4 != 0:
            raise ValueError(f"shape: got {list(tensor.shape)}, expected a last size that is a multiple of 4")
        ops.validate(values, bitmasks, row_offsets, tensor.shape)
        sizes = [*tensor.shape[:-1], tensor.shape[-1] // 2]
        bitmasks = bitmasks.reshape(ops.bitmask_sizes(tensor.shape))
        try:
            ops_two_four.validate_24(values.new_empty(()).expand(sizes), bitmasks)
        except FormatError as error:
            raise ValueError(f"bitmasks, taken for 2:4 {error}") from None
        return cls(values.reshape(sizes), bitmasks)

    def to_bitmask(self) -> BitmaskTensor:
        """The same tensor in the bitmask layout, which stores what is stored here; values and metadata are shared.

        Raises:
            FormatError: the parts were changed since they were proven.

        >>> SemiStructuredTensor.from_dense(torch.tensor([[0.0, 7.0, 0.0, 8.0]])).to_bitmask().row_offsets
        tensor([0])
        """
        parts = self._parts()
        ops_two_four.validate_24(*parts)  # a bitmask proves whole rows, not every four columns
        return BitmaskTensor._wrap(ops_two_four.bitmask_parts_24(*parts), self.shape)

    def to_torch(self) -> SparseSemiStructuredTensorCUTLASS:
        """torch's tensor for its 2:4 kernels on GPUs; values are shared, but for float32.

        Raises:
            ValueError: sizes that torch's kernels do not take, or a float32 tensor with two non-zeros in a pair of
                columns: torch's are 1:2.
            TypeError: a dtype other than float16, bfloat16, float32 and int8.
            FormatError: the parts were changed since they were proven.

        >>> dense = torch.tensor([1.0, 0.0, 0.0, 2.0]).half().repeat(32, 16)
        >>> torch.equal(SemiStructuredTensor.from_dense(dense).to_torch().to_dense(), dense)
        True
        """
        packed, meta = to_cutlass(*self._parts())
        construct: Any = SparseSemiStructuredTensorCUTLASS
        converted: SparseSemiStructuredTensorCUTLASS = construct(self.shape, packed, meta, None, None, None)
        return converted

    @classmethod
    def from_torch(cls, tensor: SparseSemiStructuredTensorCUTLASS) -> SemiStructuredTensor:
        """The inverse of `to_torch`; values are shared.

        Raises:
            TypeError: anything but a `torch.sparse.SparseSemiStructuredTensorCUTLASS`.
            ValueError: one that has lost its elements by being transposed.
            FormatError: metadata that are none of the layout.
        """
        values, metadata = from_cutlass(*parts_of_torch(tensor))  # proves them
        return cls(values.detach(), metadata)

    def _decompress(self) -> Tensor:
        values, metadata = self._parts()
        return ops_two_four.unpack_24(values, metadata)

    def _rows(self, start: int, stop: int, shape: Sequence[int]) -> SemiStructuredTensor:
        """Both parts are views; what they hold says nothing of where rows begin."""
        parts = [part.flatten(0, -2)[start:stop].reshape([*shape[:-1], part.shape[-1]]) for part in self._parts()]
        return self._wrap(parts, shape, borrowed=True)

    @staticmethod
    def _linear(x: Tensor, parts: Sequence[Tensor], in_features: int, bias: Tensor | None) -> Tensor:
        values, metadata = parts
        return ops_two_four.linear_24(x, values, metadata, bias)

    @staticmethod
    def _converts(source: torch.dtype, target: torch.dtype) -> bool:
        return target in ops_two_four.TWO_FOUR_DTYPES
