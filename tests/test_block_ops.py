"""Products with a block-sparse weight: the ops, their gradients, and the index that they prove."""

import itertools
import math
import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import VIEWS_OF_ROWS, assert_bits_equal, assert_works_after_fork, random_numbers, run_python
from torch import Tensor, library
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


class Blocks(NamedTuple):
    """The kept blocks of a weight."""

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, int]

    @property
    def index(self):
        return self.crow_indices, self.col_indices

    @property
    def block_shape(self):
        return tuple(self.values.shape[1:])

    @property
    def transposed(self):
        return bsr_transpose(*self.index, -(-self.shape[1] // self.values.shape[2]))

    @property
    def dense(self):
        return reference.bsr_to_dense(self.values, *self.index, self.shape)

    @property
    def kept(self):
        """Bool [out_features, in_features]: what lies in a kept block."""
        return reference.bsr_to_dense(torch.ones_like(self.values, dtype=torch.bool), *self.index, self.shape)

    @property
    def inside(self):
        """Bool [blocks, block rows, block columns]: what of the blocks lies in the weight."""
        (rows, cols), (block_rows, block_cols) = self.shape, self.block_shape
        row = reference.block_rows_of(self.crow_indices)[:, None, None] * block_rows + torch.arange(block_rows)[:, None]
        col = self.col_indices[:, None, None] * block_cols + torch.arange(block_cols)
        return (row < rows) & (col < cols)

    def with_padding(self, number):
        return self._replace(values=self.values.masked_fill(~self.inside, number))


def random_blocks(n, k, block_shape, density=0.5, seed=0, dtype=torch.float32):
    """Random kept blocks of a weight [n, k], the last row and column of blocks among them; NaN past its edges."""
    generator = torch.Generator().manual_seed(seed)
    down, across = -(-n // block_shape[0]), -(-k // block_shape[1])
    kept = torch.rand(down, across, generator=generator) < density
    if 0 < density < 1:
        kept[-1:, -1:] = True
    crow_indices = F.pad(kept.sum(1).cumsum(0), (1, 0))
    col_indices = kept.nonzero()[:, 1].clone()
    values = random_numbers(len(col_indices), *block_shape, density=1.0, seed=seed, dtype=dtype)
    return Blocks(values, crow_indices, col_indices, (n, k)).with_padding(math.nan)


def assert_is_product(got, left, right, bias=None, kept=None):
    """`got` is left @ right + bias, where `kept`, within the rounding that a product may do.

    Products of 16-bit numbers are exact in the float32 of the sums, so each addition and a conversion or two are the
    only roundings there, each relative to a partial sum, which the sum of magnitudes bounds; the result is rounded once
    to its dtype. For float64 the yardstick has the same error, hence the factor of two.
    """
    left, right, bias = (None if t is None else t.detach().double() for t in (left, right, bias))
    exact, magnitude = left @ right, left.abs() @ right.abs()
    if bias is not None:
        exact, magnitude = exact + bias, magnitude + bias.abs()
    if kept is not None:
        exact, magnitude = exact.masked_fill(~kept, 0), magnitude.masked_fill(~kept, 0)
    unit = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
    info = torch.finfo(got.dtype)
    bound = 2 * (right.shape[0] + 3) * unit * magnitude + 0.51 * info.eps * exact.abs() + info.tiny * info.eps
    assert got.shape == exact.shape
    error = (got.detach().double() - exact).abs()
    assert bool((error <= bound).all()), f"off by {float((error / bound).max()):.1f} times the bound"


def rows_of(tensor):
    """[..., size] as [rows, size]."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def check_gradient_of_x(got, blocks, grad):
    assert (got.shape, got.dtype) == ((*grad.shape[:-1], blocks.shape[1]), grad.dtype)
    assert_is_product(rows_of(got), rows_of(grad), blocks.dense)


def check_gradient_of_values(got, blocks, grad, x):
    assert (got.shape, got.dtype) == (blocks.values.shape, x.dtype)
    assert not got[~blocks.inside].any(), "expected zeros past the edges"
    found = reference.bsr_to_dense(got, *blocks.index, blocks.shape)
    assert_is_product(found, rows_of(grad).t(), rows_of(x), kept=blocks.kept)


def check_product(got, blocks, x, bias=None):
    assert (got.shape, got.dtype) == ((*x.shape[:-1], blocks.shape[0]), x.dtype)
    assert_is_product(rows_of(got), rows_of(x), blocks.dense.t(), bias)


def operands(blocks, m, seed=0):
    """x [m, in_features], a gradient [m, out_features] and a bias."""
    sizes = ((m, blocks.shape[1]), (m, blocks.shape[0]), (blocks.shape[0],))
    dtype = blocks.values.dtype
    return [random_numbers(*size, density=1.0, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]


def products(blocks, x, grad, bias=None):
    """y, and the gradients of x and values, each from its op."""
    return (
        bsr_linear(x, blocks.values, *blocks.index, blocks.shape[0], bias),
        bsr_linear_backward_input(grad, blocks.values, blocks.transposed, blocks.shape[1]),
        bsr_linear_backward_values(grad, x, *blocks.index, blocks.block_shape),
    )


def check(blocks, x, grad, bias=None):
    """All three products against float64."""
    y, grad_x, grad_values = products(blocks, x, grad, bias)
    check_product(y, blocks, x, bias)
    check_gradient_of_x(grad_x, blocks, grad)
    check_gradient_of_values(grad_values, blocks, grad, x)


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


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("block_shape", [(16, 16), (5, 24)], ids=str)
def test_same_as_reference(dtype, m, block_shape):
    blocks = random_blocks(70, 90, block_shape, dtype=dtype)
    x, grad, bias = operands(blocks, m)
    n, k = blocks.shape
    assert_index_equal(blocks.transposed, reference.bsr_transpose(*blocks.index, -(-k // block_shape[1])))
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
    """Notes which ops of bitmask are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bitmask":
            self.names.add(func._opname)
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


# What is refused.


def arguments():
    """Of each function, right ones by their names: four rows of three blocks, each column filled but the second."""
    col_indices = torch.tensor([0, 2, 0, 2, 2])
    blocks = Blocks(torch.ones(5, 16, 24), torch.tensor([0, 2, 2, 4, 5]), col_indices, (60, 70))
    index = {"crow_indices": blocks.crow_indices, "col_indices": blocks.col_indices}
    x, grad, bias = operands(blocks, 2)
    return {
        bsr_linear: {
            "x": x,
            "values": blocks.values,
            **index,
            "out_features": 60,
            "bias": bias,
            "transposed": blocks.transposed,
        },
        bsr_linear_backward_input: {
            "grad": grad,
            "values": blocks.values,
            "transposed": blocks.transposed,
            "in_features": 70,
        },
        bsr_linear_backward_values: {"grad": grad, "x": x, **index, "block_shape": (16, 24)},
        bsr_transpose: {**index, "cols_of_blocks": 3},
    }


def with_entry(name, index, entry):
    """A change of one entry of a part of an index, also of a transposed one."""

    def change(args):
        part = getattr(args["transposed"], name, None) if name not in args else args[name]
        part = part.clone()
        part[index] = entry
        if name in args:
            return args | {name: part}
        return args | {"transposed": args["transposed"]._replace(**{name: part})}

    return change


def with_argument(**changed):
    return lambda args: args | changed


def test_right_arguments_are_accepted():
    for function, args in arguments().items():
        function(**args)


BY_ROW = (bsr_linear, bsr_linear_backward_values, bsr_transpose)
BAD_ROWS = [
    (with_entry("crow_indices", 0, 1), r"crow_indices\[0\]: got 1, expected 0"),
    (with_entry("crow_indices", 0, -1), r"crow_indices\[0\]: got -1, expected 0"),
    (with_entry("crow_indices", 1, 6), r"crow_indices\[1\]: got 6, expected 0 to 5 \(the number of blocks\)"),
    (with_entry("crow_indices", 2, 1), r"crow_indices\[2\]: got 1, expected 2 to 5"),
    (with_entry("crow_indices", 2, -(2**63)), r"crow_indices\[2\]: got -9223372036854775808, expected 2 to 5"),
    (with_entry("crow_indices", 4, 4), r"crow_indices\[4\]: got 4, expected 5 \(the number of blocks\)"),
    (with_entry("crow_indices", 4, 2**63 - 1), r"crow_indices\[4\]: got 9223372036854775807, expected 4 to 5"),
    (with_entry("col_indices", 1, 3), r"col_indices\[1\]: got 3, expected at least 0 and less than 3"),
    (with_entry("col_indices", 4, -1), r"col_indices\[4\]: got -1, expected at least 0 and less than 3"),
    (
        with_entry("col_indices", 3, 0),
        r"col_indices\[3\]: got 0, expected more than 0, which comes before it in line 2",
    ),
    (with_entry("col_indices", 0, 2), r"col_indices\[1\]: got 2, expected more than 2"),
]
BY_COLUMN = [
    (with_entry("ccol_indices", 1, 6), r"ccol_indices\[1\]: got 6, expected 0 to 5"),
    (with_entry("ccol_indices", 3, 4), r"ccol_indices\[3\]: got 4, expected 5 \(the number of blocks\)"),
    (with_entry("row_indices", 1, 4), r"row_indices\[1\]: got 4, expected at least 0 and less than 4"),
    (with_entry("row_indices", 1, 0), r"row_indices\[1\]: got 0, expected more than 0"),
    (with_entry("order", 0, 5), r"order\[0\]: got 5, expected at least 0 and less than 5"),
    (with_entry("order", 0, -1), r"order\[0\]: got -1, expected at least 0 and less than 5"),
    (with_entry("order", 1, 0), r"order\[1\]: got 0, which is order\[0\] already, expected each block once"),
]


BAD_CONTENTS = [(function, change, message) for change, message in BAD_ROWS for function in BY_ROW]
BAD_CONTENTS += [(bsr_linear_backward_input, change, message) for change, message in BY_COLUMN]


@pytest.mark.parametrize(("function", "change", "message"), BAD_CONTENTS)
def test_contents_that_contradict_themselves(function, change, message):
    with pytest.raises(FormatError, match=message):
        function(**change(arguments()[function]))


def test_order_that_is_not_that_of_the_values():
    args = arguments()[bsr_linear_backward_input]
    transposed = args["transposed"]._replace(order=args["transposed"].order.flip(0))
    with pytest.raises(
        FormatError, match=r"order\[.\]: got ., expected less than order\[.\] = .: blocks lie row by row"
    ):
        bsr_linear_backward_input(**args | {"transposed": transposed})


@pytest.mark.parametrize("name", ["ccol_indices", "row_indices", "order"])
def test_transposed_index_of_another_weight(name):
    """Each wrong entry is noticed in the forward pass."""
    args = arguments()[bsr_linear]
    for index, entry in enumerate(getattr(args["transposed"], name).tolist()):
        for wrong in {entry - 1, entry + 1, 0, -(2**63)} - {entry}:
            message = rf"{name}\[{index}\]: got {wrong}, expected {entry} as by crow_indices and col_indices"
            with pytest.raises(FormatError, match=message):
                bsr_linear(**with_entry(name, index, wrong)(args))


LINEAR, TO_X, TO_VALUES = bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values
WIDE, COLUMNS, ROWS = torch.ones(2, 3, 4, 5), torch.zeros(4).long(), torch.zeros(4).long()
BAD_ARGUMENTS = [
    (LINEAR, with_argument(x=torch.ones(2, 73)), FormatError, r"ccol_indices: got size \[4\], expected \[5\]"),
    (LINEAR, with_argument(x=torch.ones(())), ValueError, r"x: got size \[\], expected \[..., in_features\]"),
    (
        LINEAR,
        with_argument(x=torch.ones(2, 70).double()),
        TypeError,
        "x: got dtype torch.float64, expected torch.float32",
    ),
    (LINEAR, with_argument(x=[1.0] * 70), TypeError, "x: got list, expected a torch.Tensor"),
    (LINEAR, with_argument(x=torch.ones(2, 70).to_sparse()), TypeError, "x: got a torch.sparse_coo tensor"),
    (LINEAR, with_argument(x=torch.ones(2, 70, device="meta")), ValueError, "x: got device meta, expected cpu"),
    (LINEAR, with_argument(values=WIDE), FormatError, r"values: got size \[2, 3, 4, 5\], expected \[blocks"),
    (LINEAR, with_argument(values=torch.ones(5, 0, 24)), FormatError, r"values: got size \[5, 0, 24\], expected"),
    (LINEAR, with_argument(values=torch.ones(4, 16, 24)), FormatError, r"col_indices: got size \[5\], expected \[4\]"),
    (LINEAR, with_argument(values=torch.ones(5, 12, 24)), FormatError, r"crow_indices: got size \[5\], expected \[6\]"),
    (LINEAR, with_argument(values=torch.ones(5, 16, 23)), FormatError, r"ccol_indices: got size \[4\], expected \[5\]"),
    (
        LINEAR,
        with_argument(values=torch.ones(5, 16, 24).int()),
        TypeError,
        "values: got dtype torch.int32, expected float32",
    ),
    (
        LINEAR,
        with_argument(crow_indices=ROWS.int()),
        TypeError,
        "crow_indices: got dtype torch.int32, expected torch.int64",
    ),
    (LINEAR, with_argument(crow_indices=ROWS), FormatError, r"crow_indices: got size \[4\], expected \[5\]"),
    (LINEAR, with_argument(crow_indices=ROWS[:0]), FormatError, r"crow_indices: got size \[0\], expected \[5\]"),
    (LINEAR, with_argument(crow_indices=torch.zeros(5, 1).long()), FormatError, r"crow_indices: got size \[5, 1\]"),
    (LINEAR, with_argument(col_indices=COLUMNS.float()), TypeError, "col_indices: got dtype torch.float32"),
    (LINEAR, with_argument(col_indices=COLUMNS), FormatError, r"col_indices: got size \[4\], expected \[5\]"),
    (LINEAR, with_argument(col_indices=None), TypeError, "col_indices: got NoneType, expected a torch.Tensor"),
    (LINEAR, with_argument(out_features=65), FormatError, r"crow_indices: got size \[5\], expected \[6\]"),
    (LINEAR, with_argument(out_features=61), ValueError, r"bias: got size \[60\], expected \[61\]"),
    (LINEAR, with_argument(out_features=-1), ValueError, "out_features: got -1, expected 0 or more"),
    (
        LINEAR,
        with_argument(out_features=2**63 - 2),
        FormatError,
        r"crow_indices: got size \[5\], expected \[57646075230",
    ),
    (LINEAR, with_argument(out_features=2**63 - 1), ValueError, "out_features: got 9223372036854775807, expected 0 or"),
    (LINEAR, with_argument(out_features=2**64), ValueError, "out_features: got 18446744073709551616, expected 0 or"),
    (LINEAR, with_argument(out_features=60.0), TypeError, "out_features: got 60.0, expected an integer"),
    (LINEAR, with_argument(bias=torch.ones(1)), ValueError, r"bias: got size \[1\], expected \[60\] \(out_features\)"),
    (
        LINEAR,
        with_argument(bias=torch.ones(60).half()),
        TypeError,
        "bias: got dtype torch.float16, expected torch.float32",
    ),
    (LINEAR, with_argument(transposed=3), TypeError, "transposed: got int, expected the TransposedIndex"),
    (LINEAR, with_argument(transposed=(ROWS, ROWS)), TypeError, "transposed: got tuple, expected the TransposedIndex"),
    (LINEAR, with_argument(transposed=(ROWS, None, None)), ValueError, "got ccol_indices alone, expected all or none"),
    (LINEAR, with_argument(transposed=(ROWS.int(),) * 3), TypeError, "ccol_indices: got dtype torch.int32"),
    (LINEAR, with_argument(transposed=(ROWS,) * 3), FormatError, r"row_indices: got size \[4\], expected \[5\]"),
    (TO_X, with_argument(grad=torch.ones(2, 48)), FormatError, r"row_indices\[.\]: got 3, expected .* less than 3"),
    (TO_X, with_argument(grad=torch.ones(())), ValueError, r"grad: got size \[\], expected \[..., out_features\]"),
    (
        TO_X,
        with_argument(grad=torch.ones(2, 60).half()),
        TypeError,
        "grad: got dtype torch.float16, expected torch.float32",
    ),
    (TO_X, with_argument(values=torch.ones(4, 16, 24)), FormatError, r"row_indices: got size \[5\], expected \[4\]"),
    (TO_X, with_argument(transposed=None), TypeError, "ccol_indices: got NoneType, expected a torch.Tensor"),
    (TO_X, with_argument(in_features=73), FormatError, r"ccol_indices: got size \[4\], expected \[5\]"),
    (TO_X, with_argument(in_features=-1), ValueError, "in_features: got -1, expected 0 or more"),
    (TO_X, with_argument(in_features=2**63 - 2), FormatError, r"ccol_indices: got size \[4\], expected \[3843071682"),
    (TO_X, with_argument(in_features="70"), TypeError, "in_features: got '70', expected an integer"),
    (
        TO_VALUES,
        with_argument(grad=torch.ones(3, 60)),
        ValueError,
        r"x: got size \[2, 70\], expected \[3, 'in_features'\]",
    ),
    (
        TO_VALUES,
        with_argument(grad=torch.ones(2, 60).bfloat16()),
        TypeError,
        "x: got dtype torch.float32, expected torch.bf",
    ),
    (
        TO_VALUES,
        with_argument(grad=torch.ones(2, 60).int()),
        TypeError,
        "grad: got dtype torch.int32, expected float32",
    ),
    (TO_VALUES, with_argument(grad=torch.ones(())), ValueError, r"grad: got size \[\]"),
    (TO_VALUES, with_argument(grad=torch.ones(2, 65)), FormatError, r"crow_indices: got size \[5\], expected \[6\]"),
    (TO_VALUES, with_argument(x=torch.ones(())), ValueError, r"x: got size \[\]"),
    (
        TO_VALUES,
        with_argument(x=torch.ones(2, 48)),
        FormatError,
        r"col_indices\[1\]: got 2, expected at least 0 and less than 2",
    ),
    (TO_VALUES, with_argument(block_shape=(16,)), TypeError, r"block_shape: got \(16,\), expected two integers"),
    (TO_VALUES, with_argument(block_shape=16), TypeError, "block_shape: got 16, expected two integers"),
    (TO_VALUES, with_argument(block_shape=(16, 2.5)), TypeError, "block_shape: got 2.5, expected an integer"),
    (TO_VALUES, with_argument(block_shape=(0, 24)), ValueError, r"block_shape: got \[0, 24\], expected .* at least 1"),
    (TO_VALUES, with_argument(block_shape=(16, -24)), ValueError, "block_shape: got -24, expected 0 or more"),
    (
        TO_VALUES,
        with_argument(block_shape=(16, 2**40)),
        FormatError,
        r"block_shape: got \[16, 1099511627776\], expected",
    ),
    (TO_VALUES, with_argument(col_indices=ROWS.reshape(2, 2)), FormatError, r"col_indices: got size \[2, 2\]"),
    (bsr_transpose, with_argument(cols_of_blocks=2), FormatError, r"col_indices\[1\]: got 2, expected .* less than 2"),
    (bsr_transpose, with_argument(cols_of_blocks=-1), ValueError, "cols_of_blocks: got -1, expected 0 or more"),
    (bsr_transpose, with_argument(cols_of_blocks=2**62), RuntimeError, "cannot allocate a tensor of size"),
    (bsr_transpose, with_argument(cols_of_blocks=None), TypeError, "cols_of_blocks: got None, expected an integer"),
    (bsr_transpose, with_argument(crow_indices=ROWS[:0]), FormatError, r"crow_indices: got size \[0\], expected"),
    (bsr_transpose, with_argument(crow_indices=ROWS.reshape(2, 2)), FormatError, r"crow_indices: got size \[2, 2\]"),
    (
        bsr_transpose,
        with_argument(col_indices=ROWS[0]),
        FormatError,
        r"col_indices: got size \[\], expected \[blocks\]",
    ),
]


@pytest.mark.parametrize(("function", "change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(function, change, error, message):
    args = change(arguments()[function])
    with pytest.raises(error, match=message):
        function(**args)


def test_kernels_are_for_cpus():
    for function, args in arguments().items():
        with FakeTensorMode():
            there = {name: move(arg) for name, arg in args.items()}
            with pytest.raises(
                NotImplementedError, match="got device cuda:0, expected cpu: bitmask has no block-sparse kernels"
            ):
                function(**there)


def move(arg):
    """A stand-in for it on a GPU."""
    if isinstance(arg, ops_block.TransposedIndex):
        return ops_block.TransposedIndex(*map(move, arg))
    return torch.empty(arg.shape, dtype=arg.dtype, device="cuda") if isinstance(arg, Tensor) else arg


def test_native_ops_by_themselves_refuse_the_same():
    """Whoever goes past the functions of this package gets an exception as well, whatever its kind."""
    for function, change, *_ in [*BAD_ARGUMENTS, *BAD_CONTENTS]:
        args = change(arguments()[function])
        transposed = args.pop("transposed", None)
        if isinstance(transposed, tuple) and len(transposed) == 3:
            args |= dict(zip(("ccol_indices", "row_indices", "order"), transposed, strict=True))
        elif transposed is not None:
            continue
        with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
            getattr(native, function.__name__)(**args)


def test_storage_that_was_shrunk():
    args = arguments()[bsr_linear]
    for name in ("values", "crow_indices", "col_indices", "x", "bias"):
        tensor = args[name].clone()
        tensor.untyped_storage().resize_(tensor.nbytes - 8)
        with pytest.raises(FormatError, match=rf"{name}: got a storage of"):
            bsr_linear(**args | {name: tensor})


def test_sizes_at_which_nothing_may_be_allocated():
    """No rows of x, so no memory behind a huge weight; its index has none of it either."""
    none = torch.zeros(0, dtype=torch.int64)
    huge, values = 1 << 60, torch.ones(0, 1 << 28, 1)
    starts = torch.zeros(1, dtype=torch.int64).expand((1 << 32) + 1)
    with pytest.raises(RuntimeError, match=r"cannot copy crow_indices of size"):
        bsr_linear(torch.ones(0, 3), values[:, :1], starts.expand((1 << 32) + 1), none, 1 << 32)
    assert bsr_linear(torch.empty(0, huge), torch.ones(0, 4, 1), torch.zeros(3).long(), none, 8).shape == (0, 8)
    transposed = ops_block.TransposedIndex(torch.zeros(3).long(), none, none)
    assert bsr_linear_backward_input(torch.empty(0, huge), torch.ones(0, 1, 4), transposed, 8).shape == (0, 8)
    index = (torch.tensor([0, 1, 1]), torch.tensor([7]))
    gradient = bsr_linear_backward_values(torch.empty(0, 8), torch.empty(0, huge), *index, (4, 2))
    assert torch.equal(gradient, torch.zeros(1, 4, 2))


# Random indices.


def index_is_valid(crow_indices, col_indices, lines, across):
    """The rules of the index, spelled out anew in plain Python."""
    starts, columns = crow_indices.tolist(), col_indices.tolist()
    if len(starts) != lines + 1 or starts[0] != 0 or starts[-1] != len(columns) or starts != sorted(starts):
        return False
    rows = [columns[begin:end] for begin, end in itertools.pairwise(starts)]
    return all(row == sorted(set(row)) and all(0 <= column < across for column in row) for row in rows)


def mutate(blocks, randint):
    """One small random change to the index or the sizes of the weight; some leave them valid."""
    crow_indices, col_indices, (n, k) = *(part.clone() for part in blocks.index), blocks.shape
    part = (crow_indices, col_indices)[randint(2)]
    kind, place = randint(6), randint(len(part))
    if kind == 0:
        part[place] += randint(5) - 2
    elif kind == 1:
        part[place] = part[randint(len(part))]
    elif kind == 2:
        part.view(torch.uint8)[place * 8 + randint(8)] ^= 1 << randint(8)
    elif kind == 3:
        other = randint(len(part))
        part[place], part[other] = part[other].clone(), part[place].clone()
    elif kind == 4:
        n, k = n + randint(9) - 4, k + randint(9) - 4
    elif part is col_indices:
        col_indices = torch.cat([part[:place], part[place + 1 :]])
    else:
        crow_indices = torch.cat([part[:place], part[place : place + 1], part[place:]])
    return Blocks(blocks.values, crow_indices, col_indices, (n, k))


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("block_shape", [(3, 4), (16, 16)], ids=str)
def test_changed_indices_are_refused_or_multiply_as_the_reference_does(isa, block_shape, m):
    generator = torch.Generator().manual_seed(m)
    whole = random_blocks(5 * block_shape[0], 4 * block_shape[1], block_shape).with_padding(0.0)
    refused, tries = 0, 300
    for _ in range(tries):
        blocks = mutate(whole, lambda limit: int(torch.randint(limit, (), generator=generator)))
        n, k = blocks.shape
        lines, across = -(-n // block_shape[0]), -(-k // block_shape[1])
        x, grad, _ = operands(blocks, m)
        valid = index_is_valid(*blocks.index, lines, across) and len(blocks.col_indices) == len(blocks.values)
        if valid:
            check(blocks, x, grad)
            continue
        refused += 1
        with pytest.raises(FormatError):
            bsr_linear(x, blocks.values, *blocks.index, n)
        if len(blocks.col_indices) == len(blocks.values):
            with pytest.raises(FormatError):
                bsr_linear_backward_values(grad, x, *blocks.index, block_shape)
            # The transposed weight, with the same mistake.
            transposed = ops_block.TransposedIndex(*blocks.index, torch.arange(len(blocks.values)))
            with pytest.raises(FormatError):
                bsr_linear_backward_input(x, blocks.values.transpose(1, 2), transposed, n)
    assert 0 < refused < tries


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
