"""The block-sparse layout (FORMAT.md): sizes, parts, what proves them, and the way from and to dense.

A weight [out_features, in_features] is cut into a grid of blocks, of which some are kept; those at its lower and right
edges may reach past it.

    values        [blocks, rows and columns of a block]: the kept blocks, block row by block row
    crow_indices  [block rows + 1]: the first block of each block row
    col_indices   [blocks]: the block column of each block, ascending in each block row
    dense_shape   [2]: out_features, in_features
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitmask import ops_block
from bitmask.calls import LINEAR_DTYPES, MOST_BLOCK_SIDE, FormatError, check_strided

# What a layer consists of, beside its bias.
PARTS = ("values", "crow_indices", "col_indices", "dense_shape")

# crow_indices and col_indices.
Index = tuple[Tensor, Tensor]


def grid_of(shape: Sequence[int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Block rows and block columns of a matrix; those at the edges may reach past it."""
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def block_sizes(size: int, block: int) -> Tensor:
    """How many rows (columns) of the matrix each block row (block column) really has: int64."""
    return (size - torch.arange(0, size, block, device="cpu")).clamp(max=block)


def index_of(pattern: Tensor) -> Index:
    """crow_indices and col_indices of a pattern, on the CPU."""
    pattern = pattern.cpu()
    crow_indices = torch.zeros(len(pattern) + 1, dtype=torch.int64, device="cpu")
    crow_indices[1:] = pattern.sum(1).cumsum(0)
    return crow_indices, pattern.nonzero()[:, 1].clone(memory_format=torch.contiguous_format)


def rows_of(index: Index) -> Tensor:
    """The block row of each block: one that exists, whatever an index that is not proven holds."""
    crow_indices, col_indices = index
    blocks = torch.arange(len(col_indices), device=crow_indices.device)
    return torch.bucketize(blocks, crow_indices[1:-1], right=True)


def inputs_of(index: Index, in_features: int, width: int) -> Tensor:
    """How many inputs the outputs of each block row have: int64 [block rows], on the CPU."""
    crow_indices, col_indices = (tensor.cpu() for tensor in index)
    widths = block_sizes(in_features, width)[col_indices]
    inputs = torch.zeros(len(crow_indices) - 1, dtype=torch.int64, device="cpu")
    return inputs.index_add(0, rows_of((crow_indices, col_indices)), widths)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless there are kernels for weights of this dtype."""
    if dtype not in LINEAR_DTYPES:
        raise TypeError(f"{name}: got dtype {dtype}, expected float32, bfloat16, float16 or float64")


def check_size(name: str, size: int) -> int:
    """The size as an int; raises TypeError or ValueError unless it is an integer of at least 0."""
    try:
        size = operator.index(size)
    except TypeError:
        raise TypeError(f"{name}: got {size!r}, expected an integer") from None
    if size < 0:
        raise ValueError(f"{name}: got {size}, expected at least 0")
    return size


def check_shape(name: str, shape: tuple[int, int], error: type[ValueError] = ValueError) -> tuple[int, int]:
    """The shape; raises `error` unless a weight can have as many elements."""
    if shape[0] * shape[1] >= 2**63:
        raise error(f"{name}: got {list(shape)}, expected sizes whose product is less than 2^63")
    return shape


def known_sizes(out_features: int | None, in_features: int | None) -> list[int | None]:
    """What a caller knows of a weight's size, checked."""
    known = {"out_features": out_features, "in_features": in_features}
    return [None if size is None else check_size(name, size) for name, size in known.items()]


def check_known_sizes(shape: tuple[int, int], expected: Sequence[int | None], prefix: str) -> None:
    """Raise FormatError unless out_features and in_features are what is known of them."""
    for name, size, known in zip(("out_features", "in_features"), shape, expected, strict=True):
        if known is not None and size != known:
            raise FormatError(f"{prefix}dense_shape: got {name} {size}, expected {known}")


def refuse_two_four(state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise FormatError if these are the parts of a layer whose blocks are 2:4, which may pass for dense ones."""
    if prefix + "metadata" in state_dict:
        raise FormatError(
            f"{prefix}metadata: got the state of a SemiStructuredBlockLinear, whose blocks are 2:4; expected that of a "
            "BlockSparseLinear, which has none"
        )


def parts_of(state_dict: Mapping[str, Any], names: Sequence[str], prefix: str) -> dict[str, Any]:
    """The parts of a layer; raises TypeError unless it is a state_dict and a prefix, FormatError if one is missing."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got {type(state_dict).__name__}, expected a dict of tensors by name")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: got {prefix!r}, expected a string")
    missing = [prefix + name for name in names if prefix + name not in state_dict]
    if missing:
        raise FormatError(f"{missing[0]}: not in the state_dict, expected {', '.join(names)} and perhaps bias")
    return {name: state_dict[prefix + name] for name in names}


def check_parts(parts: Mapping[str, Any], prefix: str, sharded: bool = False) -> tuple[int, int]:
    """Raise TypeError or FormatError unless the parts are those of a weight, but for the numbers in its index.

    Returns its shape. `prefix` stands before the names in messages; where values are `sharded`, they may wrap others.
    """
    for name, part in parts.items():
        if not (sharded and name == "values" and isinstance(part, Tensor)):
            check_strided(prefix + name, part)
        if name == "values":
            check_dtype(prefix + name, part.dtype)
        elif part.dtype != torch.int64:
            raise TypeError(f"{prefix}{name}: got dtype {part.dtype}, expected torch.int64")
        elif part.is_meta:
            raise FormatError(f"{prefix}{name}: got a meta tensor, expected one with data")
    values, crow_indices, col_indices, shape = (parts[name] for name in PARTS)
    _check_size(prefix, "dense_shape", shape, (2,), "out_features, in_features")
    out_features, in_features = shape.tolist()
    if min(out_features, in_features) < 0:
        raise FormatError(f"{prefix}dense_shape: got {[out_features, in_features]}, expected no negative size")
    check_shape(f"{prefix}dense_shape", (out_features, in_features), FormatError)
    if values.ndim != 3 or 0 in values.shape[1:] or max(values.shape[1:]) > MOST_BLOCK_SIDE:
        raise FormatError(
            f"{prefix}values: got size {list(values.shape)}, expected [blocks, rows, columns], the last two 1 to 2^28"
        )
    block_rows = grid_of((out_features, in_features), (values.shape[1], values.shape[2]))[0]
    _check_size(prefix, "crow_indices", crow_indices, (block_rows + 1,), "one per block row and one")
    _check_size(prefix, "col_indices", col_indices, (len(values),), "one per block of values")
    return out_features, in_features


def prove_index(index: Index, shape: tuple[int, int], width: int, prefix: str = "") -> None:
    """Raise FormatError unless it is an index of blocks of this width in a weight of `shape`.

    Takes memory that grows with the weight's block columns: RuntimeError if there is none.
    """
    crow_indices, col_indices = (tensor.cpu() for tensor in index)
    try:
        ops_block.bsr_transpose(crow_indices, col_indices, -(-shape[1] // width))
    except FormatError as error:
        raise FormatError(f"{prefix}{error}") from None
    except RuntimeError as error:
        raise RuntimeError(f"{prefix}dense_shape: got {list(shape)}: {error}") from error


def _check_size(prefix: str, name: str, part: Tensor, size: tuple[int, ...], meaning: str) -> None:
    if tuple(part.shape) != size:
        raise FormatError(f"{prefix}{name}: got size {list(part.shape)}, expected {list(size)} ({meaning})")


def check_device(name: str, part: Tensor, values: Tensor) -> None:
    """Raise ValueError unless a part is where the values are."""
    if part.device != values.device:
        raise ValueError(f"{name}: got device {part.device}, expected {values.device}, the device of values")


def check_bias(bias: Any, values: Tensor, out_features: int, prefix: str) -> None:
    """Raise TypeError, ValueError or FormatError unless the bias goes with a weight of these values."""
    check_strided(f"{prefix}bias", bias)
    if bias.dtype != values.dtype:
        raise TypeError(f"{prefix}bias: got dtype {bias.dtype}, expected {values.dtype}, the dtype of values")
    check_device(f"{prefix}bias", bias, values)
    _check_size(prefix, "bias", bias, (out_features,), "out_features")


def take_blocks(dense: Tensor, index: Index, block_shape: tuple[int, int]) -> Tensor:
    """The values of a matrix: a copy of these blocks, with zeros past its edges."""
    (rows, cols), (height, width) = grid_of(dense.shape, block_shape), block_shape
    padded = F.pad(dense, (0, cols * width - dense.shape[1], 0, rows * height - dense.shape[0]))
    return padded.view(rows, height, cols, width)[rows_of(index), :, index[1]]


def dense_of(values: Tensor, index: Index, shape: tuple[int, int]) -> Tensor:
    """The matrix of these values, differentiable."""
    _, height, width = values.shape
    rows, cols = grid_of(shape, (height, width))
    blocks = values.new_zeros(rows, cols, height, width).index_put((rows_of(index), index[1]), values)
    return blocks.transpose(1, 2).reshape(rows * height, cols * width)[: shape[0], : shape[1]]


def zero_past_edges(values: Tensor, index: Index, shape: tuple[int, int]) -> None:
    """Set to zero what of the values lies past a matrix of `shape`."""
    for dim, (place, size) in enumerate(zip((rows_of(index), index[1]), shape, strict=True), start=1):
        line, rest = divmod(size, values.shape[dim])
        past = torch.arange(rest, values.shape[dim], device=values.device)
        values[place == line] = values[place == line].index_fill_(dim, past, 0)
