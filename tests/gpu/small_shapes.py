"""Every kernel on small and awkward shapes, for compute-sanitizer, under which everything is slow (tests/run_gpu.sh).

Tensors are made on the CPU and copied, so that hardly a kernel runs but those of bitmask. Results are compared with the
CPU's; weights are hostile, too. Memory is allocated one tensor at a time, with nothing behind it, if
PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

import argparse
from itertools import product

import torch
from torch import Tensor

from bitmask import FormatError, ops, ops_block, ops_block_two_four, ops_two_four, reference

SHAPES = [(1, 1), (5, 13), (65, 131), (33, 1025), (130, 64), (3, 5001), (2, 0), (0, 4)]
CODEC_DTYPES = [torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
LINEAR_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 128]
CUBLAS_ROWS = [700]  # for which a weight is decompressed and multiplied by cuBLAS
HOSTILE = [-(2**63), -1, 2**31, 2**62]
BLOCK_SIZES = [(64, 128, (16, 16)), (70, 100, (32, 32)), (130, 200, (64, 64)), (37, 53, (5, 8)), (7, 35, (32, 64))]
BLOCK_ROWS = [1, 5, 8, 16, 17, 65, 130]
WARPGROUP_SIZE, WARPGROUP_ROWS = (128, 192, (64, 64)), [257]  # which the instructions of sm_90a multiply
HOSTILE_ROWS = [5, 65, 257]  # for which indices are hostile, too
STREAMED_ROWS = 16  # up to which every 2:4 weight of at most 32 bits is streamed; cuBLAS multiplies some others


def numbers(shape: tuple[int, ...], dtype: torch.dtype, density: float) -> Tensor:
    """Small integers, of which sums are exact."""
    return (torch.randint(1, 3, shape) * (torch.rand(shape) < density)).to(dtype)


def check(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless both are equal, but for what cuBLAS rounds in between; they may be NaN."""
    assert found.dtype == expected.dtype, what
    rtol = 2 * torch.finfo(expected.dtype).eps
    assert torch.allclose(found.cpu(), expected, rtol=rtol, atol=0, equal_nan=True), what


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


def run_blocks(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int, tuple[int, int]], rows: list[int]
) -> None:
    """Block-sparse products, and those of blocks that are 2:4; with hostile indices for some numbers of rows of x."""
    n, k, (height, width) = size
    kept = torch.rand(-(-n // height), -(-k // width)) < 0.5
    kept[-1, -1] = True
    index = [torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)), kept.nonzero()[:, 1].clone()]
    values = numbers((len(index[1]), height, width), dtype, 0.9)
    dense, packed = reference.bsr_to_dense(values, *index, (n, k)), ops_two_four.pack_24(values, prune=True)
    halved = reference.bsr_to_dense(reference.unpack_24(*packed), *index, (n, k))
    there, by_row = values.to(device), [part.to(device) for part in index]
    by_column = ops_block.bsr_transpose(*by_row, kept.shape[1])
    inside = reference.bsr_to_dense(torch.ones_like(values), *index, (n, k))
    for m in rows:
        x, grad, what = numbers((m, k), dtype, 0.9), numbers((m, n), dtype, 0.9), f"blocks {dtype} {size} m={m}"
        x_there, grad_there = x.to(device), grad.to(device)
        check(what, ops_block.bsr_linear(x_there, there, *by_row, n), (x.double() @ dense.double().T).to(dtype))
        found = ops_block.bsr_linear_backward_input(grad_there, there, by_column, k)
        check(what, found, (grad.double() @ dense.double()).to(dtype))
        sampled = ops_block.bsr_linear_backward_values(grad_there, x_there, *by_row, (height, width))
        exact = ((grad.double().T @ x.double()) * inside).to(dtype)
        check(what, reference.bsr_to_dense(sampled.cpu(), *index, (n, k)), exact)
        half = ops_block_two_four.bsr_linear_24(x_there, *(part.to(device) for part in packed), *by_row, n)
        check(what, half, (x.double() @ halved.double().T).to(dtype))
        for entry, part in product(HOSTILE if m in HOSTILE_ROWS else [], range(2)):
            faulty = [each.clone() for each in by_row]
            faulty[part][-1] = entry
            try:
                assert ops_block.bsr_linear(x_there, there, *faulty, n).cpu().isnan().any(), what
                found = ops_block.bsr_linear_backward_values(grad_there, x_there, *faulty, (height, width))
                assert found.cpu().isnan().any(), what
            except FormatError:  # on the CPU
                continue


def run_tf32(device: torch.device) -> None:
    """Blocks of float32 multiplied as tf32, which holds the small integers, too."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        for size in BLOCK_SIZES:
            run_blocks(device, torch.float32, size, BLOCK_ROWS)
    finally:
        matmul.fp32_precision = before


def is_left_to_cublas(dtype: torch.dtype, columns: int, m: int) -> bool:
    """Whether no kernel takes so many rows of x times a 2:4 weight (csrc/cuda/two_four_plan.cpp)."""
    if dtype == torch.float64:
        return True
    return m > STREAMED_ROWS and (dtype == torch.float32 or columns % 16 != 0)


def run_two_four(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], cublas: bool) -> None:
    """Packing and products with honest and faulty metadata."""
    n, k = shape[0], shape[1] // 4 * 4
    dense, what = numbers((n, k), dtype, 0.9), f"2:4 {dtype} {(n, k)}"
    expected = ops_two_four.pack_24(dense, prune=True)
    parts = ops_two_four.pack_24(dense.to(device), prune=True)
    for found, part in zip(parts, expected, strict=True):
        assert torch.equal(found.cpu(), part), what
    pruned = ops_two_four.unpack_24(*parts)
    assert torch.equal(pruned.cpu(), ops_two_four.unpack_24(*expected)), what
    for found, part in zip(ops_two_four.pack_24(pruned), expected, strict=True):
        assert torch.equal(found.cpu(), part), what
    if dtype not in [*LINEAR_DTYPES, torch.float64]:
        return
    for m in BLOCK_ROWS:
        if is_left_to_cublas(dtype, k, m) and not cublas:
            continue
        x = numbers((m, k), dtype, 0.9)
        y = ops_two_four.linear_24(x.to(device), *parts)
        check(f"{what} m={m}", y, (x.double() @ pruned.cpu().double().T).to(dtype))
        if parts[1].numel() > 0:
            faulty = parts[1].clone()
            faulty[-1, -1] = 0xFF
            try:
                assert ops_two_four.linear_24(x.to(device), parts[0], faulty).cpu().isnan().any(), what
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
            if not dtype.is_complex:
                run_two_four(device, dtype, shape, arguments.cublas)
        for dtype in LINEAR_DTYPES:
            run_linear(device, dtype, shape, ROWS + (CUBLAS_ROWS if arguments.cublas else []))
        run_two_four(device, torch.float16, shape, arguments.cublas)
        if arguments.cublas:
            run_linear(device, torch.float64, shape, [1, 5])
    for size in BLOCK_SIZES:
        for dtype in [*LINEAR_DTYPES, torch.float64]:
            run_blocks(device, dtype, size, BLOCK_ROWS)
    for dtype in LINEAR_DTYPES:
        run_blocks(device, dtype, WARPGROUP_SIZE, WARPGROUP_ROWS)
    run_tf32(device)
    print("small shapes: ok")


if __name__ == "__main__":
    main()
