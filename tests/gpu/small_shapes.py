"""Every kernel on small and awkward shapes, for compute-sanitizer, under which everything is slow (tests/run_gpu.sh).

Tensors are made on the CPU and copied, so that hardly a kernel runs but those of bitmask. Results are compared with the
CPU's; weights are hostile, too. Memory is allocated one tensor at a time, with nothing behind it, if
PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

import argparse

import torch
from torch import Tensor

from bitmask import FormatError, ops

SHAPES = [(1, 1), (5, 13), (65, 131), (33, 1025), (130, 64), (3, 5001), (2, 0), (0, 4)]
CODEC_DTYPES = [torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
LINEAR_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 128]
CUBLAS_ROWS = [700]  # for which a weight is decompressed and multiplied by cuBLAS
HOSTILE = [-(2**63), -1, 2**31, 2**62]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, density: float) -> Tensor:
    """Small integers, of which sums are exact."""
    return (torch.randint(1, 3, shape) * (torch.rand(shape) < density)).to(dtype)


def check(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless both are equal; they may be NaN."""
    assert found.dtype == expected.dtype, what
    assert torch.allclose(found.cpu(), expected, rtol=1e-2, atol=0, equal_nan=True), what


def run_codec(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """There, into buffers of every size, and back; then hostile parts."""
    dense = numbers(shape, dtype, 0.5)
    expected, what = ops.compress(dense), f"{dtype} {shape}"
    parts = ops.compress(dense.to(device))
    for name, found, part in zip(("values", "bitmasks", "row_offsets"), parts, expected, strict=True):
        assert torch.equal(found.cpu(), part), f"compress {what}: {name}"
    for capacity in {0, len(expected[0]) // 2, len(expected[0]), dense.numel()}:
        room = torch.empty(capacity, dtype=dtype, device=device)
        bitmasks, row_offsets = torch.empty_like(parts[1]), torch.empty_like(parts[2])
        nnz = ops.compress_into(dense.to(device), room, bitmasks, row_offsets)
        filled = min(capacity, len(expected[0]))
        assert int(nnz) == len(expected[0]), f"compress_into {what}"
        assert torch.equal(room.cpu()[:filled], expected[0][:filled]), f"compress_into {what}"
    assert torch.equal(ops.decompress(*parts, shape).cpu(), dense), f"decompress {what}"
    ops.validate(*parts, shape)
    for values, bitmasks, row_offsets in hostile(expected, device):
        try:
            ops.decompress(values, bitmasks, row_offsets, shape)
        except FormatError:
            continue
        raise AssertionError(f"decompress {what}: a fault was not noticed")


def run_linear(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rows: list[int]) -> None:
    """Honest and hostile weights for each number of rows of x."""
    dense, bias = numbers(shape, dtype, 0.5), numbers(shape[:1], dtype, 1.0)
    expected = ops.compress(dense)
    parts = [part.to(device) for part in expected]
    for m in rows:
        x = numbers((m, shape[1]), dtype, 0.9)
        for offset in (None, bias):
            y = ops.linear(x.to(device), *parts, shape[1], None if offset is None else offset.to(device))
            check(f"linear {dtype} {shape} m={m}", y, ops.linear(x, *expected, shape[1], offset))
        for faulty in hostile(expected, device):
            try:
                assert ops.linear(x.to(device), *faulty, shape[1]).cpu().isnan().any(), f"{dtype} {shape} m={m}"
            except FormatError:  # on the CPU
                continue


def hostile(parts: tuple[Tensor, Tensor, Tensor], device: torch.device) -> list[list[Tensor]]:
    """Weights that contradict themselves: too few values, offsets out of range."""
    values, bitmasks, row_offsets = parts
    if len(values) == 0:
        return []
    found = [[values[:-1], bitmasks, row_offsets], [values[:0], bitmasks, row_offsets]]
    for start in HOSTILE:
        offsets = row_offsets.clone()
        offsets[len(offsets) // 2] = start
        found.append([values, bitmasks, offsets])
    return [[part.clone().to(device) for part in each] for each in found]


def main() -> None:
    """Run everything; an AssertionError names what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--cublas", action="store_true", help="also what is left to cuBLAS")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    for shape in SHAPES:
        for dtype in CODEC_DTYPES:
            run_codec(device, dtype, shape)
        for dtype in LINEAR_DTYPES:
            run_linear(device, dtype, shape, ROWS + (CUBLAS_ROWS if arguments.cublas else []))
        if arguments.cublas:
            run_linear(device, torch.float64, shape, [1, 5])
    print("small shapes: ok")


if __name__ == "__main__":
    main()
