"""The command line: python -m bitmask compress | decompress | inspect | verify."""

from __future__ import annotations

import argparse
import signal
import sys

from safetensors import SafetensorError

from bitmask.files import compress_checkpoint, decompress_checkpoint, list_checkpoint, verify_checkpoint
from bitmask.files.config import BITMASK_24_FORMAT, BITMASK_FORMAT

MB = 2**20


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 to 1")
    return number


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    top = argparse.ArgumentParser(
        prog="python -m bitmask", description="Checkpoints whose weights are bitmasks, unstructured or 2:4."
    )
    commands = top.add_subparsers(dest="command", required=True)

    compress = commands.add_parser("compress", help="compress a safetensors file or a directory of shards")
    compress.add_argument("source")
    compress.add_argument("target")
    compress.add_argument(
        "--format",
        choices=(BITMASK_FORMAT, BITMASK_24_FORMAT),
        default=BITMASK_FORMAT,
        help=f'"{BITMASK_24_FORMAT}" compresses matrices with at most two non-zeros in every four neighbours of a row,'
        " and leaves all else as it is (default: %(default)s)",
    )
    compress.add_argument("--min-sparsity", type=fraction, default=0.0, help="leave denser tensors as they are")
    compress.add_argument("--keep-negative-zero", action="store_true", help="bit-exact: store -0.0 too")
    compress.add_argument(
        "--key-style",
        choices=("module", "parameter"),
        default="module",
        help='name components "layer.bitmask", or "layer.weight.bitmask" as releases up to 0.8 did',
    )
    compress.add_argument("--prune", type=fraction, default=0.0, help="first zero this fraction of each weight")
    compress.add_argument(
        "--prune-24",
        action="store_true",
        help="first zero the smaller two of every four neighbours in a row, in floating-point matrices named *weight"
        " whose columns are a multiple of four",
    )

    decompress = commands.add_parser("decompress", help="back to ordinary safetensors")
    decompress.add_argument("source")
    decompress.add_argument("target")

    inspect = commands.add_parser("inspect", help="list the tensors, reading headers only")
    inspect.add_argument("source")

    verify = commands.add_parser("verify", help="prove every tensor consistent")
    verify.add_argument("source")
    verify.add_argument("--against", metavar="DENSE", help="and equal to those of this checkpoint")
    return top


def show(source: str) -> None:
    """Print a line for each tensor and the totals."""
    tensors = list(list_checkpoint(source))
    width = max((len(repr(tensor.name)) for tensor in tensors), default=0)
    dense = stored = 0
    header = f"{'shape':>16}  {'dtype':>8}  {'stored as':>17}  {'zeros':>7}  {'dense MB':>10}  {'stored MB':>10}"
    print(f"{'tensor':{width}}  {header}")
    for tensor in tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        zeros = "-" if tensor.sparsity is None else f"{tensor.sparsity:.2%}"
        sizes = f"{tensor.dense_nbytes / MB:10.4f}  {tensor.stored_nbytes / MB:10.4f}"
        print(f"{tensor.name!r:{width}}  {shape:>16}  {tensor.dtype:>8}  {tensor.format:>17}  {zeros:>7}  {sizes}")
        dense += tensor.dense_nbytes
        stored += tensor.stored_nbytes
    ratio = f", {stored / dense:.3f} of dense" if dense else ""
    print(f"{len(tensors)} tensors: {dense / MB:.4f} MB dense, {stored / MB:.4f} MB stored{ratio}")


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says."""
    progress = sys.stderr.isatty()
    if arguments.command == "compress":
        kept_dense = compress_checkpoint(
            arguments.source,
            arguments.target,
            arguments.format,
            min_sparsity=arguments.min_sparsity,
            keep_negative_zero=arguments.keep_negative_zero,
            prune=arguments.prune,
            prune_24=arguments.prune_24,
            key_style=arguments.key_style,
            show_progress=progress,
        )
        for name, reason in kept_dense.items():
            print(f"{name!r} stays dense: {printable(reason)}")
    elif arguments.command == "decompress":
        decompress_checkpoint(arguments.source, arguments.target, show_progress=progress)
    elif arguments.command == "inspect":
        show(arguments.source)
    else:
        count = verify_checkpoint(arguments.source, arguments.against, show_progress=progress)
        print(f"{arguments.source}: {count} tensors, all consistent{' and equal' if arguments.against else ''}")


def main() -> None:
    """Run; what a file or an argument has wrong is one line and exit status 1."""
    try:
        run(parser().parse_args())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        sys.exit("bitmask: " + printable(str(error)))


def printable(text: str) -> str:
    r"""Text whose control characters, which names in a file may have, do nothing to a terminal.

    >>> printable("a\x1b[31m\n")
    'a\\x1b[31m\\n'
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


if __name__ == "__main__":
    main()
