"""Block patterns: norms, the largest blocks, pruning, and patterns that change while a layer is trained."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bitmask import BlockSparseLinear, BlockSparseModelPatcher, block_norms, compress_, largest_blocks, prune_blocks
from bitmask.block_patterns import spread_blocks

pytestmark = pytest.mark.filterwarnings("error")


# Norms.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "block_shape"),
    [((64, 96), (32, 32)), ((50, 70), (16, 32)), ((5, 7), (32, 32)), ((6, 4), (1, 1))],
    ids=str,
)
def test_norms_are_those_of_each_block(dtype, shape, block_shape):
    weight = torch.randn(shape).to(dtype)
    norms = block_norms(weight, block_shape)
    height, width = block_shape
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norms.shape == (math.ceil(shape[0] / height), math.ceil(shape[1] / width))
    for row, col in itertools.product(*map(range, norms.shape)):
        block = weight[row * height : (row + 1) * height, col * width : (col + 1) * width].double()
        torch.testing.assert_close(norms[row, col].double(), block.norm(), rtol=1e-5, atol=1e-6)


def test_norms_take_views_and_give_no_gradient():
    weight = torch.randn(70, 50, requires_grad=True).t()
    norms = block_norms(weight, (16, 32))
    assert not norms.requires_grad
    assert torch.equal(norms, block_norms(weight.detach().contiguous(), (16, 32)))
    assert block_norms(torch.empty(0, 7)).shape == (0, 1)


@pytest.mark.parametrize(
    ("weight", "block_shape", "error", "message"),
    [
        ([[1.0]], (1, 1), TypeError, "weight: got list, expected a torch.Tensor"),
        (torch.ones(4, 4).int(), (1, 1), TypeError, "weight: got dtype torch.int32"),
        (torch.ones(4, 4).to_sparse(), (1, 1), TypeError, "weight: got a Tensor that is not dense"),
        (torch.ones(4), (1, 1), ValueError, "weight: got 1 dimensions, expected 2"),
        (torch.ones(4, 4), (0, 1), ValueError, "block_shape: got"),
        (torch.ones(4, 4), 4, TypeError, "block_shape: got 4, expected two integers"),
    ],
    ids=str,
)
def test_wrong_arguments_of_norms(weight, block_shape, error, message):
    with pytest.raises(error, match=message):
        block_norms(weight, block_shape)


# The largest blocks.


@pytest.mark.parametrize("density", [0.1, 0.5, 0.77, 1.0])
def test_the_largest_are_kept(density):
    scores = torch.randn(7, 11)
    pattern = largest_blocks(scores, density)
    assert pattern.dtype == torch.bool
    assert int(pattern.sum()) == math.floor(density * 77 + 0.5)
    assert density == 1 or scores[pattern].min() >= scores[~pattern].max()


def test_ties_and_nan():
    assert largest_blocks(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert largest_blocks(torch.ones(60, 70), 0.5)[:30].all(), "many, too"
    scores = torch.tensor([[1.0, math.inf, math.nan, -1.0]])
    assert largest_blocks(scores, 0.25).tolist() == [[False, False, True, False]]
    assert largest_blocks(scores, 0.5).tolist() == [[False, True, True, False]]


def test_one_block_at_least():
    with pytest.warns(UserWarning, match="density: 0.001 of 6 blocks is less than half a block; one is kept"):
        assert int(largest_blocks(torch.randn(2, 3), 0.001).sum()) == 1
    assert largest_blocks(torch.empty(0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize(
    ("scores", "density", "error", "message"),
    [
        (torch.ones(2, 2), 0.0, ValueError, "density: got 0.0"),
        (torch.ones(2, 2), 1.5, ValueError, "density: got 1.5"),
        (torch.ones(2, 2), None, TypeError, "density: got None"),
        (torch.ones(2, 2, dtype=torch.bool), 0.5, TypeError, "scores: got dtype torch.bool"),
        (torch.ones(4), 0.5, ValueError, "scores: got 1 dimensions"),
        (None, 0.5, TypeError, "scores: got NoneType"),
    ],
    ids=str,
)
def test_wrong_arguments_of_largest_blocks(scores, density, error, message):
    with pytest.raises(error, match=message):
        largest_blocks(scores, density)


# Pruning of layers and models.


def three_layers():
    """Weights of about the same size, one layer with blocks that are cut off."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 70), nn.ReLU(), nn.Linear(70, 32, bias=False))


def test_pruning_a_layer():
    dense = nn.Linear(64, 96)
    layer = prune_blocks(dense, 0.5)
    assert isinstance(layer, BlockSparseLinear)
    assert torch.equal(layer.pattern, largest_blocks(block_norms(dense.weight), 0.5))
    assert prune_blocks(dense, 0.5, (16, 8)).block_shape == (16, 8)


def test_pruning_a_model_layer_by_layer():
    model = three_layers()
    before = copy.deepcopy(model)
    assert prune_blocks(model, 0.5) is model
    for layer, dense in zip(model[::2], before[::2], strict=True):
        expected = BlockSparseLinear.from_dense(dense, 0.5)
        assert torch.equal(layer.pattern, expected.pattern)
        assert torch.equal(layer.values, expected.values)
    assert model(torch.randn(3, 64)).shape == (3, 32)


def test_pruning_a_model_as_a_whole():
    model = three_layers()
    model[0].weight.data *= 10
    model[4].weight.data /= 1000
    before = copy.deepcopy(model)
    prune_blocks(model, 0.4, (16, 16), scope="model")
    layers = list(model[::2])
    assert sum(len(layer.values) for layer in layers) == round(0.4 * (24 + 30 + 10))
    assert layers[0].density == 1
    assert len(layers[2].values) == 1, "one block at least"
    kept, dropped = [], []
    for layer, dense in zip(layers[:2], before[::2], strict=False):
        for row, col in itertools.product(*map(range, layer.pattern.shape)):
            block = dense.weight.data[row * 16 : row * 16 + 16, col * 16 : col * 16 + 16]
            (kept if layer.pattern[row, col] else dropped).append(float(block.square().mean().sqrt()))
    assert min(kept) >= max(dropped)


def test_the_one_block_of_a_layer_is_its_largest():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data *= 1e-6
    model[1].weight.data[32:, :32] *= 10
    prune_blocks(model, 0.5, scope="model")
    assert model[1].pattern.tolist() == [[False, False], [True, False]]


def test_filter():
    model, asked = three_layers(), []
    prune_blocks(model, 0.5, filter_fn=lambda name, layer: asked.append((name, layer)) or name != "2")
    assert [name for name, _ in asked] == ["0", "2", "4"]
    assert [type(layer) for layer in model[::2]] == [BlockSparseLinear, nn.Linear, BlockSparseLinear]


def test_layers_that_stay_dense():
    """One whose weight is tied, one that is computed, one that attention uses itself, a compressed one."""
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b", "c", "d", "e")})
    model["b"].weight = model["a"].weight
    nn.utils.parametrizations.weight_norm(model["c"])
    model["d"].weight.data[:, 1:] = 0
    compress_(model["d"], progress=False)
    model["attention"] = nn.MultiheadAttention(64, 4)
    for scope in ("layer", "model"):
        with pytest.warns(
            UserWarning, match=r"layers that are not pruned: a: a and b share(.*)attention.out_proj: nn.Mul"
        ):
            prune_blocks(model, 0.5, scope=scope)
        assert [name for name, layer in model.items() if isinstance(layer, BlockSparseLinear)] == ["e"]
    reasons = {row.name: row.reason for row in BlockSparseModelPatcher().get_patchable_layers(model).rows}
    assert reasons == {
        "a": "a and b share one weight",
        "b": "a and b share one weight",
        "c": "it is computed from other parameters",
        "d": "its weight is compressed: decompress_ the model first",
        "attention.out_proj": "nn.MultiheadAttention uses it without calling the layer",
    }


def test_a_layer_in_several_places_stays_one():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ModuleList([layer]))
    prune_blocks(model, 0.5)
    assert isinstance(model[0], BlockSparseLinear)
    assert model[0] is model[2] is model[3][0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0}, ValueError, "density: got 0"),
        ({"block_shape": (1,)}, TypeError, "block_shape: got"),
        ({"scope": "global"}, ValueError, "scope: got 'global', expected 'layer' or 'model'"),
        ({"filter_fn": "0"}, TypeError, "filter_fn: got '0'"),
        ({"module": [nn.Linear(2, 2)]}, TypeError, r"module: got list, expected an nn.Module"),
    ],
    ids=str,
)
def test_wrong_arguments_of_pruning(options, error, message):
    model = three_layers()
    with pytest.raises(error, match=message):
        prune_blocks(**{"module": model, "density": 0.5, **options})
    assert all(isinstance(layer, nn.Linear) for layer in model[::2])


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_nothing_to_prune(scope):
    meta = nn.Sequential(nn.Linear(64, 64, device="meta"))
    for model, reason in [
        (nn.Sequential(nn.Conv1d(2, 2, 1)), "there is none at all"),
        (meta, "0: it is on device meta: load it first"),
        (meta[0], r"\(model\): it is on device meta: load it first"),
        (nn.Sequential(nn.Linear(64, 64).to(torch.float8_e4m3fn)), "0: its weight is of torch.float8_e4m3fn"),
        (BlockSparseLinear(64, 64, device="meta"), "on device meta"),
    ]:
        with pytest.raises(ValueError, match=f"got no linear layer that can be pruned .*{reason}"):
            prune_blocks(model, 0.5, scope=scope)
    model = three_layers()
    assert prune_blocks(model, 0.5, scope=scope, filter_fn=lambda *_: False) is model
    assert all(isinstance(layer, nn.Linear) for layer in model[::2])


def test_each_layer_keeps_a_block_of_its_own():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10)))
    model[3].weight.data.fill_(math.nan)
    with pytest.warns(UserWarning, match="density: 0.1 of 40 blocks is 4; each of 10 layers keeps one"):
        prune_blocks(model, 0.1, scope="model")
    assert [len(layer.values) for layer in model] == [1] * 10


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_pruning_again(scope):
    model = three_layers()
    prune_blocks(model, 0.5, (16, 16), scope=scope)
    before, parameters = copy.deepcopy(model), [layer.values for layer in model[::2]]
    prune_blocks(model, 0.75, scope=scope)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True)), (
        "none is added"
    )
    prune_blocks(model, 0.25, scope=scope)
    assert sum(len(layer.values) for layer in model[::2]) == sum((6, 8, 3) if scope == "layer" else (16,))
    for layer, old, parameter in zip(model[::2], before[::2], parameters, strict=True):
        assert layer.values is parameter
        assert layer.block_shape == (16, 16)
        assert not (layer.pattern & ~old.pattern).any()
        expected = BlockSparseLinear.from_dense(old.to_dense(), block_shape=(16, 16), pattern=layer.pattern)
        assert torch.equal(layer.values, expected.values)
        if scope == "layer":
            norms = block_norms(old.to_dense().weight, (16, 16))
            assert norms[layer.pattern].min() >= norms[old.pattern & ~layer.pattern].max()


def test_pruning_a_lone_layer_again():
    layer = BlockSparseLinear(64, 64, density=0.75)
    assert prune_blocks(layer, 0.25) is layer
    assert layer.density == 0.25


def test_layers_that_share_values_are_not_pruned():
    model = nn.Sequential(BlockSparseLinear(64, 64), BlockSparseLinear(64, 64), nn.Linear(64, 64))
    model[1].values = model[0].values
    with pytest.warns(UserWarning, match="0: it shares its values; 1: it shares its values"):
        prune_blocks(model, 0.25)
    assert [len(layer.values) for layer in model] == [2, 2, 1]


def test_single_layers_are_refused_as_in_a_model():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TypeError, match=r"got a Own that cannot be replaced: .* has a forward of its own"):
        prune_blocks(Own(64, 64), 0.5)
    with pytest.raises(TypeError, match=r"cannot be replaced: nn\.MultiheadAttention uses it"):
        prune_blocks(nn.MultiheadAttention(64, 4).out_proj, 0.5)
    layer = nn.Linear(64, 64)
    assert prune_blocks(layer, 0.5, filter_fn=lambda name, module: name != "" or module is not layer) is layer


def test_half_a_block_is_one_without_a_warning():
    assert len(BlockSparseLinear(32, 32).values) == 1
    assert int(largest_blocks(torch.randn(1, 5), 0.5).sum()) == 3


def test_warnings_name_the_layer():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.warns(UserWarning, match="one is kept") as caught:
        prune_blocks(model, 0.1)
    text = "density: 0.1 of 1 blocks is less than half a block; one is kept"
    assert [str(each.message) for each in caught] == [f"0: {text}", f"1: {text}"]
    assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize("kind", [np.float32, np.float64, Fraction])
def test_densities_of_any_real_type(kind):
    assert prune_blocks(nn.Linear(64, 64), kind(0.5)).density == 0.5
    assert BlockSparseLinear(64, 64, density=kind(0.5)).density == 0.5


# Patterns that change.

OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), ["momentum_buffer"]),
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 0.1), ["sum"]),
    "Adafactor": (lambda p: torch.optim.Adafactor(p, 0.1), ["row_var", "col_var"]),
}


def trained(optimizer="AdamW", block_shape=(16, 32), density=0.5):
    layer = BlockSparseLinear(70, 50, density=density, block_shape=block_shape)
    optimizer = OPTIMIZERS[optimizer][0](layer.parameters())
    for _ in range(3):
        step(layer, optimizer)
    return layer, optimizer


def step(layer, optimizer):
    optimizer.zero_grad()
    loss = (layer(torch.randn(20, layer.in_features)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("blocks", [6, 2, 9, 12, 1])
def test_blocks_that_stay_keep_values_gradient_and_state(name, blocks):
    layer, optimizer = trained(name)
    parameter, before = layer.values, copy.deepcopy(layer)
    state = {key: tensor.clone() for key, tensor in optimizer.state[parameter].items() if tensor.ndim == 3}
    assert sorted(state) == sorted(OPTIMIZERS[name][1])
    pattern = spread_blocks((4, 3), blocks)
    assert layer.update_pattern_(pattern, optimizer=optimizer) is layer
    assert layer.values is parameter
    assert torch.equal(layer.pattern, pattern)
    places = {place: at for at, place in enumerate(map(tuple, before.pattern.nonzero().tolist()))}
    new = {"values": parameter.data, **optimizer.state[parameter]}
    for key, old in {"values": before.values.data, **state}.items():
        assert len(new[key]) == blocks
        for at, place in enumerate(map(tuple, pattern.nonzero().tolist())):
            expected = old[places[place]] if place in places else torch.zeros_like(old[0])
            assert torch.equal(new[key][at], expected), (key, place)
    for _ in range(2):
        step(layer, optimizer)
    assert layer.values.grad.shape == (blocks, 16, 32)


def test_the_gradient_moves_along():
    layer, _ = trained()
    dense = copy.deepcopy(layer)
    dense.values.data = layer.values.grad
    expected = BlockSparseLinear.from_dense(dense.to_dense(), block_shape=(16, 32), pattern=spread_blocks((4, 3), 7))
    layer.update_pattern_(expected.pattern)
    assert torch.equal(layer.values.grad, expected.values)
    layer.zero_grad()
    assert layer.update_pattern_(spread_blocks((4, 3), 3)).values.grad is None


def test_training_goes_on_while_an_old_graph_is_alive():
    """A loss that is kept holds on to the node that takes the gradient of values, which knows their old size."""
    layer, optimizer = trained()
    kept = step(layer, optimizer)
    layer.update_pattern_(torch.ones(4, 3, dtype=torch.bool), optimizer=optimizer)
    step(layer, optimizer)
    assert layer.values.grad.shape == (12, 16, 32)
    assert kept.grad_fn is not None


def test_as_many_blocks_keep_the_node_that_takes_the_gradient():
    """DistributedDataParallel hooks it, to add up the gradients of all processes."""
    layer, optimizer = trained()
    node, calls = layer.values.view_as(layer.values).grad_fn.next_functions[0][0], []
    node.register_hook(lambda *_: calls.append(1))
    for pattern in (~layer.pattern, layer.pattern):
        step(layer.update_pattern_(pattern, optimizer=optimizer), optimizer)
    assert calls == [1, 1]


def test_as_many_blocks_leave_alone_who_shares_memory():
    layer, _ = trained()
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict(), assign=True)
    x, state, kept = torch.randn(5, layer.in_features), layer.state_dict(), layer.values.detach()
    y, values = layer(x), kept.clone()
    layer.update_pattern_(~layer.pattern)
    assert torch.equal(kept, values)
    assert torch.equal(twin(x), y)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), y)


def test_scores_keep_the_number_of_blocks():
    layer, optimizer = trained()
    scores = torch.randn(4, 3)
    layer.update_pattern_(scores=scores, optimizer=optimizer)
    assert torch.equal(layer.pattern, largest_blocks(scores, 0.5))
    layer.update_pattern_(spread_blocks((4, 3), 0))
    assert len(layer.update_pattern_(scores=scores).values) == 0


def test_the_same_pattern_changes_nothing():
    layer, optimizer = trained()
    before, state = copy.deepcopy(layer), copy.deepcopy(optimizer.state_dict())
    layer.update_pattern_(layer.pattern, optimizer=optimizer)
    assert torch.equal(layer.values, before.values)
    after = optimizer.state_dict()["state"]
    for key, part in state["state"].items():
        assert all(torch.equal(part[name], after[key][name]) for name in part)


def test_products_after_a_change():
    layer, _ = trained()
    x = torch.randn(5, 70, requires_grad=True)
    for blocks in (3, 11, 12, 1):
        layer.update_pattern_(spread_blocks((4, 3), blocks))
        layer.values.data.normal_()
        dense = layer.to_dense()
        torch.testing.assert_close(layer(x), dense(x))
        got, expected = (torch.autograd.grad(each(x).square().sum(), x) for each in (layer, dense))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        again = BlockSparseLinear.from_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_layers_can_change(frozen):
    layer = BlockSparseLinear(70, 50, block_shape=(16, 32)).requires_grad_(not frozen)
    layer.update_pattern_(spread_blocks((4, 3), 3))
    assert layer.values.requires_grad != frozen


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, "pattern, scores: expected exactly one of them"),
        ({"pattern": torch.ones(4, 3) > 0, "scores": torch.ones(4, 3)}, TypeError, "expected exactly one"),
        ({"pattern": torch.ones(4, 4) > 0}, ValueError, r"pattern: got size \[4, 4\], expected \[4, 3\]"),
        ({"pattern": torch.ones(4, 3)}, TypeError, "pattern: got dtype torch.float32"),
        ({"scores": torch.ones(3, 4)}, ValueError, r"scores: got size \[3, 4\], expected \[4, 3\]"),
        ({"scores": torch.ones(4, 3).long()}, TypeError, "scores: got dtype torch.int64"),
        ({"scores": torch.ones(4, 3), "optimizer": "AdamW"}, TypeError, "optimizer: got str, expected a torch.optim"),
        (
            {"scores": torch.ones(4, 3), "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)},
            ValueError,
            "optimizer: got one without this layer's values",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_of_update(options, error, message):
    layer, optimizer = trained()
    before, state = copy.deepcopy(layer), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        layer.update_pattern_(**options)
    assert torch.equal(layer.pattern, before.pattern)
    assert torch.equal(layer.values, before.values)
    assert str(optimizer.state_dict()) == str(state)


def test_no_change_on_meta():
    with pytest.raises(ValueError, match="values: on device meta"):
        BlockSparseLinear(70, 50, device="meta").update_pattern_(scores=torch.ones(2, 3))


def test_computed_values_are_not_written_to():
    """The blocks would come from the old parameters again, at places of the new pattern."""
    layer = prune.identity(BlockSparseLinear(70, 50, block_shape=(16, 32)), "values")
    x, before = torch.randn(3, 70), copy.deepcopy(layer.state_dict())
    expected = layer(x)
    for write in (lambda: layer.update_pattern_(~layer.pattern), layer.reset_parameters):
        with pytest.raises(ValueError, match="values: got ones that are computed from other parameters, expected a pa"):
            write()
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
