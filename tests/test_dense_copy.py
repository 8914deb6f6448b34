"""The dense copy that a block-sparse layer's `weight` is: made when it is needed, refused where it is written to."""

import copy
import io
import operator

import pytest
import torch
import torch.nn.functional as F
from block_layers import assert_same_layer, dense_weight, make
from torch import nn

from bitmask import BlockSparseLinear, prune_24_

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("error", "ignore:Sparse .* beta", "ignore:Initializing", "ignore:.*nested"),
]


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


OPERATORS = ["add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor"]

WRITES = {
    **{f"i{name}": lambda weight, name=name: getattr(operator, f"i{name}")(weight, 2) for name in OPERATORS},
    "relu, inplace": lambda weight: F.relu(weight, inplace=True),
    "leaky_relu, inplace": lambda weight: F.leaky_relu(weight, 0.1, True),
    "dropout, inplace": lambda weight: F.dropout(weight, inplace=True),
    "nn.ReLU, inplace": nn.ReLU(inplace=True),
    "embedding": lambda weight: F.embedding(torch.tensor([0]), weight, max_norm=0.1),
    "embedding_bag": lambda weight: F.embedding_bag(torch.tensor([[0]]), weight, max_norm=0.1),
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
    "packet, out=": lambda weight: torch.ops.aten.add(torch.ones(50, 70), 1, out=weight),
    "packet of another name": lambda weight: torch.ops.bitmask.prune_24(tensor=weight, transposable=False),
    "prune_24_": lambda weight: prune_24_(weight[0, :68]),
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
        pytest.raises(TypeError, match=r"^weight: got [\w. -]+ of a dense copy; write"),
    ):
        WRITES[name](layer.weight)
    assert_same_layer(layer, before)


MEMORY = {
    "data_ptr": lambda weight: weight.data_ptr(),
    "storage": lambda weight: weight.storage(),
    "typed storage": lambda weight: weight._typed_storage(),
    "untyped storage": lambda weight: weight.untyped_storage(),
    "detached": lambda weight: weight.detach().data_ptr(),
    "function": lambda weight: torch.Tensor.data_ptr(weight),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_of_weight_is_refused(name):
    with pytest.raises(TypeError, match=r"^weight: got \w+ of a dense copy; use layer\.to_dense\(\)\.weight"):
        MEMORY[name](make().weight)


def test_weight_is_no_cuda_array():
    """Libraries ask whether it is one."""
    assert not hasattr(make().weight, "__cuda_array_interface__")


def test_safetensors_save_the_dense_twin_of_weight():
    safetensors = pytest.importorskip("safetensors.torch")
    layer = make()
    with pytest.raises(TypeError, match="weight: got storage of a dense copy; use layer"):
        safetensors.save({"weight": layer.weight})
    saved = safetensors.load(safetensors.save({"weight": layer.to_dense().weight}))
    assert torch.equal(saved["weight"], dense_weight(layer))


def test_memory_of_weight_is_refused_where_only_torch_asks():
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(make().weight.detach())


def test_what_weight_is_copied_to_outlives_it():
    layer = make()
    expected = dense_weight(layer)
    weight = layer.weight.detach()
    arrays = weight.numpy(), weight.__array__(), torch.from_dlpack(weight)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    others = weight.cpu(), torch.load(file)
    del weight
    assert all(torch.equal(torch.as_tensor(array), expected) for array in (*arrays, *others))
    arrays[2].zero_()
    assert torch.equal(layer.weight, expected)
    assert "weight" not in layer.state_dict()


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
        assert torch.equal(torch.ops.aten.add(torch.zeros(50, 70), layer.weight), expected)
        assert torch.equal(torch.ops.aten.sort(layer.weight)[0], expected.sort()[0])
        assert torch.equal(torch.ops.aten.add(layer.weight, 0, out=torch.empty(50, 70)), expected)


def test_operators_on_weight_and_into_other_tensors():
    layer = make()
    expected = dense_weight(layer)
    with torch.no_grad():
        assert torch.equal(layer.weight + 1, expected + 1)
        assert torch.equal(2 ** (1 - layer.weight), 2 ** (1 - expected))
        assert torch.equal(layer.weight < 0, expected < 0)
        assert (int(layer.weight[0, 0] * 1000), len(layer.weight)) == (int(expected[0, 0] * 1000), 50)
        assert all(map(torch.equal, layer.weight, expected))
        assert torch.equal(copy.deepcopy(layer.weight.detach()), expected)
        assert torch.equal(copy.copy(layer.weight), expected)
        assert torch.equal(F.relu(layer.weight), expected.relu())
        assert torch.equal(F.embedding(torch.tensor([3]), layer.weight), expected[3:4])
        total = plain = torch.ones(50, 70)
        total += layer.weight
    assert total is plain
    assert torch.equal(plain, 1 + expected)


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
