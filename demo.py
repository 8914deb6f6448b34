"""What bitmask compression saves: on a random half-sparse tensor, or on the tensors of a checkpoint.

python demo.py
python demo.py CHECKPOINT.safetensors [--prune 0.5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from bitmask import BitmaskTensor
from bitmask.ops import DTYPES
from bitmask.prune import prune_by_magnitude

MB = 2**20


@dataclass
class Row:
    """What compression did to one tensor; `stored` is the smaller of both sizes."""

    name: str
    shape: str
    dtype: str
    sparsity: float
    dense: int
    stored: int
    note: str
    round_trip: bool


def show_random(size: tuple[int, int], precision: torch.dtype, sparsity: float) -> None:
    """Compress one random tensor and print where its bytes are."""
    print(f"Generating a tensor of size={list(size)} and {precision=} with {sparsity=}\n")
    dense_tensor = torch.randn(size).to(precision).masked_fill_(torch.rand(size) < sparsity, 0)
    print(f"dense_tensor: {dense_tensor.nbytes / MB:.4f} MB\n")
    bitmask_tensor = BitmaskTensor.from_dense(dense_tensor)
    if not torch.equal(bitmask_tensor.to_dense(), dense_tensor):
        sys.exit("the round trip changed the tensor")
    print(f"bitmask_tensor: {bitmask_tensor.compressed_nbytes / MB:.4f} MB")
    for part in ("values", "bitmasks", "row_offsets"):
        print(f"  {part}: {getattr(bitmask_tensor, part).nbytes / MB:.4f} MB")


def same_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree bit for bit, -0.0 and 0.0 being the same."""
    octets = [tensor.view(-1).view(torch.uint8).view(tensor.numel(), tensor.element_size()) for tensor in (left, right)]
    differing = (octets[0] != octets[1]).any(dim=1)
    wide = torch.complex128 if left.is_complex() else torch.float64
    return all(bool((tensor.view(-1)[differing].to(wide) == 0).all()) for tensor in (left, right))


def compress_one(name: str, dense: torch.Tensor, prune: float) -> Row:
    """Prune matrices if asked to, compress, and check the way back."""
    shape, dtype = "x".join(map(str, dense.shape)) or "scalar", str(dense.dtype).removeprefix("torch.")
    if dense.dtype not in DTYPES:
        return Row(name, shape, dtype, 0.0, dense.nbytes, dense.nbytes, "dense: no codec for this dtype", True)
    if prune > 0 and dense.ndim >= 2 and dense.is_floating_point() and dense.dtype is not torch.float8_e8m0fnu:
        dense = prune_by_magnitude(dense, prune)
    compressed = BitmaskTensor.from_dense(dense)
    round_trip = same_values(dense.contiguous(), compressed.to_dense())
    size = compressed.compressed_nbytes
    grows = size >= dense.nbytes
    note = f"dense: would take {size - dense.nbytes:,} bytes more" if grows else ""
    return Row(name, shape, dtype, compressed.sparsity, dense.nbytes, dense.nbytes if grows else size, note, round_trip)


def compress_checkpoint(path: str, prune: float) -> Iterator[Row]:
    """One row for each tensor; only one tensor is in memory at a time."""
    with safe_open(path, framework="pt") as checkpoint:
        names = list(checkpoint.keys())
        for name in tqdm(names, desc="Compressing", unit="tensor", file=sys.stderr, disable=None):
            yield compress_one(name, checkpoint.get_tensor(name), prune)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    ratio = row.dense / row.stored if row.stored else 1.0
    sizes = (f"{row.dense / MB:.4f}", f"{row.stored / MB:.4f}", f"{ratio:.2f}x")
    verdict = "ok" if row.round_trip else "FAILED"
    return (row.name, row.shape, row.dtype, f"{row.sparsity:.4f}", *sizes, verdict, row.note)


def print_table(rows: list[Row]) -> None:
    """Aligned columns, then totals."""
    header = ("tensor", "shape", "dtype", "sparsity", "dense MB", "stored MB", "ratio", "round trip", "")
    lines = [header, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = "<>>>>>><<"
    for line in lines:
        aligned = [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)]
        print("  ".join(aligned).rstrip())
    dense, stored = sum(row.dense for row in rows), sum(row.stored for row in rows)
    kept = sum(bool(row.note) for row in rows)
    print(
        f"\n{len(rows)} tensors: {dense / MB:.4f} MB dense, {stored / MB:.4f} MB stored, "
        f"{dense / stored if stored else 1.0:.2f}x; "
        f"{len(rows) - kept} compressed, {kept} kept dense because compression would not shrink them"
    )


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 to 1")
    return value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT.safetensors")
    parser.add_argument(
        "--prune",
        type=fraction,
        default=0.0,
        metavar="S",
        help="first zero this fraction of each matrix, smallest first",
    )
    args = parser.parse_args()
    if args.checkpoint is None:
        if args.prune > 0:
            parser.error("--prune needs a checkpoint")
        show_random((4096, 4096), torch.float16, sparsity=0.5)
        return
    try:
        rows = list(compress_checkpoint(args.checkpoint, args.prune))
    except (OSError, SafetensorError) as error:
        sys.exit(f"{args.checkpoint}: {error}")
    print_table(rows)
    if not all(row.round_trip for row in rows):
        sys.exit("a round trip changed a tensor")


if __name__ == "__main__":
    main()
