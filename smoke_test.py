"""The ops once on every instruction set of this machine, against the pure Python reference, and once on the GPU.

Conversions to and from PyTorch's sparse layouts are left to the tests.

Exits with a non-zero status if anything differs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

import bitmask
from bitmask import native, ops, ops_block, ops_block_two_four, ops_two_four, reference

EXAMPLE = torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 0.0], [4.0, 0.0, 5.0]])
SHAPE = torch.Size([65, 131])
ROWS = (1, 4, 8, 16, 33, 64, 128)  # of x: there are other kernels for few than for many
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def show(title: str, parts: Parts) -> None:
    """Print the parts of the example, whose nine elements are one row."""
    values, bitmasks, _ = parts
    print(title)
    print("  Values", values)
    print("  Bitmask Unpacked", reference.unpack_bits(bitmasks, EXAMPLE.numel()).to(torch.uint8))
    print("  Bitmask Packed Binary", [f"{octet:08b}" for octet in bitmasks.tolist()])


def same(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    """Whether all parts agree."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def random_weight() -> torch.Tensor:
    """A weight with half of its elements zero."""
    return torch.randn(SHAPE).masked_fill_(torch.rand(SHAPE) < 0.5, 0)


def failed(checks: Mapping[str, bool]) -> list[str]:
    """Names of the checks that went wrong."""
    return [name for name, passed in checks.items() if not passed]


def failures_of(isa: str) -> list[str]:
    """Names of what went wrong on one instruction set."""
    bitmask.set_isa(isa)
    dense = random_weight()
    parts = ops.compress(dense)
    ops.validate(*parts, SHAPE)
    tensor = bitmask.BitmaskTensor.from_dense(dense)
    checks = {
        "example": same(ops.compress(EXAMPLE.flatten()), reference.compress(EXAMPLE.flatten())),
        "compress": same(parts, reference.compress(dense)),
        "compress_into": fills(dense, parts),
        "decompress": torch.equal(ops.decompress(*parts, SHAPE), dense),
        "validate": refuses(parts),
        "linear": all(multiplies(parts, rows) for rows in (1, 8)),
        "BitmaskTensor": torch.equal(tensor[3:7].to_dense(), dense[3:7]),
        "BitmaskLinear": layer_agrees(dense),
        "bsr_transpose": block_index_agrees(),
        "bsr_linear": all(blocks_multiply(dtype, rows) for dtype in DTYPES for rows in ROWS),
        "pack_24": all(two_four_comes_back(dtype) for dtype in DTYPES),
        "prune_24": prunes_rows_and_columns(),
        "linear_24": all(two_four_multiplies(dtype, rows) for dtype in DTYPES for rows in ROWS),
        "bsr_linear_24": all(two_four_blocks_multiply(dtype, rows) for dtype in DTYPES for rows in ROWS),
    }
    bitmask.set_isa(None)
    return failed(checks)


def failures_on(device: torch.device) -> list[str]:
    """Names of what went wrong on a device, by what the CPU makes of the same."""
    dense = random_weight()
    parts = ops.compress(dense)
    values, bitmasks, row_offsets = (part.to(device) for part in parts)
    there = (values, bitmasks, row_offsets)
    tensor: Any = bitmask.BitmaskTensor.from_dense(dense).to(device)
    moved = (tensor.values, tensor.bitmasks, tensor.row_offsets)
    checks = {
        "compress": same(ops.compress(dense.to(device)), there),
        "compress_into": fills(dense.to(device), there),
        "decompress": torch.equal(ops.decompress(*there, SHAPE).cpu(), dense),
        "validate": ops.validate(*there, SHAPE) == list(SHAPE) and refuses(there),
        "BitmaskTensor": same(moved, there) and torch.equal(tensor.cpu().to_dense(), dense),
        "BitmaskLinear": layer_agrees(dense, device),
    }
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        checks |= {f"linear {name} m={rows}": agrees_on(device, dense.to(dtype), rows) for rows in ROWS}
        checks[f"gradient {name}"] = gradient_agrees(device, dense.to(dtype))
        if device.type not in native.DEVICES:  # the portable kernels are of bitmasks alone
            continue
        checks[f"pack_24 {name}"] = two_four_comes_back(dtype, device)
        checks |= {f"bsr_linear {name} m={rows}": blocks_multiply(dtype, rows, device) for rows in ROWS}
        checks |= {f"linear_24 {name} m={rows}": two_four_multiplies(dtype, rows, device) for rows in ROWS}
        checks |= {f"bsr_linear_24 {name} m={rows}": two_four_blocks_multiply(dtype, rows, device) for rows in ROWS}
    if device.type in native.DEVICES:
        checks |= {"bsr_transpose": block_index_agrees(device), "prune_24": prunes_rows_and_columns(device)}
    return failed(checks)


def fills(dense: torch.Tensor, parts: Parts) -> bool:
    """Whether compress_into puts the same parts into buffers with room to spare."""
    values, bitmasks, row_offsets = parts
    room = (dense.new_empty(dense.numel()), torch.empty_like(bitmasks), torch.empty_like(row_offsets))
    nnz = int(ops.compress_into(dense, *room))
    return nnz == len(values) and same((room[0][:nnz], room[1], room[2]), parts)


def refuses(parts: Parts) -> bool:
    """Whether one missing value is noticed."""
    values, bitmasks, row_offsets = parts
    try:
        ops.validate(values[:-1], bitmasks, row_offsets, SHAPE)
    except bitmask.FormatError:
        return True
    return False


def multiplies(parts: Parts, rows: int) -> bool:
    """Whether linear agrees with the reference on so many rows of x."""
    x = torch.randn(rows, SHAPE[1])
    return torch.allclose(ops.linear(x, *parts, SHAPE[1]), reference.linear(x, *parts, SHAPE[1]), atol=1e-4)


def agrees_on(device: torch.device, dense: torch.Tensor, rows: int) -> bool:
    """Whether the device multiplies so many rows of x, and adds a bias, as float64 does."""
    x, bias = torch.randn(rows, SHAPE[1]).to(dense.dtype), torch.randn(SHAPE[0]).to(dense.dtype)
    values, bitmasks, row_offsets = (part.to(device) for part in ops.compress(dense))
    y = ops.linear(x.to(device), values, bitmasks, row_offsets, SHAPE[1], bias.to(device))
    return close(y, functional.linear(x.double(), dense.double(), bias.double()))


def gradient_agrees(device: torch.device, dense: torch.Tensor) -> bool:
    """Whether the gradient of x is that of a dense weight in float64."""
    x = torch.randn(5, SHAPE[1]).to(dense.dtype).to(device).requires_grad_()
    values, bitmasks, row_offsets = (part.to(device) for part in ops.compress(dense))
    given = torch.randn(5, SHAPE[0]).to(dense.dtype)
    (found,) = torch.autograd.grad(ops.linear(x, values, bitmasks, row_offsets, SHAPE[1]), x, given.to(device))
    return close(found, given.double() @ dense.double())


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the numbers are as near as their dtype allows, by their norm."""
    allowed = 1e-5 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    return bool((found.cpu().double() - expected).norm() <= allowed * expected.norm())


def layer_agrees(dense: torch.Tensor, device: torch.device | str = "cpu") -> bool:
    """Whether a compressed layer does what the dense one does."""
    layer = torch.nn.Linear(dense.shape[1], dense.shape[0])
    layer.load_state_dict({"weight": dense, "bias": torch.ones(dense.shape[0])})
    x = torch.randn(5, dense.shape[1])
    compressed = bitmask.BitmaskLinear.from_dense(layer).to(device)
    return torch.allclose(compressed(x.to(device)).cpu(), layer(x), atol=1e-4)


def random_block_index() -> tuple[torch.Tensor, torch.Tensor]:
    """Where each other block of a weight of this shape lies, in blocks of 16 by 16, as crow_indices and col_indices."""
    kept = torch.rand(-(-SHAPE[0] // 16), -(-SHAPE[1] // 16)) < 0.5
    return functional.pad(kept.sum(1).cumsum(0), (1, 0)), kept.nonzero()[:, 1]


def block_index_agrees(device: torch.device | str = "cpu") -> bool:
    """Whether kept blocks are found by columns as well."""
    (crow_indices, col_indices), cols_of_blocks = random_block_index(), -(-SHAPE[1] // 16)
    found = ops_block.bsr_transpose(crow_indices.to(device), col_indices.to(device), cols_of_blocks)
    expected = reference.bsr_transpose(crow_indices, col_indices, cols_of_blocks)
    return same(tuple(part.cpu() for part in found), expected)


def blocks_multiply(dtype: torch.dtype, rows: int, device: torch.device | str = "cpu") -> bool:
    """Whether a block-sparse product of so many rows of x, and its gradients, are those of a masked weight."""
    index = random_block_index()
    there = (index[0].to(device), index[1].to(device))
    inputs = [torch.randn(size).to(dtype) for size in ((rows, SHAPE[1]), (len(index[1]), 16, 16), (SHAPE[0],))]
    x, values, bias = (tensor.detach().to(device).requires_grad_() for tensor in inputs)
    y = ops_block.bsr_linear(x, values, *there, SHAPE[0], bias)
    wide_x, wide_values, wide_bias = wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = functional.linear(wide_x, reference.bsr_to_dense(wide_values, *index, SHAPE), wide_bias)
    given = torch.randn(rows, SHAPE[0]).to(dtype)
    found = torch.autograd.grad(y, (x, values, bias), given.to(device))
    gradients = torch.autograd.grad(expected, wide, given.double())
    return close(y, expected) and all(close(*pair) for pair in zip(found, gradients, strict=True))


def two_four_comes_back(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether a pruned weight is packed as the reference has it, and is the same when it is unpacked."""
    weight = torch.randn(65, 132).to(dtype).to(device)
    values, metadata = ops_two_four.pack_24(weight, prune=True)
    ops_two_four.validate_24(values, metadata)
    ops_two_four.prune_24(weight)
    packed = same((values.cpu(), metadata.cpu()), reference.pack_24(weight.cpu()))
    return packed and torch.equal(ops_two_four.unpack_24(values, metadata), weight)


def prunes_rows_and_columns(device: torch.device | str = "cpu") -> bool:
    """Whether each 4 x 4 elements keep what the reference keeps."""
    expected = torch.randn(8, 20)
    weight = expected.clone().to(device)
    ops_two_four.prune_24(weight, transposable=True)
    reference.prune_24_transposable(expected)
    return torch.equal(weight.cpu(), expected)


def two_four_multiplies(dtype: torch.dtype, rows: int, device: torch.device | str = "cpu") -> bool:
    """Whether a 2:4 product of so many rows of x, and its gradient, are those of float64; on a CPU an infinity too."""
    x = torch.randn(rows, 132).to(dtype)
    parts = ops_two_four.pack_24(torch.randn(65, 132).to(dtype), prune=True)
    dense, bias, given = reference.unpack_24(*parts), torch.randn(65).to(dtype), torch.randn(rows, 65).to(dtype)
    there = x.clone().to(device).requires_grad_()
    y = ops_two_four.linear_24(there, parts[0].to(device), parts[1].to(device), bias.to(device))
    (found,) = torch.autograd.grad(y, there, given.to(device))
    infinite = x.index_fill(1, torch.tensor(7), torch.inf)
    spread = ops_two_four.linear_24(infinite, *parts)
    return (
        close(y, functional.linear(x.double(), dense.double(), bias.double()))
        and close(found, given.double() @ dense.double())
        and (y.is_cuda or torch.equal(spread.isnan(), functional.linear(infinite.double(), dense.double()).isnan()))
    )


def two_four_blocks_multiply(dtype: torch.dtype, rows: int, device: torch.device | str = "cpu") -> bool:
    """Whether a product with kept blocks that are 2:4, and its gradient, are those of float64."""
    index = random_block_index()
    parts = ops_two_four.pack_24(torch.randn(len(index[1]), 16, 16).to(dtype), prune=True)
    dense = reference.bsr_to_dense(reference.unpack_24(*parts), *index, SHAPE).double()
    x, bias = torch.randn(rows, SHAPE[1]).to(dtype), torch.randn(SHAPE[0]).to(dtype)
    there = x.clone().to(device).requires_grad_()
    values, metadata, crow_indices, col_indices = (part.to(device) for part in (*parts, *index))
    y = ops_block_two_four.bsr_linear_24(there, values, metadata, crow_indices, col_indices, SHAPE[0], bias.to(device))
    given = torch.randn(rows, SHAPE[0]).to(dtype)
    (found,) = torch.autograd.grad(y, there, given.to(device))
    return close(y, functional.linear(x.double(), dense, bias.double())) and close(found, given.double() @ dense)


def has_cuda_ops() -> bool:
    """Whether bitmask has kernels for a GPU: those of this build, or portable ones."""
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key("bitmask::compress", "CUDA")


def report(name: str, failures: list[str]) -> bool:
    """Print the outcome on one line; whether all is well."""
    print(f"{name}: {'FAILED ' + ', '.join(failures) if failures else 'ok'}")
    return not failures


def main() -> None:
    """Print the example, then run everything."""
    native = ops.compress(EXAMPLE.flatten())
    show("Python reference", reference.compress(EXAMPLE.flatten()))
    show("Native library", native)
    print("Decompressed Tensor", ops.decompress(*native, [EXAMPLE.numel()]).reshape(EXAMPLE.shape))
    passed = [report(isa, failures_of(isa)) for isa in bitmask.available_isas()]
    if not torch.cuda.is_available():
        print("cuda: no GPU here")
    elif not has_cuda_ops():
        print("cuda: this build of bitmask has no CUDA kernels, and there is no Triton")
    else:
        passed.append(report(f"cuda ({torch.cuda.get_device_name()})", failures_on(torch.device("cuda"))))
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
