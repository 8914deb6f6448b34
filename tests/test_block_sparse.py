"""BlockSparseLinear: against the dense layer with the same weight, its patterns, its life among modules."""

import copy
import io
import math
import pickle
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from block_layers import PARTS, SHAPES, TRANSPOSED, assert_consistent, assert_same_layer, dense_weight, linear_of, make
from conftest import assert_bits_equal
from torch import nn
from torch._subclasses import FakeTensorMode

import bitmask
from bitmask import (
    BitmaskLinear,
    BlockSparseLinear,
    FormatError,
    SemiStructuredBlockLinear,
    block_norms,
    largest_blocks,
)
from bitmask.block_layout import block_sizes, rows_of
from bitmask.block_patterns import spread_blocks
from bitmask.calls import LINEAR_DTYPES

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("error", "ignore:Sparse .* beta", "ignore:Initializing", "ignore:.*nested"),
]


@pytest.fixture(params=sorted(LINEAR_DTYPES, key=str), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


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
        ({"block_shape": (1, 2**28 + 1)}, ValueError, r"block_shape: got \(1, 268435457\), expected .* at most 2\^28"),
        ({"block_shape": (32,)}, TypeError, r"block_shape: got \(32,\), expected two integers"),
        ({"block_shape": (32, 32, 32)}, TypeError, "block_shape: got"),
        ({"block_shape": 32}, TypeError, "block_shape: got 32"),
        ({"block_shape": (32.0, 32)}, TypeError, "block_shape: got"),
        ({"in_features": -1}, ValueError, "in_features: got -1, expected at least 0"),
        ({"out_features": -1}, ValueError, "out_features: got -1"),
        (
            {"in_features": 2**40, "out_features": 2**23},
            ValueError,
            r"out_features, in_features: got \[8388608, 1099511627776\], expected .* is less than 2\^63",
        ),
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


# Buffers that were written to.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda layer: layer.crow_indices[1].fill_(100), r"crow_indices\[1\]: got 100, expected 0 to 6"),
        (lambda layer: layer.crow_indices[-1].fill_(5), r"crow_indices\[4\]: got 5, expected 6"),
        (lambda layer: layer.col_indices[0].fill_(999), r"col_indices\[0\]: got 999, expected at least 0"),
        (lambda layer: layer.col_indices[0].fill_(-1), r"col_indices\[0\]: got -1, expected at least 0"),
        (lambda layer: layer.col_indices.copy_(layer.col_indices.flip(0)), r"col_indices\[1\]: got 0, expected more"),
    ],
)
@pytest.mark.parametrize("two_four", [True, False])
def test_a_damaged_index_is_refused_and_printed(damage, message, two_four):
    pattern = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    layer = make(pattern=pattern)
    uses = [lambda: layer.pattern, lambda: layer.density, lambda: layer.weight + 0]
    if two_four:
        layer = SemiStructuredBlockLinear.from_block_sparse(layer, prune=True)
    else:
        uses += [
            lambda: layer.reset_parameters(),
            lambda: layer.update_pattern_(pattern),
            lambda: SemiStructuredBlockLinear.from_block_sparse(layer, prune=True),
        ]
    damage(layer)
    before = copy.deepcopy(layer.state_dict())
    for use in uses:
        with pytest.raises(FormatError, match=message):
            use()
    assert "blocks=6, density=unknown, dtype=torch.float32" in repr(nn.Sequential(layer))
    for name, tensor in layer.state_dict().items():
        assert_bits_equal(tensor, before[name])


@pytest.mark.parametrize("crow_indices", [[0, 100, 4, 6], [2**62, -1, 2**62, -5], [9, 9, 9, 9]], ids=str)
def test_rows_exist_whatever_the_index_holds(crow_indices):
    """Compiled code proves no index before it looks at the rows."""
    rows = rows_of((torch.tensor(crow_indices), torch.zeros(6, dtype=torch.int64)))
    assert len(rows) == 6
    assert 0 <= rows.min() <= rows.max() < 3


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
        (
            lambda: torch.sparse_bsr_tensor(
                torch.zeros(2).long(), torch.empty(0).long(), torch.empty(0, 1, 2**28 + 1), check_invariants=False
            ),
            None,
            FormatError,
            r"values: got size \[0, 1, 268435457\], expected .* 1 to 2\^28",
        ),
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


def with_stand_ins(layer, device):
    """The layer with tensors on a device that need not be there, in a FakeTensorMode."""

    def there(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for name, parameter in list(layer.named_parameters()):
        layer._parameters[name] = nn.Parameter(there(parameter))
    for name, buffer in list(layer.named_buffers()):
        layer._buffers[name] = there(buffer)
    return layer


@pytest.mark.parametrize("lead", [(3,), (), (2, 0)], ids=str)
def test_training_looks_at_no_number(lead):
    """Where it would, a GPU would have to be waited for."""
    layer = make()
    with FakeTensorMode():
        x = torch.empty(*lead, 70, requires_grad=True)
        with_stand_ins(layer, "cpu")(x).sum().backward()
    assert x.grad.shape == x.shape
    assert layer.values.grad.shape == layer.values.shape


@contextmanager
def autocast_on_a_gpu(dtype):
    """`torch.autocast`, which leaves autocast off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_on_a_gpu():
    layer = make()
    with FakeTensorMode(), torch.no_grad():
        with_stand_ins(layer, "cuda")
        x = torch.empty(3, 70, device="cuda")
        assert layer(x).is_cuda
        with autocast_on_a_gpu(torch.bfloat16):
            assert layer(x).dtype == layer(x.half()).dtype == torch.bfloat16
            with pytest.raises(TypeError, match=r"x: got dtype torch.float64, expected torch.float32"):
                layer(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"x: got dtype torch.float16"):
            layer(x.half())
        with pytest.raises(ValueError, match="x: got device cpu, expected cuda:0, the device of values"):
            layer(torch.empty(3, 70))


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


@pytest.mark.parametrize("change", ["load_state_dict", "as many blocks", "other blocks"])
def test_layers_changed_in_inference_mode_can_be_trained(change):
    layer, source, x = make(640, 640), make(640, 640), torch.randn(5, 640, requires_grad=True)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    for step in (torch.inference_mode(), nullcontext()):
        layer(x).sum().backward()
        optimizer.step()
        with step:
            if change == "load_state_dict":
                layer.load_state_dict(source.state_dict())
            else:
                pattern = ~layer.pattern if change == "as many blocks" else spread_blocks((40, 20), 7)
                layer.update_pattern_(pattern, optimizer=optimizer)
    layer(x).sum().backward()
    optimizer.step()
    assert not any(tensor.is_inference() for tensor in [*layer.state_dict().values(), *layer.buffers()])
    assert_consistent(layer)


def test_layers_made_in_inference_mode_change_there():
    with torch.inference_mode():
        layer = make(64, 64)
        pattern = layer.pattern.flip(0)
        layer.update_pattern_(pattern)
        assert torch.equal(layer.pattern, pattern)
        assert_consistent(layer)


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
