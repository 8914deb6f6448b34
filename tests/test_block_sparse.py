"""BlockSparseLinear: products and gradients, construction, conversion, state_dict, copies and modes of torch."""

import copy
import io
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_bits_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitmask
from bitmask import BitmaskLinear, BlockSparseLinear, FormatError, block_norms, largest_blocks, ops_block
from bitmask.block_layout import block_sizes
from bitmask.block_patterns import spread_blocks
from bitmask.calls import LINEAR_DTYPES

pytestmark = pytest.mark.filterwarnings("error", "ignore:Sparse .* beta", "ignore:Initializing", "ignore:.*nested")

# in_features, out_features, block_shape: whole blocks, cut ones at both edges, blocks larger than the weight.
SHAPES = [(64, 96, (32, 32)), (70, 50, (16, 32)), (33, 65, (8, 4)), (35, 7, (32, 32)), (9, 4, (1, 1)), (40, 1, (3, 7))]
PARTS = ["values", "bias", "crow_indices", "col_indices", "dense_shape"]
TRANSPOSED = ["ccol_indices", "row_indices", "order"]


@pytest.fixture(params=sorted(LINEAR_DTYPES, key=str), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


# Products and gradients.


@pytest.mark.parametrize(("in_features", "out_features", "block_shape"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_dense_layer(in_features, out_features, block_shape, bias):
    layer = make(in_features, out_features, 0.4, block_shape, bias=bias, dtype=torch.float64)
    weight = dense_weight(layer).requires_grad_()
    x = torch.randn(3, 5, in_features, dtype=torch.float64, requires_grad=True)
    other_x, other_bias = x.detach().clone().requires_grad_(), None
    if bias:
        other_bias = layer.bias.detach().clone().requires_grad_()
    y, expected = layer(x), F.linear(other_x, weight, other_bias)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, other_x.grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, other_bias.grad)
    gradient = BlockSparseLinear.from_dense(linear_of(weight.grad), block_shape=block_shape, pattern=layer.pattern)
    torch.testing.assert_close(layer.values.grad, gradient.values.data)


def linear_of(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return layer


def test_dtypes(dtype):
    layer, x = make(dtype=dtype), torch.randn(9, 70).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(y, F.linear(x, dense_weight(layer), layer.bias), **tolerance)
    y.sum().backward()
    assert layer.values.grad.dtype == layer.bias.grad.dtype == dtype


@pytest.mark.parametrize("size", [(), (0,), (3, 0, 2)], ids=str)
def test_any_leading_sizes(size):
    layer = make()
    y = layer(torch.randn(*size, 70))
    assert y.shape == (*size, 50)
    y.sum().backward()
    assert layer.values.grad.shape == layer.values.shape


def test_what_lies_past_the_edges_counts_for_nothing():
    layer = make(33, 17, 1.0, (16, 32))
    expected = layer(x := torch.randn(4, 33))
    with torch.no_grad():
        layer.values[1::2, :, 1:] = torch.nan
        layer.values[-2:, 1:] = torch.nan
    y = layer(x)
    assert torch.equal(y, expected)
    assert not layer.to_dense().weight.isnan().any()
    y.sum().backward()
    assert not layer.values.grad.isnan().any()
    assert not layer.values.grad[1::2, :, 1:].any()
    assert not layer.values.grad[-2:, 1:].any()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout):
    layer, parts = make(), [torch.randn(3, 70), torch.randn(5, 70)]
    y = layer(torch.nested.nested_tensor(parts, layout=layout))
    assert y.layout == layout
    for got, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(got, layer(part))
    y.to_padded_tensor(0.0).sum().backward()
    gradient = layer.values.grad.clone()
    layer.zero_grad()
    layer(torch.cat(parts)).sum().backward()
    torch.testing.assert_close(layer.values.grad, gradient)


def test_no_blocks_at_all():
    layer = make(pattern=torch.zeros(4, 3, dtype=torch.bool))
    assert len(layer.values) == 0
    assert layer.density == 0
    assert not layer.bias.any(), "outputs without an input"
    layer(x := torch.randn(2, 70, requires_grad=True)).sum().backward()
    assert not x.grad.any()
    assert layer.values.grad.shape == (0, 16, 32)
    assert torch.equal(layer.bias.grad, torch.full((50,), 2.0))


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (5, 0), (0, 0)])
def test_no_features(in_features, out_features):
    layer = make(in_features, out_features)
    assert layer(torch.randn(3, in_features)).shape == (3, out_features)
    assert layer.density == 0
    assert layer.to_dense().weight.shape == (out_features, in_features)


@pytest.mark.parametrize("size", [(3, 69), (3, 96), (70, 3), ()], ids=str)
def test_wrong_input(size):
    """96 inputs would have as many blocks as 70 have."""
    with pytest.raises(ValueError, match=r"x: got size .*, expected \[..., 70\]"):
        make()(torch.randn(size))


@pytest.mark.parametrize("x", [None, [1.0] * 70, 3], ids=str)
def test_input_that_is_no_tensor(x):
    with pytest.raises(TypeError, match=r"x: got (NoneType|list|int), expected a torch.Tensor"):
        make()(x)


@pytest.mark.parametrize("autocast", [True, False])
def test_wrong_dtype_of_input(autocast):
    """Autocast leaves float64 as it is."""
    refused = pytest.raises(TypeError, match=r"x: got dtype torch.float64, expected torch.float32")
    with torch.autocast("cpu", torch.bfloat16, autocast), refused:
        make()(torch.randn(3, 70, dtype=torch.float64))


# Construction.


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("grid", [(8, 8), (3, 17), (40, 5), (1, 9), (9, 1), (32, 32)], ids=str)
def test_random_blocks_are_spread_evenly(grid, density):
    count = round(density * grid[0] * grid[1])
    pattern = spread_blocks(grid, count)
    assert int(pattern.sum()) == count
    for across in (0, 1):
        counts = pattern.sum(across)
        assert counts.max() - counts.min() <= 1


def test_random_blocks_are_not_repeated_from_row_to_row():
    pattern = spread_blocks((64, 64), 64 * 16)
    assert len(pattern.unique(dim=0)) == 64


def test_layers_repeat_with_the_seed():
    torch.manual_seed(3)
    first, second = make(640, 640), make(640, 640)
    torch.manual_seed(3)
    again = make(640, 640)
    assert_same_layer(again, first)
    assert not torch.equal(first.pattern, second.pattern)


@pytest.mark.parametrize(("in_features", "out_features", "block_shape"), SHAPES)
def test_density_and_pattern(in_features, out_features, block_shape):
    layer = make(in_features, out_features, 0.5, block_shape)
    assert_consistent(layer)
    kept = torch.kron(layer.pattern, torch.ones(block_shape, dtype=torch.bool))[:out_features, :in_features]
    assert layer.density == pytest.approx(float(kept.double().mean()))
    assert len(layer.values) == int(0.5 * layer.pattern.numel() + 0.5)
    again = make(in_features, out_features, block_shape=block_shape, pattern=layer.pattern)
    assert torch.equal(again.pattern, layer.pattern)


def test_a_density_of_less_than_a_block_keeps_one():
    with pytest.warns(UserWarning, match=r"density: 0.01 of 12 blocks is less than half a block; one is kept"):
        layer = make(density=0.01)
    assert len(layer.values) == 1


def test_initialisation_counts_the_inputs_that_there_are():
    """Block row 0 has a whole block, 1 one that is cut off to 6 inputs, 2 both, 3 none."""
    pattern = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.bool)
    layer = BlockSparseLinear(38, 125, block_shape=(32, 32), pattern=pattern)
    dense = layer.to_dense()
    for row, inputs in enumerate([32, 6, 38, 0]):
        bound = inputs**-0.5 if inputs else 0.0
        weight, bias = dense.weight[row * 32 : row * 32 + 32], dense.bias[row * 32 : row * 32 + 32]
        for numbers in (weight, bias):
            assert numbers.abs().max() <= bound
            assert inputs == 0 or numbers.abs().max() > 0.7 * bound
    assert not layer.values[1, :, 6:].any(), "zero past the right edge"
    assert not layer.values[3, :, 6:].any()
    last = BlockSparseLinear(32, 33, block_shape=(32, 32), density=1.0)
    assert not last.values[1, 1:].any(), "zero past the lower edge"
    assert last.values[1, 0].all()


def test_initialisation_is_that_of_linear():
    dense, layer = nn.Linear(512, 512), BlockSparseLinear(512, 512, density=1.0)
    torch.testing.assert_close(layer.values.std(), dense.weight.std(), rtol=0.02, atol=0)
    torch.testing.assert_close(layer.bias.std(), dense.bias.std(), rtol=0.15, atol=0)


def test_reset_parameters_keeps_the_pattern(dtype):
    layer = make(dtype=dtype)
    before = copy.deepcopy(layer)
    layer.reset_parameters()
    assert torch.equal(layer.pattern, before.pattern)
    assert not torch.equal(layer.values, before.values)
    assert layer.values.dtype == dtype


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, ValueError, "density: got 0.0, expected more than 0 and at most 1"),
        ({"density": 1.1}, ValueError, "density: got 1.1"),
        ({"density": -0.5}, ValueError, "density: got -0.5"),
        ({"density": math.nan}, ValueError, "density: got nan"),
        ({"density": "0.5"}, TypeError, "density: got '0.5', expected a number"),
        ({"density": True}, TypeError, "density: got True"),
        (
            {"density": 0.5, "pattern": torch.ones(4, 3, dtype=torch.bool)},
            ValueError,
            "density: got 0.5 and a pattern, expected one of them",
        ),
        ({"block_shape": (0, 32)}, ValueError, r"block_shape: got \(0, 32\), expected sizes of at least 1"),
        ({"block_shape": (32, -1)}, ValueError, "block_shape: got"),
        ({"block_shape": (32,)}, TypeError, r"block_shape: got \(32,\), expected two integers"),
        ({"block_shape": (32, 32, 32)}, TypeError, "block_shape: got"),
        ({"block_shape": 32}, TypeError, "block_shape: got 32"),
        ({"block_shape": (32.0, 32)}, TypeError, "block_shape: got"),
        ({"in_features": -1}, ValueError, "in_features: got -1, expected at least 0"),
        ({"out_features": -1}, ValueError, "out_features: got -1"),
        ({"in_features": 7.0}, TypeError, "in_features: got 7.0, expected an integer"),
        ({"pattern": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"pattern: got size \[3, 4\], expected \[4, 3\]"),
        ({"pattern": torch.ones(12, dtype=torch.bool)}, ValueError, "pattern: got 1 dimensions, expected 2"),
        ({"pattern": torch.ones(4, 3)}, TypeError, "pattern: got dtype torch.float32, expected torch.bool"),
        ({"pattern": [[True]]}, TypeError, "pattern: got list, expected a torch.Tensor"),
        (
            {"pattern": torch.ones(4, 3, dtype=torch.bool, device="meta")},
            ValueError,
            "pattern: got a meta tensor, expected one with data",
        ),
        ({"dtype": torch.int32}, TypeError, "dtype: got dtype torch.int32, expected float32, bfloat16"),
        ({"dtype": torch.complex64}, TypeError, "dtype: got dtype torch.complex64"),
    ],
    ids=str,
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_without_density_and_pattern_half_of_the_blocks_are_kept():
    assert int(BlockSparseLinear(256, 256).pattern.sum()) == 32
    assert int(BlockSparseLinear.from_dense(nn.Linear(256, 256)).pattern.sum()) == 32


def test_repr():
    layer = make(bias=False, dtype=torch.bfloat16)
    assert repr(layer) == (
        "BlockSparseLinear(in_features=70, out_features=50, bias=False, block_shape=(16, 32), blocks=6, "
        f"density={layer.density:.4f}, dtype=torch.bfloat16)"
    )


# From dense and back.


@pytest.mark.parametrize(("in_features", "out_features", "block_shape"), SHAPES)
def test_from_dense_keeps_the_largest_blocks_bit_for_bit(in_features, out_features, block_shape, dtype):
    dense = nn.Linear(in_features, out_features, dtype=dtype)
    layer = BlockSparseLinear.from_dense(dense, 0.4, block_shape)
    assert_consistent(layer)
    assert torch.equal(layer.pattern, largest_blocks(block_norms(dense.weight, block_shape), 0.4))
    kept = torch.kron(layer.pattern, torch.ones(block_shape, dtype=torch.bool))[:out_features, :in_features]
    assert_bits_equal(layer.to_dense().weight.data, torch.where(kept, dense.weight.data, 0))
    assert_bits_equal(layer.bias.data, dense.bias.data)
    norms = block_norms(dense.weight, block_shape)
    assert norms[layer.pattern].min() >= norms[~layer.pattern].max()


def test_from_dense_takes_a_pattern():
    dense, pattern = nn.Linear(70, 50, bias=False), spread_blocks((4, 3), 5)
    layer = BlockSparseLinear.from_dense(dense, block_shape=(16, 32), pattern=pattern)
    assert torch.equal(layer.pattern, pattern)
    assert layer.bias is None
    assert_bits_equal(layer.to_dense().weight.data, dense_weight(layer))


def test_from_dense_shares_nothing_and_keeps_flags():
    dense = nn.Linear(32, 32).eval()
    dense.bias.requires_grad_(False)
    layer = BlockSparseLinear.from_dense(dense, 1.0)
    for parameter in layer.parameters():
        parameter.data.fill_(7)
    assert dense.weight.abs().max() < 1
    assert dense.bias.abs().max() < 1
    assert not layer.training
    assert layer.values.requires_grad
    assert not layer.bias.requires_grad
    back = layer.requires_grad_(False).train().to_dense()
    assert back.training
    assert not back.weight.requires_grad
    assert type(back) is nn.Linear


def test_from_dense_of_a_computed_weight():
    dense = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    assert_bits_equal(BlockSparseLinear.from_dense(dense, 1.0).to_dense().weight.data, dense.weight.data)


def on_int():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)
    return layer


def lazy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.LazyLinear(4)


@pytest.mark.parametrize(
    ("linear", "options", "error", "message"),
    [
        (lambda: nn.Conv1d(2, 2, 1), {}, TypeError, "linear: got Conv1d, expected an nn.Linear"),
        (lambda: torch.ones(2, 2), {}, TypeError, "linear: got Tensor, expected an nn.Linear"),
        (lambda: BitmaskLinear(4, 4), {}, TypeError, "linear: got a BitmaskLinear whose weight is compressed"),
        (lazy, {}, TypeError, "linear: got a lazy layer"),
        (on_int, {}, TypeError, "linear.weight: got dtype torch.int32"),
        (lambda: nn.Linear(4, 4, device="meta"), {}, ValueError, "linear: got a layer on device meta"),
        (lambda: nn.Linear(4, 4), {"density": 2}, ValueError, "density: got 2"),
        (lambda: nn.Linear(4, 4), {"block_shape": (0, 1)}, ValueError, "block_shape: got"),
        (
            lambda: nn.Linear(4, 4),
            {"pattern": torch.ones(2, 1, dtype=torch.bool)},
            ValueError,
            r"pattern: got size \[2, 1\], expected \[1, 1\]",
        ),
        (
            lambda: nn.Linear(4, 4),
            {"density": 0.5, "pattern": torch.ones(1, 1, dtype=torch.bool)},
            ValueError,
            "density: got 0.5 and a pattern, expected one of them",
        ),
    ],
)
def test_wrong_arguments_of_from_dense(linear, options, error, message):
    with pytest.raises(error, match=message):
        BlockSparseLinear.from_dense(linear(), **options)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_torch_bsr_and_back(density, dtype):
    layer = make(64, 96, block_shape=(32, 16), pattern=torch.rand(3, 4) < density, dtype=dtype)
    weight = layer.to_bsr()
    assert weight.layout == torch.sparse_bsr
    assert_bits_equal(weight.to_dense(), dense_weight(layer))
    assert_same_layer(BlockSparseLinear.from_bsr(weight, layer.bias), layer)
    weight.values().fill_(7)
    assert layer.values.numel() == 0 or layer.values.abs().max() < 1, "a copy"


@pytest.mark.filterwarnings("error")
def test_torch_bsr_comes_without_a_warning_about_checks():
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            make(64, 96).to_bsr()
    finally:
        torch.set_warn_always(False)
    assert not [warning for warning in caught if "invariant" in str(warning.message)]


def test_from_bsr_under_a_default_device():
    layer = make(64, 96)
    weight = layer.to_bsr()
    with torch.device("meta"):
        again = BlockSparseLinear.from_bsr(weight, layer.bias)
    assert_same_layer(again, layer)


def test_bsr_with_int32_indices():
    layer = make(64, 96)
    narrow = torch.sparse_bsr_tensor(
        layer.crow_indices.int(), layer.col_indices.int(), layer.values.data, (96, 64), check_invariants=False
    )
    assert_same_layer(BlockSparseLinear.from_bsr(narrow, layer.bias), layer)
    assert BlockSparseLinear.from_bsr(narrow).bias is None


def test_cut_blocks_have_no_torch_bsr():
    with pytest.raises(ValueError, match=r"block_shape: got \(16, 32\), expected sizes that divide \(50, 70\)"):
        make().to_bsr()


def bsr(crow_indices, col_indices):
    values = torch.ones(len(col_indices), 2, 2)
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        return torch.sparse_bsr_tensor(torch.tensor(crow_indices), torch.tensor(col_indices), values, (4, 4))


@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        (lambda: torch.ones(4, 4), None, TypeError, "weight: got torch.strided, expected a tensor of layout"),
        (lambda: torch.ones(4, 4).to_sparse_csr(), None, TypeError, "weight: got torch.sparse_csr"),
        (lambda: [1], None, TypeError, "weight: got list"),
        (lambda: torch.ones(2, 4, 4).to_sparse_bsr((2, 2)), None, ValueError, r"weight: got size \[2, 4, 4\]"),
        (lambda: torch.ones(4, 4).int().to_sparse_bsr((2, 2)), None, TypeError, "values: got dtype torch.int32"),
        (lambda: bsr([0, 2, 2], [1, 0]), None, FormatError, r"col_indices\[\d\]: got"),
        (lambda: bsr([0, 2, 2], [1, 1]), None, FormatError, r"col_indices\[\d\]: got"),
        (lambda: bsr([0, 1, 2], [0, 2]), None, FormatError, r"col_indices\[\d\]: got"),
        (lambda: bsr([0, 2, 1], [0, 1]), None, FormatError, r"crow_indices\[\d\]: got"),
        (lambda: bsr([0, 1, 2], [0, 1]), torch.ones(3), FormatError, r"bias: got size \[3\], expected \[4\]"),
        (lambda: bsr([0, 1, 2], [0, 1]), torch.ones(4).half(), TypeError, "bias: got dtype torch.float16"),
        (lambda: bsr([0, 1, 2], [0, 1]), [1.0], TypeError, "bias: got list, expected a torch.Tensor"),
        (lambda: bsr([0, 1, 2], [0, 1]), torch.ones(4, device="meta"), ValueError, "bias: got device meta"),
    ],
)
def test_wrong_arguments_of_from_bsr(weight, bias, error, message):
    with pytest.raises(error, match=message):
        BlockSparseLinear.from_bsr(weight(), bias)


# The dense copy that `weight` is.


def test_weight_is_a_dense_copy_through_which_gradients_flow():
    layer = make(dtype=torch.float64)
    assert isinstance(layer.weight, torch.Tensor)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((50, 70), torch.float64, "cpu")
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, dense_weight(layer))
    x = torch.randn(3, 70, dtype=torch.float64)
    for product in (F.linear(x, layer.weight, layer.bias), x @ layer.weight.t() + layer.bias):
        assert type(product) is torch.Tensor
        torch.testing.assert_close(product, layer(x))
        (gradient,) = torch.autograd.grad(product.pow(2).sum(), layer.values)
        (expected,) = torch.autograd.grad(layer(x).pow(2).sum(), layer.values)
        torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(layer.weight.norm(), layer.values.norm())
    assert repr(layer.weight) == repr(layer._dense())


def test_looking_at_weight_makes_no_copy(monkeypatch):
    layer = make()
    monkeypatch.setattr(BlockSparseLinear, "_dense", lambda self: pytest.fail("a copy was made"))
    weight = layer.weight
    assert (weight.shape, weight.ndim, weight.dtype, weight.device.type) == ((50, 70), 2, torch.float32, "cpu")
    assert weight.requires_grad
    assert torch.overrides.has_torch_function((weight,))


def add_to_data(weight):
    weight.data += 1


WRITES = {
    "fill_": lambda weight: weight.fill_(1),
    "constant_": lambda weight: nn.init.constant_(weight, 1),
    "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_uniform_": lambda weight: nn.init.kaiming_uniform_(tensor=weight),
    "trunc_normal_": nn.init.trunc_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "eye_": nn.init.eye_,
    "relu_": F.relu_,
    "copy_": lambda weight: weight.copy_(torch.ones(50, 70)),
    "requires_grad_": lambda weight: weight.requires_grad_(False),
    "item": lambda weight: weight.__setitem__(0, 1),
    "data +=": add_to_data,
    "out=": lambda weight: torch.add(torch.ones(50, 70), 1, out=weight),
    "foreach": lambda weight: torch._foreach_add_([weight], 1),
    "op": lambda weight: torch.ops.aten.fill_.Scalar(weight, 1),
    "packet": lambda weight: torch.ops.aten.fill_(weight, 1),
    ".data =": lambda weight: setattr(weight, "data", torch.ones(50, 70)),
    ".grad =": lambda weight: setattr(weight, "grad", torch.ones(50, 70)),
    "data": lambda weight: weight.data.fill_(1),
    "detach": lambda weight: weight.detach().zero_(),
    "row": lambda weight: weight[0].zero_(),
    "transposed": lambda weight: weight.data.t()[:3].mul_(2),
    "part": lambda weight: weight.split(10)[1].zero_(),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("grad", [True, False])
def test_writing_to_weight_is_refused(name, grad):
    layer = make()
    before = copy.deepcopy(layer)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(TypeError, match=r"^weight: got \w+(\.\w+)? of a dense copy; write"),
    ):
        WRITES[name](layer.weight)
    assert_same_layer(layer, before)


def test_weight_under_transforms_and_as_sparse():
    layer, x = make(), torch.randn(3, 70)
    gradient = torch.func.grad(lambda x: F.linear(x, layer.weight.data).sum())(x)
    torch.testing.assert_close(gradient, dense_weight(layer).sum(0).expand(3, 70))
    with torch.no_grad():
        rows = torch.func.vmap(lambda row: F.linear(row, layer.weight.view(50, 70)))(x)
    torch.testing.assert_close(rows, x @ dense_weight(layer).t())
    assert torch.equal(layer.weight.detach().to_sparse().to_dense(), dense_weight(layer))


def test_what_weight_gives_may_be_written_to():
    layer = make()
    expected = dense_weight(layer)
    with torch.no_grad():
        assert torch.equal(torch.zeros(50, 70).add_(layer.weight), expected)
        assert torch.equal(layer.weight.clone().mul_(2), 2 * expected)
        assert torch.equal((layer.weight.data * 1).mul_(2), 2 * expected)
        assert torch.equal(torch.empty(70, 50).copy_(layer.weight.t()), expected.t())
        assert not (~layer.weight.bool() & (expected != 0)).any()


def test_writing_past_torch_function_is_refused():
    class Zero(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            with torch._C.DisableTorchFunctionSubclass():
                return weight.zero_()

    with pytest.raises(TypeError, match=r"^weight: got zero_(\.default)? of a dense copy; write to values"):
        Zero.apply(make().weight)


def test_weight_past_torch_function():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight * 2

    layer = make()
    assert torch.equal(Twice.apply(layer.weight), 2 * dense_weight(layer))


def test_weight_cannot_be_set():
    layer = make()
    with pytest.raises((AttributeError, KeyError), match="weight"):
        layer.weight = nn.Parameter(torch.ones(50, 70))
    with pytest.raises(AttributeError):
        layer.weight = torch.ones(50, 70)


# state_dict.


def test_state_dict_has_the_parts_of_the_format():
    state = make().state_dict()
    assert sorted(state) == sorted(PARTS)
    assert state["dense_shape"].tolist() == [50, 70]
    assert {str(state[name].dtype) for name in PARTS[2:]} == {"torch.int64"}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_brings_its_pattern(assign, bias):
    source, target = make(640, 640, bias=bias), make(640, 640, bias=bias)
    assert not torch.equal(source.pattern, target.pattern)
    values = target.values
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert_same_layer(target, source)
    assert (target.values is values) != assign
    x = torch.randn(3, 640, requires_grad=True)
    gradients = [torch.autograd.grad(layer(x).pow(2).sum(), (x, layer.values)) for layer in (source, target)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("grad_mode", "of_x", "given"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_transposed_index_is_given_only_where_the_gradient_of_x_needs_it(monkeypatch, grad_mode, of_x, given):
    seen = []
    monkeypatch.setattr(ops_block, "bsr_linear", lambda *args: seen.append(args[-1]))
    with torch.set_grad_enabled(grad_mode):
        make()(torch.randn(3, 70, requires_grad=of_x))
    assert [transposed is not None for transposed in seen] == [given]


def test_state_dict_of_another_dtype_is_converted():
    source, target = make(dtype=torch.float64), make(dtype=torch.bfloat16)
    target.load_state_dict(source.state_dict())
    assert_same_layer(target, source.bfloat16())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"density": 0.25}, r"values: got 3 blocks of 16 x 32 in a weight of 50 x 70, expected 6 blocks"),
        ({"block_shape": (32, 16)}, r"values: got 5 blocks of 32 x 16 in a weight of 50 x 70"),
        ({"in_features": 71}, r"got 6 blocks of 16 x 32 in a weight of 50 x 71, expected 6 blocks .* 50 x 70"),
        ({"out_features": 49}, r"in a weight of 49 x 70"),
    ],
)
def test_state_dict_of_other_sizes_is_refused(source, message):
    model = nn.Sequential(make())
    before = copy.deepcopy(model)
    state = nn.Sequential(make(**source)).state_dict()
    with pytest.raises(RuntimeError, match=rf"0\.{message}(.|\n)*from_state_dict" if "values" in message else message):
        model.load_state_dict(state)
    assert_same_layer(model[0], before[0])
    assert_same_layer(BlockSparseLinear.from_state_dict(state, "0."), make_of(state))


def make_of(state):
    layer = BlockSparseLinear(
        int(state["0.dense_shape"][1]),
        int(state["0.dense_shape"][0]),
        block_shape=tuple(state["0.values"].shape[1:]),
        pattern=pattern_of(state),
    )
    layer.load_state_dict({name.removeprefix("0."): tensor for name, tensor in state.items()})
    return layer


def pattern_of(state):
    rows = len(state["0.crow_indices"]) - 1
    cols = -(-int(state["0.dense_shape"][1]) // state["0.values"].shape[2])
    pattern = torch.zeros(rows, cols, dtype=torch.bool)
    for row in range(rows):
        pattern[row, state["0.col_indices"][state["0.crow_indices"][row] : state["0.crow_indices"][row + 1]]] = True
    return pattern


# A change to one part of make(), the error and its message.
CORRUPT = {
    "unsorted": (lambda s: s["col_indices"].copy_(s["col_indices"].flip(0)), FormatError, r"col_indices\[\d\]: got"),
    "duplicate": (
        lambda s: s["col_indices"].__setitem__(1, s["col_indices"][0]),
        FormatError,
        r"col_indices\[\d\]: got",
    ),
    "too large": (lambda s: s["col_indices"].__setitem__(-1, 3), FormatError, r"col_indices\[\d\]: got 3"),
    "negative": (lambda s: s["col_indices"].__setitem__(0, -1), FormatError, r"col_indices\[\d\]: got -1"),
    "huge": (lambda s: s["col_indices"].__setitem__(0, 2**62), FormatError, r"col_indices\[\d\]: got"),
    "not from 0": (lambda s: s["crow_indices"].__setitem__(0, 1), FormatError, r"crow_indices\[\d\]: got"),
    "falling": (lambda s: s["crow_indices"].__setitem__(2, 0), FormatError, r"crow_indices\[\d\]: got"),
    "short of the blocks": (lambda s: s["crow_indices"].__setitem__(-1, 5), FormatError, r"crow_indices\[\d\]: got"),
    "past the blocks": (lambda s: s["crow_indices"].__setitem__(-1, 7), FormatError, r"crow_indices\[\d\]: got"),
    "beyond": (lambda s: s["crow_indices"].__setitem__(slice(1, None), 2**62), FormatError, r"crow_indices\[\d\]: got"),
    "negative shape": (lambda s: s["dense_shape"].neg_(), FormatError, r"dense_shape: got \[-50, -70\]"),
    "small shape": (
        lambda s: s["dense_shape"].__setitem__(0, 16),
        FormatError,
        r"crow_indices: got size \[5\], expected \[2",
    ),
    "size of crow": (lambda s: s.update(crow_indices=s["crow_indices"][:-1]), FormatError, "crow_indices: got size"),
    "size of col": (lambda s: s.update(col_indices=s["col_indices"][:-1]), FormatError, r"col_indices: got size \[5\]"),
    "crow of 2 dims": (lambda s: s.update(crow_indices=s["crow_indices"][None]), FormatError, "crow_indices: got size"),
    "size of shape": (
        lambda s: s.update(dense_shape=s["dense_shape"][:1]),
        FormatError,
        r"dense_shape: got size \[1\], expected \[2\]",
    ),
    "flat values": (lambda s: s.update(values=s["values"].flatten(1)), FormatError, r"values: got size \[6, 512\]"),
    "blocks of nothing": (lambda s: s.update(values=s["values"][:, :0]), FormatError, r"values: got size \[6, 0, 32\]"),
    "integers": (lambda s: s.update(values=s["values"].int()), TypeError, "values: got dtype torch.int32"),
    "int32 crow": (lambda s: s.update(crow_indices=s["crow_indices"].int()), TypeError, "crow_indices: got dtype"),
    "int32 col": (lambda s: s.update(col_indices=s["col_indices"].int()), TypeError, "col_indices: got dtype"),
    "float shape": (
        lambda s: s.update(dense_shape=s["dense_shape"].float()),
        TypeError,
        "dense_shape: got dtype torch.float32",
    ),
    "no tensor": (lambda s: s.update(col_indices=[0, 1]), TypeError, "col_indices: got list, expected a torch.Tensor"),
    "meta": (lambda s: s.update(crow_indices=s["crow_indices"].to("meta")), FormatError, "crow_indices: got a meta"),
}


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("assign", [True, False])
def test_corrupt_state_dict_is_refused_and_changes_nothing(name, assign):
    change, error, message = CORRUPT[name]
    pattern = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    model = nn.Sequential(make(pattern=pattern))
    before, state = copy.deepcopy(model), copy.deepcopy(model[0]).state_dict()
    change(state)
    state = {f"0.{name}": part for name, part in state.items()}
    with pytest.raises(error, match=rf"^0\.{message}"):
        model.load_state_dict(state, assign=assign)
    assert_same_layer(model[0], before[0])
    with pytest.raises(error, match=rf"^0\.{message}"):
        BlockSparseLinear.from_state_dict(state, "0.")


def test_a_shape_too_narrow_for_the_blocks():
    state = make(density=1.0).state_dict()
    state["dense_shape"][1] = 64
    with pytest.raises(FormatError, match=r"^col_indices\[2\]: got 2, expected at least 0 and less than 2"):
        BlockSparseLinear.from_state_dict(state)


def test_a_shape_larger_than_memory():
    """Refused for another size before anything is reserved for it; on its own, for the memory."""
    state = make().state_dict()
    state["dense_shape"] = torch.tensor([50, 2**62])
    with pytest.raises(RuntimeError, match=f"values: got 6 blocks of 16 x 32 in a weight of 50 x {2**62}"):
        make().load_state_dict(state)
    with pytest.raises(RuntimeError, match="cannot allocate"):
        BlockSparseLinear.from_state_dict(state)
    with pytest.raises(FormatError, match=rf"^dense_shape: got in_features {2**62}, expected 70"):
        BlockSparseLinear.from_state_dict(state, in_features=70)


def test_sizes_that_are_known():
    layer = make()
    state = nn.Sequential(layer).state_dict()
    assert_same_layer(BlockSparseLinear.from_state_dict(state, "0.", in_features=70, out_features=50), layer)
    with pytest.raises(FormatError, match=r"^0\.dense_shape: got out_features 50, expected 51"):
        BlockSparseLinear.from_state_dict(state, "0.", 70, 51)
    with pytest.raises(TypeError, match="in_features: got '70', expected an integer"):
        BlockSparseLinear.from_state_dict(state, "0.", "70")
    with pytest.raises(ValueError, match="out_features: got -1, expected at least 0"):
        BlockSparseLinear.from_state_dict(state, "0.", out_features=-1)


@settings(max_examples=100, deadline=None)
@given(
    part=st.sampled_from(["crow_indices", "col_indices", "dense_shape"]),
    at=st.integers(0, 5),
    number=st.integers(-3, 80) | st.integers(-(2**63), 2**63 - 1),
)
def test_any_number_anywhere_is_refused_or_gives_a_layer(part, at, number):
    state = make().state_dict()
    tensor = state[part].clone()
    tensor[at % len(tensor)] = number if part != "dense_shape" else min(number, 1000)
    state = {**state, part: tensor, "bias": torch.zeros(max(int(tensor[0]), 0) if part == "dense_shape" else 50)}
    try:
        layer = BlockSparseLinear.from_state_dict(state)
    except FormatError as error:
        message = str(error)
    else:
        assert_consistent(layer)
        layer(torch.ones(2, layer.in_features)).sum().backward()
        message = f"{part}: got a layer"
    assert re.match(rf"({'|'.join(PARTS)})(\[\d\])?: got", message)


def test_parts_that_are_missing():
    state = make().state_dict()
    for name in ["values", "crow_indices", "col_indices", "dense_shape"]:
        rest = {key: part for key, part in state.items() if key != name}
        with pytest.raises(FormatError, match=f"^{name}: not in the state_dict"):
            BlockSparseLinear.from_state_dict(rest)
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            make(pattern=pattern_of({f"0.{key}": part for key, part in state.items()})).load_state_dict(rest)
    rest = {key: part for key, part in state.items() if key != "bias"}
    assert BlockSparseLinear.from_state_dict(rest).bias is None
    dense = nn.Linear(70, 50).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "values"(.|\n)*Unexpected key.*"weight"'):
        make().load_state_dict(dense)


def test_part_of_a_state_dict():
    source, target = make(640, 640), make(640, 640)
    before = copy.deepcopy(target)
    missing, unexpected = target.load_state_dict({"values": source.values.data}, strict=False)
    assert sorted(missing) == sorted({*PARTS} - {"values"})
    assert unexpected == []
    assert torch.equal(target.pattern, before.pattern)
    assert torch.equal(target.values, source.values)
    index = {name: getattr(source, name) for name in ("crow_indices", "col_indices")}
    target.load_state_dict(index, strict=False)
    assert torch.equal(target.pattern, source.pattern)
    assert_consistent(target)


def test_from_state_dict_copies():
    layer = make()
    state = layer.state_dict()
    again = BlockSparseLinear.from_state_dict(state)
    assert_same_layer(again, layer)
    for part in state.values():
        part.fill_(1)
    assert_consistent(again)
    assert again.values.requires_grad
    assert again.bias.requires_grad


def test_the_worked_example_of_the_format():
    """FORMAT.md, byte by byte."""
    parts = {
        "values": ("0000803f 00000040 00004040 00008040 0000a040 00000000 00000000 00000000", torch.float32, (2, 2, 2)),
        "crow_indices": ("0000000000000000 0100000000000000 0200000000000000", torch.int64, (3,)),
        "col_indices": ("0000000000000000 0200000000000000", torch.int64, (2,)),
        "dense_shape": ("0300000000000000 0500000000000000", torch.int64, (2,)),
    }
    state = {
        name: torch.frombuffer(bytearray.fromhex(octets), dtype=dtype).view(size)
        for name, (octets, dtype, size) in parts.items()
    }
    layer = BlockSparseLinear.from_state_dict(state)
    dense = torch.tensor([[1.0, 2, 0, 0, 0], [3, 4, 0, 0, 0], [0, 0, 0, 0, 5]])
    assert torch.equal(layer.to_dense().weight, dense)
    written = BlockSparseLinear.from_dense(linear_of(dense), block_shape=(2, 2), pattern=layer.pattern).state_dict()
    assert written.keys() == state.keys()
    for name, part in state.items():
        assert_bits_equal(written[name], part)


def test_beside_compressed_weights(tmp_path):
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(50, 64))
    model[2].weight.data[:, ::2] = 0
    bitmask.save_compressed_model(bitmask.compress_(model, progress=False), tmp_path / "model.safetensors")
    other = nn.Sequential(make(), nn.ReLU(), nn.Linear(50, 64))
    other.load_state_dict(dict(bitmask.load_compressed(tmp_path / "model.safetensors")))
    assert_same_layer(other[0], model[0])
    torch.testing.assert_close(other(x := torch.randn(3, 70)), model(x))


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(make(), nn.ReLU(), make(50, 20, block_shape=(32, 32), bias=False))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert_same_layer(BlockSparseLinear.from_state_dict(state, "0."), model[0])
    assert_same_layer(BlockSparseLinear.from_state_dict(state, "2."), model[2])
    torch.manual_seed(5)
    other = nn.Sequential(make(), nn.ReLU(), make(50, 20, block_shape=(32, 32), bias=False))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert_same_layer(other[0], model[0])


# Copies, devices, modes.


def test_deepcopy_and_pickle():
    layer = make().requires_grad_(False)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert_same_layer(twin, layer)
        assert not twin.values.requires_grad
        assert twin.values.data_ptr() != layer.values.data_ptr()
        assert torch.equal(twin(x := torch.randn(3, 70)), layer(x))


def test_to_dtype_keeps_the_indices(dtype):
    layer = make()
    index = layer.crow_indices
    for change in (lambda m: m.to(dtype), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
        change(layer)
        assert layer.crow_indices is index
        assert_consistent(layer)
        layer(torch.randn(2, 70).to(layer.values.dtype)).sum().backward()
        layer.values.grad = layer.bias.grad = None


@pytest.mark.parametrize("make_on_meta", [lambda: make(device="meta"), lambda: make().to("meta")])
def test_meta_and_back(make_on_meta):
    torch.manual_seed(1)
    layer = make_on_meta()
    torch.manual_seed(1)
    assert torch.equal(layer.pattern, make().pattern), "known on device meta, too"
    assert all(getattr(layer, name).is_meta for name in [*PARTS, *TRANSPOSED])
    assert "blocks=6" in repr(layer)
    assert layer(torch.empty(3, 70, device="meta")).shape == (3, 50)
    pattern = layer.pattern
    moved = copy.deepcopy(layer).to_empty(device="cpu")
    assert_consistent(moved)
    assert torch.equal(moved.pattern, pattern)
    moved.reset_parameters()
    assert 0 < moved.values.abs().max() < 1
    assert moved._index_of_meta is None
    source = make(640, 640)
    for assign in (True, False):
        target = make(640, 640, device="meta")
        if not assign:
            target.to_empty(device="cpu")
        target.load_state_dict(source.state_dict(), assign=assign)
        assert_same_layer(target, source)
        target(torch.randn(2, 640)).sum().backward()


def test_copying_into_meta_changes_nothing():
    layer = make(640, 640, device="meta")
    pattern = layer.pattern
    with pytest.warns(UserWarning, match="copying from a non-meta parameter"):
        layer.load_state_dict(make(640, 640).state_dict())
    assert torch.equal(layer.pattern, pattern)


def test_to_empty_keeps_the_pattern():
    layer = make()
    pattern = layer.pattern
    layer.to_empty(device="cpu")
    assert torch.equal(layer.pattern, pattern)
    assert_consistent(layer)


def test_built_under_a_default_device():
    with torch.device("meta"):
        layer = make()
    assert layer.values.is_meta
    assert int(layer.pattern.sum()) == 6
    assert_consistent(layer.to_empty(device="cpu"))


def test_from_dense_on_meta_with_a_pattern():
    pattern = spread_blocks((4, 3), 5)
    layer = BlockSparseLinear.from_dense(nn.Linear(70, 50, device="meta"), block_shape=(16, 32), pattern=pattern)
    assert layer.values.shape == (5, 16, 32)
    assert torch.equal(layer.pattern, pattern)
    assert layer.to_dense().weight.is_meta


def test_share_memory():
    layer = make().share_memory()
    assert layer.values.is_shared()
    assert layer.crow_indices.is_shared()
    assert_consistent(layer)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast):
    layer, x = make(), torch.randn(5, 70)
    with torch.autocast("cpu", dtype=autocast):
        y = layer(x)
    assert y.dtype == autocast
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_export():
    layer, x = make(), torch.randn(5, 70)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},)).module()
    assert torch.equal(exported(x), layer(x))
    torch.testing.assert_close(exported(x[:3]), layer(x[:3]))


def test_inference_mode_and_functional_call():
    layer, x = make(), torch.randn(5, 70)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    doubled = torch.func.functional_call(layer, {"values": 2 * layer.values, "bias": 2 * layer.bias}, (x,))
    torch.testing.assert_close(doubled, 2 * expected)


def test_gradcheck():
    layer = make(9, 7, 0.5, (2, 4), dtype=torch.float64)
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def product(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    inputs = (x, *(parameter.detach().clone().requires_grad_() for parameter in (layer.values, layer.bias)))
    edge = layer.values.detach() == 0
    assert edge.any(), "blocks are cut"
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


def test_public_names():
    names = {"BlockSparseLinear", "BlockSparseModelPatcher", "block_norms", "largest_blocks", "prune_blocks"}
    assert names <= {*bitmask.__all__}
    assert all(hasattr(bitmask, name) for name in names)


def test_block_sizes():
    assert block_sizes(70, 32).tolist() == [32, 32, 6]
    assert block_sizes(64, 32).tolist() == [32, 32]
    assert block_sizes(0, 32).tolist() == []
