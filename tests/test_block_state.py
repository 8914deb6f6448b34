"""The state_dict of a block-sparse layer: round trips, what is refused, files."""

import copy
import re

import pytest
import torch
from block_layers import OTHER_KINDS, PARTS, assert_consistent, assert_same_layer, linear_of, make
from conftest import assert_bits_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitmask
from bitmask import BlockSparseLinear, FormatError, SemiStructuredBlockLinear, ops_block

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("error", "ignore:Sparse .* beta", "ignore:Initializing", "ignore:.*nested"),
]


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
} | OTHER_KINDS


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
    state["dense_shape"] = torch.tensor([50, 2**57])
    with pytest.raises(RuntimeError, match=f"values: got 6 blocks of 16 x 32 in a weight of 50 x {2**57}"):
        make().load_state_dict(state)
    with pytest.raises(RuntimeError, match=rf"^0\.dense_shape: got \[50, {2**57}\]: .*cannot allocate"):
        BlockSparseLinear.from_state_dict({f"0.{name}": part for name, part in state.items()}, "0.")
    with pytest.raises(FormatError, match=rf"^dense_shape: got in_features {2**57}, expected 70"):
        BlockSparseLinear.from_state_dict(state, in_features=70)
    state["dense_shape"] = torch.tensor([50, 2**62])
    for work in (make().load_state_dict, BlockSparseLinear.from_state_dict):
        with pytest.raises(FormatError, match=rf"^dense_shape: got \[50, {2**62}\], expected .* is less than 2\^63"):
            work(state)


def test_state_of_two_four_blocks_is_refused():
    """Half as wide as they are, its blocks would pass for dense ones."""
    two_four = SemiStructuredBlockLinear.from_block_sparse(make(128, 128, 1.0, (32, 32)), prune=True)
    state = nn.Sequential(two_four).state_dict()
    half = torch.ones(4, 8, dtype=torch.bool)
    half[:, 4:] = False
    model = nn.Sequential(make(128, 128, pattern=half, block_shape=(32, 16)))
    assert model[0].values.shape == two_four.values.shape
    before, message = copy.deepcopy(model), r"^0\.metadata: got the state of a SemiStructuredBlockLinear"
    with pytest.raises(FormatError, match=message):
        BlockSparseLinear.from_state_dict(state, "0.")
    for strict in (True, False):
        with pytest.raises(FormatError, match=message):
            model.load_state_dict(state, strict=strict)
    assert_same_layer(model[0], before[0])


def test_bias_on_another_device_is_not_assigned():
    layer = make()
    before, state = copy.deepcopy(layer), layer.state_dict()
    state["bias"] = state["bias"].to("meta")
    with pytest.raises(ValueError, match=r"^bias: got device meta, expected cpu, the device of values"):
        layer.load_state_dict(state, assign=True)
    assert_same_layer(layer, before)


def test_an_index_that_was_written_to_is_proven_again():
    works = (lambda layer: layer.weight + 0, lambda layer: layer.to_dense(), lambda layer: layer.to_bsr())
    for work in works:
        layer = make(96, 64)
        layer.col_indices[0] = -1
        with pytest.raises(FormatError, match=r"^col_indices\[0\]: got -1, expected at least 0 and less than 3"):
            work(layer)


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
