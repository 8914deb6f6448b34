"""What only the CUDA op on 2:4 blocks does: it waits for nothing, and faulty parts give NaN (see run.sh)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitmask import FormatError, reference
from bitmask.ops_block_two_four import bsr_linear_24
from bitmask.ops_two_four import pack_24
from tests.cuda.ops.cases import said, waits  # noqa: F401  # fixtures
from tests.cuda.ops.cases_block import as_on_a_gpu  # noqa: F401

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# A weight [45, 90] in blocks of 16 x 32, the last ones of which reach past it: block rows of 2, 0 and 2 blocks.
ROWS, COLS, BLOCK_SHAPE = 45, 90, (16, 32)
CROW_INDICES, COL_INDICES = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 2, 1, 2])


def parts_of(dtype: torch.dtype, block_shape: tuple[int, int] = BLOCK_SHAPE) -> tuple[Tensor, Tensor]:
    """values and metadata of four blocks."""
    blocks = torch.randn(4, *block_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return pack_24(blocks, prune=True)


def expected(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor) -> Tensor:
    blocks = reference.unpack_24(values, metadata).double()
    return F.linear(x.double(), reference.bsr_to_dense(blocks, CROW_INDICES, COL_INDICES, (ROWS, COLS)), bias.double())


def operands(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, COLS, generator=generator).to(dtype), torch.randn(ROWS, generator=generator).to(dtype)


def near(got: Tensor, wanted: Tensor) -> Tensor:
    return torch.isclose(got.double(), wanted, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("capturing", [0, 1])
@pytest.mark.parametrize("m", [1, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_waits_for_nothing(waits, dtype, m, capturing):  # noqa: F811
    parts, (x, bias) = parts_of(dtype), operands(m, dtype)
    waits()
    said("capturing").value = capturing
    try:
        got = bsr_linear_24(x, *parts, CROW_INDICES, COL_INDICES, ROWS, bias)
    finally:
        said("capturing").value = 0
    assert waits() == 0
    assert near(got, expected(x, *parts, bias)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_captured(waits, as_on_a_gpu, dtype):  # noqa: F811
    parts, (x, _) = parts_of(dtype), operands(9, dtype)
    grad = torch.randn(9, ROWS, generator=torch.Generator().manual_seed(2)).to(dtype)
    waits()
    said("capturing").value = 1
    try:
        y = bsr_linear_24(x.requires_grad_(), *parts, CROW_INDICES, COL_INDICES, ROWS)
        (got,) = torch.autograd.grad(y, x, grad)
    finally:
        said("capturing").value = 0
    assert waits() == 0
    blocks = reference.unpack_24(*parts).double()
    assert near(got, grad.double() @ reference.bsr_to_dense(blocks, CROW_INDICES, COL_INDICES, (ROWS, COLS))).all()


@pytest.mark.parametrize("m", [1, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faulty_metadata_give_nan(dtype, m):
    (values, metadata), (x, bias) = parts_of(dtype), operands(m, dtype)
    wanted = expected(x, values, metadata, bias)
    metadata[2, 5, 0] ^= 1  # of row 32 + 5 of the weight
    got = bsr_linear_24(x, values, metadata, CROW_INDICES, COL_INDICES, ROWS, bias)
    assert got[:, 37].isnan().all()
    assert (near(got, wanted) | got.isnan()).all()


INDEX_FAULTS = {
    "starts": lambda crow, col: crow[1].fill_(5),
    "end": lambda crow, col: crow[3].fill_(3),
    "negative": lambda crow, col: col[2].fill_(-1),
    "far out": lambda crow, col: col[3].fill_(2**62),
    "descending": lambda crow, col: col.copy_(col.flip(0)),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faulty_indices_give_nan(dtype, m, fault):
    parts, (x, bias) = parts_of(dtype), operands(m, dtype)
    crow, col = CROW_INDICES.clone(), COL_INDICES.clone()
    INDEX_FAULTS[fault](crow, col)
    got = bsr_linear_24(x, *parts, crow, col, ROWS, bias)
    assert got.isnan().any()
    assert (near(got, expected(x, *parts, bias)) | got.isnan()).all()


def test_sizes_that_contradict():
    (values, metadata), (x, bias) = parts_of(torch.bfloat16), operands(3, torch.bfloat16)
    with pytest.raises(FormatError, match="metadata: got size"):
        bsr_linear_24(x, values, metadata[:, :, :-1], CROW_INDICES, COL_INDICES, ROWS, bias)
    with pytest.raises(FormatError, match="crow_indices: got size"):
        bsr_linear_24(x, values, metadata, CROW_INDICES[:-1], COL_INDICES, ROWS, bias)


@pytest.mark.parametrize("block_shape", [(15, 36), (45, 92), (1, 4)])
@pytest.mark.parametrize("m", [2, 33])
def test_shapes_that_tensor_cores_do_not_take(block_shape, m):
    rows, cols = 2 * block_shape[0], 2 * block_shape[1]
    values, metadata = parts_of(torch.float16, block_shape)
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(m)).half()
    crow, col = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 1])
    dense = reference.bsr_to_dense(reference.unpack_24(values, metadata).double(), crow, col, (rows, cols))
    assert near(bsr_linear_24(x, values, metadata, crow, col, rows), F.linear(x.double(), dense)).all()
