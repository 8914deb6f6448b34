"""The suites of `benchmark.py`: every module of this folder defines one as `SUITE`, and is found by being there."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cases import Selection
from benchmarks.machine import Header
from benchmarks.peers import Peers
from benchmarks.report import Report, Result


@dataclass(frozen=True)
class Plan:
    """What a suite is to run: its thread counts and ISA are those of the header."""

    header: Header
    selection: Selection
    peers: Peers
    quick: bool
    only_isa: bool


@dataclass(frozen=True)
class Suite:
    """A set of benchmarks.

    `default_threads` gets the number torch uses by default, `run` gets a plan and a function that prints a line while
    it works, and `tables` sets the results as Markdown.
    """

    summary: str
    default_threads: Callable[[int], Sequence[int]]
    run: Callable[[Plan, Callable[[str], None]], list[Result]]
    tables: Callable[[Report], str]


def find_suites() -> dict[str, Suite]:
    """Every suite by its name, which is that of its module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").SUITE for name in names}
