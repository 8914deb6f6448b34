"""Products with a block-sparse weight: the ops, their gradients, and the index that they prove."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_bits_equal, random_numbers, run_python
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitmask import FormatError, calls, ops_block, reference
from bitmask.ops_block import bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values, bsr_transpose

native = torch.ops.bitmask
DTYPES = sorted(calls.LINEAR_DTYPES, key=str)
BLOCK_SHAPES = [(1, 1), (4, 4), (1, 16), (16, 1), (8, 24), (20, 12), (16, 16), (32, 32), (64, 64), (128, 128)]
BATCHES = [0, 1, 2, 7, 8, 9, 16, 17, 33, 130]


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
    col_indices = kept.nonzero()[:, 1].contiguous()
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


def check_gradient_of_x(got, blocks, grad):
    (n, k), dtype = blocks.shape, blocks.values.dtype
    assert (got.shape, got.dtype) == ((*grad.shape[:-1], k), dtype)
    assert_is_product(got.reshape(-1, k), grad.reshape(-1, n), blocks.dense)


def check_gradient_of_values(got, blocks, grad, x):
    (n, k), values = blocks.shape, blocks.values
    assert (got.shape, got.dtype) == (values.shape, values.dtype)
    assert not got[~blocks.inside].any(), "expected zeros past the edges"
    found = reference.bsr_to_dense(got, *blocks.index, blocks.shape)
    assert_is_product(found, grad.reshape(-1, n).t(), x.reshape(-1, k), kept=blocks.kept)


def check_product(got, blocks, x, bias=None):
    (n, k), dtype = blocks.shape, blocks.values.dtype
    assert (got.shape, got.dtype) == ((*x.shape[:-1], n), dtype)
    assert_is_product(got.reshape(-1, n), x.reshape(-1, k), blocks.dense.t(), bias)


def operands(blocks, m, seed=0):
    """x [m, in_features], a gradient [m, out_features] and a bias."""
    sizes = ((m, blocks.shape[1]), (m, blocks.shape[0]), (blocks.shape[0],))
    return [
        random_numbers(*size, density=1.0, seed=seed + i, dtype=blocks.values.dtype) for i, size in enumerate(sizes)
    ]


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
    for m in (1, 5, 16, 64, 130):
        check(blocks, *operands(blocks, m))


@pytest.mark.parametrize("m", [1023, 1100, 2049, 4100])
@pytest.mark.parametrize("block_shape", [(16, 16), (20, 12)], ids=str)
def test_many_rows(isa, dtype, m, block_shape):
    blocks = random_blocks(70, 50, block_shape, dtype=dtype)
    check(blocks, *operands(blocks, m))


@pytest.mark.parametrize("m", [1, 9, 130])
@pytest.mark.parametrize(("n", "k"), [(700, 900), (1, 2500), (2500, 1), (50, 3000)], ids=str)
def test_larger_weights(isa, dtype, n, k, m):
    for block_shape in ((16, 16), (64, 32)):
        blocks = random_blocks(n, k, block_shape, density=0.1, dtype=dtype)
        check(blocks, *operands(blocks, m))


@pytest.mark.parametrize("n", [0, 1, 40])
@pytest.mark.parametrize("k", [0, 1, 40])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(isa, dtype, n, k, density):
    for block_shape in ((16, 16), (3, 50)):
        blocks = random_blocks(n, k, block_shape, density, dtype=dtype)
        for m in (0, 1, 20):
            check(blocks, *operands(blocks, m))
            y, grad_x, _ = products(blocks, *operands(blocks, m))
            assert density > 0 or torch.equal(y, operands(blocks, m)[2].expand(m, n))
            assert density > 0 or not grad_x.any()


@pytest.mark.parametrize("m", [3, 40])
def test_empty_rows_and_columns_of_blocks(isa, dtype, m):
    whole = random_blocks(200, 300, (16, 16), dtype=dtype)
    kept = (whole.transposed.row_indices.argsort(), whole)[1]
    rows = reference.block_rows_of(kept.crow_indices)
    some = (rows % 3 != 1) & (kept.col_indices % 4 != 2) & (rows > 0)
    counts = rows[some].bincount(minlength=len(kept.crow_indices) - 1)
    blocks = Blocks(kept.values[some], F.pad(counts.cumsum(0), (1, 0)), kept.col_indices[some], kept.shape)
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
@pytest.mark.parametrize("m", [1, 8, 40, 1100])
@pytest.mark.parametrize(("n", "k"), [(300, 520), (32, 4000), (4000, 32)], ids=str)
def test_number_of_threads_does_not_change_a_bit(isa, dtype, m, n, k):
    blocks = random_blocks(n, k, (16, 32), density=0.2, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(products(blocks, *operands(blocks, m)))
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

VIEWS = {
    "transposed": lambda x: x[:70, :40].t().contiguous().t()[:12],
    "every second column": lambda x: x[:9, ::2],
    "every second row": lambda x: x[::2, :70],
    "expanded row": lambda x: x[:1, :70].expand(20, 70),
    "expanded scalar": lambda x: x[3, 4].expand(3, 70),
    "storage offset": lambda x: x.reshape(-1)[1:71],
    "1-D": lambda x: x[0, :70],
    "3-D": lambda x: x[:30, :70].reshape(2, 15, 70),
    "permuted": lambda x: x[:30, :70].reshape(5, 6, 70).permute(1, 0, 2),
    "no rows": lambda x: x[:0, :70],
    "no rows, 3-D": lambda x: x[:30, :70].reshape(5, 6, 70)[:, :0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_x_and_grad(isa, dtype, name):
    x = VIEWS[name](random_numbers(80, 140, density=1.0, dtype=dtype))
    grad = VIEWS[name](random_numbers(80, 140, density=1.0, seed=1, dtype=dtype))
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
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        dual = torch.autograd.forward_ad.make_dual(x.requires_grad_(), x.detach())
        bsr_linear(dual, blocks.values, *blocks.index, 37)


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
    for m in (2, 3, 9, 40):
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

BLOCKS = random_blocks(37, 53, (16, 24), density=1.0)
LINEAR = dict(zip(("x", "values", "crow_indices", "col_indices", "out_features"), (
    torch.ones(2, 53), BLOCKS.values, *BLOCKS.index, 37), strict=True))  # fmt: skip
