"""What only the CUDA ops of 2:4 do: waiting, captured graphs, NaN for faulty weights, weights in parts (see run.sh)."""

import pytest
import torch
from torch import Tensor

from bitmask import FormatError, ops_two_four
from tests.cuda.ops.cases import capturing, said, waits  # noqa: F401  # fixtures

LINEAR_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sparse(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    dense = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).mul(8).to(dtype)
    groups = dense.reshape(rows, cols // 4, 4)
    groups[..., 1::2] = 0
    return dense


def test_who_waits(waits):  # noqa: F811
    dense, x = sparse(30, 68), torch.randn(3, 68)
    parts = ops_two_four.pack_24(dense)
    assert waits() == 1
    ops_two_four.unpack_24(*parts)
    assert waits() == 1
    ops_two_four.validate_24(*parts)
    assert waits() == 1
    ops_two_four.pack_24(torch.randn(8, 8), prune=True)
    ops_two_four.prune_24(torch.randn(8, 8))
    ops_two_four.prune_24(torch.randn(8, 8), transposable=True)
    for dtype in LINEAR_DTYPES:
        weight = parts[0].to(dtype), parts[1]
        ops_two_four.linear_24(x.to(dtype).requires_grad_(), *weight).sum().backward()
    assert waits() == 0


@pytest.mark.usefixtures("capturing")
def test_captured():
    dense = sparse(30, 68)
    values = dense.reshape(30, 17, 4)[..., ::2].reshape(30, 34)
    metadata = torch.full([30, 9], 0x55, dtype=torch.uint8)
    metadata[:, -1] = 0x05
    with pytest.raises(RuntimeError, match=r"pack_24 waits .* graph is captured; with prune=True it does not"):
        ops_two_four.pack_24(dense)
    with pytest.raises(RuntimeError, match=r"validate_24 waits .* graph is captured"):
        ops_two_four.validate_24(values, metadata)
    packed = ops_two_four.pack_24(dense, prune=True)
    assert torch.equal(packed[0], values)
    assert torch.equal(packed[1], metadata)
    assert torch.equal(ops_two_four.unpack_24(values, metadata), dense)


def faulty(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, metadata = ops_two_four.pack_24(sparse(30, 68, dtype))
    metadata[17, 3] = 0x57
    return values, metadata


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_captured_unpack_of_faulty_parts_is_nan(dtype):
    parts = faulty(dtype)
    said("capturing").value = 1
    try:
        got = ops_two_four.unpack_24(*parts)
    finally:
        said("capturing").value = 0
    assert got.float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fnuz])
def test_captured_unpack_to_what_has_no_nan_is_refused(dtype):
    parts = faulty(dtype)
    said("capturing").value = 1
    try:
        with pytest.raises(RuntimeError, match="unpack_24 waits"):
            ops_two_four.unpack_24(*parts)
    finally:
        said("capturing").value = 0


def test_errors_name_the_lowest_faulty_row():
    values, metadata = faulty(torch.float16)
    metadata[29] = 0xFF
    message = r"metadata: row 17, columns 24 to 27: got 3 bits set, expected 2"
    with pytest.raises(FormatError, match=message):
        ops_two_four.unpack_24(values, metadata)
    with pytest.raises(FormatError, match=message):
        ops_two_four.validate_24(values, metadata)
    dense = sparse(30, 68)
    dense[20] = 1
    dense[11, 65:] = 1
    with pytest.raises(ValueError, match=r"dense: row 11, columns 64 to 67: got [34] non-zeros, expected at most 2"):
        ops_two_four.pack_24(dense)


@pytest.mark.parametrize("fault", [(3, 0x57), (8, 0x15)], ids=["group", "padding"])
@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 9, 40])
def test_faulty_weights_give_nan_where_they_are_faulty(dtype, m, fault):
    dense = sparse(30, 68, dtype)
    values, metadata = ops_two_four.pack_24(dense)
    x, bias = torch.randn(m, 68).to(dtype), torch.randn(30).to(dtype)
    expected = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    sound = ops_two_four.linear_24(x, values, metadata, bias)
    torch.testing.assert_close(sound.double(), expected, rtol=0.02, atol=0.5)
    metadata[17, fault[0]] = fault[1]
    got = ops_two_four.linear_24(x, values, metadata, bias)
    assert got[:, 17].isnan().all()
    right = got == sound
    assert got[~right].isnan().all()
    grad = torch.randn(m, 30).to(dtype)
    assert ops_two_four.linear_24_backward_input(grad, values, metadata).isnan().all()


def test_weight_in_parts():
    """Rows of 8 MB: cuBLAS is given few at a time."""
    rows, cols = 10, 1 << 20
    dense, x = torch.zeros(rows, cols, dtype=torch.float64), torch.ones(2, cols, dtype=torch.float64)
    dense[:, ::1000] = torch.arange(1.0, rows + 1)[:, None]
    bias = torch.arange(rows, dtype=torch.float64) * 1e6
    parts = ops_two_four.pack_24(dense)
    assert torch.equal(ops_two_four.linear_24(x, *parts, bias), dense.sum(1).add(bias).expand(2, rows))
    parts[1][rows - 1, 7] = 0
    assert ops_two_four.linear_24(x, *parts, bias).isnan().all()


def test_errors_of_the_gpu():
    said("error").value = 701
    with pytest.raises(RuntimeError, match=r"pack_24: CUDA error: cudaErrorLaunchOutOfResources$"):
        ops_two_four.pack_24(sparse(4, 8))
    values, metadata = ops_two_four.pack_24(sparse(6, 20))
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory.*\[17592186044416, 6\] for linear_24"):
        ops_two_four.linear_24(torch.ones(1, 20).expand(2**44, 20), values, metadata)
