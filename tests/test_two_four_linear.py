"""Products with a 2:4 weight against float64: for every kind of size, number and stride; their gradients; bad input."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ISAS,
    VIEWS_OF_ROWS,
    assert_bits_equal,
    assert_is_linear,
    assert_works_after_fork,
    random_numbers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bitmask
from bitmask import BitmaskTensor, FormatError, reference
from bitmask.calls import LINEAR_DTYPES
from bitmask.ops_two_four import linear_24, linear_24_backward_input, pack_24, prune_24, unpack_24, validate_24

DTYPES = sorted(LINEAR_DTYPES, key=str)
BATCHES = [0, 1, 2, 3, 4, 5, 8, 9, 13, 25, 33, 130, 505]
COLUMNS = [0, 4, 8, 60, 64, 68, 132]
ROWS = [0, 1, 7, 16, 33, 65]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def random_weight(*shape, density=1.0, seed=0, dtype=torch.float32):
    """2:4, with fewer non-zeros than two in some groups if the density is below 1."""
    weight = random_numbers(*shape, density=density, seed=seed, dtype=dtype)
    prune_24(weight)
    return weight


def numbers(*shape, seed=1, dtype=torch.float32):
    return random_numbers(*shape, density=1.0, seed=seed, dtype=dtype)


def check(x, weight, bias=None):
    assert_is_linear(linear_24(x, *pack_24(weight), bias), x, weight, bias)


def check_gradient(grad, weight):
    assert_is_linear(linear_24_backward_input(grad, *pack_24(weight)), grad, weight.t())


# Against float64.


@pytest.mark.parametrize("m", BATCHES)
def test_small_sizes(isa, dtype, m):
    for k in COLUMNS:
        x = numbers(m, k, seed=m, dtype=dtype)
        for n in ROWS:
            weight = random_weight(n, k, density=0.7, seed=k + n, dtype=dtype)
            check(x, weight, numbers(n, seed=2, dtype=dtype) if (k // 4 + n) % 2 else None)
            check_gradient(numbers(m, n, dtype=dtype), weight)


@pytest.mark.parametrize(("k", "n"), [(516, 1100), (2500, 130), (64, 2500), (4100, 31)])
@pytest.mark.parametrize("m", [1, 4, 5, 13, 130])
def test_larger_sizes(isa, dtype, m, k, n):
    weight = random_weight(n, k, dtype=dtype)
    check(numbers(m, k, dtype=dtype), weight, numbers(n, dtype=dtype))
    check_gradient(numbers(m, n, dtype=dtype), weight)


@pytest.mark.parametrize("m", [1023, 1024, 1031, 2065])
def test_many_rows(isa, dtype, m):
    weight = random_weight(90, 72, dtype=dtype)
    check(numbers(m, 72, dtype=dtype), weight, numbers(90, dtype=dtype))
    check_gradient(numbers(m, 90, dtype=dtype), weight)


@pytest.mark.parametrize("m", [1, 20])
def test_a_weight_of_zeros_and_empty_rows(isa, dtype, m):
    weight = random_weight(70, 200, dtype=dtype)
    weight[::3] = 0
    check(numbers(m, 200, dtype=dtype), weight, numbers(70, dtype=dtype))
    check(numbers(m, 200, dtype=dtype), torch.zeros(70, 200, dtype=dtype))


@settings(max_examples=200, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), max_size=2),
    groups=st.integers(0, 40),
    n=st.integers(0, 100),
    dtype=st.sampled_from(DTYPES),
    isa_name=st.sampled_from(ISAS),
    density=st.sampled_from([0.1, 0.5, 1.0]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_random_layers(lead, groups, n, dtype, isa_name, density, has_bias, seed):
    bitmask.set_isa(isa_name)
    try:
        weight = random_weight(n, 4 * groups, density=density, seed=seed, dtype=dtype)
        bias = numbers(n, seed=seed + 1, dtype=dtype) if has_bias else None
        check(numbers(*lead, 4 * groups, seed=seed + 2, dtype=dtype), weight, bias)
    finally:
        bitmask.set_isa(None)


@pytest.mark.parametrize("m", [1, 6])
def test_same_as_reference(dtype, m):
    parts = pack_24(random_weight(40, 92, dtype=dtype))
    x, grad = numbers(m, 92, dtype=dtype), numbers(m, 40, dtype=dtype)
    torch.testing.assert_close(linear_24(x, *parts), reference.linear_24(x, *parts))
    got = linear_24_backward_input(grad, *parts)
    torch.testing.assert_close(got, reference.linear_24_backward_input(grad, *parts))


# Numbers at the edges.


@pytest.mark.parametrize("m", [1, 4, 5, 20, 70, 1100])
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", ["x", "weight"])
def test_infinity_and_nan_spread_as_from_a_dense_weight(isa, dtype, m, special, place):
    """A weight that is not stored still makes NaN of an infinity, also where kernels leave dropped columns out."""
    weight, x = random_weight(40, 100, dtype=dtype), numbers(m, 100, dtype=dtype)
    (x if place == "x" else weight)[-1, 66 if weight[-1, 66] != 0 else weight[-1].nonzero()[-1]] = special
    y, expected = linear_24(x, *pack_24(weight)), F.linear(x.double(), weight.double())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())
    assert expected.isfinite().any() or m == 1
    x[~x.isfinite()] = 0
    weight[~weight.isfinite()] = 0
    finite = expected.isfinite().all(dim=1) & (y == y).all(dim=1)
    assert_is_linear(y[finite], x[finite], weight)


@pytest.mark.parametrize("m", [1, 40])
def test_sums_that_overflow_float16_become_infinite(isa, m):
    weight = torch.full((3, 100), 300.0, dtype=torch.float16)
    prune_24(weight)
    assert linear_24(torch.full((m, 100), 300.0, dtype=torch.float16), *pack_24(weight)).isposinf().all()


@pytest.mark.parametrize("m", [1, 40])
def test_the_largest_numbers_are_finite(isa, dtype, m):
    """They are not taken for infinities, nor do they become any."""
    x = torch.full((m, 68), torch.finfo(dtype).max, dtype=dtype)
    weight = torch.zeros(33, 68, dtype=dtype)
    weight[:, 0] = 0.5
    assert torch.equal(linear_24(x, *pack_24(weight)), x[:, :1].expand(m, 33) / 2)


@pytest.mark.parametrize("m", [1, 40])
def test_subnormals(isa, dtype, m):
    """Of bfloat16 and float32, at most what the smallest normal number would add may be missing."""
    tiny = torch.finfo(dtype).tiny
    weight = torch.full((20, 72), tiny / 4, dtype=dtype)
    prune_24(weight)
    x = torch.full((m, 72), 2.0, dtype=dtype)
    error = (linear_24(x, *pack_24(weight)).double() - F.linear(x.double(), weight.double())).abs()
    assert error.max() <= (72 * tiny if dtype == torch.bfloat16 else 2 * tiny * torch.finfo(dtype).eps)


# Strides, shapes, threads.


@pytest.mark.parametrize("name", VIEWS_OF_ROWS)
def test_views_of_x_and_grad(isa, dtype, name):
    x = VIEWS_OF_ROWS[name](numbers(80, 140, dtype=dtype))
    k = x.shape[-1] // 4 * 4
    check(x[..., :k], random_weight(30, k, dtype=dtype), numbers(60, dtype=dtype)[::2])
    check_gradient(x, random_weight(x.shape[-1], 40, dtype=dtype))


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("offset", [1, 3])
def test_parts_that_are_unaligned_views(isa, dtype, m, offset):
    weight, inside = random_weight(30, 100, dtype=dtype), []
    for part in pack_24(weight):
        buffer = torch.zeros(part.numel() + 8, dtype=part.dtype)
        buffer[offset : offset + part.numel()] = part.reshape(-1)
        inside.append(buffer[offset : offset + part.numel()].view(part.shape))
    x = numbers(m + 1, 101, dtype=dtype).reshape(-1)[1 : 1 + m * 100].reshape(m, 100)
    assert_is_linear(linear_24(x, *inside), x, weight)
    values, metadata = (torch.stack([part, part], dim=-1)[..., 0] for part in inside)
    assert_is_linear(linear_24(x, values, metadata), x, weight)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 700, 600), (5, 700, 600), (200, 700, 600), (1100, 30, 600)], ids=str)
def test_number_of_threads_does_not_change_a_bit(isa, dtype, m, n, k):
    parts, x, grad = pack_24(random_weight(n, k, dtype=dtype)), numbers(m, k, dtype=dtype), numbers(m, n, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append((linear_24(x, *parts), linear_24_backward_input(grad, *parts)))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_bits_equal(got, expected)


# Gradients.


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3,), (2, 4)], ids=str)
@pytest.mark.parametrize("shape", [(6, 20), (0, 8), (5, 0)], ids=str)
def test_gradcheck(lead, shape):
    parts = pack_24(random_weight(*shape, dtype=torch.float64))
    x = numbers(*lead, shape[1], dtype=torch.float64).requires_grad_()
    bias = numbers(shape[0], dtype=torch.float64).requires_grad_()

    def layer(x, bias):
        return linear_24(x, *parts, bias)

    assert torch.autograd.gradcheck(layer, (x, bias))
    assert torch.autograd.gradgradcheck(layer, (x, bias))


@pytest.mark.parametrize("wanted", ["x", "bias", "both"])
def test_gradients_equal_those_of_a_dense_layer(dtype, wanted):
    weight = random_weight(30, 52, dtype=dtype)
    parts, results = pack_24(weight), []
    for packed in (False, True):
        x = numbers(2, 7, 52, dtype=dtype).requires_grad_(wanted != "bias")
        bias = numbers(30, dtype=dtype).requires_grad_(wanted != "x")
        y = linear_24(x, *parts, bias) if packed else F.linear(x, weight, bias)
        (y * numbers(30, seed=5, dtype=dtype)).sum().backward()
        results.append((x.grad, bias.grad))
    for got, expected in zip(*reversed(results), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


def test_no_dense_copy_is_kept_for_the_backward_pass():
    parts, saved = pack_24(random_weight(300, 400)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_24(torch.ones(2, 400, requires_grad=True), *parts)
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in parts)


def test_values_that_require_a_gradient_are_refused():
    values, metadata = pack_24(random_weight(6, 20))
    values.requires_grad_()
    for product, x in ((linear_24, torch.ones(20)), (linear_24_backward_input, torch.ones(6))):
        with pytest.raises(TypeError, match=r"compressed weight is frozen; train the dense one"):
            product(x, values, metadata)
        with torch.no_grad():
            product(x, values, metadata)


def test_metadata_changed_before_backward():
    values, metadata = pack_24(random_weight(6, 20))
    x = torch.ones(20, requires_grad=True)
    y = linear_24(x, values, metadata).sum()
    metadata.numpy()[2, 1] = 0
    with pytest.raises(FormatError, match="metadata: row 2, columns 8 to 11: got 0 bits set"):
        y.backward()


# Compilers, autocast.


@pytest.mark.parametrize("lead", [(), (3,), (0,), (2, 9)], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(lead, gradient):
    parts = pack_24(random_weight(6, 20))
    x, grad = (numbers(*lead, size).requires_grad_(gradient) for size in (20, 6))
    library.opcheck(torch.ops.bitmask.linear_24.default, (x, *parts, numbers(6).requires_grad_(gradient)))
    library.opcheck(torch.ops.bitmask.linear_24.default, (x, *parts))
    library.opcheck(torch.ops.bitmask.linear_24_backward_input.default, (grad, *parts))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph_for_any_number_of_rows(backend):
    parts, bias = pack_24(random_weight(6, 20)), numbers(6)

    def layer(x):
        return linear_24(x, *parts, bias).relu()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 17, 70):
        x, y = (numbers(m, 20).requires_grad_() for _ in range(2))
        got, expected = compiled(x), layer(y)
        assert torch.equal(got, expected)
        got.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, y.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(region, dtype):
    weight, bias = random_weight(30, 52, dtype=dtype), numbers(30)
    x, y = (numbers(4, 52).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=region):
        expected, got = F.linear(x, weight, bias), linear_24(y, *pack_24(weight), bias)
    assert got.dtype == expected.dtype == region
    torch.testing.assert_close(got, expected)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone():
    parts = pack_24(random_weight(6, 20, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_24(torch.ones(2, 20).double(), *parts).dtype == torch.float64
        with pytest.raises(TypeError, match=r"x: got dtype torch.float32, expected torch.float64"):
            linear_24(torch.ones(2, 20), *parts)
        with pytest.raises(ValueError, match=r"x: got size \[2, 19\], expected \[..., 20\]"):
            linear_24(torch.ones(2, 19).half(), *pack_24(random_weight(6, 20)))


# Bad input.


def good(m=2):
    """Arguments that hold, of a weight of three rows of twelve columns."""
    values, metadata = pack_24(random_weight(3, 12))
    return {"x": torch.ones(m, 12), "values": values, "metadata": metadata, "bias": torch.zeros(3)}


def flip(row, octet, bits):
    """A change of bits of the metadata."""

    def change(metadata):
        metadata[row, octet] ^= bits
        return metadata

    return change


BAD = [
    ("x", lambda x: x.tolist(), TypeError, "x: got list, expected a torch.Tensor"),
    ("x", lambda x: None, TypeError, "x: got NoneType, expected a torch.Tensor"),
    ("x", lambda x: x.to_sparse(), TypeError, "x: got a torch.sparse_coo tensor, expected a dense"),
    ("x", lambda x: x.double(), TypeError, "x: got dtype torch.float64, expected torch.float32, the dtype of values"),
    ("x", lambda x: x.to("meta"), ValueError, "x: got device meta, expected cpu, the device of values"),
    ("x", lambda x: x[:, :11], ValueError, r"x: got size \[\d+, 11\], expected \[..., 12\] \(in_features"),
    ("x", lambda x: x[0, 0], ValueError, r"x: got size \[\], expected \[..., 12\]"),
    ("bias", lambda b: b.tolist(), TypeError, "bias: got list, expected a torch.Tensor"),
    ("bias", lambda b: b.half(), TypeError, "bias: got dtype torch.float16, expected torch.float32"),
    ("bias", lambda b: b.to("meta"), ValueError, "bias: got device meta, expected cpu"),
    ("bias", lambda b: b[:2], ValueError, r"bias: got size \[2\], expected \[3\] \(out_features"),
    ("bias", lambda b: b[None], ValueError, r"bias: got size \[1, 3\], expected \[3\]"),
    ("bias", lambda b: b[0], ValueError, r"bias: got size \[\], expected \[3\]"),
    ("values", lambda t: None, TypeError, "values: got NoneType, expected a torch.Tensor"),
    ("values", BitmaskTensor.from_dense, TypeError, "values: got a BitmaskTensor"),
    ("values", lambda t: t.to_sparse(), TypeError, "values: got a torch.sparse_coo tensor"),
    ("values", lambda t: t.int(), TypeError, "values: got dtype torch.int32, expected float32, bfloat16"),
    ("values", lambda t: t.half(), TypeError, "x: got dtype torch.float32, expected torch.float16"),
    (
        "values",
        lambda t: t[None],
        FormatError,
        r"values: got size \[1, 3, 6\], expected \[out_features, in_features / 2",
    ),
    ("values", lambda t: t[0], FormatError, r"values: got size \[6\], expected \[out_features, in_features / 2\]"),
    ("values", lambda t: t[:, :5], FormatError, r"values: got size \[3, 5\], expected \[..., cols / 2\]"),
    ("values", lambda t: t[:2], FormatError, r"metadata: got size \[3, 2\], expected \[2, 2\]"),
    ("values", lambda t: t[:, :4], FormatError, r"metadata: got size \[3, 2\], expected \[3, 1\]"),
    ("metadata", lambda t: t.to(torch.int8), TypeError, "metadata: got dtype torch.int8, expected torch.uint8"),
    ("metadata", BitmaskTensor.from_dense, TypeError, "metadata: got a BitmaskTensor"),
    ("metadata", lambda t: t[:2], FormatError, r"metadata: got size \[2, 2\], expected \[3, 2\]"),
    ("metadata", lambda t: t.reshape(-1), FormatError, r"metadata: got size \[6\], expected \[3, 2\]"),
    ("metadata", lambda t: t * 0, FormatError, "metadata: row 0, columns 0 to 3: got 0 bits set, expected 2"),
    ("metadata", flip(1, 0, 0xF0), None, ""),
    ("metadata", flip(2, 1, 0xF0), FormatError, "metadata: row 2 has padding bits set past column 12"),
    ("metadata", flip(2, 1, 0x10), FormatError, "metadata: row 2 has padding bits set past column 12"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
@pytest.mark.parametrize("m", [1, 8, 100])
def test_bad_input(isa, name, change, error, message, m):
    arguments = good(m)
    arguments[name] = change(arguments[name])
    if error is None:  # the complement of a four is as good
        linear_24(**arguments)
        return
    with pytest.raises(error, match=message) as got:
        linear_24(**arguments)
    assert isinstance(got.value, FormatError) == (error is FormatError)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"), [bad for bad in BAD if bad[0] in ("values", "metadata")]
)
def test_bad_input_of_the_gradient(name, change, error, message):
    arguments = good()
    grad = torch.ones(2, 3)
    del arguments["x"], arguments["bias"]
    arguments[name] = change(arguments[name])
    if error is None:
        linear_24_backward_input(grad, **arguments)
        return
    with pytest.raises(error, match=message.replace("x: got dtype", "grad: got dtype")):
        linear_24_backward_input(grad, **arguments)


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.ones(2, 12), ValueError, r"grad: got size \[2, 12\], expected \[..., 3\] \(out_features"),
        (torch.ones(()), ValueError, r"grad: got size \[\], expected \[..., 3\]"),
        (torch.ones(3).half(), TypeError, "grad: got dtype torch.float16, expected torch.float32"),
        (None, TypeError, "grad: got NoneType, expected a torch.Tensor"),
    ],
)
def test_bad_gradients(grad, error, message):
    with pytest.raises(error, match=message):
        linear_24_backward_input(grad, good()["values"], good()["metadata"])


def test_native_ops_by_themselves_refuse_the_same():
    for name, change, error, _ in BAD:
        arguments = good()
        arguments[name] = change(arguments[name])
        tensors = all(type(argument) is torch.Tensor for argument in arguments.values())
        if error is not None and tensors:
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                torch.ops.bitmask.linear_24(*arguments.values())


@pytest.mark.parametrize("m", [1, 9, 100])
@pytest.mark.parametrize("finite", [True, False])
def test_a_faulty_group_is_found_whatever_the_kernel(isa, dtype, m, finite):
    """Also where the row as a whole has the right number of bits."""
    values, metadata = pack_24(random_weight(300, 1000, dtype=dtype))
    x, grad = torch.ones(m, 1000, dtype=dtype), torch.ones(m, 300, dtype=dtype)
    if not finite:
        x[-1, -1] = math.inf
    metadata[299] = 0
    metadata[150, 7] = 0b11110000 if metadata[150, 7] != 0b11110000 else 0b00001111
    for product in (lambda: linear_24(x, values, metadata), lambda: linear_24_backward_input(grad, values, metadata)):
        with pytest.raises(FormatError, match=r"metadata: row 150, columns 56 to 59: got 0 bits set, expected 2"):
            product()


def fault_of(function, *args):
    """What a call finds wrong, if anything."""
    try:
        function(*args)
    except FormatError as error:
        return str(error)
    return None


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("shape", [(5, 12), (70, 132), (3, 2500)], ids=str)
def test_mutated_metadata_are_refused_or_multiply_as_the_reference_does(isa, m, shape):
    values, metadata = pack_24(random_weight(*shape))
    x, generator, refused = numbers(m, shape[1]), torch.Generator().manual_seed(0), 0
    for _ in range(60):
        mutated = metadata.clone()
        place = int(torch.randint(0, mutated.numel(), (), generator=generator))
        mutated.view(-1)[place] ^= int(torch.randint(1, 256, (), generator=generator))
        fault = fault_of(validate_24, values, mutated)
        assert fault_of(linear_24, x, values, mutated) == fault
        refused += fault is not None
        if fault is None:
            assert_is_linear(linear_24(x, values, mutated), x, unpack_24(values, mutated))
    assert 0 < refused < 60


def test_kernels_are_for_cpus_and_nvidia_gpus():
    with FakeTensorMode():
        x, values = torch.empty(2, 8, device="xpu"), torch.empty(3, 4, device="xpu")
        metadata = torch.empty(3, 1, device="xpu", dtype=torch.uint8)
        calls = [
            lambda: pack_24(x),
            lambda: prune_24(x),
            lambda: unpack_24(values, metadata),
            lambda: validate_24(values, metadata),
            lambda: linear_24(x, values, metadata),
            lambda: linear_24_backward_input(torch.empty(2, 3, device="xpu"), values, metadata),
        ]
        for call in calls:
            with pytest.raises(
                NotImplementedError, match="got device xpu:0, expected cpu or cuda: bitmask has no 2:4 kernels"
            ):
                call()


FORK = """
import torch
from bitmask.ops_two_four import linear_24, linear_24_backward_input, pack_24

torch.set_num_threads(2)
parts = pack_24(torch.ones(900, 480), prune=True)
x, grad = torch.ones(100, 480), torch.ones(100, 900)

def works():
    # NumPy compares without torch's own threads, which do not survive a fork.
    y = [linear_24(x[:m], *parts).numpy() for m in (1, 100)]
    grad_x = linear_24_backward_input(grad, *parts).numpy().reshape(-1, 4)
    return all((t == 240).all() for t in y) and (grad_x == [900, 900, 0, 0]).all()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("use_before", [True, False])
def test_products_work_in_a_forked_child(use_before):
    assert_works_after_fork(FORK, use_before)
