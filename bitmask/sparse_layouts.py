"""Parts of the bitmask layout to and from PyTorch's sparse layouts: COO, CSR, CSC, BSR, BSC, and its 2:4 tensors.

The native ops make and prove lists of indices; here they become sparse tensors, and batches and dense dimensions are
sorted out. A sparse tensor is data that anyone may have written to, so its indices are proven, not trusted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedOperatorException
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from bitmask import ops, ops_convert, ops_two_four
from bitmask.calls import FormatError
from bitmask.cutlass_layout import from_cutlass, parts_of_torch

_Parts = tuple[Tensor, Tensor, Tensor]

# They hold; where PyTorch was told to check them, it does.
_checks_invariants: Callable[[], bool] = torch.sparse.check_sparse_tensor_invariants.is_enabled


# From the bitmask layout: values, bitmasks and row offsets of a tensor of `shape`.


def to_coo(parts: _Parts, shape: torch.Size) -> Tensor:
    """A coalesced torch.sparse_coo tensor without dense dimensions."""
    _break_graph(parts, torch.ops.aten.sparse_coo_tensor.indices)
    indices, values = ops_convert.to_coo(*parts, shape)
    return torch.sparse_coo_tensor(
        indices, values, shape, device=values.device, is_coalesced=True, check_invariants=_checks_invariants()
    )


def to_csr(parts: _Parts, shape: torch.Size) -> Tensor:
    """A torch.sparse_csr tensor."""
    _break_graph(parts, torch.ops.aten.sparse_csr_tensor.crow_col_value_size)
    _check_matrices(shape)
    return _compressed(torch.sparse_csr, ops_convert.to_csr(*parts, shape), shape)


def to_csc(parts: _Parts, shape: torch.Size) -> Tensor:
    """A torch.sparse_csc tensor."""
    _break_graph(parts, torch.ops.aten.sparse_csc_tensor.ccol_row_value_size)
    _check_matrices(shape)
    return _compressed(torch.sparse_csc, ops_convert.to_csc(*parts, shape), shape)


def to_bsr(parts: _Parts, shape: torch.Size, block_shape: Sequence[int]) -> Tensor:
    """A torch.sparse_bsr tensor of blocks of such sides."""
    _break_graph(parts, torch.ops.aten.sparse_bsr_tensor.crow_col_value_size)
    _check_matrices(shape)
    if parts[0].is_meta:
        raise ValueError("tensor: got a meta tensor, expected one with data: it says how many blocks there are")
    return _compressed(torch.sparse_bsr, ops_convert.to_bsr(*parts, shape, block_shape), shape)


def _break_graph(parts: _Parts, op: OpOverload) -> None:
    """Tell compilers to call the conversion between their graphs, in which there are no tensors of sparse layouts."""
    if isinstance(parts[0], FakeTensor):
        raise UnsupportedOperatorException(op)


def _check_matrices(shape: torch.Size) -> None:
    if len(shape) < 2 or math.prod(shape[:-2]) == 0:
        raise ValueError(
            f"tensor: got shape {list(shape)}, expected a matrix or a batch of one or more: PyTorch has no other "
            "tensors of this layout"
        )


def _compressed(layout: torch.layout, lists: _Parts, shape: torch.Size) -> Tensor:
    """The sparse tensor of lists that go on from matrix to matrix; PyTorch's begin anew in each one."""
    starts, positions, values = lists
    batch = shape[:-2]
    if len(batch) > 0:
        count = math.prod(batch)
        lines = (len(starts) - 1) // count
        borders = starts[torch.arange(count + 1, device=starts.device) * lines]
        entries = _entries_of_each(borders)
        starts = torch.cat([starts[:-1].reshape(count, lines), borders[1:, None]], dim=1) - borders[:-1, None]
        starts = starts.reshape(*batch, lines + 1)
        positions = positions.reshape(*batch, entries)
        values = values.reshape(*batch, entries, *values.shape[1:])
    return torch.sparse_compressed_tensor(
        starts,
        positions,
        values,
        shape,
        layout=layout,
        device=values.device,
        check_invariants=_checks_invariants(),
    )


def _entries_of_each(borders: Tensor) -> int:
    """How many elements, or blocks, every matrix stores."""
    counts = borders.diff()
    other = (counts != counts[0]).nonzero()
    if len(other) > 0:
        matrix = int(other[0])
        raise ValueError(
            f"tensor: got {int(counts[matrix])} stored elements or blocks in matrix {matrix} of the batch and "
            f"{int(counts[0])} in matrix 0, expected as many in each: PyTorch's batches of this layout have no room "
            "for other ones; to_coo() has, and each matrix by itself"
        )
    return int(counts[0])


# To the bitmask layout.


def from_sparse(tensor: Tensor, keep_negative_zero: bool = False) -> _Parts:
    """The parts of a sparse tensor of any layout."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: got {type(tensor).__name__}, expected a sparse torch.Tensor")
    if isinstance(tensor, SparseSemiStructuredTensorCUTLASS):
        return _from_semi_structured(tensor, keep_negative_zero)
    if tensor.layout not in _CONVERSIONS or hasattr(tensor, "__tensor_flatten__"):
        kind = type(tensor).__name__ if hasattr(tensor, "__tensor_flatten__") else f"{tensor.layout} tensor"
        way = "use its to_bitmask()" if hasattr(tensor, "to_bitmask") else "from_dense takes dense ones"
        raise TypeError(f"tensor: got a {kind}, expected a sparse one; {way}")
    if tensor.dtype not in ops.DTYPES:
        raise TypeError(f"tensor: got dtype {tensor.dtype}, expected one that bitmask compresses")
    if tensor.device.type != "cpu":
        raise NotImplementedError(f"tensor: got device {tensor.device}, expected cpu: bitmask converts there only")
    values, bitmasks, row_offsets = _CONVERSIONS[tensor.layout](tensor.detach(), keep_negative_zero)
    return values, bitmasks.reshape(ops.bitmask_sizes(tensor.shape)), row_offsets


def _from_semi_structured(tensor: SparseSemiStructuredTensorCUTLASS, keep_negative_zero: bool) -> _Parts:
    """Its two elements of every four columns, less the zeros among them."""
    stored = ops_two_four.bitmask_parts_24(*from_cutlass(*parts_of_torch(tensor)))
    crow_indices, col_indices, values = ops_convert.to_csr(*stored, tensor.shape)
    return ops_convert.from_csr(values, crow_indices, col_indices, tensor.shape, keep_negative_zero)


@contextmanager
def _named(names: dict[str, str]) -> Iterator[None]:
    """Errors that speak of the caller's fields, by their names."""
    try:
        yield
    except FormatError as error:
        pattern = "|".join(map(re.escape, names))
        raise FormatError(re.sub(pattern, lambda name: names[name[0]], str(error)) if names else str(error)) from None


def _from_coo(tensor: Tensor, keep_negative_zero: bool) -> _Parts:
    if not tensor.is_coalesced():
        _check_range(tensor._indices(), tensor.shape)
        tensor = tensor.coalesce()
    return _from_entries(tensor._indices(), tensor._values(), tensor.shape, keep_negative_zero)


def _check_range(indices: Tensor, shape: Sequence[int]) -> None:
    """Refuse indices out of range, which coalescing would take for those of another element."""
    if indices.numel() == 0:
        return
    for dim, (low, high) in enumerate(zip(*(bound.tolist() for bound in indices.aminmax(dim=1)), strict=True)):
        if low < 0 or high >= shape[dim]:
            raise FormatError(
                f"indices[{dim}]: got {low if low < 0 else high}, expected at least 0 and less than {shape[dim]}"
            )


def _from_entries(indices: Tensor, values: Tensor, shape: Sequence[int], keep_negative_zero: bool) -> _Parts:
    """Entries of a COO tensor, ordered: each an element, or where there are dense dimensions, a tensor of them."""
    sparse_dims = indices.shape[0]
    sparse, dense = list(shape[:sparse_dims]), list(shape[sparse_dims:])
    if list(values.shape) != [indices.shape[1], *dense]:
        raise FormatError(f"values: got size {list(values.shape)}, expected {[indices.shape[1], *dense]}")
    if math.prod(shape) == 0 and len(dense) > 0:
        return ops.compress(values.new_empty(shape))
    # Where elements, or tensors of them, are not indexed within their row, they are the only ones in it.
    if len(dense) > 0 or sparse_dims == 0:
        indices = torch.cat([indices, indices.new_zeros(1, indices.shape[1])])
        sparse = [*sparse, 1]
    rows = math.prod(sparse[:-1])
    with _named({"col_indices[": f"indices[{len(sparse) - 1}, ", "in row": "in flattened row"}):
        crow_indices = ops_convert.coo_to_crow(indices, sparse)
        if len(dense) == 0:
            return ops_convert.from_csr(values, crow_indices, indices[-1], [rows, sparse[-1]], keep_negative_zero)
        lines = math.prod(dense[:-1])
        blocks = values.reshape(len(values), lines, dense[-1])
        return ops_convert.from_bsr(blocks, crow_indices, indices[-1], [rows * lines, dense[-1]], keep_negative_zero)


def _from_rows(tensor: Tensor, keep_negative_zero: bool) -> _Parts:
    """CSR and BSR."""
    if tensor.dense_dim() > 0:
        return _from_hybrid(tensor, keep_negative_zero)
    convert = ops_convert.from_csr if tensor.layout is torch.sparse_csr else ops_convert.from_bsr
    return convert(tensor.values(), *_index(tensor), tensor.shape, keep_negative_zero)


def _from_columns(tensor: Tensor, keep_negative_zero: bool) -> _Parts:
    """CSC and BSC: rows of the transposed tensor."""
    if tensor.dense_dim() > 0:
        return _from_hybrid(tensor, keep_negative_zero)
    transposed = [*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]]
    with _named(_BY_COLUMN):
        if tensor.layout is torch.sparse_csc:
            parts = ops_convert.from_csr(tensor.values(), *_index(tensor), transposed, keep_negative_zero)
        else:
            blocks = tensor.values()
            if blocks.ndim < 3:
                raise FormatError(f"values: got size {list(blocks.shape)}, expected [..., block rows, block columns]")
            parts = ops_convert.from_bsr(blocks.mT, *_index(tensor), transposed, keep_negative_zero)
    return ops_convert.transpose(*parts, transposed)


def _index(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Where lines of entries begin, and their positions in a line: lines are rows, or columns in CSC and BSC."""
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    starts = tensor.crow_indices() if by_row else tensor.ccol_indices()
    positions = tensor.col_indices() if by_row else tensor.row_indices()
    return starts.to(torch.int64), positions.to(torch.int64)


def _from_hybrid(tensor: Tensor, keep_negative_zero: bool) -> _Parts:
    """Any of the compressed layouts with dense dimensions: as the COO tensor of the same entries, put in order."""
    starts, positions = _index(tensor)
    values = tensor.values()
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    has_blocks = tensor.layout in (torch.sparse_bsr, torch.sparse_bsc)
    dense_dims = tensor.dense_dim()
    sparse, dense = tensor.shape[:-dense_dims], tensor.shape[-dense_dims:]
    batch_dims = len(sparse) - 2
    block = values.shape[batch_dims + 1 : batch_dims + 3] if has_blocks else torch.Size([1, 1])
    if list(values.shape) != [*positions.shape, *(block if has_blocks else []), *dense] or min(block) < 1:
        raise FormatError(f"values: got size {list(values.shape)}, expected those of the entries, then {list(dense)}")
    if math.prod(tensor.shape) == 0:
        return ops.compress(values.new_empty(tensor.shape))

    # The entries' own bitmask proves their index and lists them.
    sides = [size // side for size, side in zip(sparse[-2:], block, strict=True)]
    entries_shape = [*sparse[:-2], *(sides if by_row else reversed(sides))]
    with _named({} if by_row else _BY_COLUMN):
        entries = values.new_ones(positions.shape, dtype=torch.bool)
        marks = ops_convert.from_csr(entries, starts, positions, entries_shape)
    indices, _ = ops_convert.to_coo(*marks, entries_shape)
    *batch, row, col = indices if by_row else [*indices[:-2], indices[-1], indices[-2]]
    within = torch.arange(block.numel(), device=values.device).reshape(block)
    spread = [index[:, None, None].expand(-1, *block) for index in batch]
    row = row[:, None, None] * block[0] + within // block[1]
    col = col[:, None, None] * block[1] + within % block[1]
    indices = torch.stack([*spread, row, col]).flatten(1)
    order = torch.zeros_like(indices[0])
    for size, index in zip(sparse, indices, strict=True):
        order = order * size + index
    order = order.argsort()
    values = values.reshape(-1, *dense)
    return _from_entries(indices[:, order], values[order], tensor.shape, keep_negative_zero)


_BY_COLUMN = {
    "crow_indices": "ccol_indices",
    "col_indices": "row_indices",
    "in row": "in column",
    "in line": "in column",
}

_CONVERSIONS: dict[torch.layout, Callable[[Tensor, bool], Any]] = {
    torch.sparse_coo: _from_coo,
    torch.sparse_csr: _from_rows,
    torch.sparse_bsr: _from_rows,
    torch.sparse_csc: _from_columns,
    torch.sparse_bsc: _from_columns,
}
