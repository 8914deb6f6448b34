"""Products with a block-sparse weight: the ops, their gradients, and the index that they prove."""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from block_weights import (
    Blocks,
    assert_is_product,
    check,
    operands,
    products,
    random_blocks,
)
from conftest import VIEWS_OF_ROWS, assert_bits_equal, assert_works_after_fork, random_numbers, run_python
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitmask import FormatError, calls, ops_block, reference
from bitmask.ops_block import bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values, bsr_transpose

native = torch.ops.bitmask

DTYPES = sorted(calls.LINEAR_DTYPES, key=str)
BLOCK_SHAPES = [(1, 1), (4, 4), (1, 16), (16, 1), (8, 24), (20, 12), (16, 16), (32, 32), (64, 64), (128, 128)]
BATCHES = [0, 1, 2, 7, 8, 9, 16, 17, 33]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


# Numbers: against float64.


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_sizes_that_blocks_do_not_divide(isa, dtype, block_shape):
    block_rows, block_cols = block_shape
    blocks = random_blocks(3 * block_rows - block_rows // 2, 4 * block_cols - block_cols // 3, block_shape, dtype=dtype)
    for m in BATCHES:
        x, grad, bias = operands(blocks, m)
        check(blocks, x, grad, bias if m % 2 else None)


@pytest.mark.parametrize("block_shape", [(16, 16), (32, 64), (20, 12)], ids=str)
def test_sizes_that_blocks_divide(isa, dtype, block_shape):
    blocks = random_blocks(6 * block_shape[0], 5 * block_shape[1], block_shape, dtype=dtype)
    for m in (1, 5, 16, 130):
        check(blocks, *operands(blocks, m))


@pytest.mark.parametrize(("m", "block_shape"), [(1023, (16, 16)), (1100, (20, 12)), (4100, (16, 16))], ids=str)
def test_many_rows(isa, dtype, m, block_shape):
    blocks = random_blocks(70, 50, block_shape, dtype=dtype)
    check(blocks, *operands(blocks, m))


@pytest.mark.parametrize(("n", "k"), [(500, 600), (1, 2500), (2500, 1), (50, 1500)], ids=str)
def test_larger_weights(isa, dtype, n, k):
    for m, block_shape in ((1, (16, 16)), (9, (64, 32)), (130, (16, 16))):
        blocks = random_blocks(n, k, block_shape, density=0.1, dtype=dtype)
        check(blocks, *operands(blocks, m))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(isa, dtype, density):
    for n, k, m in itertools.product((0, 1, 40), (0, 1, 40), (0, 1, 20)):
        for block_shape in ((16, 16), (3, 50)):
            blocks = random_blocks(n, k, block_shape, density, dtype=dtype)
            check(blocks, *operands(blocks, m))


@pytest.mark.parametrize("m", [3, 40])
def test_empty_rows_and_columns_of_blocks(isa, dtype, m):
    whole = random_blocks(200, 300, (16, 16), dtype=dtype)
    rows = reference.block_rows_of(whole.crow_indices)
    some = (rows % 3 != 1) & (whole.col_indices % 4 != 2) & (rows > 0)
    counts = rows[some].bincount(minlength=len(whole.crow_indices) - 1)
    blocks = Blocks(whole.values[some], F.pad(counts.cumsum(0), (1, 0)), whole.col_indices[some], whole.shape)
    check(blocks, *operands(blocks, m))
    assert_index_equal(blocks.transposed, ops_block._transpose_by_sorting(*blocks.index, 19))


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("block_shape", [(16, 16), (5, 24)], ids=str)
def test_same_as_reference(dtype, m, block_shape):
    blocks = random_blocks(70, 90, block_shape, dtype=dtype)
    x, grad, bias = operands(blocks, m)
    n, k = blocks.shape
    lines = -(-k // block_shape[1])
    assert_index_equal(blocks.transposed, reference.bsr_transpose(*blocks.index, lines))
    assert_index_equal(blocks.transposed, ops_block._transpose_by_sorting(*blocks.index, lines))
    expected = (
        reference.bsr_linear(x, blocks.values, *blocks.index, n, bias),
        reference.bsr_linear_backward_input(grad, blocks.values, *blocks.transposed, k),
        reference.bsr_linear_backward_values(grad, x, *blocks.index, block_shape),
    )
    for got, twin in zip(products(blocks, x, grad, bias), expected, strict=True):
        torch.testing.assert_close(got, twin)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 300, 520), (8, 32, 4000), (40, 4000, 32), (1100, 300, 200)], ids=str)
def test_number_of_threads_does_not_change_a_bit(isa, dtype, m, n, k):
    blocks, results = random_blocks(n, k, (16, 32), density=0.2, dtype=dtype), []
    given = operands(blocks, m)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(products(blocks, *given))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_bits_equal(got, expected)


# Numbers at the edges.


def assert_same_specials(got, terms, dim):
    """NaN and infinities are where the sum of the terms has them."""
    expected = terms.sum(dim)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isposinf(), expected.isposinf())
    assert torch.equal(got.isneginf(), expected.isneginf())


@pytest.mark.parametrize("m", [2, 9, 40])
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_infinity_and_nan_reach_what_their_blocks_reach(isa, dtype, m, special):
    blocks = random_blocks(40, 100, (16, 24), dtype=dtype)
    blocks.values[1, 3, 5] = 0
    x, grad, _ = operands(blocks, m)
    x[1, 70], x[0, 99], grad[0, 17], grad[1, 39] = (special,) * 4
    y, grad_x, grad_values = products(blocks, x, grad)
    kept, dense, wide, wide_grad = blocks.kept, blocks.dense.double(), x.double(), grad.double()
    assert_same_specials(y, (wide[:, None] * dense).masked_fill(~kept, 0), -1)
    assert_same_specials(grad_x, (wide_grad[:, :, None] * dense).masked_fill(~kept, 0), 1)
    found = reference.bsr_to_dense(grad_values, *blocks.index, blocks.shape)
    assert_same_specials(found, (wide_grad[:, :, None] * wide[:, None]).masked_fill(~kept, 0), 0)
    assert not grad_values[~blocks.inside].any()


@pytest.mark.parametrize("m", [1, 9, 40])
def test_what_lies_past_the_edges_counts_for_nothing(isa, dtype, m):
    blocks = random_blocks(37, 53, (16, 24), dtype=dtype)
    x, grad, bias = operands(blocks, m)
    expected = products(blocks.with_padding(0.0), x, grad, bias)
    for number in (math.nan, math.inf, 1.0):
        for got, wanted in zip(products(blocks.with_padding(number), x, grad, bias), expected, strict=True):
            assert_bits_equal(got, wanted)


@pytest.mark.parametrize("m", [1, 20])
def test_sums_are_rounded_once(isa, m):
    """In a 16-bit dtype, 4096 ones and a half of the last place would be lost if sums were kept in it."""
    for dtype in (torch.bfloat16, torch.float16):
        blocks = random_blocks(16, 4096, (16, 16), density=1.0, dtype=dtype)
        values = torch.ones_like(blocks.values)
        y = bsr_linear(torch.ones(m, 4096, dtype=dtype), values, *blocks.index, 16)
        assert torch.equal(y, torch.full((m, 16), 4096.0, dtype=dtype))
    many, ones = 5000, random_blocks(16, 16, (16, 16), density=1.0, dtype=torch.bfloat16)
    grad = torch.ones(many, 16, dtype=torch.bfloat16)
    grad_values = bsr_linear_backward_values(grad, grad, *ones.index, (16, 16))
    assert torch.equal(grad_values, torch.full((1, 16, 16), 5000.0).bfloat16())


# Strides and shapes.


@pytest.mark.parametrize("name", VIEWS_OF_ROWS)
def test_views_of_x_and_grad(isa, dtype, name):
    x = VIEWS_OF_ROWS[name](random_numbers(80, 140, density=1.0, dtype=dtype))
    grad = VIEWS_OF_ROWS[name](random_numbers(80, 140, density=1.0, seed=1, dtype=dtype))
    blocks = random_blocks(grad.shape[-1], x.shape[-1], (16, 12), dtype=dtype)
    check(blocks, x, grad, random_numbers(2 * blocks.shape[0], density=1.0, dtype=dtype)[::2])


@pytest.mark.parametrize("m", [1, 20])
def test_weights_that_are_views(isa, dtype, m):
    blocks = random_blocks(70, 90, (16, 24), dtype=dtype)
    x, grad, bias = operands(blocks, m)
    expected = products(blocks, x, grad, bias)
    unaligned = torch.cat([blocks.values.new_zeros(1), blocks.values.reshape(-1)])[1:].view_as(blocks.values)
    strided = [torch.stack([part, -part], dim=1)[:, 0] for part in blocks.index]
    for values in (unaligned, blocks.values.transpose(1, 2).contiguous().transpose(1, 2)):
        view = Blocks(values, *strided, blocks.shape)
        transposed = ops_block.TransposedIndex(*(torch.stack([part, -part], dim=1)[:, 0] for part in view.transposed))
        for got, wanted in zip(products(view, x, grad, bias), expected, strict=True):
            assert_bits_equal(got, wanted)
        assert_bits_equal(bsr_linear(x, values, *strided, 70, bias, transposed), expected[0])
        assert_bits_equal(bsr_linear_backward_input(grad, values, transposed, 90), expected[1])


def test_expanded_values():
    blocks = random_blocks(70, 90, (16, 24), dtype=torch.float32)
    same = blocks._replace(values=torch.ones(()).expand(blocks.values.shape))
    check(same, *operands(same, 5))


# Autograd.


def assert_index_equal(got, expected):
    for part, wanted in zip(got, expected, strict=True):
        assert_bits_equal(part, wanted)


def masked_linear(blocks, x, values, bias=None):
    """What autograd makes of a masked dense weight."""
    return F.linear(x, reference.bsr_to_dense(values, *blocks.index, blocks.shape), bias)


@pytest.mark.parametrize("given", [True, False], ids=["transposed given", "not given"])
@pytest.mark.parametrize("lead", [(5,), (2, 10), ()], ids=str)
def test_gradients_are_those_of_a_masked_weight(dtype, lead, given):
    blocks = random_blocks(37, 53, (16, 24), dtype=dtype).with_padding(0.0)
    x = random_numbers(*lead, 53, density=1.0, dtype=dtype).requires_grad_()
    bias = random_numbers(37, density=1.0, dtype=dtype).requires_grad_()
    inputs = x, blocks.values.requires_grad_(), bias
    y = bsr_linear(x, inputs[1], *blocks.index, 37, bias, blocks.transposed if given else None)
    grad = random_numbers(*lead, 37, density=1.0, seed=9, dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(masked_linear(blocks, *wide), wide, grad.double())
    for got, wanted in zip(torch.autograd.grad(y, inputs, grad), expected, strict=True):
        torch.testing.assert_close(got, wanted.to(dtype))


class OpsCalled(TorchDispatchMode):
    """Notes which ops of bitmask are called, and which of them may use tf32."""

    def __init__(self):
        super().__init__()
        self.names, self.with_tf32 = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bitmask":
            self.names.add(func._opname)
            if func._schema.arguments[-1].name == "allow_tf32" and args[len(func._schema.arguments) - 1 :] == (True,):
                self.with_tf32.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needed", "names"),
    [
        ("x", {"bsr_linear_backward_input"}),
        ("values", {"bsr_linear_backward_values"}),
        ("bias", set()),
        ("x values", {"bsr_linear_backward_input", "bsr_linear_backward_values"}),
    ],
)
def test_gradients_that_nobody_needs_are_not_calculated(needed, names):
    blocks = random_blocks(37, 53, (16, 24)).with_padding(0.0)
    x, _, bias = operands(blocks, 5)
    tensors = {"x": x, "values": blocks.values, "bias": bias}
    inputs = [tensors[name].requires_grad_() for name in needed.split()]
    y = bsr_linear(x, blocks.values, *blocks.index, 37, bias, blocks.transposed)
    with OpsCalled() as called:
        torch.autograd.grad(y.sum(), inputs)
    assert called.names == names


def test_nothing_is_saved_where_nothing_needs_a_gradient():
    blocks = random_blocks(37, 53, (16, 24))
    x, _, bias = operands(blocks, 5)
    assert bsr_linear(x, blocks.values, *blocks.index, 37, bias).grad_fn is None
    with torch.no_grad():
        assert bsr_linear(x.requires_grad_(), blocks.values, *blocks.index, 37, bias).grad_fn is None


@pytest.mark.parametrize("given", [True, False], ids=["transposed given", "not given"])
def test_gradcheck_of_every_order(given):
    blocks = random_blocks(7, 9, (3, 4), dtype=torch.float64).with_padding(0.0)
    transposed = blocks.transposed if given else None
    x, grad, bias = (tensor.requires_grad_() for tensor in operands(blocks, 4))
    values = blocks.values.requires_grad_()
    ops = {
        lambda x, values, bias: bsr_linear(x, values, *blocks.index, 7, bias, transposed): (x, values, bias),
        lambda grad, values: bsr_linear_backward_input(grad, values, blocks.transposed, 9): (grad, values),
        lambda grad, x: bsr_linear_backward_values(grad, x, *blocks.index, (3, 4)): (grad, x),
    }
    for op, inputs in ops.items():
        assert torch.autograd.gradcheck(op, inputs)
        assert torch.autograd.gradgradcheck(op, inputs)
        for i in range(len(inputs)):
            alone = [tensor if i == j else tensor.detach() for j, tensor in enumerate(inputs)]
            assert torch.autograd.gradgradcheck(lambda *args, op=op: op(*args) ** 2, alone)


PRODUCTS = {"bsr_linear", "bsr_linear_backward_input", "bsr_linear_backward_values"}


@pytest.mark.parametrize("allowed", [True, False])
def test_gradients_of_every_order_use_tf32_where_the_product_does(monkeypatch, allowed):
    blocks = random_blocks(37, 53, (16, 24)).with_padding(0.0)
    x, grad, _ = (tensor.requires_grad_() for tensor in operands(blocks, 5))
    values = blocks.values.requires_grad_()
    calls_of = {
        bsr_linear: (x, values, *blocks.index, 37),
        bsr_linear_backward_input: (grad, values, blocks.transposed, 53),
        bsr_linear_backward_values: (grad, x, *blocks.index, (16, 24)),
    }
    for product, args in calls_of.items():
        monkeypatch.setattr(ops_block, "_allows_tf32", lambda multiplied: allowed)
        y = product(*args)
        monkeypatch.undo()  # what counts is what was allowed when the product was calculated
        leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
        with OpsCalled() as called:
            first = torch.autograd.grad((y**2).sum(), leaves, create_graph=True)
            torch.autograd.grad(sum((part**2).sum() for part in first), leaves)
        assert called.names >= PRODUCTS - {product.__name__}
        assert called.with_tf32 == (called.names & PRODUCTS if allowed else set())


@pytest.fixture
def matmul_settings():
    """Puts back what torch allows."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_where_torch_allows_it(matmul_settings):
    """Whichever of torch's ways to allow it was used, and compiled as well."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + ops_block._tf32_of_matmuls(), backend="eager", fullgraph=True)
    settings = {
        lambda: torch.set_float32_matmul_precision("highest"): False,
        lambda: torch.set_float32_matmul_precision("high"): True,
        lambda: setattr(matmul_settings, "fp32_precision", "ieee"): False,
        lambda: setattr(matmul_settings, "fp32_precision", "tf32"): True,
        lambda: setattr(matmul_settings, "allow_tf32", False): False,
        lambda: setattr(matmul_settings, "allow_tf32", True): True,
    }
    for setting, allowed in settings.items():
        setting()
        with FakeTensorMode():
            assert ops_block._allows_tf32(torch.empty(1, device="cuda")) == allowed
        assert compiled(torch.zeros(1)).item() == allowed
        assert not ops_block._allows_tf32(torch.zeros(1))


def test_changed_in_place_before_backward():
    blocks = random_blocks(37, 53, (16, 24)).with_padding(0.0)
    x = operands(blocks, 5)[0].requires_grad_()
    y = bsr_linear(x, blocks.values, *blocks.index, 37)
    blocks.col_indices[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_index_changed_past_autograd_before_backward():
    blocks = random_blocks(37, 53, (16, 24)).with_padding(0.0)
    x = operands(blocks, 5)[0].requires_grad_()
    y = bsr_linear(x, blocks.values, *blocks.index, 37)
    blocks.col_indices.data[0] = 1 << 40
    with pytest.raises(FormatError, match=r"col_indices\[0\]: got 1099511627776"):
        y.sum().backward()


def test_forward_mode_is_refused():
    blocks = random_blocks(37, 53, (16, 24))
    x = operands(blocks, 5)[0]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: bsr_linear(x, blocks.values, *blocks.index, 37), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.requires_grad_(), x.detach())
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            bsr_linear(dual, blocks.values, *blocks.index, 37)


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.vjp, torch.func.jacrev, torch.func.hessian], ids=lambda f: f.__name__
)
def test_gradients_under_torch_func_are_refused(transform):
    blocks = random_blocks(37, 53, (16, 24))
    x, grad, _ = operands(blocks, 5)
    products = {
        lambda x: bsr_linear(x, blocks.values, *blocks.index, 37).sum(): x,
        lambda grad: bsr_linear_backward_input(grad, blocks.values, blocks.transposed, 53).sum(): grad,
        lambda grad: bsr_linear_backward_values(grad, x, *blocks.index, (16, 24)).sum(): grad,
    }
    for product, at in products.items():
        with pytest.raises(NotImplementedError, match=r"bsr_linear.*: has no (gradient under torch.func|forward-mode)"):
            transform(product, at) if transform is torch.func.vjp else transform(product)(at)


def test_autocast_names_dtypes_that_it_leaves_different():
    blocks = random_blocks(37, 53, (16, 24))
    x, _, bias = operands(blocks, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, other in [(x.double(), bias), (x, bias.double())]:
            with pytest.raises(TypeError, match=r"(x|bias): got dtype torch.float64, expected torch.float32"):
                bsr_linear(got, blocks.values, *blocks.index, 37, other)
        bsr_linear(x.half(), blocks.values, *blocks.index, 37, bias)
        with pytest.raises(TypeError, match=r"grad: got dtype torch.float64, expected torch.float32"):
            bsr_linear_backward_input(torch.ones(5, 37).double(), blocks.values, blocks.transposed, 53)


@pytest.mark.parametrize("m", [1, 20])
def test_autocast(m):
    blocks = random_blocks(37, 53, (16, 24)).with_padding(0.0)
    x, _, bias = (tensor.requires_grad_() for tensor in operands(blocks, m))
    values = blocks.values.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bsr_linear(x, values, *blocks.index, 37, bias, blocks.transposed)
        wide = bsr_linear(x.double(), values.double(), *blocks.index, 37, bias.double())
    assert_bits_equal(y, bsr_linear(x.bfloat16(), values.bfloat16(), *blocks.index, 37, bias.bfloat16()))
    assert wide.dtype == torch.float64
    y.sum().backward()
    assert x.grad.dtype == values.grad.dtype == bias.grad.dtype == torch.float32
    assert_is_product(x.grad.bfloat16(), torch.ones(m, 37), blocks.dense.bfloat16())


# torch.compile and friends.


def opcheck_cases(blocks, lead):
    n, k = blocks.shape
    x, grad = (random_numbers(*lead, size, density=1.0, dtype=blocks.values.dtype) for size in (k, n))
    bias = random_numbers(n, density=1.0, dtype=blocks.values.dtype)
    x, grad, bias = (tensor.requires_grad_() for tensor in (x, grad, bias))
    values = blocks.values.requires_grad_()
    return {
        native.bsr_linear: [
            (x, values, *blocks.index, n),
            (x, values, *blocks.index, n, bias),
            (x, values, *blocks.index, n, None, *blocks.transposed),
        ],
        native.bsr_linear_backward_input: [(grad, values, *blocks.transposed, k)],
        native.bsr_linear_backward_values: [(grad, x, *blocks.index, list(blocks.block_shape))],
        native.bsr_transpose: [(*blocks.index, -(-k // blocks.block_shape[1]))],
    }


@pytest.mark.parametrize("lead", [(3,), (), (2, 0)], ids=str)
def test_opcheck(lead):
    for op, cases in opcheck_cases(random_blocks(37, 53, (16, 24)).with_padding(0.0), lead).items():
        for args in cases:
            library.opcheck(op.default, args)


def test_compiles_in_one_graph_for_any_number_of_rows():
    blocks = random_blocks(37, 53, (16, 24)).with_padding(0.0)
    values, counter = blocks.values.requires_grad_(), CompileCounterWithBackend("aot_eager")

    def loss(x, bias):
        return (bsr_linear(x, values, *blocks.index, 37, bias, blocks.transposed) ** 2).sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for m in (5, 9, 40):
        x, _, bias = (tensor.requires_grad_() for tensor in operands(blocks, m))
        got, expected = (torch.autograd.grad(f(x, bias), (x, values, bias)) for f in (compiled, loss))
        for gradient, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(gradient, wanted)
    assert counter.frame_count == 1


def test_fake_and_meta_tensors():
    blocks = random_blocks(37, 53, (16, 24))
    x, grad, bias = operands(blocks, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [p.shape for p in products(blocks, x, grad, bias)] == [(5, 37), (5, 53), blocks.values.shape]
    values, *index = (part.to("meta") for part in blocks[:3])
    y = bsr_linear(x.to("meta"), values, *index, 37)
    assert (y.device.type, y.shape) == ("meta", (5, 37))
    assert [part.shape for part in bsr_transpose(*index, 3)] == [(4,), (len(values),), (len(values),)]


# Other threads and processes.

WRITER = """
import threading
import time
import torch
from bitmask import FormatError
from bitmask.ops_block import bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values, bsr_transpose

torch.set_num_threads(1)
lines = 300
values, crow_indices = torch.ones(lines * lines, 4, 4), torch.arange(lines + 1) * lines
col_indices = torch.arange(lines).repeat(lines)
x = torch.ones(2, lines * 4)
transposed = bsr_transpose(crow_indices, col_indices, lines)
calls = [
    (col_indices, lambda: bsr_linear(x, values, crow_indices, col_indices, lines * 4)),
    (crow_indices, lambda: bsr_linear(x, values, crow_indices, col_indices, lines * 4)),
    (col_indices, lambda: bsr_linear_backward_values(x, x, crow_indices, col_indices, (4, 4))),
    (transposed.order, lambda: bsr_linear_backward_input(x, values, transposed, lines * 4)),
    (transposed.row_indices, lambda: bsr_linear_backward_input(x, values, transposed, lines * 4)),
]
for part, call in calls:
    entries, place, expected = part.numpy(), len(part) * 2 // 3, call()
    proven, done, outcomes = int(entries[place]), False, set()

    def write():
        while not done:
            entries[place] = 1 << 40
            time.sleep(0.0002)
            entries[place] = proven
            time.sleep(0.0006)

    writer = threading.Thread(target=write)
    writer.start()
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        try:
            outcomes.add(torch.equal(call(), expected))
        except FormatError:
            outcomes.add("refused")
    done = True
    writer.join()
    print(True in outcomes, "refused" in outcomes, False in outcomes)
"""


def test_an_index_written_meanwhile_is_refused_or_harmless():
    """What was proven is what is used: no kernel reads the index that others can write to."""
    assert run_python(WRITER).stdout.splitlines() == ["True True False"] * 5


FORK = """
import torch
from bitmask.ops_block import bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values, bsr_transpose

torch.set_num_threads(2)
values, crow_indices, col_indices = torch.ones(900, 16, 16), torch.arange(31) * 30, torch.arange(30).repeat(30)
x = torch.ones(100, 480)

def works():
    grad_x = bsr_linear_backward_input(x, values, bsr_transpose(crow_indices, col_indices, 30), 480)
    grad_values = bsr_linear_backward_values(x, x, crow_indices, col_indices, (16, 16))
    # NumPy compares without torch's own threads, which do not survive a fork.
    y = [bsr_linear(x[:m], values, crow_indices, col_indices, 480) for m in (1, 100)]
    return all((t.numpy() == 480).all() for t in (*y, grad_x)) and (grad_values.numpy() == 100).all()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_ops_work_in_a_forked_child():
    assert_works_after_fork(FORK, use_before=True)
