"""What BitmaskTensor and SemiStructuredTensor share, as torch, modules, files and other processes see it."""

import contextlib
import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    allows_decompression,
    assert_bits_equal,
    assert_is_compressed,
    assert_parts_equal,
    parts_of,
    run_python,
    two_four_numbers,
)
from torch import nn

import bitmask
from bitmask import BitmaskTensor, DecompressWarning, FormatError, SemiStructuredTensor
from bitmask.compressed_tensor import CompressedTensor
from bitmask.prune import prune_by_magnitude

pytestmark = pytest.mark.usefixtures("decompression_is_an_error")

KINDS = [BitmaskTensor, SemiStructuredTensor]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def dense():
    return two_four_numbers(6, 20)


@pytest.fixture
def compressed(kind, dense):
    return kind.from_dense(dense)


@pytest.fixture
def linear(kind, dense):
    """A linear layer with a compressed weight."""
    module = nn.Linear(20, 6)
    module.weight = nn.Parameter(kind.from_dense(dense), requires_grad=False)
    return module


# Construction and attributes.


def test_sparsity_of_a_tensor_without_elements(kind):
    assert kind.from_dense(torch.empty(3, 0)).sparsity == 0.0


def test_from_dense_does_not_keep_its_input(kind, dense):
    original = dense.clone()
    compressed = kind.from_dense(dense)
    dense.zero_()
    assert_is_compressed(compressed, original)


def test_from_dense_of_a_parameter_is_frozen(kind, dense):
    compressed = kind.from_dense(nn.Parameter(dense))
    assert not compressed.requires_grad
    assert not compressed.values.requires_grad


def test_to_dense_with_dtype(compressed, dense):
    assert_bits_equal(compressed.to_dense(torch.float64), dense.double())
    assert_bits_equal(compressed.to_dense(dtype=torch.float16), dense.half())


@pytest.mark.parametrize(
    "use",
    [bitmask.compress, bitmask.pack_24, bitmask.prune_24_, lambda t: prune_by_magnitude(t, 0.5), bitmask.block_norms],
)
def test_what_takes_dense_tensors_refuses_compressed_ones(dense, compressed, use):
    with pytest.raises(TypeError, match=f"got a {type(compressed).__name__}"):
        use(compressed)
    assert_is_compressed(compressed, dense)


@pytest.mark.parametrize("not_dense", [None, [1.0], 3.0])
def test_from_dense_refuses_what_is_no_tensor(kind, not_dense):
    with pytest.raises(TypeError, match=f"got {type(not_dense).__name__}, expected"):
        kind.from_dense(not_dense)


@pytest.mark.parametrize("given", KINDS)
def test_from_dense_refuses_a_compressed_tensor(kind, given, dense):
    with pytest.raises(TypeError, match=f"tensor: got a {given.__name__}, expected a dense tensor"):
        kind.from_dense(given.from_dense(dense))


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.to_sparse_coo,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_sparse_csc,
        lambda t: t.to_sparse_bsr((2, 2)),
        lambda t: t.to_sparse_bsc((2, 2)),
        lambda t: torch.nested.nested_tensor([t, t]),
        lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: t.to(torch.uint8).view(torch.float4_e2m1fn_x2),
        lambda t: t.to(torch.uint8).view(torch.int4),
    ],
    ids=["coo", "csr", "csc", "bsr", "bsc", "nested", "jagged", "quantized", "float4", "int4"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch announces that some of these are in beta
def test_from_dense_refuses_tensors_that_are_not_dense(kind, dense, convert):
    with pytest.raises(TypeError, match=r"got .*, expected"):
        kind.from_dense(convert(dense))


# Rows.

ROW_CASES = [
    slice(1, 3),
    slice(0, 6),
    slice(None),
    slice(2, None),
    slice(None, 4),
    slice(-2, None),
    slice(None, -1),
    slice(3, 3),
    slice(5, 2),
    slice(4, 100),
    slice(100, None),
    slice(0, 0),
    0,
    3,
    5,
    -1,
    -6,
]


@pytest.mark.parametrize("index", ROW_CASES, ids=str)
@pytest.mark.parametrize("shape", [(6, 20), (6, 3, 12), (6, 1, 2, 8), (6, 0), (6, 0, 4)], ids=str)
def test_rows_share_the_storage(kind, shape, index):
    """Without decompressing, which would be an error."""
    dense = two_four_numbers(*shape)
    compressed = kind.from_dense(dense)
    rows = compressed[index]
    assert_is_compressed(rows, dense[index])
    for part, whole in list(zip(parts_of(rows), parts_of(compressed), strict=True))[:2]:
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_rows_of_rows(dense, compressed):
    assert_is_compressed(compressed[1:][1:4][-2], dense[1:][1:4][-2])


def test_several_leading_indices(kind):
    dense = two_four_numbers(4, 3, 12)
    assert_is_compressed(kind.from_dense(dense)[1, 2], dense[1, 2])
    assert_is_compressed(kind.from_dense(dense)[-1][0:2], dense[-1][0:2])


@pytest.mark.parametrize("index", [6, -7, 100])
def test_row_out_of_range(compressed, index):
    with pytest.raises(IndexError, match=r"out of bounds|out of range"):
        compressed[index]


def test_rows_by_other_names(dense, compressed):
    assert_is_compressed(compressed.narrow(0, 1, 3), dense.narrow(0, 1, 3))
    assert_is_compressed(compressed.select(0, 2), dense.select(0, 2))
    assert_is_compressed(compressed.select(-2, 2), dense[2])
    assert_is_compressed(compressed[:, :], dense)
    assert_is_compressed(compressed[...], dense)


@pytest.mark.parametrize(
    "split",
    [
        lambda t: t.split(4),
        lambda t: t.split([1, 5]),
        lambda t: t.chunk(3),
        lambda t: t.unbind(),
        list,
        lambda t: t.tensor_split(2),
    ],
    ids=["split", "split sizes", "chunk", "unbind", "iteration", "tensor_split"],
)
def test_splitting_into_rows(dense, compressed, split):
    pieces, expected = split(compressed), split(dense)
    assert len(pieces) == len(expected)
    for piece, dense_piece in zip(pieces, expected, strict=True):
        assert_is_compressed(piece, dense_piece)


@allows_decompression
@pytest.mark.parametrize(
    "index",
    [
        (slice(None), 2),
        (slice(None), slice(2, 5)),
        slice(None, None, 2),
        (Ellipsis, 0),
        (2, 3),
        None,
        torch.tensor([4, 0, 0]),
        torch.tensor([True, False, True, True, False, False]),
        (slice(1, 3), torch.tensor([1, 2])),
    ],
    ids=str,
)
def test_other_indexing_gives_dense_results(dense, compressed, index):
    assert torch.equal(compressed[index], dense[index])


@allows_decompression
def test_one_dimensional_tensors(kind):
    dense = torch.tensor([0.0, 3.0, 0.0, 0.0])
    compressed = kind.from_dense(dense)
    assert torch.equal(compressed[1:], dense[1:])
    assert compressed[1].item() == 3.0
    with pytest.raises(IndexError):
        compressed[4]


# Conversions and copies.


@pytest.mark.parametrize("to", [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool])
def test_to_dtype(dense, compressed, to):
    assert_is_compressed(compressed.to(to), dense.to(to))
    assert_is_compressed(compressed, dense)


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.half,
        torch.Tensor.double,
        torch.Tensor.bool,
        torch.Tensor.cpu,
        lambda t: t.to("cpu", torch.float64),
        lambda t: t.type(torch.float64),
        lambda t: t.to(torch.zeros((), dtype=torch.float16)),
        lambda t: t.to(torch.float32, copy=True),
    ],
)
def test_conversions_by_other_names(dense, compressed, convert):
    assert_is_compressed(convert(compressed), convert(dense))


def test_to_the_same_dtype_is_the_same_tensor(compressed):
    assert compressed.to(torch.float32) is compressed


def test_float8_round_trip_of_dtype(kind, dense):
    eight = dense.to(torch.float8_e4m3fn)
    assert_bits_equal(kind.from_dense(eight).to(torch.float32).to_dense(), eight.to(torch.float32))


def test_values_that_round_to_zero_stay_valid(kind):
    dense = torch.tensor([[1e-30, 0.0, 2.0, 0.0]])
    assert_is_compressed(kind.from_dense(dense).half(), dense.half())


def test_to_meta(compressed):
    meta = compressed.to(device="meta")
    assert type(meta) is type(compressed)
    assert {part.device.type for part in (meta, *parts_of(meta))} == {"meta"}
    assert meta.to_dense().shape == (6, 20)


@pytest.mark.parametrize(
    ("make", "shares"),
    [
        (torch.clone, False),
        (copy.deepcopy, False),
        (lambda t: pickle.loads(pickle.dumps(t)), False),
        (torch.Tensor.detach, True),
        (copy.copy, True),
        (lambda t: t.data, True),
        (torch.Tensor.contiguous, True),
    ],
    ids=["clone", "deepcopy", "pickle", "detach", "copy", "data", "contiguous"],
)
def test_copies(dense, compressed, make, shares):
    copied = make(compressed)
    assert type(copied) is type(compressed)
    assert_is_compressed(copied, dense)
    for part, original in zip(parts_of(copied), parts_of(compressed), strict=True):
        assert (part.data_ptr() == original.data_ptr()) is shares


def test_deepcopy_keeps_identity_inside_containers(compressed):
    first, second = copy.deepcopy([compressed, compressed])
    assert first is second
    assert first is not compressed


def test_copies_of_rows(dense, compressed):
    rows = compressed[2:4]
    for copied in (copy.deepcopy(rows), rows.clone(), pickle.loads(pickle.dumps(rows)), copy.copy(rows)):
        assert_is_compressed(copied, dense[2:4])


# Files.


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


def test_save_and_load_weights_only(dense, compressed):
    assert_is_compressed(torch.load(saved(compressed), weights_only=True), dense)
    loaded = torch.load(saved({"w": compressed, "others": [compressed[1:3]]}), weights_only=True)
    assert_is_compressed(loaded["w"], dense)
    assert_is_compressed(loaded["others"][0], dense[1:3])


def test_load_maps_devices_and_memory(dense, compressed, tmp_path):
    assert torch.load(saved(compressed), weights_only=True, map_location="meta").values.device.type == "meta"
    torch.save(compressed, tmp_path / "weight.pt")
    assert_is_compressed(torch.load(tmp_path / "weight.pt", weights_only=True, mmap=True), dense)


def test_load_in_a_fresh_process(compressed, tmp_path):
    torch.save(compressed, tmp_path / "weight.pt")
    code = f"import bitmask, torch; print(torch.load({str(tmp_path / 'weight.pt')!r}, weights_only=True))"
    assert run_python(code).stdout.strip() == repr(compressed)


@pytest.mark.parametrize("write", [lambda t: saved(t).getvalue(), pickle.dumps], ids=["torch.save", "pickle"])
def test_saved_rows_leave_the_rest_behind(kind, write):
    whole = kind.from_dense(two_four_numbers(20000, 20))
    assert len(write(whole)) > 100_000
    assert len(write(whole[5:7])) < 5_000
    assert_is_compressed(pickle.loads(pickle.dumps(whole[5:7])), whole.to_dense()[5:7])


def test_safetensors_writes_no_wrong_file(compressed, dense, tmp_path):
    """Safetensors reads memory through the tensor's storage, which a compressed tensor does not have."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weight.safetensors"
    try:
        safetensors.save_file({"w": compressed}, path)
    except Exception as error:
        assert isinstance(error, TypeError | ValueError | RuntimeError)  # noqa: PT017  # refusing is one right answer
    else:
        assert torch.equal(safetensors.load_file(path)["w"], dense)


# Modules.


def test_linear_equals_dense(linear, dense):
    inputs = torch.randn(3, 20).requires_grad_()
    outputs = linear(inputs)
    torch.testing.assert_close(outputs, F.linear(inputs, dense, linear.bias))
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, dense.sum(0).expand(3, 20))
    assert linear.bias.grad is not None
    assert linear.weight.grad is None


@allows_decompression
@pytest.mark.parametrize("weight_kind", [None, *KINDS])
def test_linear_with_a_compressed_bias(kind, weight_kind):
    weight, bias, inputs = two_four_numbers(8, 20), two_four_numbers(8, seed=1), torch.randn(3, 20)
    outputs = F.linear(inputs, weight_kind.from_dense(weight) if weight_kind else weight, kind.from_dense(bias))
    torch.testing.assert_close(outputs, F.linear(inputs, weight, bias))


def dual_derivative(function, x):
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(dual).tangent


@allows_decompression
@pytest.mark.parametrize(
    "derive",
    [
        dual_derivative,
        lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),)),
        lambda function, x: torch.func.linearize(function, x)[1](torch.ones_like(x)),
        lambda function, x: torch.func.jacfwd(function)(x),
        lambda function, x: torch.func.hessian(lambda x: function(x).sin().sum())(x),
    ],
    ids=["dual", "jvp", "linearize", "jacfwd", "hessian"],
)
@pytest.mark.parametrize("function", [F.linear, lambda x, weight: x @ weight.t()], ids=["linear", "matmul"])
def test_forward_mode_derivatives_on_dense_copies(dense, compressed, derive, function):
    x = torch.randn(3, 20)
    got, expected = (derive(lambda x, weight=weight: function(x, weight), x) for weight in (compressed, dense))
    torch.testing.assert_close(got, expected)


def test_parameter(linear, dense):
    assert isinstance(linear.weight, nn.Parameter)
    assert isinstance(linear.weight, CompressedTensor)
    assert [(name, p.requires_grad) for name, p in linear.named_parameters()] == [("weight", False), ("bias", True)]
    assert_is_compressed(linear.weight, dense)


@pytest.mark.parametrize(
    "demand",
    [
        nn.Parameter,
        lambda t: t.requires_grad_(),
        lambda t: nn.Parameter(t, requires_grad=False).requires_grad_(True),
        lambda t: setattr(t, "requires_grad", True),
        lambda t: nn.ParameterList([nn.Parameter(t, requires_grad=False)]).requires_grad_(True),
    ],
)
def test_gradients_are_refused(compressed, demand):
    with pytest.raises(TypeError, match="frozen and takes no gradient"):
        demand(compressed)
    assert not compressed.requires_grad


def test_no_gradient_is_always_fine(compressed, linear):
    assert compressed.requires_grad_(False) is compressed
    compressed.requires_grad = False
    linear.requires_grad_(False).train().eval().zero_grad()


@pytest.mark.parametrize("to", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("swap", [False, True], ids=["set data", "swap tensors"])
def test_module_to_dtype(linear, dense, to, swap):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        linear.to(to)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert_is_compressed(linear.weight, dense.to(to))
    assert isinstance(linear.weight, nn.Parameter)
    assert not linear.weight.requires_grad
    assert "weight" in dict(linear.named_parameters())


def test_module_to_meta_and_empty(linear):
    kind = type(linear.weight)
    assert type(linear.to("meta").weight) is kind
    assert linear.to_empty(device="cpu").weight.device.type == "cpu"


def test_module_that_is_there_is_not_emptied(linear, dense):
    with pytest.raises(TypeError, match=r"data: got Tensor, expected a \w+; .* to_empty takes no \w+ that is on that"):
        linear.to_empty(device="cpu")
    assert_is_compressed(linear.weight, dense)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: torch.load(saved(m), weights_only=False)])
def test_module_copies(linear, dense, make):
    copied = make(linear)
    assert_is_compressed(copied.weight, dense)
    assert isinstance(copied.weight, nn.Parameter)
    assert "weight" in dict(copied.named_parameters())
    assert copied.weight.values.data_ptr() != linear.weight.values.data_ptr()


def test_buffer(kind, dense):
    module = nn.Module()
    module.register_buffer("mask", kind.from_dense(dense))
    assert_is_compressed(copy.deepcopy(module).state_dict()["mask"], dense)
    assert_is_compressed(module.double().mask, dense.double())


def test_state_dict_through_a_file(linear, dense):
    state = torch.load(saved(linear.state_dict()), weights_only=True)
    assert list(state) == ["weight", "bias"]
    assert_is_compressed(state["weight"], dense)


def other_linear(kind, seed=5):
    """A linear layer with another weight, which is dense if there is no kind of compressed tensor."""
    module = nn.Linear(20, 6)
    weight = two_four_numbers(6, 20, seed=seed)
    module.weight = nn.Parameter(weight if kind is None else kind.from_dense(weight), requires_grad=False)
    return module


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", [None, *KINDS])
@pytest.mark.parametrize("target", [None, *KINDS])
def test_load_state_dict(source, target, assign):
    giver, taker = other_linear(source, seed=1), other_linear(target, seed=2)
    expected = two_four_numbers(6, 20, seed=1)
    result = taker.load_state_dict(giver.state_dict(), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert isinstance(taker.weight, nn.Parameter)
    if kind := source if assign else target:
        assert type(taker.weight) is kind
        assert_is_compressed(taker.weight, expected)
    else:
        assert type(taker.weight) is nn.Parameter
        assert torch.equal(taker.weight, expected)
    if not assign:
        shared = taker.weight if target is None else taker.weight.values
        given = giver.weight if source is None else giver.weight.values
        assert shared.data_ptr() != given.data_ptr()


@pytest.mark.parametrize("source", [None, *KINDS])
@pytest.mark.parametrize("made_inside", [False, True])
def test_loaded_in_inference_mode_it_trains_x(linear, source, made_inside):
    state = other_linear(source).state_dict()
    with torch.inference_mode():
        if made_inside:
            state = {name: tensor.clone() for name, tensor in state.items()}
        linear.load_state_dict(state)
    assert_is_compressed(linear.weight, two_four_numbers(6, 20, seed=5))
    linear(x := torch.ones(2, 20, requires_grad=True)).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.to_dense().sum(0).expand(2, 20))


def test_views_of_a_weight_in_inference_mode(linear, dense):
    with torch.inference_mode():
        state, row, parameter = linear.state_dict(), linear.weight[2], nn.Parameter(linear.weight, requires_grad=False)
    assert_is_compressed(row, dense[2])
    for weight in (state["weight"], parameter):
        F.linear(x := torch.ones(2, 20, requires_grad=True), weight).sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 20))


def test_load_state_dict_keeps_the_parameter_object(linear):
    weight = linear.weight
    linear.load_state_dict(other_linear(None).state_dict())
    assert linear.weight is weight


def test_load_state_dict_of_another_shape(linear, dense):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        linear.load_state_dict(nn.Linear(20, 7).state_dict())
    assert_is_compressed(linear.weight, dense)


def test_optimizers_leave_the_weight_alone(linear, dense):
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0.1)
    bias = linear.bias.detach().clone()
    linear(torch.ones(2, 20)).sum().backward()
    optimizer.step()
    assert_is_compressed(linear.weight, dense)
    assert not torch.equal(linear.bias, bias)


def test_functional_call_and_autocast(linear, dense):
    inputs = torch.randn(3, 20)
    assert torch.equal(torch.func.functional_call(linear, dict(linear.named_parameters()), (inputs,)), linear(inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(F.linear(inputs, linear.weight), F.linear(inputs, dense))


# Writing.


def write_out(tensor):
    torch.add(torch.ones(6, 20), 1, out=tensor)


def set_item(index, value=1.0):
    return lambda tensor: tensor.__setitem__(index, value)


WRITES = {
    "add_": lambda t: t.add_(1),
    "mul_": lambda t: t.mul_(2),
    "zero_": lambda t: t.zero_(),
    "fill_": lambda t: t.fill_(2),
    "t[0] =": set_item(0),
    "t[0] = row": set_item(0, torch.ones(20)),
    "t[0] = compressed row": set_item(0, BitmaskTensor.from_dense(torch.ones(20))),
    "t[0] = 2:4 row": set_item(0, SemiStructuredTensor.from_dense(torch.eye(20)[0])),
    "t[1:3] =": set_item(slice(1, 3)),
    "t[1:3] = rows": set_item(slice(1, 3), torch.ones(2, 20)),
    "t[::2] =": set_item(slice(None, None, 2)),
    "t[0, 0] =": set_item((0, 0)),
    "t[:, 2] =": set_item((slice(None), 2)),
    "t[..., 0] =": set_item((Ellipsis, 0)),
    "t[None] =": set_item(None),
    "t[mask] =": set_item(torch.ones(6, dtype=torch.bool)),
    "t[indices] =": set_item(torch.tensor([1, 2])),
    "uniform_": lambda t: t.uniform_(),
    "init": lambda t: nn.init.normal_(t),
    "index_put_": lambda t: t.index_put_((torch.tensor([0]),), torch.ones(())),
    "masked_fill_": lambda t: t.masked_fill_(torch.ones(6, 20, dtype=torch.bool), 0.0),
    "clamp_": lambda t: t.clamp_(0, 1),
    "out=": write_out,
    "foreach": lambda t: torch._foreach_add_([t], 1.0),
    "resize_": lambda t: t.resize_(3),
    "set_": lambda t: t.set_(torch.zeros(3)),
    "t_": lambda t: t.t_(),
    "squeeze_": lambda t: t.squeeze_(),
    "apply_": lambda t: t.apply_(lambda x: x),
    "map_": lambda t: t.map_(torch.zeros(6, 20), lambda x, y: x),
    "assigned dense data": lambda t: setattr(t, "data", torch.zeros(6, 20)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused_and_change_nothing(dense, compressed, name):
    before = copy.deepcopy(parts_of(compressed))
    with pytest.raises(TypeError, match=rf"{type(compressed).__name__}|subclass"):
        WRITES[name](compressed)
    assert_parts_equal(parts_of(compressed), before)
    assert_is_compressed(compressed, dense)


@allows_decompression
def test_augmented_assignment_does_not_change_the_tensor(dense, compressed):
    """Python falls back from the refused `mul_` to `*`, whose dense result takes over the name."""
    result = compressed
    result *= 2
    assert torch.equal(result, dense * 2)
    assert_is_compressed(compressed, dense)


def test_copied_into_while_forward_mode_is_on(kind, dense):
    compressed = kind.from_dense(torch.zeros(6, 20))
    with torch.autograd.forward_ad.dual_level():
        compressed.copy_(dense)
    assert_is_compressed(compressed, dense)


def test_rows_cannot_be_written_to(dense, compressed):
    with pytest.raises(TypeError, match="cannot be written to in place"):
        compressed[1:3].zero_()
    assert_is_compressed(compressed, dense)


@allows_decompression
def test_dense_results_can_be_written_to(dense, compressed):
    compressed[:, 2].zero_()
    assert_is_compressed(compressed, dense)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        BitmaskTensor.from_dense,
        SemiStructuredTensor.from_dense,
        torch.Tensor.double,
        lambda t: BitmaskTensor.from_dense(t.double()),
        lambda t: SemiStructuredTensor.from_dense(t.double()),
        torch.Tensor.clone,
    ],
    ids=["dense", "bitmask", "2:4", "dense float64", "bitmask float64", "2:4 float64", "clone"],
)
def test_copy_replaces_the_contents(compressed, make):
    source = two_four_numbers(6, 20, density=0.7, seed=9)
    assert compressed.copy_(make(source)) is compressed
    assert_is_compressed(compressed, source)


def test_copy_does_not_share_with_its_source(kind, compressed):
    source = kind.from_dense(two_four_numbers(6, 20, seed=9))
    expected = source.to_dense()
    compressed.copy_(source)
    source.values.zero_()
    assert_is_compressed(compressed, expected)


@pytest.mark.parametrize(
    "make", [torch.clone, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), lambda t: t.to(t.dtype, copy=True)]
)
def test_copy_into_a_copy_leaves_the_original(dense, compressed, make):
    make(compressed).copy_(dense * 2)
    assert_is_compressed(compressed, dense)


def test_copy_into_cloned_rows(dense, compressed):
    rows = compressed[1:3].clone()
    rows.copy_(dense[:2])
    assert_is_compressed(rows, dense[:2])
    assert_is_compressed(compressed, dense)


def test_copy_between_compressed_tensors_keeps_negative_zeros(kind):
    dense = torch.tensor([[-0.0, 1.0, 0.0, 0.0]])
    target = kind.from_dense(torch.eye(4)[:1])
    target.copy_(kind.from_dense(dense, keep_negative_zero=True))
    assert_bits_equal(target.to_dense(), dense)


@pytest.mark.parametrize(
    "alias",
    [lambda t: t.data, torch.Tensor.detach, lambda t: t[:], torch.Tensor.contiguous],
    ids=["data", "detach", "[:]", "contiguous"],
)
def test_copy_through_an_alias_is_never_lost(dense, compressed, alias):
    """Weight loaders write `parameter.data.copy_(...)`: that must arrive, or say that it cannot."""
    source = two_four_numbers(6, 20, density=0.7, seed=9)
    target = alias(compressed)
    try:
        target.copy_(source)
    except TypeError:
        assert_is_compressed(compressed, dense)
    else:
        assert_is_compressed(compressed, source)
        assert_is_compressed(target, source)


@pytest.mark.parametrize(
    "rows", [lambda t: t[1:3], lambda t: t[:2], lambda t: t.narrow(0, 4, 2), lambda t: t.split(2)[0]]
)
def test_copy_into_rows_is_refused(dense, compressed, rows):
    """The rows' values may be a view of a packed array, in which more or fewer of them find no place."""
    with pytest.raises(TypeError, match=f"rows of a {type(compressed).__name__} cannot be written to"):
        rows(compressed).copy_(dense[:2])
    assert_is_compressed(compressed, dense)


def test_copy_from_itself(dense, compressed):
    compressed.copy_(compressed)
    assert_is_compressed(compressed, dense)


def test_copy_into_dense_tensors_does_not_warn(dense, compressed):
    assert torch.equal(torch.empty(6, 20).copy_(compressed), dense)
    assert torch.equal(torch.empty(2, 6, 20).copy_(compressed), dense.expand(2, 6, 20))
    target = torch.zeros(8, 20)
    target[1:7] = compressed
    assert torch.equal(target[1:7], dense)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (torch.zeros(3), ValueError),
        (torch.zeros(20), ValueError),
        (torch.zeros(20, 6), ValueError),
        (torch.zeros(6, 20).to_sparse(), TypeError),
        (3, TypeError),
        (None, TypeError),
    ],
    ids=["other rank", "broadcastable", "transposed", "sparse", "number", "None"],
)
def test_copy_of_something_else_is_refused_and_changes_nothing(dense, compressed, source, error):
    with pytest.raises(error):
        compressed.copy_(source)
    assert_is_compressed(compressed, dense)


def test_assigning_data(kind, compressed):
    other = two_four_numbers(6, 20, seed=3)
    compressed.data = kind.from_dense(other)
    assert_is_compressed(compressed, other)


@pytest.mark.parametrize("make", [lambda t: t, *(kind.from_dense for kind in KINDS)], ids=["dense", "bitmask", "2:4"])
def test_assigning_data_of_another_kind_is_refused(kind, dense, compressed, make):
    source = make(dense)
    if type(source) is not kind:
        with pytest.raises(TypeError, match=f"data: got {type(source).__name__}, expected a {kind.__name__}"):
            compressed.data = source
    assert_is_compressed(compressed, dense)


@pytest.mark.parametrize("change", [lambda t: t.reshape(3, 40), torch.Tensor.half, lambda t: t[:3]])
def test_assigning_data_of_another_shape_or_dtype_is_refused(kind, dense, compressed, change):
    with pytest.raises(ValueError, match=r"data: got .*, expected"):
        compressed.data = kind.from_dense(change(dense))
    assert_is_compressed(compressed, dense)


# Operations without a kernel.

FALLBACKS = {
    "+": lambda t: t + 1,
    "reflected -": lambda t: 1 - t,
    "-t": lambda t: -t,
    "t * t": lambda t: t * t,
    "==": lambda t: t == 0,
    "matmul": lambda t: torch.ones(2, 6) @ t,
    "T": lambda t: t.T,
    "sum": lambda t: t.sum(dim=0),
    "max": lambda t: t.max(dim=1).values,
    "view": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(3, 40),
    "cat": lambda t: torch.cat([t, torch.ones(1, 20), t]),
    "stack": lambda t: torch.stack([t, t]),
    "where": lambda t: torch.where(t > 0, t, -1.0),
    "einsum": lambda t: torch.einsum("ij,ij->i", t, t),
    "to_sparse": lambda t: t.to_sparse().to_dense(),
    "vmap": lambda t: torch.vmap(lambda row: row * 2)(t),
    "sort": lambda t: t.sort(dim=1).values,
    "nonzero": lambda t: t.nonzero(),
    "abs": torch.abs,
    "isnan": torch.isnan,
    "dense in place": lambda t: torch.ones(6, 20).mul_(t),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallbacks_are_right_and_warn(dense, compressed, name):
    with pytest.warns(DecompressWarning, match=rf"aten\..* has no kernel for {type(compressed).__name__}"):
        result = FALLBACKS[name](compressed)
    assert not isinstance(result, CompressedTensor)
    assert torch.equal(result, FALLBACKS[name](dense))
    assert_is_compressed(compressed, dense)


@pytest.mark.filterwarnings("always::bitmask.DecompressWarning")
@pytest.mark.parametrize("guard", [contextlib.nullcontext, torch._C.DisableTorchFunctionSubclass])
def test_warning_points_at_the_caller(compressed, guard):
    with pytest.warns(DecompressWarning) as caught, guard():
        _ = compressed + 1
    assert [warning.filename for warning in caught] == [__file__]


def test_warning_can_be_silenced(compressed):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=bitmask.DecompressWarning)
        _ = compressed + 1
    assert caught == []


@allows_decompression
def test_equality(dense, compressed):
    assert torch.equal(compressed, dense)
    assert torch.equal(dense, compressed)
    assert not torch.equal(compressed, dense + 1)
    torch.testing.assert_close(compressed, dense)


def test_identity_survives_hashing(compressed):
    assert {compressed: 1}[compressed] == 1


@pytest.mark.parametrize(
    ("make", "fill"),
    [
        (torch.zeros_like, 0.0),
        (torch.ones_like, 1.0),
        (lambda t: torch.full_like(t, 3.0), 3.0),
        (lambda t: t.new_zeros(6, 20), 0.0),
        (lambda t: t.new_ones((6, 20)), 1.0),
        (lambda t: t.new_full((6, 20), 3.0), 3.0),
    ],
)
def test_new_tensors_take_shape_and_dtype_only(compressed, make, fill):
    made = make(compressed)
    assert type(made) is torch.Tensor
    assert torch.equal(made, torch.full((6, 20), fill))


@pytest.mark.parametrize("make", [torch.empty_like, torch.rand_like, torch.randn_like, lambda t: t.new_empty(6, 20)])
def test_new_tensors_of_no_particular_content(compressed, make):
    made = make(compressed)
    assert (type(made), made.shape, made.dtype) == (torch.Tensor, (6, 20), torch.float32)
    made.zero_()
    assert made.is_contiguous()


def test_new_tensors_of_another_dtype_or_device(compressed):
    assert torch.zeros_like(compressed, dtype=torch.int8).dtype == torch.int8
    assert torch.empty_like(compressed, device="meta").device.type == "meta"


# What reads memory.


def test_repr_does_not_decompress(compressed):
    nnz = compressed.nnz
    for text in (repr(compressed), str(compressed), f"{compressed}"):
        assert text.startswith(f"{type(compressed).__name__}(shape=(6, 20), dtype=torch.float32, device='cpu'")
        assert f"nnz={nnz}" in text
        assert f"compressed_nbytes={compressed.compressed_nbytes}" in text


def test_python_and_numpy_values(dense, compressed):
    assert compressed.tolist() == dense.tolist()
    assert np.array_equal(compressed.numpy(), dense.numpy())
    assert np.array_equal(np.asarray(compressed), dense.numpy())
    assert np.asarray(compressed, dtype=np.float64).dtype == np.float64
    assert np.array_equal(np.from_dlpack(compressed), dense.numpy())


@allows_decompression
def test_dlpack(dense, compressed):
    assert torch.equal(torch.from_dlpack(compressed), dense)


@pytest.mark.parametrize("read", [lambda t: t.data_ptr(), lambda t: t.storage(), lambda t: t._typed_storage()])
def test_there_is_no_dense_memory(compressed, read):
    with pytest.raises(TypeError, match=f"a {type(compressed).__name__} has no dense storage: use its values"):
        read(compressed)


def test_its_untyped_storage_has_no_memory(compressed):
    assert compressed.untyped_storage().device.type == "meta"


STORAGE_USES = {
    "set_": "torch.empty(0).set_(t.untyped_storage(), 0, (3,)).sum()",
    "copy_": "t.untyped_storage().copy_(torch.zeros(120).untyped_storage())",
    "read": "t.untyped_storage().tolist()[:3]",
    "share": "t.untyped_storage().share_memory_()",
    "typed": "t.storage().share_memory_()",
    "pickle": "pickle.dumps(t.untyped_storage())",
    "save": "torch.save(t.untyped_storage(), io.BytesIO())",
    "apply_": "t.apply_(lambda x: x)",
    "frombuffer": "torch.frombuffer(t, dtype=torch.float32)",
    "memoryview": "memoryview(t)",
}


@pytest.mark.parametrize("name", STORAGE_USES)
def test_looking_for_dense_memory_does_not_crash(kind, name):
    """In a process of its own, because what is tested is that it survives."""
    code = f"""
import io, pickle, torch, bitmask
t = bitmask.{kind.__name__}.from_dense(torch.eye(20)[:6])
try:
    {STORAGE_USES[name]}
except Exception as error:
    print(type(error).__name__)
print("alive", torch.equal(t.to_dense(), torch.eye(20)[:6]))
"""
    assert "alive True" in run_python(code).stdout


# Parts that someone changed.


BITMASK_CHANGES = [
    ("values", lambda t: t.resize_(2), FormatError, r"row_offsets\[1\]: got 3, expected 0 to 2"),
    ("values", lambda t: t.resize_(0), FormatError, r"row_offsets\[1\]: got 3, expected 0 to 0"),
    ("values", lambda t: t.resize_(9), FormatError, "values: got 9 elements, expected 5"),
    ("values", lambda t: t.resize_(1, 5), FormatError, "values: got 2 dimensions, expected 1"),
    ("bitmasks", lambda t: t.bitwise_xor_(1), FormatError, r"row_offsets\[1\]: got 3, expected 1"),
    ("bitmasks", lambda t: t.zero_(), FormatError, r"row_offsets\[1\]: got 3, expected 0"),
    ("bitmasks", lambda t: t.resize_(1, 1), FormatError, r"bitmasks: got size \[1, 1\], expected \[3, 2\]"),
    ("row_offsets", lambda t: t.add_(1), FormatError, r"row_offsets\[0\]: got 1, expected 0"),
    ("row_offsets", lambda t: t.fill_(-(2**63)), FormatError, r"row_offsets\[0\]: got -9223372036854775808, expected"),
    ("row_offsets", lambda t: t.fill_(2**63 - 1), FormatError, r"row_offsets\[0\]: got 9223372036854775807, expected"),
    ("row_offsets", lambda t: t.resize_(1), FormatError, r"row_offsets: got size \[1\], expected \[3\]"),
    ("values", torch.zeros(2), FormatError, r"row_offsets\[1\]: got 3, expected 0 to 2"),
    ("values", torch.zeros(5, dtype=torch.int32), FormatError, "values: got dtype torch.int32, expected torch.float32"),
    ("values", None, TypeError, "values: got NoneType, expected a torch.Tensor"),
    ("bitmasks", [1, 2], TypeError, "bitmasks: got list, expected a torch.Tensor"),
    ("bitmasks", torch.zeros(3, 2, dtype=torch.int8), TypeError, "bitmasks: got dtype torch.int8, expected"),
    ("bitmasks", torch.zeros(3, 2, dtype=torch.uint8, device="meta"), ValueError, "bitmasks: got device meta"),
    ("row_offsets", torch.zeros(3), TypeError, "row_offsets: got dtype torch.float32, expected torch.int64"),
    ("row_offsets", torch.tensor([1, 4, 4]), FormatError, r"row_offsets\[0\]: got 1, expected 0"),
]


TWO_FOUR_CHANGES = [
    ("values", lambda t: t.resize_(2), FormatError, r"metadata: got size \[3, 1\], expected \[1\]"),
    ("values", lambda t: t.resize_(0), FormatError, "metadata: got size"),
    ("values", lambda t: t.resize_(3, 6), FormatError, r"metadata: got size \[3, 1\], expected \[3, 2\]"),
    ("values", lambda t: t.resize_(3, 3), FormatError, r"values: got size \[3, 3\], expected \[..., cols / 2\]"),
    ("values", torch.zeros(()), FormatError, r"values: got size \[\], expected"),
    ("values", torch.zeros(3, 2), FormatError, r"values: got size \[3, 2\], expected \[3, 4\] for shape \[3, 8\]"),
    ("values", torch.zeros(3, 4, dtype=torch.int32), FormatError, "values: got dtype torch.int32, expected torch.flo"),
    ("values", torch.zeros(3, 4, dtype=torch.complex64), TypeError, "values: got dtype torch.complex64, expected"),
    ("values", None, TypeError, "values: got NoneType, expected a torch.Tensor"),
    ("values", torch.zeros(3, 4).to_sparse(), TypeError, "values: got a torch.sparse_coo tensor, expected a dense"),
    ("metadata", lambda t: t.bitwise_xor_(1), FormatError, "metadata: row 0, columns 0 to 3: got 1 bits? set, exp"),
    ("metadata", lambda t: t.zero_(), FormatError, "metadata: row 0, columns 0 to 3: got 0 bits set, expected 2"),
    ("metadata", lambda t: t.bitwise_or_(0x10), FormatError, "metadata: row 0, columns 4 to 7: got 3 bits set, exp"),
    ("metadata", lambda t: t.resize_(1, 1), FormatError, r"metadata: got size \[1, 1\], expected \[3, 1\]"),
    ("metadata", [1, 2], TypeError, "metadata: got list, expected a torch.Tensor"),
    ("metadata", torch.zeros(3, 1, dtype=torch.int8), TypeError, "metadata: got dtype torch.int8, expected torch.uin"),
    ("metadata", torch.zeros(3, 1, dtype=torch.uint8, device="meta"), ValueError, "metadata: got device meta"),
]


def changed(kind, part, change):
    """A small tensor, one part of which was changed in place or replaced behind its back."""
    dense = torch.tensor([[1, 0, 2, 0, 0, 0, 0, 0], [0] * 8, [3, 4, 0, 0, 0, 0, 0, 0]], dtype=torch.float32)
    tensor = SemiStructuredTensor.from_dense(dense)
    if kind is BitmaskTensor:
        tensor = BitmaskTensor.from_parts(
            torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
            torch.tensor([[5, 1], [0, 0], [3, 0]], dtype=torch.uint8),
            torch.tensor([0, 3, 3]),
            [3, 9],
        )
    change(getattr(tensor, part)) if callable(change) else setattr(tensor, part, change)
    return tensor


CHANGES = [(BitmaskTensor, *change) for change in BITMASK_CHANGES] + [
    (SemiStructuredTensor, *change) for change in TWO_FOUR_CHANGES
]


@pytest.mark.parametrize(
    ("kind", "part", "change", "error", "message"),
    CHANGES,
    ids=[f"{c[0].__name__}-{c[1]}-{c[4][:40]}" for c in CHANGES],
)
@pytest.mark.parametrize(
    "use",
    [
        CompressedTensor.to_dense,
        lambda t: t[0].to_dense(),
        lambda t: t[:2].to_dense(),
        lambda t: [rows.to_dense() for rows in t.split(2)],
        lambda t: t.double().to_dense(),
        lambda t: torch.add(t, 1),
        lambda t: F.linear(torch.ones(t.shape[-1]), t),
        lambda t: t.tolist(),
        lambda t: copy.deepcopy(t).to_dense(),
        lambda t: pickle.loads(pickle.dumps(t)),
    ],
    ids=["to_dense", "row", "rows", "split", "double", "add", "linear", "tolist", "deepcopy", "pickle"],
)
def test_changed_parts_are_noticed(kind, part, change, error, message, use):
    tensor = changed(kind, part, change)
    with pytest.raises(error, match=message):
        use(tensor)
    assert repr(tensor).startswith(f"{kind.__name__}(shape=(3, ")


# torch.compile and other processes.


def test_flatten_and_unflatten(dense, compressed):
    names, context = compressed.__tensor_flatten__()
    assert all(getattr(compressed, name) is part for name, part in zip(names, parts_of(compressed), strict=True))
    inner = {name: getattr(compressed, name) for name in names}
    assert_is_compressed(
        type(compressed).__tensor_unflatten__(inner, context, compressed.shape, compressed.stride()), dense
    )


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_to_dense(fresh_dynamo, dense, compressed):
    compiled = torch.compile(lambda t: t.to_dense() * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(compressed), dense * 2)
    other = two_four_numbers(6, 20, seed=8)
    assert torch.equal(compiled(type(compressed).from_dense(other)), other * 2)


def test_compiled_linear(fresh_dynamo, linear):
    inputs = torch.randn(3, 20)
    assert torch.equal(torch.compile(linear, backend="aot_eager", fullgraph=True)(inputs), linear(inputs))


def test_share_memory(dense, compressed):
    assert not compressed.is_shared()
    assert compressed.share_memory_() is compressed
    assert compressed.is_shared()
    assert_is_compressed(compressed, dense)


def double_in_another_process(inbox, outbox):
    tensor = inbox.get(timeout=60)
    outbox.put(type(tensor).from_dense(tensor.to_dense() * 2))
    inbox.get(timeout=60)  # keeps the shared memory alive until the other side has it


def test_multiprocessing_queue(dense, compressed):
    context = torch.multiprocessing.get_context("spawn")
    outbox, inbox = context.Queue(), context.Queue()
    process = context.Process(target=double_in_another_process, args=(outbox, inbox))
    process.start()
    try:
        outbox.put(compressed)
        assert_is_compressed(inbox.get(timeout=60), dense * 2)
        outbox.put(None)
        process.join(timeout=60)
        assert process.exitcode == 0
    finally:
        process.kill()


# Aliases and copies, as with dense tensors.


def test_shallow_copy_is_an_alias(dense, compressed):
    twin = copy.copy(compressed)
    twin.copy_(dense * 2)
    assert_is_compressed(compressed, dense * 2)


def test_deepcopy_keeps_aliases_together(dense, compressed):
    first, second = copy.deepcopy((compressed, compressed.detach()))
    first.copy_(dense * 2)
    assert_is_compressed(second, dense * 2)
    assert_is_compressed(compressed, dense)


@pytest.mark.parametrize("index", [6, -7, 100])
def test_select_out_of_range(compressed, index):
    with pytest.raises(IndexError):
        torch.select(compressed, 0, index)


def test_select_out_of_range_without_elements(kind):
    with pytest.raises(IndexError):
        torch.select(kind.from_dense(torch.ones(6, 0)), 0, 100)


@pytest.mark.parametrize(
    "view",
    [lambda t: t.narrow(1, 0, 4), lambda t: t.view(-1), lambda t: t.t(), lambda t: t[:, 2:4], torch.Tensor.flatten],
)
def test_views_that_are_dense_copies_say_that_writes_go_nowhere(compressed, view):
    with pytest.warns(
        DecompressWarning, match=f"writing to the result will not change the {type(compressed).__name__}"
    ):
        view(compressed)


def test_other_dense_results_do_not_say_so(compressed):
    with pytest.warns(DecompressWarning) as caught:
        compressed + 1
    assert not any("writing to the result" in str(warning.message) for warning in caught)


# Compilers.


@pytest.mark.parametrize(
    "cut", [lambda t: t[1:3], lambda t: t.split(2)[1], lambda t: t.narrow(0, 1, 2), lambda t: t[4]]
)
def test_rows_in_a_compiled_function(fresh_dynamo, dense, compressed, cut):
    compiled = torch.compile(lambda t: cut(t).to_dense() + 1, backend="aot_eager")
    assert torch.equal(compiled(compressed), cut(dense) + 1)


def test_rows_as_input_of_a_compiled_function(fresh_dynamo, dense, compressed):
    compiled = torch.compile(lambda t: t.to_dense() + 1, backend="aot_eager")
    assert torch.equal(compiled(compressed[1:3]), dense[1:3] + 1)


@pytest.mark.parametrize(
    "make", [lambda source: source, *(kind.from_dense for kind in KINDS)], ids=["dense", "bitmask", "2:4"]
)
def test_compiled_copy_arrives_or_is_refused(fresh_dynamo, dense, compressed, make):
    """Parts replaced inside a graph would be lost without a word."""
    source = two_four_numbers(6, 20, density=0.7, seed=9)
    compiled = torch.compile(lambda target, value: target.copy_(value), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot be compiled"):
        compiled(compressed, make(source))
    assert_is_compressed(compressed, dense)
