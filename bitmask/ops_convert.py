"""Conversions between the bitmask layout and the index lists of PyTorch's sparse layouts, one typed function each.

None of them makes a dense copy. Indices are int64. Where a shape has more than two dimensions, it is a batch of
matrices, whose lists follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from bitmask.calls import FormatError, call, check_block_shape, check_flag, check_strided
from bitmask.ops import DTYPES, bitmask_sizes, check_part_sizes, check_parts
from bitmask.reference import rows_and_columns

_Three = tuple[Tensor, Tensor, Tensor]


def to_coo(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The index of every stored element in each dimension, in order, and the elements, copied.

    Returns:
        indices int64 [dimensions of `shape`, nnz]; values [nnz].

    Raises:
        FormatError: parts that contradict each other or the shape.
        TypeError, ValueError: a part of the wrong kind, dtype or device.

    >>> to_coo(torch.tensor([7, 8]), torch.tensor([[5]], dtype=torch.uint8), torch.tensor([0]), [1, 3])
    (tensor([[0, 0],
             [0, 2]]), tensor([7, 8]))
    """
    lists: tuple[Tensor, Tensor] = _call_on_parts(torch.ops.bitmask.to_coo, values, bitmasks, row_offsets, shape)
    return lists


def to_csr(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> _Three:
    """Where each row begins, the column of every stored element, and the elements, copied.

    Returns:
        crow_indices int64 [rows + 1] (rows of all matrices); col_indices int64 [nnz]; values [nnz].

    Raises:
        FormatError: parts that contradict each other or the shape.
        TypeError, ValueError: a part of the wrong kind, dtype or device.

    >>> to_csr(torch.tensor([7, 8]), torch.tensor([[5]], dtype=torch.uint8), torch.tensor([0]), [1, 3])
    (tensor([0, 2]), tensor([0, 2]), tensor([7, 8]))
    """
    lists: _Three = _call_on_parts(torch.ops.bitmask.to_csr, values, bitmasks, row_offsets, shape)
    return lists


def to_csc(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> _Three:
    """Where each column begins, the row of every stored element, and the elements, column by column.

    Returns:
        ccol_indices int64 [columns + 1] (columns of all matrices); row_indices int64 [nnz]; values [nnz].

    Raises:
        FormatError: parts that contradict each other or the shape.
        TypeError, ValueError: a part of the wrong kind, dtype or device; fewer than two dimensions.

    >>> to_csc(torch.tensor([7, 8]), torch.tensor([[5]], dtype=torch.uint8), torch.tensor([0]), [1, 3])
    (tensor([0, 1, 1, 2]), tensor([0, 0]), tensor([7, 8]))
    """
    _check_matrices(shape)
    lists: _Three = _call_on_parts(torch.ops.bitmask.to_csc, values, bitmasks, row_offsets, shape)
    return lists


def to_bsr(
    values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int], block_shape: Sequence[int]
) -> _Three:
    """The blocks that store anything: where each row of blocks begins, their block columns and all of their elements.

    Args:
        values: [nnz], with `bitmasks` and `row_offsets` the parts of a tensor of `shape`.
        block_shape: rows and columns of a block, which divide those of a matrix.

    Returns:
        crow_indices int64 [rows of blocks + 1] (of all matrices); col_indices int64 [blocks]; values
        [blocks, block rows, block columns].

    Raises:
        FormatError: parts that contradict each other or the shape.
        TypeError, ValueError: a part of the wrong kind, dtype or device; fewer than two dimensions; such a block_shape.

    >>> to_bsr(torch.tensor([7, 8]), torch.tensor([[5]], dtype=torch.uint8), torch.tensor([0]), [1, 4], [1, 2])
    (tensor([0, 2]), tensor([0, 1]), tensor([[[7, 0]],
    <BLANKLINE>
            [[8, 0]]]))
    """
    _check_matrices(shape)
    sides = _dividing_sides(block_shape, shape)
    lists: _Three = _call_on_parts(torch.ops.bitmask.to_bsr, values, bitmasks, row_offsets, shape, sides)
    return lists


def transpose(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> _Three:
    """The parts of the tensor with its last two dimensions exchanged.

    Raises:
        FormatError: parts that contradict each other or the shape.
        TypeError, ValueError: a part of the wrong kind, dtype or device; fewer than two dimensions.

    >>> transpose(torch.tensor([7, 8]), torch.tensor([[5]], dtype=torch.uint8), torch.tensor([0]), [1, 3])
    (tensor([7, 8]), tensor([[1],
            [0],
            [1]], dtype=torch.uint8), tensor([0, 1, 1]))
    """
    _check_matrices(shape)
    parts: _Three = _call_on_parts(torch.ops.bitmask.transpose, values, bitmasks, row_offsets, shape)
    return parts


def from_csr(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    shape: Sequence[int],
    keep_negative_zero: bool = False,
) -> _Three:
    """The parts of a tensor given as CSR. Stored zeros are dropped by the zero rule, as `compress` does.

    Args:
        values: [..., entries], the leading sizes being those of the batch.
        crow_indices: int64 [..., rows + 1].
        col_indices: int64 [..., entries], ascending in each row.
        shape: [..., rows, columns].
        keep_negative_zero: store -0.0.

    Raises:
        FormatError: indices that contradict themselves, each other or the shape.
        TypeError, ValueError: a tensor of the wrong kind, dtype or device.

    >>> from_csr(torch.tensor([7, 0, 8]), torch.tensor([0, 3]), torch.tensor([0, 1, 2]), [1, 3])
    (tensor([7, 8]), tensor([[5]], dtype=torch.uint8), tensor([0]))
    """
    parts: _Three = _call_on_lists(
        torch.ops.bitmask.from_csr, values, crow_indices, col_indices, shape, keep_negative_zero
    )
    return parts


def from_bsr(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    shape: Sequence[int],
    keep_negative_zero: bool = False,
) -> _Three:
    """The same for BSR.

    Args:
        values: [..., blocks, block rows, block columns], the leading sizes being those of the batch.
        crow_indices: int64 [..., rows of blocks + 1].
        col_indices: int64 [..., blocks], ascending in each row of blocks.
        shape: [..., rows, columns], which blocks divide.
        keep_negative_zero: store -0.0.

    >>> from_bsr(torch.tensor([[[7, 0]]]), torch.tensor([0, 1]), torch.tensor([1]), [1, 4])
    (tensor([7]), tensor([[4]], dtype=torch.uint8), tensor([0]))
    """
    parts: _Three = _call_on_lists(
        torch.ops.bitmask.from_bsr, values, crow_indices, col_indices, shape, keep_negative_zero
    )
    return parts


def coo_to_crow(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Where each row begins in the ordered indices of a COO tensor; what its last index says is not looked at.

    Args:
        indices: int64 [dimensions of `shape`, entries], entries in the order of the dense tensor.
        shape: at least one dimension; rows are all but the last, flattened.

    Returns:
        int64 [rows + 1].

    Raises:
        FormatError: indices out of range or out of order.
        TypeError: a tensor of the wrong kind or dtype.

    >>> coo_to_crow(torch.tensor([[0, 0, 2], [1, 3, 0]]), [3, 4])
    tensor([0, 2, 2, 3])
    """
    _check_indices({"indices": indices})
    crow_indices: Tensor = call(torch.ops.bitmask.coo_to_crow, indices, list(shape), invalid=FormatError)
    return crow_indices


def _dividing_sides(block_shape: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """The sides of blocks that divide the matrices of `shape`; raises TypeError or ValueError."""
    sides = check_block_shape(block_shape)
    if any(size % side != 0 for size, side in zip(shape[-2:], sides, strict=True)):
        raise ValueError(
            f"block_shape: got {list(sides)}, expected sizes that divide those of a matrix, {list(shape[-2:])}"
        )
    return sides


def _check_matrices(shape: Sequence[int]) -> None:
    if len(shape) < 2:
        raise ValueError(f"shape: got {list(shape)}, expected at least two dimensions")


def _check_device(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"{name}: got device {tensor.device}, expected cpu: bitmask converts sparse layouts there only"
        )


def _check_indices(indices: dict[str, Tensor]) -> None:
    for name, part in indices.items():
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: got {type(part).__name__}, expected a torch.Tensor")
        check_strided(name, part)
        _check_device(name, part)
        if part.dtype != torch.int64:
            raise TypeError(f"{name}: got dtype {part.dtype}, expected torch.int64")


def _check_lists(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int]) -> None:
    _check_matrices(shape)
    _check_indices({"crow_indices": crow_indices, "col_indices": col_indices})
    if not isinstance(values, Tensor):
        raise TypeError(f"values: got {type(values).__name__}, expected a torch.Tensor")
    check_strided("values", values)
    _check_device("values", values)
    if values.dtype not in DTYPES:
        raise TypeError(f"values: got dtype {values.dtype}, expected one that bitmask compresses")


def _call_on_parts(
    op: Callable[..., Any], values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int], *more: Any
) -> Any:
    check_parts(values, bitmasks, row_offsets)
    _check_device("values", values)
    return call(op, values.detach(), bitmasks, row_offsets, list(shape), *more, invalid=FormatError)


def _call_on_lists(
    op: Callable[..., Any],
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    shape: Sequence[int],
    keep_negative_zero: bool,
) -> Any:
    _check_lists(values, crow_indices, col_indices, shape)
    check_flag("keep_negative_zero", keep_negative_zero)
    return call(op, values.detach(), crow_indices, col_indices, list(shape), keep_negative_zero, invalid=FormatError)


def _check_sized_parts(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> None:
    check_parts(values, bitmasks, row_offsets)
    check_part_sizes(values, bitmasks, row_offsets, shape)


def _fake_to_coo(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    _check_sized_parts(values, bitmasks, row_offsets, shape)
    return row_offsets.new_empty([len(shape), values.shape[0]]), values.new_empty(values.shape)


def _fake_to_csr(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> _Three:
    _check_sized_parts(values, bitmasks, row_offsets, shape)
    starts = row_offsets.new_empty([row_offsets.shape[0] + 1])
    return starts, row_offsets.new_empty(values.shape), values.new_empty(values.shape)


def _transposed(shape: Sequence[int]) -> list[int]:
    return [*shape[:-2], shape[-1], shape[-2]]


def _fake_to_csc(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> _Three:
    _check_matrices(shape)
    _check_sized_parts(values, bitmasks, row_offsets, shape)
    columns, _ = rows_and_columns(_transposed(shape))
    starts = row_offsets.new_empty([columns + 1])
    return starts, row_offsets.new_empty(values.shape), values.new_empty(values.shape)


def _fake_to_bsr(
    values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int], block_shape: Sequence[int]
) -> _Three:
    _check_matrices(shape)
    _check_sized_parts(values, bitmasks, row_offsets, shape)
    blocks = library.get_ctx().new_dynamic_size()
    return (
        row_offsets.new_empty([row_offsets.shape[0] // block_shape[0] + 1]),
        row_offsets.new_empty([blocks]),
        values.new_empty([blocks, *block_shape]),
    )


def _fake_transpose(values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> _Three:
    _check_matrices(shape)
    _check_sized_parts(values, bitmasks, row_offsets, shape)
    transposed = _transposed(shape)
    return (
        values.new_empty(values.shape),
        bitmasks.new_empty(bitmask_sizes(transposed)),
        row_offsets.new_empty([rows_and_columns(transposed)[0]]),
    )


def _fake_from_lists(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int], keep_negative_zero: bool
) -> _Three:
    _check_lists(values, crow_indices, col_indices, shape)
    return (
        values.new_empty([library.get_ctx().new_dynamic_size()]),
        values.new_empty(bitmask_sizes(shape), dtype=torch.uint8),
        crow_indices.new_empty([rows_and_columns(shape)[0]]),
    )


def _fake_coo_to_crow(indices: Tensor, shape: Sequence[int]) -> Tensor:
    _check_indices({"indices": indices})
    return indices.new_empty([rows_and_columns(shape)[0] + 1])


library.register_fake("bitmask::coo_to_crow", _fake_coo_to_crow)
library.register_fake("bitmask::from_bsr", _fake_from_lists)
library.register_fake("bitmask::from_csr", _fake_from_lists)
library.register_fake("bitmask::to_bsr", _fake_to_bsr)
library.register_fake("bitmask::to_coo", _fake_to_coo)
library.register_fake("bitmask::to_csc", _fake_to_csc)
library.register_fake("bitmask::to_csr", _fake_to_csr)
library.register_fake("bitmask::transpose", _fake_transpose)
