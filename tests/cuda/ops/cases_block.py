"""What only the CUDA ops on block-sparse weights do: waiting, captured graphs, NaN for faulty indices (see run.sh)."""

import functools

import pytest
import torch
from torch import Tensor

from bitmask import FormatError, ops_block, ops_block_two_four, reference
from bitmask.ops_block import TransposedIndex, bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values
from tests.cuda.ops.cases import OUT_OF_RESOURCES, said, waits  # noqa: F401  # fixtures

NATIVE = torch.ops.bitmask
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# A weight [37, 53] in blocks of 8 x 16: block rows of 2, 0, 4, 1 and 2 blocks; the last ones reach past it.
ROWS, COLS, BLOCK_SHAPE = 37, 53, (8, 16)
CROW_INDICES = torch.tensor([0, 2, 2, 6, 7, 9])
COL_INDICES = torch.tensor([0, 3, 0, 1, 2, 3, 1, 0, 3])


def values_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(9, *BLOCK_SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def transposed() -> TransposedIndex:
    return ops_block.bsr_transpose(CROW_INDICES, COL_INDICES, 4)


def operands(m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x and a gradient."""
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, COLS, generator=generator).to(dtype), torch.randn(m, ROWS, generator=generator).to(dtype)


def dense_of(values: Tensor) -> Tensor:
    return reference.bsr_to_dense(values.double(), CROW_INDICES, COL_INDICES, (ROWS, COLS))


def test_who_waits(waits):  # noqa: F811
    index = transposed()
    assert waits() > 0
    for dtype in DTYPES:
        x, values = operands(3, dtype)[0].requires_grad_(), values_of(dtype).requires_grad_()
        bias = torch.ones(ROWS, dtype=dtype, requires_grad=True)
        bsr_linear(x, values, CROW_INDICES, COL_INDICES, ROWS, bias, index).sum().backward()
        assert torch.allclose(x.grad.double(), dense_of(values.detach()).sum(0).expand(3, COLS), rtol=0.05, atol=0.05)
    assert waits() == 0


@pytest.mark.parametrize("m", [16, 255, 256])
def test_rows_around_those_of_other_kernels(m):
    """Blocks that warpgroups take, from 256 rows of x on; integers, whose sums are exact."""
    generator = torch.Generator().manual_seed(m)
    crow_indices, col_indices = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 2])
    draw = functools.partial(torch.randint, -3, 4, generator=generator)
    x, values = draw((m, 192)).bfloat16().requires_grad_(), draw((3, 64, 64)).bfloat16().requires_grad_()
    y = bsr_linear(
        x, values, crow_indices, col_indices, 128, None, ops_block.bsr_transpose(crow_indices, col_indices, 3)
    )
    grad = draw((m, 128)).bfloat16()
    y.backward(grad)
    wide = values.detach().double().requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    expected = wide_x @ reference.bsr_to_dense(wide, crow_indices, col_indices, (128, 192)).T
    expected.backward(grad.double())
    for got, exact in ((y, expected), (x.grad, wide_x.grad), (values.grad, wide.grad)):
        assert torch.equal(got, exact.bfloat16())


def test_captured():
    index, (x, grad), values = transposed(), operands(3), values_of()
    said("capturing").value = 1
    try:
        with pytest.raises(RuntimeError, match=r"bsr_transpose waits .* graph is captured; transpose before"):
            transposed()
        y = bsr_linear(x, values, CROW_INDICES, COL_INDICES, ROWS, None, index)
        grad_x = bsr_linear_backward_input(grad, values, index, COLS)
        grad_values = bsr_linear_backward_values(grad, x, CROW_INDICES, COL_INDICES, BLOCK_SHAPE)
    finally:
        said("capturing").value = 0
    dense = dense_of(values)
    torch.testing.assert_close(y.double(), x.double() @ dense.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_x.double(), grad.double() @ dense, rtol=1e-4, atol=1e-4)
    assert grad_values.isfinite().all()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Gradients transpose indices as those of a GPU."""
    for module in (ops_block, ops_block_two_four):
        monkeypatch.setattr(module, "transposed_for_gradients", ops_block._transpose_by_sorting)


def test_gradients_that_transpose_are_captured(waits, as_on_a_gpu):  # noqa: F811
    (x, grad), values = operands(3), values_of()

    def derivatives(x, values, grad, product):
        """First ones, and those of their squares."""
        first = torch.autograd.grad(product(x, values), (x, values), grad, create_graph=True)
        return *first, *torch.autograd.grad(sum(tensor.square().sum() for tensor in first), (x, values))

    waits()
    said("capturing").value = 1
    try:
        product = functools.partial(bsr_linear, crow_indices=CROW_INDICES, col_indices=COL_INDICES, out_features=ROWS)
        found = derivatives(x.requires_grad_(), values.requires_grad_(), grad, product)
    finally:
        said("capturing").value = 0
    assert waits() == 0
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, values)]
    expected = derivatives(*exact, grad.double(), lambda x, values: x @ dense_of(values).t())
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("entry", [-1, 4, 2**62])
def test_faulty_indices_give_nan_gradients(as_on_a_gpu, entry):
    (x, grad), columns = operands(3), COL_INDICES.clone()
    columns[3] = entry
    y = bsr_linear(x.requires_grad_(), values_of(), CROW_INDICES, columns, ROWS)
    assert torch.autograd.grad(y, x, grad)[0].isnan().any()


@pytest.mark.parametrize(("line", "entry"), [(0, 1), (0, -1), (1, 3), (2, 7), (5, 8), (5, 10)])
def test_faulty_starts_give_nan_gradients(as_on_a_gpu, line, entry):
    (x, grad), starts = operands(3), CROW_INDICES.clone()
    starts[line] = entry
    y = bsr_linear(x.requires_grad_(), values_of(), starts, COL_INDICES, ROWS)
    assert torch.autograd.grad(y, x, grad)[0].isnan().any()


# Entries that are changed, and the block rows that are faulty then.
FAULTY_ROWS = {
    "does not begin at 0": (CROW_INDICES, 0, 1, {0}),
    "negative": (CROW_INDICES, 3, -5, {2, 3}),
    "far out": (CROW_INDICES, 3, 2**62, {2, 3}),
    "ends early": (CROW_INDICES, 5, 8, {4}),
    "descending starts": (CROW_INDICES, 2, 1, {1}),
    "column out of range": (COL_INDICES, 5, 4, {2}),
    "negative column": (COL_INDICES, 6, -1, {3}),
    "column twice": (COL_INDICES, 1, 0, {0}),
}


def with_fault(fault: str) -> tuple[Tensor, Tensor, set[int]]:
    part, place, entry, faulty = FAULTY_ROWS[fault]
    index = [CROW_INDICES.clone(), COL_INDICES.clone()]
    index[0 if part is CROW_INDICES else 1][place] = entry
    return *index, faulty


@pytest.mark.parametrize("fault", FAULTY_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 9, 40])
def test_faulty_lines_give_nan_where_they_are_faulty(dtype, m, fault):
    *index, faulty = with_fault(fault)
    x, values = operands(m, dtype)[0], values_of(dtype)
    y = bsr_linear(x, values, *index, ROWS).double()
    is_faulty = torch.tensor([row // BLOCK_SHAPE[0] in faulty for row in range(ROWS)])
    assert y[:, is_faulty].isnan().all()
    if fault != "descending starts":  # the line before is a sound one of other blocks then
        expected = x.double() @ dense_of(values).t()
        torch.testing.assert_close(y[:, ~is_faulty], expected[:, ~is_faulty], rtol=0.02, atol=0.1)
    with pytest.raises(FormatError):
        ops_block.bsr_transpose(*index, 4)


@pytest.mark.parametrize("fault", FAULTY_ROWS)
@pytest.mark.parametrize("m", [0, 3])
def test_gradient_of_values_of_a_faulty_index_is_nan(m, fault):
    x, grad = operands(m)
    assert bsr_linear_backward_values(grad, x, CROW_INDICES, COL_INDICES, BLOCK_SHAPE).isfinite().all()
    assert bsr_linear_backward_values(grad, x, *with_fault(fault)[:2], BLOCK_SHAPE).isnan().all()


# Changes of a transposed index.
CONTRADICTIONS = {
    "starts": lambda index: index.ccol_indices[1].add_(1),
    "starts far out": lambda index: index.ccol_indices[2].fill_(2**40),
    "row out of range": lambda index: index.row_indices[-1].fill_(5),
    "negative row": lambda index: index.row_indices[0].fill_(-1),
    "rows of another column": lambda index: index.row_indices.copy_(torch.tensor([0, 2, 4, 2, 3, 4, 0, 2, 4])),
    "order out of range": lambda index: index.order[3].fill_(9),
    "negative order": lambda index: index.order[3].fill_(-(2**63)),
    "block twice": lambda index: index.order[3].copy_(index.order[4]),
    "order of other values": lambda index: index.order.copy_(index.order.flip(0)),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_contradicting_transposed_index_gives_nan(contradiction):
    index, (x, grad), values = transposed(), operands(5), values_of()
    sound = bsr_linear(x, values, CROW_INDICES, COL_INDICES, ROWS, None, index)
    assert torch.equal(sound, bsr_linear(x, values, CROW_INDICES, COL_INDICES, ROWS))
    assert bsr_linear_backward_input(grad, values, index, COLS).isfinite().all()
    CONTRADICTIONS[contradiction](index)
    assert bsr_linear(x, values, CROW_INDICES, COL_INDICES, ROWS, None, index).isnan().all()
    if contradiction != "rows of another column":  # that may be a weight, but another one
        assert bsr_linear_backward_input(grad, values, index, COLS).isnan().all()


def test_tf32():
    """Rounds what is multiplied to 11 bits, at most: in float32 alone."""
    index = transposed()
    for dtype in DTYPES:
        (x, grad), values = operands(20, dtype), values_of(dtype)
        products = {
            NATIVE.bsr_linear: (x, values, CROW_INDICES, COL_INDICES, ROWS, None, *index),
            NATIVE.bsr_linear_backward_input: (grad, values, *index, COLS),
            NATIVE.bsr_linear_backward_values: (grad, x, CROW_INDICES, COL_INDICES, BLOCK_SHAPE),
        }
        for op, args in products.items():
            got, exact = op(*args, allow_tf32=True), op(*args)
            if dtype == torch.float32:
                torch.testing.assert_close(got, exact, rtol=0.01, atol=0.1)
            else:
                assert torch.equal(got, exact)


def test_nothing_to_multiply():
    index, bias = transposed(), torch.arange(float(ROWS))
    none = torch.zeros(0, dtype=torch.int64)
    x, grad = operands(0)
    assert bsr_linear(x, values_of(), CROW_INDICES, COL_INDICES, ROWS, bias, index).shape == (0, ROWS)
    assert bsr_linear_backward_input(grad, values_of(), index, COLS).shape == (0, COLS)
    assert not bsr_linear_backward_values(grad, x, CROW_INDICES, COL_INDICES, BLOCK_SHAPE).any()
    x, grad = operands(3)
    nothing = torch.empty(0, *BLOCK_SHAPE), torch.zeros(6, dtype=torch.int64), none
    empty = ops_block.bsr_transpose(*nothing[1:], 4)
    assert torch.equal(bsr_linear(x, *nothing, ROWS, bias, empty), bias.expand(3, ROWS))
    assert torch.equal(bsr_linear_backward_input(grad, nothing[0], empty, COLS), torch.zeros(3, COLS))
    assert bsr_linear_backward_values(grad, x, *nothing[1:], BLOCK_SHAPE).shape == (0, *BLOCK_SHAPE)
    no_outputs = torch.zeros(1, dtype=torch.int64), none
    assert bsr_linear(x, nothing[0], *no_outputs, 0).shape == (3, 0)
    assert bsr_linear_backward_input(grad, nothing[0], ops_block.bsr_transpose(nothing[1], none, 0), 0).shape == (3, 0)
    y = bsr_linear(x[:, :0], nothing[0], nothing[1], none, ROWS, bias)
    assert torch.equal(y, bias.expand(3, ROWS))


def test_blocks_of_no_line():
    """There is no line to be faulty, yet blocks."""
    values, one = values_of()[:1], torch.zeros(1, dtype=torch.int64)
    assert bsr_linear(torch.ones(3, COLS), values, one, one, 0).shape == (3, 0)
    grad_values = bsr_linear_backward_values(torch.ones(3, 0), torch.ones(3, COLS), one, one, BLOCK_SHAPE)
    assert grad_values.isnan().all()
    y = bsr_linear(torch.ones(3, 0), values, torch.tensor([0, 1]), one, 5)
    assert y.isnan().all()


def test_errors():
    (x, _), index = operands(3), transposed()
    args = (x, values_of(), CROW_INDICES, COL_INDICES, ROWS)
    with pytest.raises((RuntimeError, ValueError), match=r"ccol_indices, row_indices, order: got 1 of them"):
        NATIVE.bsr_linear(*args, None, index.ccol_indices)
    with pytest.raises((RuntimeError, ValueError), match=r"order: got size \[8\], expected \[9\] \(one per block\)"):
        NATIVE.bsr_linear(*args, None, index.ccol_indices, index.row_indices, index.order[1:])
    with pytest.raises(FormatError, match=r"crow_indices\[5\]: got 8, expected 9"):
        ops_block.bsr_transpose(*with_fault("ends early")[:2], 4)
    with pytest.raises(TypeError, match=r"x: got dtype torch.float16, expected torch.float32"):
        bsr_linear(x.half(), *args[1:])
    said("error").value = OUT_OF_RESOURCES
    with pytest.raises(RuntimeError, match=r"bsr_linear: CUDA error: cudaErrorLaunchOutOfResources$"):
        bsr_linear(*args)


def test_out_of_memory():
    with pytest.raises(
        torch.OutOfMemoryError, match=r"CUDA out of memory.*\[17592186044416, 37\] for bsr_linear .* MiB are free"
    ):
        bsr_linear(torch.ones(1, COLS).expand(2**44, COLS), values_of(), CROW_INDICES, COL_INDICES, ROWS)
    with pytest.raises(torch.OutOfMemoryError, match=r"\[1125899906842625\] for bsr_transpose"):
        ops_block.bsr_transpose(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2**50)
