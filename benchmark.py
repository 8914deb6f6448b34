"""Timings of bitmask on this machine; `python benchmark.py` alone gives the everyday ones in under a minute."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import bitmask
from benchmarks.cases import DTYPES, Selection, parse_shape
from benchmarks.gpu.device import CudaDevice, reason_against
from benchmarks.gpu.report import GPU_SUITES, GpuReport
from benchmarks.gpu.rivals import RivalsError
from benchmarks.gpu.run import GpuOrder, run_on
from benchmarks.machine import Header
from benchmarks.memory import map_large_blocks_afresh
from benchmarks.plot import NothingToPlotError, have_matplotlib
from benchmarks.report import CpuResult, Report
from benchmarks.suites import Plan, Suite, UnavailableError, find_suites

_DEFAULT_SUITE = "everyday"

_Item = TypeVar("_Item")


def main() -> None:
    """Run a suite, or set a stored run as tables or as a plot."""
    suites = find_suites()
    parser = _parser(suites)
    arguments = parser.parse_args()
    if arguments.plot and not have_matplotlib():
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if arguments.table and (stored := _stored_of_a_gpu(arguments, parser)):
        print(stored.markdown())
        return
    if arguments.device == "cuda":
        _run_on_the_gpu(arguments, parser)
        return
    if arguments.rivals:
        parser.error("--rivals needs --device cuda")
    if len(arguments.suite) > 1 or not suites.keys() >= {*arguments.suite}:
        parser.error(f"--suite: got {','.join(arguments.suite)}, expected one of {', '.join(sorted(suites))}")
    if arguments.isa and arguments.isa not in bitmask.available_isas():
        parser.error(f"--isa {arguments.isa}: this machine runs {', '.join(bitmask.available_isas())}")
    if arguments.table:
        report = _stored(arguments, suites, parser)
        print(report.markdown_header(), suites[report.suite].tables(report), sep="\n\n")
    else:
        report = _run(arguments, suites, parser)
    if arguments.json:
        report.save(arguments.json)
    if arguments.plot:
        _plot(report, suites[report.suite], arguments.plot, parser)


def _run(
    arguments: argparse.Namespace, suites: dict[str, Suite[Any]], parser: argparse.ArgumentParser
) -> Report[CpuResult]:
    (name,) = arguments.suite or (_DEFAULT_SUITE,)
    suite = suites[name]
    if arguments.plot:
        _plotter(suite, name, parser)  # before anything takes minutes
    fresh_memory = suite.fresh_memory and map_large_blocks_afresh()
    if arguments.isa:
        bitmask.set_isa(arguments.isa)
    threads = arguments.threads or tuple(suite.default_threads(torch.get_num_threads()))
    header = Header.of_this_run(threads, fresh_memory)
    peers = dict(suite.peers())
    print(*header.lines(), *(f"{'Peer':<16}{name} {status}" for name, status in peers.items()), sep="\n")
    plan = Plan(header, _selection(arguments), arguments.quick, only_isa=bool(arguments.isa))
    try:
        results = suite.run(plan, lambda line: print(line, flush=True))
    except UnavailableError as error:
        parser.error(f"--suite {name}: {error}")
    return Report(name, header, peers, tuple(results))


def _run_on_the_gpu(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run the suites on the GPU, and end with the tables; exit 2 with one line where there is none."""
    unknown = [f"--{name}" for name in ("isa", "threads", "plot") if getattr(arguments, name)]
    if unknown:
        parser.error(f"--device cuda knows no {', '.join(unknown)}")
    if not GPU_SUITES.keys() >= {*arguments.suite}:
        parser.error(f"--device cuda has the suites {', '.join(GPU_SUITES)}")
    problem = reason_against()
    if problem:
        parser.exit(2, f"{parser.prog}: --device cuda: {problem}\n")
    order = GpuOrder(arguments.suite, _selection(arguments), arguments.quick, arguments.json, arguments.rivals)
    try:
        report = run_on(CudaDevice(), order, lambda line: print(line, flush=True))
    except RivalsError as error:
        parser.error(f"--rivals: {error}")
    print("", report.markdown(), sep="\n")


def _stored_of_a_gpu(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> GpuReport | None:
    """The stored run, if it is of a GPU, as far as it was asked for."""
    try:
        report = GpuReport.load(arguments.table)
    except (OSError, ValueError) as error:
        parser.error(f"--table: {error}")
    if report is None:
        return None
    wanted = report.only(_selection(arguments))
    if not wanted.results:
        parser.error(f"--table: nothing in {arguments.table} matches the filters")
    return wanted


def _stored(
    arguments: argparse.Namespace, suites: dict[str, Suite[Any]], parser: argparse.ArgumentParser
) -> Report[CpuResult]:
    try:
        report = Report.load(arguments.table, {name: suite.read for name, suite in suites.items()})
    except (OSError, ValueError) as error:
        parser.error(f"--table: {error}")
    wanted = _selection(arguments)
    results = tuple(
        result
        for result in report.results
        if wanted.admits(result) and (not arguments.threads or result.threads in arguments.threads)
    )
    if not results:
        parser.error(f"--table: nothing in {arguments.table} matches the filters")
    return replace(report, results=results)


def _plot(report: Report[CpuResult], suite: Suite[Any], path: Path, parser: argparse.ArgumentParser) -> None:
    try:
        _plotter(suite, report.suite, parser)(report, path)
    except NothingToPlotError as error:
        parser.error(f"--plot: {error}")


def _plotter(
    suite: Suite[Any], name: str, parser: argparse.ArgumentParser
) -> Callable[[Report[CpuResult], Path], None]:
    if suite.plot is None:
        parser.error(f"--plot: the suite {name} has no plot")
    return suite.plot


def _selection(arguments: argparse.Namespace) -> Selection:
    return Selection(arguments.shapes, arguments.dtypes, arguments.sparsities, arguments.rows, arguments.blocks)


def _parser(suites: dict[str, Suite[Any]]) -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<17}{suite.summary}" for name, suite in suites.items())
    on_gpu = "\n".join(f"  {name:<17}{suite.summary}" for name, suite in GPU_SUITES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"suites:\n{listing}\n\nsuites of --device cuda:\n{on_gpu}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite",
        type=_list_of(str),
        default=(),
        metavar="NAME[,NAME]",
        help="what to run (on a CPU one, everyday unless given; on a GPU all it has)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds: to check that everything works")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--isa", metavar="NAME", help="run with this instruction set only")
    parser.add_argument("--threads", type=_list_of(_count), default=(), metavar="N[,M]", help="numbers of threads")
    parser.add_argument("--shapes", type=_list_of(parse_shape), default=(), metavar="RxC[,RxC]", help="which shapes")
    parser.add_argument("--dtypes", type=_list_of(_dtype), default=(), metavar="D[,D]", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--sparsities", type=_list_of(_sparsity), default=(), metavar="S[,S]", help="from 0 to 1")
    parser.add_argument("--rows", type=_list_of(_count), default=(), metavar="M[,M]", help="rows of x, or batch sizes")
    parser.add_argument("--blocks", type=_list_of(_count), default=(), metavar="B[,B]", help="sizes of square blocks")
    parser.add_argument("--rivals", type=Path, metavar="FILE.py", help="other contenders (benchmarks/gpu/rivals.py)")
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="write header and results to FILE")
    parser.add_argument("--plot", type=_new_file, metavar="FILE.png", help="draw the results (needs matplotlib)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="run nothing, print tables of what --json wrote")
    return parser


def _list_of(item: Callable[[str], _Item]) -> Callable[[str], tuple[_Item, ...]]:
    def parse(text: str) -> tuple[_Item, ...]:
        try:
            return tuple(item(part) for part in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory")
    there = next(folder for folder in path.absolute().parents if folder.exists())  # what is missing below it is made
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{there} is no directory that can be written to")
    return path


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(f"a number of threads or rows, or the size of a block, is at least 1, got {text}")
    return count


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise ValueError(f"unknown dtype {text!r}, choose among {', '.join(DTYPES)}")
    return text


def _sparsity(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError(f"a share of zeros is between 0 and 1, got {text}")
    return share


if __name__ == "__main__":
    main()
