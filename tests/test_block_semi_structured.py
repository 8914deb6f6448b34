"""SemiStructuredBlockLinear: against dense layers, its life among modules, its state, the bytes of its parts."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from block_layers import OTHER_KINDS, linear_of, make
from conftest import assert_bits_equal, assert_exports
from torch import nn

import bitmask
from bitmask import BlockSparseLinear, FormatError, SemiStructuredBlockLinear, prune_24_
from bitmask.calls import LINEAR_DTYPES

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("error", "ignore:.*nested", "ignore:.torch.jit"),
]

PARTS = ["values", "metadata", "crow_indices", "col_indices", "dense_shape"]
SHAPES = [(64, 96, (32, 32)), (70, 50, (16, 32)), (33, 65, (8, 4)), (35, 7, (32, 64)), (9, 4, (1, 12))]


@pytest.fixture(params=sorted(LINEAR_DTYPES, key=str), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def layer_of(*sizes, **options):
    return SemiStructuredBlockLinear.from_block_sparse(make(*sizes, **options), prune=True)


def assert_same_layer(got, expected):
    for name in [*PARTS, "bias"]:
        if getattr(expected, name) is None:
            assert getattr(got, name) is None
        else:
            assert_bits_equal(getattr(got, name), getattr(expected, name))
    assert repr(got) == repr(expected)
    assert (got.in_features, got.out_features, got.block_shape) == tuple(
        getattr(expected, name) for name in ("in_features", "out_features", "block_shape")
    )


# From block-sparse layers and back.


@pytest.mark.parametrize(("in_features", "out_features", "block_shape"), SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_keeps_the_two_largest_of_four_and_multiplies_them(in_features, out_features, block_shape, bias, dtype):
    source = make(in_features, out_features, 0.6, block_shape, bias=bias, dtype=dtype)
    layer = SemiStructuredBlockLinear.from_block_sparse(source, prune=True)
    prune_24_(source.values.data)
    weight = source.to_dense().weight
    assert_bits_equal(layer.to_dense().weight, weight)
    assert_bits_equal(layer.weight + 0, weight.detach())
    assert layer.values.shape == (len(source.values), block_shape[0], block_shape[1] // 2)
    assert (layer.density, layer.block_shape) == (source.density, block_shape)
    assert torch.equal(layer.pattern, source.pattern)
    for size in [(), (3,), (2, 9), (0,)]:
        x = torch.randn(*size, in_features).to(dtype)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(layer(x), F.linear(x, weight, source.bias), **tolerance)


def test_without_pruning_nothing_may_be_lost():
    source = make()
    with pytest.raises(
        ValueError, match=r"layer.values: block 0, row 0, columns 0 to 3: got 4 non-zeros, .*, or prune=True"
    ):
        SemiStructuredBlockLinear.from_block_sparse(source)
    prune_24_(source.values.data)
    layer = SemiStructuredBlockLinear.from_block_sparse(source)
    assert_bits_equal(layer.to_block_sparse().values, source.values)


def test_what_lies_past_the_edges_is_left_out():
    source = make(33, 17, 1.0, (16, 32))
    prune_24_(source.values.data)
    expected = SemiStructuredBlockLinear.from_block_sparse(source)
    source.values.data[1::2, :, 1:] = torch.nan
    source.values.data[-2:, 1:] = torch.nan
    assert_same_layer(SemiStructuredBlockLinear.from_block_sparse(source), expected)


def test_half_of_the_bytes():
    source = make(256, 256, 0.5, (32, 32), bias=False, dtype=torch.bfloat16)
    layer = SemiStructuredBlockLinear.from_block_sparse(source, prune=True)
    assert layer.values.nbytes + layer.metadata.nbytes == source.values.nbytes * 9 // 16


def test_shares_nothing_and_keeps_flags():
    source = make().eval()
    source.bias.requires_grad_(False)
    layer = SemiStructuredBlockLinear.from_block_sparse(source, prune=True)
    before = copy.deepcopy(layer)
    for tensor in [*source.parameters(), *source.buffers()]:
        tensor.data.fill_(7)
    assert_same_layer(layer, before)
    assert not layer.training
    assert not layer.bias.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    for twin in (layer.to_dense(), layer.to_block_sparse()):
        assert not twin.training
        assert not twin.bias.requires_grad
        assert next(iter(twin.parameters())).requires_grad
        torch.testing.assert_close(twin(x := torch.randn(3, 70)), layer(x))
        for parameter in twin.parameters():
            parameter.data.fill_(7)
    assert_same_layer(layer, before)


def test_no_blocks_at_all():
    layer = SemiStructuredBlockLinear.from_block_sparse(make(pattern=torch.zeros(4, 3, dtype=torch.bool)))
    assert torch.equal(layer(torch.randn(2, 70)), layer.bias.expand(2, 50))
    assert layer.density == 0


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (lambda: nn.Linear(4, 4), TypeError, "layer: got Linear, expected a BlockSparseLinear"),
        (lambda: make(block_shape=(16, 6)), ValueError, r"block_shape: got \(16, 6\), expected columns that are"),
        (lambda: make(device="meta"), ValueError, "layer: got a layer on device meta"),
    ],
)
def test_wrong_arguments(layer, error, message):
    with pytest.raises(error, match=message):
        SemiStructuredBlockLinear.from_block_sparse(layer(), prune=True)
    with pytest.raises(TypeError, match="made by from_block_sparse or from_state_dict"):
        SemiStructuredBlockLinear()


# A module.


def test_gradients_reach_x_and_bias():
    layer = layer_of(dtype=torch.float64)
    x, y = (torch.randn(5, 70, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    dense = layer.to_dense()
    layer(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("size", [(3, 69), (3, 96), (70, 3), ()], ids=str)
def test_wrong_input(size):
    with pytest.raises(ValueError, match=r"x: got size .*, expected \[..., 70\]"):
        layer_of()(torch.randn(size))


def test_input_of_other_kinds():
    layer, parts = layer_of(), [torch.randn(3, 70), torch.randn(5, 70)]
    with pytest.raises(TypeError, match=r"x: got list, expected a torch\.Tensor"):
        layer([1.0])
    y = layer(torch.nested.nested_tensor(parts))
    for got, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(got, layer(part))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(parts[0]).dtype == torch.bfloat16


def jagged(values, **sizes):
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 3, 8]), **sizes)


@pytest.mark.parametrize("make_layer", [make, layer_of])
@pytest.mark.parametrize("sizes", [{}, {"min_seqlen": 3, "max_seqlen": 5}], ids=["unknown", "known"])
def test_residual_connections_of_jagged_tensors(make_layer, sizes):
    layer, values = make_layer(70, 70), torch.randn(8, 70, requires_grad=True)
    x = jagged(values, **sizes)
    y, expected = x + layer(x), values + layer(values)
    assert torch.equal(y.values(), expected)
    assert (layer(x)._maybe_min_seqlen, layer(x)._maybe_max_seqlen) == ((3, 5) if sizes else (None, None))
    tensors = (values, *layer.parameters())
    gradients = [torch.autograd.grad(each.square().sum(), tensors) for each in (y.values(), expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


JAGGED = {
    "heads": lambda x: x.unflatten(-1, (2, 70)).transpose(1, 2),
    "heads, contiguous": lambda x: x.unflatten(-1, (2, 70)).transpose(1, 2).contiguous(),
    "holes": lambda x: torch.nested.narrow(torch.randn(2, 9, 70), 1, *torch.tensor([[0, 2], [3, 4]]), x.layout),
}


@pytest.mark.parametrize("name", JAGGED)
@pytest.mark.parametrize("make_layer", [make, layer_of])
def test_other_jagged_tensors(make_layer, name):
    layer, x = make_layer(), JAGGED[name](jagged(torch.randn(8, 140)))
    y = layer(x)
    assert y.layout == torch.jagged
    for got, part in zip(y.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(got, layer(part))


@pytest.mark.parametrize("make_layer", [make, layer_of])
@pytest.mark.parametrize("name", JAGGED)
def test_hooks_run_once_on_jagged_tensors(make_layer, name):
    layer, x, calls = make_layer(), JAGGED[name](jagged(torch.randn(8, 140))), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer(x)
    assert calls == [1]


def test_a_jagged_size_of_the_inputs():
    x = torch.nested.nested_tensor([torch.randn(3), torch.randn(67)], layout=torch.jagged)
    assert x.values().shape == (70,)
    with pytest.raises(ValueError, match=r"x: got size \[3\], expected \[..., 70\]"):
        layer_of()(x)


def test_repr():
    layer = layer_of(bias=False, dtype=torch.bfloat16)
    assert repr(layer) == (
        "SemiStructuredBlockLinear(in_features=70, out_features=50, bias=False, block_shape=(16, 32), blocks=6, "
        f"density={layer.density:.4f}, dtype=torch.bfloat16)"
    )


@pytest.mark.parametrize("make_layer", [make, layer_of])
@pytest.mark.parametrize("weight", [nn.Parameter(torch.ones(50, 70)), torch.ones(50, 70), None], ids=type)
def test_setting_a_weight(make_layer, weight):
    message = rf"^weight: got a {type(weight).__name__} to set, expected none: it is a dense copy.*use the same one"
    with pytest.raises(TypeError, match=message):
        make_layer().weight = weight


class Doubled(nn.Module):
    def forward(self, half):
        return 2 * half

    def right_inverse(self, whole):
        return whole / 2


@pytest.mark.parametrize("make_layer", [make, layer_of])
def test_setting_a_bias(make_layer):
    layer, x = make_layer(), torch.randn(2, 70)
    layer.bias = nn.Parameter(torch.zeros(50))
    product = layer(x)
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    layer.bias = torch.ones(50)
    torch.testing.assert_close(layer(x), product + 1)
    nn.utils.parametrize.remove_parametrizations(layer, "bias")
    torch.testing.assert_close(layer(x), product + 1)
    layer.bias = None
    torch.testing.assert_close(layer(x), product)


def test_deepcopy_and_pickle():
    layer, file = layer_of(), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert_same_layer(twin, layer)
        assert twin.values.data_ptr() != layer.values.data_ptr()
        assert torch.equal(twin(x := torch.randn(3, 70)), layer(x))


def test_to_dtype(dtype):
    layer = layer_of()
    metadata = layer.metadata
    layer.to(dtype)
    assert layer.values.dtype == layer.bias.dtype == layer(torch.randn(2, 70).to(dtype)).dtype == dtype
    assert layer.metadata is metadata
    assert layer.crow_indices.dtype == torch.int64


@pytest.mark.parametrize("make_layer", [make, layer_of])
def test_type(dtype, make_layer):
    """Which casts indices and metadata as well."""
    layer = make_layer()
    expected = copy.deepcopy(layer).to(dtype)
    assert layer.type(dtype) is layer
    for name, tensor in expected.state_dict().items():
        assert_bits_equal(layer.state_dict()[name], tensor)
    assert torch.equal(layer(x := torch.randn(2, 70).to(dtype)), expected(x))


def test_meta_and_back():
    source = layer_of()
    layer = copy.deepcopy(source).to("meta")
    assert all(getattr(layer, name).is_meta for name in PARTS)
    assert repr(layer) == repr(source)
    assert layer(torch.empty(3, 70, device="meta")).shape == (3, 50)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert_same_layer(layer, source)
    layer = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    assert torch.equal(layer.pattern, source.pattern)
    layer.load_state_dict(source.state_dict())
    assert_same_layer(layer, source)
    layer(torch.randn(3, 70))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    assert_exports(layer_of(), torch.ops.bitmask.bsr_linear_24.default, torch.randn(5, 70), strict)


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    model, x = nn.Sequential(layer_of(), nn.ReLU()), torch.randn(5, 70)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
    torch._dynamo.reset()


# State.


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_brings_its_pattern(assign, bias):
    source, target = layer_of(640, 640, bias=bias), layer_of(640, 640, bias=bias)
    assert sorted(source.state_dict()) == sorted([*PARTS, *(["bias"] if bias else [])])
    assert not torch.equal(source.pattern, target.pattern)
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert_same_layer(target, source)
    assert torch.equal(target(x := torch.randn(3, 640)), source(x))


@pytest.mark.parametrize("assign", [True, False])
def test_loaded_in_inference_mode_it_trains_x_and_loads_again(assign):
    layer, state = layer_of(), copy.deepcopy(layer_of().state_dict())
    with torch.inference_mode():
        layer.load_state_dict(state, assign=assign)
    assert not any(tensor.is_inference() for tensor in (*layer.parameters(), *layer.buffers()))
    layer(x := torch.randn(3, 70, requires_grad=True)).sum().backward()
    assert x.grad.any()
    layer.load_state_dict(state)


def test_from_state_dict_copies():
    layer = layer_of()
    state = nn.Sequential(layer).state_dict()
    again = SemiStructuredBlockLinear.from_state_dict(state, "0.", in_features=70, out_features=50)
    assert_same_layer(again, layer)
    for part in state.values():
        part.zero_()
    assert again.values.any()
    assert again.metadata.any()


def test_state_dict_of_another_dtype_is_converted():
    source, target = layer_of(dtype=torch.float64), layer_of(dtype=torch.bfloat16)
    target.load_state_dict(source.state_dict())
    assert_same_layer(target, source.bfloat16())


@pytest.mark.parametrize(
    "options", [{"density": 0.25}, {"block_shape": (32, 16)}, {"in_features": 71}, {"out_features": 49}], ids=str
)
def test_state_dict_of_other_sizes_is_refused(options):
    target, source = layer_of(), layer_of(**options)
    before = copy.deepcopy(target)
    with pytest.raises(RuntimeError, match=r"values: got \d blocks of(.|\n)*SemiStructuredBlockLinear.from_state_dict"):
        target.load_state_dict(source.state_dict())
    assert_same_layer(target, before)
    assert_same_layer(SemiStructuredBlockLinear.from_state_dict(source.state_dict()), source)


# A change to one part of layer_of(), the error and its message.
CORRUPT = {
    "nibble": (
        lambda s: s["metadata"][2, 3].fill_(0x37),
        FormatError,
        "metadata: block 2, row 3, columns 0 to 3: got 3",
    ),
    "bits past the edge": (
        lambda s: s["metadata"][-1, -1].zero_(),
        FormatError,
        "metadata: block 5, row 15, columns 0",
    ),
    "size": (
        lambda s: s.update(metadata=s["metadata"][:, 1:]),
        FormatError,
        r"metadata: got size \[6, 15, 4\], expected \[6, 16, 4\]",
    ),
    "int8": (lambda s: s.update(metadata=s["metadata"].char()), TypeError, "metadata: got dtype torch.int8"),
    "meta": (lambda s: s.update(metadata=s["metadata"].to("meta")), FormatError, "metadata: got a meta tensor"),
    "sparse": (
        lambda s: s.update(metadata=s["metadata"].to_sparse()),
        TypeError,
        "metadata: got a torch.sparse_coo tensor, expected a dense",
    ),
    "no tensor": (lambda s: s.update(metadata=[1]), TypeError, "metadata: got list, expected a torch.Tensor"),
    "odd": (lambda s: s.update(values=s["values"][..., 1:]), FormatError, r"values: got size \[6, 16, 15\]"),
    "flat": (lambda s: s.update(values=s["values"].flatten(1)), FormatError, r"values: got size \[6, 256\]"),
    "empty": (lambda s: s.update(values=s["values"][:, :0]), FormatError, r"values: got size \[6, 0, 16\]"),
    "integers": (lambda s: s.update(values=s["values"].int()), TypeError, "values: got dtype torch.int32"),
    "unsorted": (lambda s: s["col_indices"].copy_(s["col_indices"].flip(0)), FormatError, r"col_indices\[\d\]: got"),
    "too large": (lambda s: s["col_indices"].__setitem__(-1, 3), FormatError, r"col_indices\[\d\]: got 3"),
    "falling": (lambda s: s["crow_indices"].__setitem__(2, 0), FormatError, r"crow_indices\[\d\]: got"),
    "crow": (lambda s: s.update(crow_indices=s["crow_indices"][:-1]), FormatError, "crow_indices: got size"),
    "shape": (lambda s: s["dense_shape"].neg_(), FormatError, r"dense_shape: got \[-50, -70\]"),
    "huge": (lambda s: s["dense_shape"].fill_(2**62), FormatError, r"dense_shape: got \[4.*, expected .* than 2\^63"),
} | OTHER_KINDS


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("assign", [True, False])
def test_corrupt_state_dict_is_refused_and_changes_nothing(name, assign):
    change, error, message = CORRUPT[name]
    pattern = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    model = nn.Sequential(layer_of(pattern=pattern))
    before, state = copy.deepcopy(model), copy.deepcopy(model[0]).state_dict()
    change(state)
    state = {f"0.{name}": part for name, part in state.items()}
    with pytest.raises(error, match=rf"^0\.{message}"):
        model.load_state_dict(state, assign=assign)
    assert_same_layer(model[0], before[0])
    with pytest.raises(error, match=rf"^0\.{message}"):
        SemiStructuredBlockLinear.from_state_dict(state, "0.")


@pytest.mark.parametrize("name", ["metadata", "bias"])
def test_parts_on_other_devices_than_the_values(name):
    layer = layer_of()
    before, state = copy.deepcopy(layer), copy.deepcopy(layer.state_dict())
    if name == "metadata":  # which itself must have data
        state = {key: part for key, part in state.items() if key != "bias"} | {"values": state["values"].to("meta")}
        message = "^metadata: got device cpu, expected meta, the device of values"
    else:
        state["bias"], message = state["bias"].to("meta"), "^bias: got device meta, expected cpu, the device of values"
    with pytest.raises(ValueError, match=message):
        SemiStructuredBlockLinear.from_state_dict(state)
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state, assign=True, strict=False)
    assert_same_layer(layer, before)


@pytest.mark.parametrize("parameter", [True, False])
def test_assigned_parts_stay_frozen_buffers(parameter):
    source, layer = layer_of(), layer_of()
    state = source.state_dict()
    state["values"] = nn.Parameter(state["values"]) if parameter else state["values"].clone().requires_grad_()
    state["col_indices"] = nn.Parameter(state["col_indices"], requires_grad=False)
    layer.load_state_dict(state, assign=True)
    assert_same_layer(layer, source)
    assert not layer.values.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert layer.state_dict().keys() == source.state_dict().keys()
    assert torch.equal(layer(x := torch.randn(3, 70, requires_grad=True)), source(x))


def test_buffers_that_were_written_to_are_proven_again():
    for work in (lambda layer: layer.weight + 0, lambda layer: layer.to_dense(), lambda layer: layer.to_block_sparse()):
        layer = layer_of()
        layer.metadata[2, 3] = 0x37
        with pytest.raises(FormatError, match=r"^metadata: block 2, row 3, columns 0 to 3: got 3 bits set, expected 2"):
            work(layer)
        layer = layer_of()
        layer.col_indices[0] = -1
        with pytest.raises(FormatError, match=r"^col_indices\[0\]: got -1, expected at least 0 and less than 3"):
            work(layer)


def test_parts_that_are_missing_and_sizes_that_are_known():
    state = layer_of().state_dict()
    for name in PARTS:
        rest = {key: part for key, part in state.items() if key != name}
        with pytest.raises(FormatError, match=f"^{name}: not in the state_dict, expected values, metadata"):
            SemiStructuredBlockLinear.from_state_dict(rest)
        message = "metadata: not in the state_dict" if name == "metadata" else f'Missing key.*"{name}"'
        with pytest.raises(RuntimeError, match=message):
            SemiStructuredBlockLinear.from_state_dict(state).load_state_dict(rest)
    with pytest.raises(FormatError, match=r"^dense_shape: got in_features 70, expected 71"):
        SemiStructuredBlockLinear.from_state_dict(state, in_features=71)
    with pytest.raises(FormatError, match=r"^bias: got size \[3\], expected \[50\]"):
        SemiStructuredBlockLinear.from_state_dict({**state, "bias": torch.ones(3)})


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_dense_blocks_is_refused(strict):
    """Half as wide, they would pass for what is stored of 2:4 ones."""
    model = nn.Sequential(layer_of(128, 128, density=1.0, block_shape=(32, 32)))
    half = torch.ones(4, 8, dtype=torch.bool)
    half[:, 4:] = False
    source = nn.Sequential(make(128, 128, pattern=half, block_shape=(32, 16)))
    assert source[0].values.shape == model[0].values.shape
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"0\.metadata: not in the state_dict, expected it with values"):
        model.load_state_dict(source.state_dict(), strict=strict)
    assert_same_layer(model[0], before[0])


def test_part_of_a_state_dict():
    source, target = layer_of(640, 640), layer_of(640, 640)
    state = source.state_dict()
    missing, _ = target.load_state_dict({"bias": state["bias"]}, strict=False)
    assert sorted(missing) == sorted(PARTS)
    for names in (("crow_indices", "col_indices"), ("values", "metadata")):
        target.load_state_dict({name: state[name] for name in names}, strict=False)
    assert_same_layer(target, source)


@pytest.mark.parametrize("kind", [BlockSparseLinear, SemiStructuredBlockLinear])
def test_what_is_no_state_dict_or_prefix(kind):
    for state in (None, make(), [("values", torch.ones(1))]):
        with pytest.raises(TypeError, match=rf"^state_dict: got {type(state).__name__}, expected a dict of tensors"):
            kind.from_state_dict(state)
    for prefix in (1, None):
        with pytest.raises(TypeError, match=f"^prefix: got {prefix}, expected a string"):
            kind.from_state_dict(layer_of().state_dict(), prefix)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(layer_of(), nn.ReLU(), layer_of(50, 20, bias=False))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    state = safetensors.load_file(tmp_path / "model.safetensors")
    for name in ("0", "2"):
        assert_same_layer(SemiStructuredBlockLinear.from_state_dict(state, f"{name}."), model[int(name)])


@pytest.mark.parametrize(
    "case",
    json.loads((Path(__file__).parent / "golden" / "block_two_four.json").read_text()),
    ids=lambda case: case["name"],
)
def test_golden_bytes(case):
    """Written down by hand, independently of the library: each part as its dtype, size and bytes in memory."""
    state = {
        name: torch.frombuffer(bytearray.fromhex(octets), dtype=getattr(torch, dtype)).view(size)
        for name, (dtype, size, octets) in case["parts"].items()
    }
    dense = torch.tensor(case["dense"], dtype=state["values"].dtype)
    layer = SemiStructuredBlockLinear.from_state_dict(state)
    assert_bits_equal(layer.to_dense().weight.data, dense)
    source = BlockSparseLinear.from_dense(
        linear_of(dense), block_shape=tuple(case["block_shape"]), pattern=torch.tensor(case["pattern"]).bool()
    )
    written = SemiStructuredBlockLinear.from_block_sparse(source).state_dict()
    assert written.keys() == state.keys()
    for name, part in state.items():
        assert_bits_equal(written[name], part)


def test_public_name():
    assert "SemiStructuredBlockLinear" in bitmask.__all__
