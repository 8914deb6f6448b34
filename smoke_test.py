"""Every op once on every instruction set of this machine, against the pure Python reference.

Exits with a non-zero status if anything differs.
"""

from __future__ import annotations

import sys

import torch

import bitmask
from bitmask import ops, reference

EXAMPLE = torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 0.0], [4.0, 0.0, 5.0]])
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def show(title: str, parts: Parts) -> None:
    """Print the parts of the example, whose nine elements are one row."""
    values, bitmasks, _ = parts
    print(title)
    print("  Values", values)
    print("  Bitmask Unpacked", reference.unpack_bits(bitmasks, EXAMPLE.numel()).to(torch.uint8))
    print("  Bitmask Packed Binary", [f"{octet:08b}" for octet in bitmasks.tolist()])


def same(left: Parts, right: Parts) -> bool:
    """Whether all parts agree."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def failures_of(isa: str) -> list[str]:
    """Names of what went wrong on one instruction set."""
    bitmask.set_isa(isa)
    dense = torch.randn(65, 131).masked_fill_(torch.rand(65, 131) < 0.5, 0)
    parts = ops.compress(dense)
    ops.validate(*parts, dense.shape)
    tensor = bitmask.BitmaskTensor.from_dense(dense)
    checks = {
        "example": same(ops.compress(EXAMPLE.flatten()), reference.compress(EXAMPLE.flatten())),
        "compress": same(parts, reference.compress(dense)),
        "decompress": torch.equal(ops.decompress(*parts, dense.shape), dense),
        "validate": refuses(parts, dense.shape),
        "linear": all(multiplies(parts, dense.shape[1], rows) for rows in (1, 8)),
        "BitmaskTensor": torch.equal(tensor[3:7].to_dense(), dense[3:7]),
        "BitmaskLinear": layer_agrees(dense),
    }
    bitmask.set_isa(None)
    return [name for name, passed in checks.items() if not passed]


def refuses(parts: Parts, shape: torch.Size) -> bool:
    """Whether one missing value is noticed."""
    values, bitmasks, row_offsets = parts
    try:
        ops.validate(values[:-1], bitmasks, row_offsets, shape)
    except bitmask.FormatError:
        return True
    return False


def multiplies(parts: Parts, columns: int, rows: int) -> bool:
    """Whether linear agrees with the reference on so many rows of x."""
    x = torch.randn(rows, columns)
    return torch.allclose(ops.linear(x, *parts, columns), reference.linear(x, *parts, columns), atol=1e-4)


def layer_agrees(dense: torch.Tensor) -> bool:
    """Whether a compressed layer does what the dense one does."""
    layer = torch.nn.Linear(dense.shape[1], dense.shape[0])
    layer.load_state_dict({"weight": dense, "bias": torch.ones(dense.shape[0])})
    x = torch.randn(5, dense.shape[1])
    return torch.allclose(bitmask.BitmaskLinear.from_dense(layer)(x), layer(x), atol=1e-4)


def main() -> None:
    """Print the example, then run everything."""
    native = ops.compress(EXAMPLE.flatten())
    show("Python reference", reference.compress(EXAMPLE.flatten()))
    show("Native library", native)
    print("Decompressed Tensor", ops.decompress(*native, [EXAMPLE.numel()]).reshape(EXAMPLE.shape))
    failed = False
    for isa in bitmask.available_isas():
        failures = failures_of(isa)
        failed |= bool(failures)
        print(f"{isa}: {'FAILED ' + ', '.join(failures) if failures else 'ok'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
