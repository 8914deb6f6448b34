"""Linear layers from compressed weights: the op, F.linear on a BitmaskTensor, and BitmaskLinear."""

import contextlib
import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ISAS,
    VIEWS_OF_ROWS,
    assert_bits_equal,
    assert_exports,
    assert_is_linear,
    assert_works_after_fork,
    mutations,
    parts_are_valid,
    random_numbers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bitmask
from bitmask import (
    BitmaskLinear,
    BitmaskTensor,
    DecompressWarning,
    FormatError,
    SemiStructuredTensor,
    ops,
    reference,
)

pytestmark = pytest.mark.filterwarnings("error::bitmask.DecompressWarning")

DTYPES = sorted(ops.LINEAR_DTYPES, key=str)
BATCHES = [0, 1, 2, 3, 4, 5, 8, 9, 11, 12, 13, 25, 130, 505, 600]
SMALL = [0, 1, 7, 63, 64, 65, 130]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def check(x, dense, bias=None):
    assert_is_linear(ops.linear(x, *ops.compress(dense), dense.shape[1], bias), x, dense, bias)


# The op against float64.


@pytest.mark.parametrize("m", BATCHES)
def test_small_sizes(isa, dtype, m):
    for k in SMALL:
        x = random_numbers(m, k, density=0.9, seed=m, dtype=dtype)
        for n in SMALL:
            bias = random_numbers(n, density=1.0, seed=2, dtype=dtype) if (k + n) % 2 else None
            check(x, random_numbers(n, k, seed=k + n, dtype=dtype), bias)


@pytest.mark.parametrize(("k", "n"), [(513, 1100), (2500, 130), (1100, 65), (64, 2500)])
@pytest.mark.parametrize("m", [1, 3, 4, 5, 13, 130])
def test_larger_sizes(isa, dtype, m, k, n):
    bias = random_numbers(n, density=1.0, seed=2, dtype=dtype)
    for density in (0.1, 0.5):
        check(random_numbers(m, k, density=1.0, dtype=dtype), random_numbers(n, k, density=density, dtype=dtype), bias)


@pytest.mark.parametrize("m", [1031, 1032, 1033, 2065])
def test_blocks_of_many_rows(isa, dtype, m):
    check(random_numbers(m, 70, density=1.0, dtype=dtype), random_numbers(90, 70, dtype=dtype))


@pytest.mark.parametrize("m", [1, 4, 5, 20])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.99, 1.0])
def test_densities_and_empty_rows(isa, dtype, m, density):
    dense = random_numbers(70, 200, density=density, dtype=dtype)
    dense[::3] = 0
    check(random_numbers(m, 200, density=1.0, dtype=dtype), dense, random_numbers(70, seed=4, dtype=dtype))


@settings(max_examples=200, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=2),
    k=st.integers(0, 150),
    n=st.integers(0, 100),
    dtype=st.sampled_from(DTYPES),
    isa_name=st.sampled_from(ISAS),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_random_layers(lead, k, n, dtype, isa_name, density, has_bias, seed):
    bitmask.set_isa(isa_name)
    try:
        dense = random_numbers(n, k, density=density, seed=seed, dtype=dtype)
        bias = random_numbers(n, seed=seed + 1, dtype=dtype) if has_bias else None
        check(random_numbers(*lead, k, density=1.0, seed=seed + 2, dtype=dtype), dense, bias)
    finally:
        bitmask.set_isa(None)


@pytest.mark.parametrize("m", [1, 6])
def test_same_as_reference(dtype, m):
    dense, x = random_numbers(40, 90, dtype=dtype), random_numbers(m, 90, density=1.0, dtype=dtype)
    parts = ops.compress(dense)
    torch.testing.assert_close(ops.linear(x, *parts, 90), reference.linear(x, *parts, 90))


# Numbers at the edges.


@pytest.mark.parametrize("m", [1, 4, 5, 20])
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["x", "weight"])
def test_infinity_and_nan_spread_as_from_a_dense_weight(isa, dtype, m, special, place):
    """A zero that is not stored still makes NaN of an infinity."""
    dense, x = random_numbers(40, 100, dtype=dtype), random_numbers(m, 100, density=1.0, dtype=dtype)
    (x if place == "x" else dense)[0, 70] = special
    y, expected = ops.linear(x, *ops.compress(dense), 100), F.linear(x.double(), dense.double())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())
    assert expected.isfinite().any() or m == 1


@pytest.mark.parametrize("m", [1, 6])
def test_sums_that_overflow_float16_become_infinite(isa, m):
    dense = torch.full((3, 100), 300.0, dtype=torch.float16)
    assert ops.linear(torch.full((m, 100), 300.0, dtype=torch.float16), *ops.compress(dense), 100).isposinf().all()


@pytest.mark.parametrize("m", [1, 6])
def test_negative_zeros(isa, dtype, m):
    dense = torch.where(random_numbers(20, 70, seed=3) == 0, -0.0, random_numbers(20, 70)).to(dtype)
    x = random_numbers(m, 70, density=1.0, dtype=dtype)
    for keep in (False, True):
        assert_is_linear(ops.linear(x, *ops.compress(dense, keep), 70), x, dense)


@pytest.mark.parametrize("m", [1, 6])
def test_subnormals(isa, dtype, m):
    """Of bfloat16 and float32, at most what the smallest normal number would add may be missing."""
    tiny = torch.finfo(dtype).tiny
    dense = torch.where(random_numbers(20, 70) == 0, 0.0, torch.tensor(tiny / 4, dtype=torch.float64)).to(dtype)
    x = torch.full((m, 70), 2.0, dtype=dtype)
    y = ops.linear(x, *ops.compress(dense), 70)
    error = (y.double() - F.linear(x.double(), dense.double())).abs()
    assert error.max() <= (70 * tiny if dtype == torch.bfloat16 else 2 * tiny * torch.finfo(dtype).eps)


# Strides and shapes of x.


@pytest.mark.parametrize("m", [1, 40])
def test_float16_subnormals_are_kept_when_the_cpu_flushes_them(isa, flush_denormals, m):
    subnormal = torch.tensor([1], dtype=torch.int16).view(torch.float16)
    dense = torch.eye(4, dtype=torch.float16)
    dense[1:3, 2:] = 0
    bias = subnormal.expand(4).clone()
    x = torch.zeros(m, 4, dtype=torch.float16)
    for weight in (BitmaskTensor.from_dense(dense), SemiStructuredTensor.from_dense(dense)):
        assert_bits_equal(F.linear(x, weight, bias), bias.expand(m, 4).contiguous())


@pytest.mark.parametrize("name", VIEWS_OF_ROWS)
def test_views_of_x(isa, dtype, name):
    x = VIEWS_OF_ROWS[name](random_numbers(80, 140, density=1.0, dtype=dtype))
    bias = random_numbers(60, density=1.0, dtype=dtype)[::2]
    check(x[..., :70], random_numbers(30, x.shape[-1], seed=1, dtype=dtype)[:, :70], bias)


@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize("offset", [1, 3])
def test_parts_that_are_unaligned_views(isa, dtype, m, offset):
    dense, inside = random_numbers(30, 100, dtype=dtype), []
    for part in ops.compress(dense):
        buffer = torch.zeros(part.numel() + 8, dtype=part.dtype)
        buffer[offset : offset + part.numel()] = part.reshape(-1)
        inside.append(buffer[offset : offset + part.numel()].view(part.shape))
    x = random_numbers(m + 1, 101, density=1.0, dtype=dtype).reshape(-1)[1 : 1 + m * 100].reshape(m, 100)
    assert_is_linear(ops.linear(x, *inside, 100), x, dense)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("m", [1, 4, 5, 200])
def test_number_of_threads_does_not_change_a_bit(isa, dtype, m):
    dense, x = random_numbers(700, 600, dtype=dtype), random_numbers(m, 600, density=1.0, dtype=dtype)
    parts, results = ops.compress(dense), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.linear(x, *parts, 600))
    assert_bits_equal(results[1], results[0])
    assert_bits_equal(results[2], results[0])


# Bad input.


def good():
    """Arguments that hold, of a weight 1 0 2 0 0 0 0 0 3 / all zero / 4 5 0 0 0 0 0 0 0."""
    return {
        "x": torch.ones(2, 9),
        "values": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        "bitmasks": torch.tensor([[5, 1], [0, 0], [3, 0]], dtype=torch.uint8),
        "row_offsets": torch.tensor([0, 3, 3]),
        "in_features": 9,
        "bias": torch.zeros(3),
    }


BAD = [
    ("x", lambda x: x.tolist(), TypeError, "x: got list, expected a torch.Tensor"),
    ("x", lambda x: None, TypeError, "x: got NoneType, expected a torch.Tensor"),
    ("x", lambda x: x.to_sparse(), TypeError, "x: got a torch.sparse_coo tensor, expected a dense"),
    ("x", lambda x: x.double(), TypeError, "x: got dtype torch.float64, expected torch.float32"),
    ("x", lambda x: x.bfloat16(), TypeError, "x: got dtype torch.bfloat16, expected torch.float32"),
    ("x", lambda x: x.to("meta"), ValueError, "x: got device meta, expected cpu"),
    ("x", lambda x: x[:, :8], ValueError, r"x: got size \[\d, 8\], expected \[..., 9\]"),
    ("x", lambda x: x.t(), ValueError, r"x: got size \[9, \d\], expected \[..., 9\]"),
    ("x", lambda x: x[0, 0], ValueError, r"x: got size \[\], expected \[..., 9\]"),
    ("bias", lambda b: b.tolist(), TypeError, "bias: got list, expected a torch.Tensor"),
    ("bias", lambda b: b.half(), TypeError, "bias: got dtype torch.float16, expected torch.float32"),
    ("bias", lambda b: b.to("meta"), ValueError, "bias: got device meta, expected cpu"),
    ("bias", lambda b: b[:2], ValueError, r"bias: got size \[2\], expected \[3\]"),
    ("bias", lambda b: b[None], ValueError, r"bias: got size \[1, 3\], expected \[3\]"),
    ("bias", lambda b: b[0], ValueError, r"bias: got size \[\], expected \[3\]"),
    ("in_features", lambda k: 10, ValueError, r"x: got size \[\d, 9\], expected \[..., 10\]"),
    ("in_features", lambda k: 17, FormatError, r"bitmasks: got size \[3, 2\], expected \[3, 3\]"),
    ("in_features", lambda k: -1, FormatError, "bitmasks: got size"),
    ("in_features", lambda k: 2**70, FormatError, "expected sizes below 2"),
    ("in_features", lambda k: 9.0, TypeError, "expected a sequence of integers"),
    ("in_features", lambda k: None, TypeError, "expected a sequence of integers"),
    ("values", lambda t: None, TypeError, "values: got NoneType, expected a torch.Tensor"),
    ("values", BitmaskTensor.from_dense, TypeError, "values: got a BitmaskTensor"),
    ("values", lambda t: t.to_sparse(), TypeError, "values: got a torch.sparse_coo tensor"),
    ("values", lambda t: t.int(), TypeError, "values: got dtype torch.int32, expected float32, bfloat16"),
    ("values", lambda t: t.half(), TypeError, "x: got dtype torch.float32, expected torch.float16"),
    ("values", lambda t: t[None], FormatError, "values: got 2 dimensions, expected 1"),
    ("values", lambda t: t[:4], FormatError, "values: got 4 elements, expected 5"),
    ("values", lambda t: t[:2], FormatError, r"row_offsets\[1\]: got 3, expected 0 to 2"),
    ("values", lambda t: t[:0], FormatError, r"row_offsets\[1\]: got 3, expected 0 to 0"),
    ("values", lambda t: torch.cat([t, t]), FormatError, "values: got 10 elements, expected 5"),
    ("values", lambda t: t.to("meta"), ValueError, "bitmasks: got device cpu, expected meta"),
    ("bitmasks", lambda t: t.to(torch.int8), TypeError, "bitmasks: got dtype torch.int8, expected torch.uint8"),
    ("bitmasks", BitmaskTensor.from_dense, TypeError, "bitmasks: got a BitmaskTensor"),
    ("bitmasks", lambda t: t[:2], FormatError, r"bitmasks: got size \[2, 2\], expected \[3, 2\]"),
    ("bitmasks", lambda t: t.reshape(-1), FormatError, r"bitmasks: got size \[6\], expected \[3, 2\]"),
    ("bitmasks", lambda t: t ^ 1, FormatError, r"row_offsets\[1\]: got 3, expected 1"),
    ("bitmasks", lambda t: t | torch.tensor([[0, 0], [0, 0], [0, 2]]).byte(), FormatError, "padding bits set"),
    ("row_offsets", lambda t: t.int(), TypeError, "row_offsets: got dtype torch.int32, expected torch.int64"),
    ("row_offsets", lambda t: t[:2], FormatError, r"bitmasks: got size \[3, 2\], expected \[2, 2\]"),
    ("row_offsets", lambda t: t[None], FormatError, r"row_offsets: got size \[1, 3\], expected \[3\]"),
    ("row_offsets", lambda t: t + 1, FormatError, r"row_offsets\[0\]: got 1, expected 0"),
    ("row_offsets", lambda t: t - 1, FormatError, r"row_offsets\[0\]: got -1, expected 0"),
    ("row_offsets", lambda t: torch.tensor([0, 3, 2]), FormatError, r"row_offsets\[2\]: got 2, expected no less"),
    ("row_offsets", lambda t: torch.tensor([0, 2**62, 3]), FormatError, r"row_offsets\[1\]: got 4611"),
    ("row_offsets", lambda t: torch.tensor([0, -(2**63), 3]), FormatError, r"row_offsets\[1\]: got -9223"),
    ("row_offsets", lambda t: torch.tensor([0, 3, 2**63 - 1]), FormatError, r"row_offsets\[2\]: got 9223"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD, ids=[f"{b[0]}-{b[3][:40]}" for b in BAD])
@pytest.mark.parametrize("m", [1, 8])
def test_bad_input(name, change, error, message, m):
    arguments = {**good(), "x": torch.ones(m, 9)}
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message) as got:
        ops.linear(**arguments)
    assert isinstance(got.value, FormatError) == (error is FormatError)


def test_values_that_require_a_gradient_are_refused():
    arguments = good()
    arguments["values"].requires_grad_()
    with pytest.raises(TypeError, match=r"compressed weight is frozen; train the dense one"):
        ops.linear(**arguments)
    with torch.no_grad():
        ops.linear(**arguments)


@pytest.mark.parametrize("m", [1, 4, 5, 30])
@pytest.mark.parametrize(("shape", "count"), [((5, 13), 400), ((70, 130), 100), ((3, 2500), 30)], ids=str)
def test_mutated_parts_are_refused_or_multiply_as_the_reference_does(isa, m, shape, count):
    parts = ops.compress(random_numbers(*shape))
    refused = 0
    for *bad_parts, (_, columns) in mutations(parts, shape, count):
        x = torch.ones(m, columns)
        if parts_are_valid(*bad_parts, [len(bad_parts[2]), columns]):
            got, expected = ops.linear(x, *bad_parts, columns), reference.linear(x, *bad_parts, columns)
            torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
        else:
            refused += 1
            with pytest.raises(FormatError):
                ops.linear(x, *bad_parts, columns)
    assert 0 < refused < count


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("start", [-(2**63), -1, 2**62, 2**63 - 1])
def test_hostile_offsets_where_rows_are_split_over_threads(isa, threads, m, start):
    torch.set_num_threads(4)
    values, bitmasks, row_offsets = ops.compress(random_numbers(300, 1000, density=0.5))
    assert values.nbytes > 2**18, "several tasks"
    row_offsets[150] = start
    with pytest.raises(FormatError, match=r"row_offsets\[150\]"):
        ops.linear(torch.ones(m, 1000), values, bitmasks, row_offsets, 1000)


# Gradients.


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3,), (2, 4)], ids=str)
@pytest.mark.parametrize("shape", [(6, 20), (0, 5), (5, 0)], ids=str)
def test_gradcheck(lead, shape):
    parts = ops.compress(random_numbers(*shape, dtype=torch.float64))
    x = random_numbers(*lead, shape[1], density=1.0, dtype=torch.float64).requires_grad_()
    bias = random_numbers(shape[0], dtype=torch.float64).requires_grad_()

    def layer(x, bias):
        return ops.linear(x, *parts, shape[1], bias)

    assert torch.autograd.gradcheck(layer, (x, bias))
    assert torch.autograd.gradgradcheck(layer, (x, bias))


@pytest.mark.parametrize("wanted", ["x", "bias", "both"])
def test_gradients_equal_those_of_a_dense_layer(dtype, wanted):
    dense = random_numbers(30, 50, dtype=dtype)
    results = []
    for compressed in (False, True):
        x = random_numbers(2, 7, 50, density=1.0, dtype=dtype).requires_grad_(wanted != "bias")
        bias = random_numbers(30, density=1.0, dtype=dtype).requires_grad_(wanted != "x")
        y = F.linear(x, BitmaskTensor.from_dense(dense) if compressed else dense, bias)
        (y * random_numbers(30, density=1.0, seed=5, dtype=dtype)).sum().backward()
        results.append((x.grad, bias.grad))
    for got, expected in zip(*reversed(results), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


def test_no_dense_copy_is_kept_for_the_backward_pass():
    dense = random_numbers(300, 400)
    parts, saved = ops.compress(dense), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear(torch.ones(2, 400, requires_grad=True), *parts, 400)
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in parts)


# What opcheck asks of an op, torch.compile, torch.export, autocast.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (0,), (2, 9)], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(dtype, lead, gradient):
    parts = ops.compress(random_numbers(6, 20, dtype=dtype))
    x = random_numbers(*lead, 20, density=1.0, dtype=dtype).requires_grad_(gradient)
    bias = random_numbers(6, dtype=dtype).requires_grad_(gradient)
    library.opcheck(torch.ops.bitmask.linear.default, (x, *parts, 20, bias))
    library.opcheck(torch.ops.bitmask.linear.default, (x, *parts, 20))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def dense_layer():
    layer = nn.Linear(20, 6)
    layer.weight.data = random_numbers(6, 20)
    return layer


@pytest.fixture
def layer(dense_layer):
    return BitmaskLinear.from_dense(dense_layer)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_op(backend):
    parts = ops.compress(random_numbers(6, 20))
    compiled = torch.compile(lambda x: ops.linear(x, *parts, 20).relu(), fullgraph=True, backend=backend)
    x = random_numbers(3, 20, density=1.0)
    assert torch.equal(compiled(x), ops.linear(x, *parts, 20).relu())


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m, nn.ReLU())], ids=["layer", "sequence"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_compiled_layer(layer, wrap, mode):
    model, counter = wrap(layer), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with mode():
        for m in (2, 3, 17, 5):
            x = random_numbers(m, 20, density=1.0)
            assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_gradients(layer, dense_layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random_numbers(3, 20, density=1.0).requires_grad_()
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, dense_layer.weight.detach().sum(0).expand(3, 20))
    assert layer.bias.grad.tolist() == [3.0] * 6


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_fallback_of_a_dtype_without_kernel():
    weight, x = BitmaskTensor.from_dense(random_numbers(6, 20).to(torch.int32)), torch.ones(2, 20, dtype=torch.int32)
    compiled = torch.compile(lambda x: F.linear(x, weight), fullgraph=True, backend="aot_eager")
    with pytest.warns(DecompressWarning):
        got = compiled(x)
    assert torch.equal(got, F.linear(x, weight.to_dense()))


class OpModule(nn.Module):
    def __init__(self, dense):
        super().__init__()
        self.values, self.bitmasks, self.row_offsets = (nn.Buffer(part) for part in ops.compress(dense))

    def forward(self, x):
        return ops.linear(x, self.values, self.bitmasks, self.row_offsets, 20)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["op", "layer", "sequence"])
def test_export(layer, strict, kind):
    model = {"op": OpModule(random_numbers(6, 20)), "layer": layer, "sequence": nn.Sequential(layer, nn.ReLU())}[kind]
    assert_exports(model, torch.ops.bitmask.linear.default, random_numbers(8, 20, density=1.0), strict)


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast(region, dtype):
    dense, bias = random_numbers(30, 50, dtype=dtype), random_numbers(30, density=1.0)
    weight = BitmaskTensor.from_dense(dense)
    x, y = (random_numbers(4, 50, density=1.0).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=region):
        expected, got = F.linear(x, dense, bias), F.linear(y, weight, bias)
        assert ops.linear(x, *ops.compress(dense), 50).dtype == region
    assert got.dtype == expected.dtype == region
    torch.testing.assert_close(got, expected)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            F.linear(torch.ones(2, 20).double(), BitmaskTensor.from_dense(torch.eye(20).double())).dtype
            == torch.float64
        )
        with pytest.raises(TypeError, match="x: got dtype"):
            F.linear(torch.ones(2, 20), BitmaskTensor.from_dense(torch.eye(20).double()))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_autocast(layer):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    assert run(torch.ones(2, 20)).dtype == torch.bfloat16


# F.linear on a BitmaskTensor.


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(20,), (1, 20), (9, 20), (0, 20), (2, 3, 20)], ids=str)
def test_functional_linear(dtype, mode, shape):
    dense, bias = random_numbers(6, 20, dtype=dtype), random_numbers(6, dtype=dtype)
    x = random_numbers(*shape, density=1.0, dtype=dtype)
    with mode():
        weight = BitmaskTensor.from_dense(dense)
        for call in (
            F.linear(x, weight, bias),
            F.linear(input=x, weight=weight, bias=bias),
            F.linear(x, nn.Parameter(weight, requires_grad=False), bias=bias),
        ):
            torch.testing.assert_close(call, F.linear(x, dense, bias))
        torch.testing.assert_close(F.linear(x, weight), F.linear(x, dense))


def test_aten_linear_in_inference_mode():
    dense, x = random_numbers(6, 20), random_numbers(3, 20, density=1.0)
    with torch.inference_mode():
        got = torch.ops.aten.linear(x, BitmaskTensor.from_dense(dense))
    torch.testing.assert_close(got, F.linear(x, dense))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.linear(x, w[0]),
        lambda x, w: F.linear(x[0], w[0]),
        lambda x, w: F.linear(x.to(torch.int32), w.to(torch.int32)),
        lambda x, w: F.linear(w, w),
        lambda x, w: F.linear(w, torch.ones(4, 20)),
        lambda x, w: F.linear(x, torch.ones(3, 20), w[0, :3]),
    ],
    ids=["1-D weight", "1-D weight and x", "integers", "both compressed", "x compressed", "bias compressed"],
)
@pytest.mark.filterwarnings("default::bitmask.DecompressWarning")
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_functional_linear_without_a_kernel_runs_on_a_dense_copy(call, mode):
    dense, x = random_numbers(6, 20), random_numbers(3, 20, density=1.0)
    with mode(), pytest.warns(DecompressWarning):
        got = call(x, BitmaskTensor.from_dense(dense))
    torch.testing.assert_close(got, call(x, dense))


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (torch.ones(2, 20).double(), None, TypeError, "x: got dtype torch.float64, expected torch.float32"),
        (torch.ones(2, 19), None, ValueError, r"x: got size \[2, 19\], expected \[..., 20\]"),
        (torch.ones(()), None, ValueError, r"x: got size \[\], expected \[..., 20\]"),
        (torch.ones(2, 20), torch.ones(7), ValueError, r"bias: got size \[7\], expected \[6\]"),
        (torch.ones(2, 20), torch.ones(6).half(), TypeError, "bias: got dtype torch.float16, expected"),
        ([1.0], None, TypeError, "must be Tensor, not list"),
    ],
)
def test_mistakes_that_a_dense_weight_refuses_too(x, bias, error, message):
    weight = BitmaskTensor.from_dense(random_numbers(6, 20))
    with pytest.raises(error, match=message):
        F.linear(x, weight, bias)
    with pytest.raises((RuntimeError, TypeError)):
        F.linear(x, weight.to_dense(), bias)


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.values.resize_(3),
        lambda t: t.bitmasks.bitwise_xor_(1),
        lambda t: t.row_offsets.add_(1),
        lambda t: t.row_offsets.resize_(3),
        lambda t: setattr(t, "values", t.values.double()),
        lambda t: [setattr(t, name, getattr(t, name)[:3]) for name in ("bitmasks", "row_offsets")],
    ],
    ids=["values", "bitmasks", "offsets", "fewer offsets", "dtype", "fewer rows"],
)
def test_parts_changed_behind_the_tensor_are_noticed(m, change):
    weight = BitmaskTensor.from_dense(random_numbers(6, 20))
    change(weight)
    with pytest.raises(FormatError):
        F.linear(torch.ones(m, 20), weight)


def test_forward_mode_derivatives_and_transforms_run_on_a_dense_copy():
    dense, x = random_numbers(6, 20), random_numbers(3, 20, density=1.0)
    weight, tangent = BitmaskTensor.from_dense(dense), torch.ones_like(x)
    with pytest.warns(DecompressWarning):
        _, derivative = torch.func.jvp(lambda x: F.linear(x, weight), (x,), (tangent,))
    torch.testing.assert_close(derivative, F.linear(tangent, dense))
    with pytest.warns(DecompressWarning):
        gradient = torch.func.grad(lambda x: F.linear(x, weight).sum())(x)
    torch.testing.assert_close(gradient, torch.ones(3, 6) @ dense)
    with torch.autograd.forward_ad.dual_level():
        dual_x = torch.autograd.forward_ad.make_dual(x, tangent)
        with pytest.warns(DecompressWarning):
            dual = F.linear(dual_x, weight)
        derivative = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(derivative, F.linear(tangent, dense))


def test_a_mistake_does_not_keep_its_tensors_alive():
    x = torch.ones(2, 19)
    gone = weakref.ref(x)
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            F.linear(x, BitmaskTensor.from_dense(random_numbers(6, 20)))
        del x
        assert gone() is None
    finally:
        gc.enable()


def test_other_subclasses_of_tensor_still_meet_a_compressed_one():
    class Other(torch.Tensor):
        pass

    dense = random_numbers(6, 20)
    weight, x = BitmaskTensor.from_dense(dense), random_numbers(3, 20, density=1.0)
    torch.testing.assert_close(torch.Tensor(F.linear(x.as_subclass(Other), weight)), F.linear(x, dense))


# BitmaskLinear.


def test_it_is_a_linear_layer_with_a_compressed_frozen_weight(layer, dense_layer):
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.weight, BitmaskTensor)
    assert isinstance(layer.weight, nn.Parameter)
    assert [(name, p.requires_grad) for name, p in layer.named_parameters()] == [("weight", False), ("bias", True)]
    assert repr(layer) == (
        f"BitmaskLinear(in_features=20, out_features=6, bias=True, sparsity={layer.weight.sparsity:.4f}, "
        "dtype=torch.float32)"
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20, 6), (6, 1), (1, 6)], ids=str)
def test_same_initialisation_as_a_dense_layer(bias, shape):
    torch.manual_seed(0)
    dense = nn.Linear(*shape, bias=bias)
    torch.manual_seed(0)
    layer = BitmaskLinear(*shape, bias=bias)
    assert torch.equal(layer.weight.to_dense(), dense.weight)
    assert layer.weight.sparsity == 0
    assert (layer.bias is None) if not bias else torch.equal(layer.bias, dense.bias)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert torch.equal(layer.weight.to_dense(), dense.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_from_dense_and_back(dtype, bias, training):
    dense = nn.Linear(20, 6, bias=bias, dtype=dtype).train(training)
    dense.weight.data = random_numbers(6, 20, dtype=dtype)
    layer = BitmaskLinear.from_dense(dense)
    back = layer.to_dense()
    assert type(back) is nn.Linear
    assert (layer.training, back.training) == (training, training)
    assert list(back.state_dict()) == list(layer.state_dict()) == list(dense.state_dict())
    assert_bits_equal(back.weight, dense.weight)
    assert back.weight.requires_grad
    if bias:
        assert_bits_equal(back.bias, dense.bias)
        assert len({module.bias.data_ptr() for module in (dense, layer, back)}) == 3
    x = random_numbers(3, 20, density=1.0, dtype=dtype)
    torch.testing.assert_close(layer(x), dense(x))


def test_from_dense_keeps_negative_zeros_if_asked(dense_layer):
    dense_layer.weight.data[0, 0] = -0.0
    kept, dropped = (BitmaskLinear.from_dense(dense_layer, keep_negative_zero=keep) for keep in (True, False))
    assert kept.weight.nnz == dropped.weight.nnz + 1


@pytest.mark.parametrize("wrong", [None, nn.Conv1d(2, 2, 1), torch.ones(2, 2)])
def test_from_dense_refuses_other_things(wrong):
    with pytest.raises(TypeError, match=r"linear: got \w+, expected an nn.Linear"):
        BitmaskLinear.from_dense(wrong)


def test_from_dense_refuses_a_compressed_layer(layer):
    with pytest.raises(TypeError, match="got a BitmaskLinear whose weight is compressed, expected a dense one"):
        BitmaskLinear.from_dense(layer)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", ["dense", "compressed"])
@pytest.mark.parametrize("nested", [False, True])
def test_load_state_dict(layer, dense_layer, source, assign, nested):
    target = BitmaskLinear(20, 6)
    state = (layer if source == "compressed" else dense_layer).state_dict()
    if nested:
        target_model, state = nn.Sequential(target), {f"0.{key}": value for key, value in state.items()}
    else:
        target_model = target
    given = dict(state)
    result = target_model.load_state_dict(state, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(state[key] is given[key] for key in given)
    assert isinstance(target.weight, BitmaskTensor)
    assert isinstance(target.weight, nn.Parameter)
    assert not target.weight.requires_grad
    assert target.weight.nnz == layer.weight.nnz
    assert torch.equal(target.weight.to_dense(), dense_layer.weight)


def test_load_state_dict_of_another_shape(layer):
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.load_state_dict(nn.Linear(20, 7).state_dict(), assign=assign)


def test_a_dense_layer_loads_from_a_compressed_one(layer, dense_layer):
    target = nn.Linear(20, 6)
    target.load_state_dict(layer.state_dict())
    assert torch.equal(target.weight, dense_layer.weight)


@pytest.mark.parametrize("source", ["dense", "compressed"])
def test_meta_layer_is_filled_by_assigning(layer, dense_layer, source):
    target = BitmaskLinear(20, 6, device="meta")
    assert (target.weight.device.type, target.weight.nnz, target.weight.shape) == ("meta", 120, (6, 20))
    target.load_state_dict((layer if source == "compressed" else dense_layer).state_dict(), assign=True)
    torch.testing.assert_close(target(torch.ones(20)), dense_layer(torch.ones(20)))


@pytest.mark.parametrize("compressed", [False, True])
def test_meta_layer_is_filled_by_copying(layer, dense_layer, compressed):
    filled = BitmaskLinear(layer.in_features, layer.out_features, device="meta").to_empty(device="cpu")
    filled.load_state_dict((layer if compressed else dense_layer).state_dict())
    assert isinstance(filled.weight, BitmaskTensor)
    assert torch.equal(filled.weight.to_dense(), dense_layer.weight)


def test_meta_layer_is_filled_by_resetting():
    with torch.device("meta"):
        layer = BitmaskLinear(20, 6)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.ones(3, 20)).isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        copy.deepcopy,
        lambda module: torch.load(saved(module), weights_only=False),
        lambda module: nn.Sequential(copy.deepcopy(nn.Sequential(module))[0])[0],
    ],
)
def test_copies(layer, make):
    copied = make(layer)
    assert type(copied) is BitmaskLinear
    assert isinstance(copied.weight, nn.Parameter)
    assert copied.weight.values.data_ptr() != layer.weight.values.data_ptr()
    assert torch.equal(copied(torch.ones(3, 20)), layer(torch.ones(3, 20)))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.half)])
def test_conversion(layer, dense_layer, convert):
    layer, dense = convert(layer), convert(dense_layer)
    x = random_numbers(3, 20, density=1.0, dtype=dense.weight.dtype)
    assert isinstance(layer.weight, BitmaskTensor)
    torch.testing.assert_close(layer(x), dense(x))


def test_training_mode_and_gradients_of_the_bias(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before, bias = layer.weight.to_dense(), layer.bias.detach().clone()
    layer.train()(torch.ones(2, 20)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight.to_dense(), before)
    torch.testing.assert_close(layer.bias, bias - 0.2)
    with pytest.raises(TypeError, match="frozen and takes no gradient"):
        layer.requires_grad_(True)


# Threads and forks.


@pytest.mark.parametrize("m", [1, 16])
def test_threads_share_a_layer(m):
    dense = nn.Linear(600, 500)
    dense.weight.data = random_numbers(500, 600)
    layer = BitmaskLinear.from_dense(dense).requires_grad_(False)
    inputs = [random_numbers(m, 600, density=1.0, seed=seed) for seed in range(8)]
    expected = [layer(x) for x in inputs]

    def work(index):
        return all(torch.equal(layer(inputs[index]), expected[index]) for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


FORK = """
import bitmask
import torch

torch.set_num_threads(2)
layer = bitmask.BitmaskLinear(700, 900)
weight = layer.weight.to_dense()
x = torch.ones({m}, 700)

def works():
    # NumPy compares without torch's own threads, which do not survive a fork.
    with torch.no_grad():
        return abs(layer(x).numpy() - weight.numpy().sum(1) - layer.bias.detach().numpy()).max() < 1e-4
"""


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("use_before", [True, False])
def test_layers_work_in_a_forked_child(m, use_before):
    assert_works_after_fork(FORK.format(m=m), use_before)
