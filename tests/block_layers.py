"""Block-sparse layers that several test files build and compare."""

import math

import torch
from conftest import assert_bits_equal
from torch import nn

from bitmask import BitmaskTensor, BlockSparseLinear

# in_features, out_features, block_shape: whole blocks, cut ones at both edges, blocks larger than the weight.
SHAPES = [(64, 96, (32, 32)), (70, 50, (16, 32)), (33, 65, (8, 4)), (35, 7, (32, 32)), (9, 4, (1, 1)), (40, 1, (3, 7))]
PARTS = ["values", "bias", "crow_indices", "col_indices", "dense_shape"]
TRANSPOSED = ["ccol_indices", "row_indices", "order"]


def _other_kind(name, convert, message):
    return lambda state: state.update({name: convert(state[name])}), TypeError, f"{name}: got {message}"


# Changes of a state_dict that put a tensor of another kind in place of a part, the error and its message.
OTHER_KINDS = {
    f"{kind} {name}": _other_kind(name, convert, message)
    for name in PARTS
    for kind, convert, message in [
        ("sparse", torch.Tensor.to_sparse, "a torch.sparse_coo tensor, expected a dense"),
        ("nested", lambda part: torch.nested.nested_tensor([part]), "a nested tensor"),
        ("compressed", BitmaskTensor.from_dense, "a BitmaskTensor, which wraps other tensors"),
    ]
}


def make(in_features=70, out_features=50, density=None, block_shape=(16, 32), **options):
    return BlockSparseLinear(in_features, out_features, density=density, block_shape=block_shape, **options)


def dense_weight(layer):
    """The weight in plain loops over blocks."""
    height, width = layer.block_shape
    dense = torch.zeros(math.ceil(layer.out_features / height) * height, math.ceil(layer.in_features / width) * width)
    dense = dense.to(layer.values.dtype)
    crow = layer.crow_indices.tolist()
    for row in range(len(crow) - 1):
        for at in range(crow[row], crow[row + 1]):
            col = int(layer.col_indices[at])
            dense[row * height : (row + 1) * height, col * width : (col + 1) * width] = layer.values.detach()[at]
    return dense[: layer.out_features, : layer.in_features]


def assert_consistent(layer):
    """Index, transposed index and sizes belong together."""
    pattern = layer.pattern.cpu()
    rows, cols = pattern.nonzero(as_tuple=True)
    assert torch.equal(layer.col_indices, cols)
    assert layer.crow_indices.tolist() == [0, *pattern.sum(1).cumsum(0).tolist()]
    order = torch.argsort(cols, stable=True)
    assert torch.equal(layer.order, order)
    assert torch.equal(layer.row_indices, rows[order])
    assert layer.ccol_indices.tolist() == [0, *pattern.sum(0).cumsum(0).tolist()]
    assert layer.values.shape == (len(cols), *layer.block_shape)
    assert layer.dense_shape.tolist() == [layer.out_features, layer.in_features]


def assert_same_layer(got, expected):
    assert_consistent(got)
    for name in [*PARTS, *TRANSPOSED]:
        if getattr(expected, name) is None:
            assert getattr(got, name) is None
        else:
            assert_bits_equal(getattr(got, name), getattr(expected, name))
    assert repr(got) == repr(expected)


def linear_of(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return layer
