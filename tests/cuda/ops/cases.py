"""What only the CUDA ops do: waiting, captured graphs, NaN for faulty weights, errors of the GPU (see run.sh)."""

import ctypes

import pytest
import torch
from torch import Tensor

import bitmask
from bitmask import FormatError, ops, reference

LIBRARY = ctypes.CDLL("build/cuda/ops/libops.so")
INVALID_DEVICE_FUNCTION, NO_KERNEL_IMAGE, OUT_OF_RESOURCES = 98, 209, 701


def said(name: str) -> ctypes.c_int:
    """A variable of as_cpu.h."""
    return ctypes.c_int.in_dll(LIBRARY, f"bitmask_twin_{name}")


@pytest.fixture
def capturing():
    said("capturing").value = 1
    yield
    said("capturing").value = 0


@pytest.fixture
def waits():
    """How often the GPU was waited for since the last call."""
    last = said("waits").value

    def count() -> int:
        nonlocal last
        before, last = last, said("waits").value
        return last - before

    return count


def sparse(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    numbers = torch.randn(rows, cols, generator=generator)
    return torch.where(torch.rand(rows, cols, generator=generator) < 0.4, numbers, 0.0).to(dtype)


def buffers(dense: Tensor, capacity: int) -> list[Tensor]:
    return [
        torch.zeros(capacity, dtype=dense.dtype),
        torch.empty(ops.bitmask_sizes(dense.shape), dtype=torch.uint8),
        torch.empty(len(dense), dtype=torch.int64),
    ]


def test_who_waits(waits):
    dense, x = sparse(30, 70), torch.randn(3, 70)
    parts = ops.compress(dense)
    assert waits() == 1
    ops.decompress(*parts, dense.shape)
    assert waits() == 1
    ops.validate(*parts, dense.shape)
    assert waits() == 1
    ops.compress_into(dense, *buffers(dense, 30 * 70))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        weight = parts[0].to(dtype), *parts[1:]
        ops.linear(x.to(dtype).requires_grad_(), *weight, 70).sum().backward()
    assert waits() == 0


@pytest.mark.usefixtures("capturing")
def test_captured():
    dense = sparse(30, 70)
    parts = reference.compress(dense)
    with pytest.raises(RuntimeError, match=r"compress waits .* graph is captured; compress_into does not"):
        ops.compress(dense)
    with pytest.raises(RuntimeError, match=r"validate waits .* graph is captured"):
        ops.validate(*parts, dense.shape)
    written = buffers(dense, dense.numel())
    assert ops.compress_into(dense, *written).item() == parts[0].numel()
    assert torch.equal(written[0][: parts[0].numel()], parts[0])
    assert torch.equal(ops.decompress(*parts, dense.shape), dense)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_captured_decompress_of_faulty_parts_is_nan(dtype):
    values, bitmasks, row_offsets = reference.compress(sparse(30, 70).to(dtype))
    got = ops.decompress(values, bitmasks, row_offsets + 1, [30, 70])
    assert got.to(torch.complex64).isnan().all()


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fnuz])
def test_captured_decompress_to_what_has_no_nan_is_refused(dtype):
    parts = reference.compress(sparse(30, 70).to(dtype))
    with pytest.raises(RuntimeError, match="decompress waits"):
        ops.decompress(*parts, [30, 70])


FAULTS = {
    "shifted": lambda bitmasks, offsets: offsets.add_(1),
    "negative": lambda bitmasks, offsets: offsets[17].fill_(-5),
    "far out": lambda bitmasks, offsets: offsets[17].fill_(2**62),
    "decreasing": lambda bitmasks, offsets: offsets[17].copy_(offsets[15]),
    "a bit more": lambda bitmasks, offsets: bitmasks[17, 0].bitwise_not_(),
    "padding": lambda bitmasks, offsets: bitmasks[17, -1].bitwise_or_(0x80),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ops.LINEAR_DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 9, 40])
def test_faulty_weights_give_nan_where_they_are_faulty(dtype, m, fault):
    dense = sparse(30, 70, dtype)
    values, bitmasks, row_offsets = reference.compress(dense)
    FAULTS[fault](bitmasks, row_offsets)
    with pytest.raises(FormatError):
        ops.validate(values, bitmasks, row_offsets, dense.shape)
    x = torch.randn(m, 70).to(dtype)
    got = ops.linear(x, values, bitmasks, row_offsets, 70)
    expected = torch.nn.functional.linear(x.double(), dense.double())
    faulty_row = 0 if fault == "shifted" else 17
    assert got[:, faulty_row].isnan().all()
    if fault != "shifted":  # each row by itself could be right then, but for the first and the last
        wrong = ~torch.isclose(got.double(), expected, rtol=0.05, atol=0.05)
        assert got[wrong].isnan().all()
    assert ops._backward_input(torch.randn(m, 30).to(dtype), values, bitmasks, row_offsets, 70).isnan().all()


def test_weight_in_parts():
    """Rows of 8 MB: cuBLAS is given few at a time."""
    rows, cols = 10, 1 << 20
    dense, x = torch.zeros(rows, cols, dtype=torch.float64), torch.ones(2, cols, dtype=torch.float64)
    dense[:, ::1000] = torch.arange(1.0, rows + 1)[:, None]
    bias = torch.arange(rows, dtype=torch.float64) * 1e6
    parts = ops.compress(dense)
    assert torch.equal(ops.linear(x, *parts, cols, bias), dense.sum(1).add(bias).expand(2, rows))
    parts[2][rows - 1] += 1
    assert ops.linear(x, *parts, cols, bias).isnan().all()


def test_errors_of_the_gpu():
    dense = sparse(30, 70)
    for unsupported in (NO_KERNEL_IMAGE, INVALID_DEVICE_FUNCTION):
        said("error").value = unsupported
        with pytest.raises(
            RuntimeError, match=r"compress: CUDA error: .*built for the twin.*capability.*TORCH_CUDA_ARCH_LIST"
        ):
            ops.compress(dense)
    said("error").value = OUT_OF_RESOURCES
    with pytest.raises(RuntimeError, match=r"compress: CUDA error: cudaErrorLaunchOutOfResources$"):
        ops.compress(dense)
    assert bitmask.compress(dense)[0].numel() == int(dense.count_nonzero())


def test_out_of_memory():
    parts = ops.compress(sparse(6, 20))
    with pytest.raises(
        torch.OutOfMemoryError, match=r"CUDA out of memory.*\[17592186044416, 6\] for linear.* MiB are free"
    ):
        ops.linear(torch.ones(1, 20).expand(2**44, 20), *parts, 20)
