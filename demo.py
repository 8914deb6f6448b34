"""What bitmask compression saves: on a random half-sparse tensor, or on the tensors of a checkpoint.

python demo.py
python demo.py CHECKPOINT.safetensors [--prune 0.5]
python demo.py --formats [CHECKPOINT.safetensors --tensor NAME] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from benchmarks.formats.plot import plot_crossovers
from benchmarks.plot import have_matplotlib
from bitmask import BitmaskTensor
from bitmask.calls import LINEAR_DTYPES
from bitmask.compare import compare_formats
from bitmask.crossovers import format_crossovers
from bitmask.ops import DTYPES
from bitmask.prune import prune_24_, prune_by_magnitude

MB = 2**20
MOST_MEASURED = 4096  # rows or columns of the random weights that crossovers are measured with


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


def pruned(dense: torch.Tensor, share: float) -> torch.Tensor:
    """The tensor with so many of its smallest elements zeroed, if it is a matrix that can be pruned."""
    if share > 0 and dense.ndim >= 2 and dense.is_floating_point() and dense.dtype is not torch.float8_e8m0fnu:
        return prune_by_magnitude(dense, share)
    return dense


def compress_one(name: str, dense: torch.Tensor, prune: float) -> Row:
    """Prune matrices if asked to, compress, and check the way back."""
    shape, dtype = "x".join(map(str, dense.shape)) or "scalar", str(dense.dtype).removeprefix("torch.")
    if dense.dtype not in DTYPES:
        return Row(name, shape, dtype, 0.0, dense.nbytes, dense.nbytes, "dense: no codec for this dtype", True)
    dense = pruned(dense, prune)
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


def show_formats(dense: torch.Tensor, plot: Path | None) -> None:
    """Print what the tensor takes in each format and how fast each multiplies, and from which sparsity on each pays."""
    timed = dense.dtype in LINEAR_DTYPES and dense.numel() > 0
    comparison = compare_formats(dense, time=timed)
    print(comparison)
    shape = [max(1, min(size, MOST_MEASURED)) for size in comparison.shape]
    crossovers = format_crossovers(shape, dense.dtype, time=timed)
    print(f"\n{crossovers}")
    if plot:
        plot_crossovers(crossovers, plot)


def names_in(path: str) -> list[str]:
    """The names of a checkpoint's tensors."""
    with safe_open(path, framework="pt") as checkpoint:
        return sorted(checkpoint.keys())


def tensor_of(path: str, name: str) -> torch.Tensor:
    """The named tensor of a checkpoint; exits with the names there are where it has none of that name."""
    names = names_in(path)
    if name not in names:
        sys.exit(f"{path}: --tensor: got {name}, expected one of {', '.join(names)}")
    with safe_open(path, framework="pt") as checkpoint:
        found: torch.Tensor = checkpoint.get_tensor(name)
        return found


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
    parser.add_argument(
        "--formats",
        action="store_true",
        help="compare sparse formats: memory, conversion, products (takes about a minute)",
    )
    parser.add_argument("--tensor", metavar="NAME", help="which tensor of the checkpoint --formats is to compare")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what --formats finds (needs matplotlib)")
    args = parser.parse_args()
    if not args.formats and (args.tensor or args.plot):
        parser.error("--tensor and --plot need --formats")
    if args.checkpoint is None and (args.tensor or args.prune > 0):
        parser.error(f"{'--tensor' if args.tensor else '--prune'} needs a checkpoint")
    if args.plot and not have_matplotlib():
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.checkpoint is None:
        if args.formats:
            show_formats(prune_24_(torch.randn(4096, 4096)), args.plot)
        else:
            show_random((4096, 4096), torch.float16, sparsity=0.5)
        return
    try:
        if args.formats and args.tensor is None:
            parser.error(f"--formats of a checkpoint needs --tensor, one of {', '.join(names_in(args.checkpoint))}")
        if args.formats:
            show_formats(pruned(tensor_of(args.checkpoint, args.tensor), args.prune), args.plot)
            return
        rows = list(compress_checkpoint(args.checkpoint, args.prune))
    except (OSError, SafetensorError, TypeError) as error:
        sys.exit(f"{args.checkpoint}: {error}")
    print_table(rows)
    if not all(row.round_trip for row in rows):
        sys.exit("a round trip changed a tensor")


if __name__ == "__main__":
    main()
