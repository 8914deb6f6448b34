"""The suites of `benchmark.py`: every module of this folder defines one as `SUITE`, and is found by being there."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.cases import Selection
from benchmarks.machine import Header
from benchmarks.report import CpuResult, Report

_R = TypeVar("_R", bound=CpuResult)


class UnavailableError(RuntimeError):
    """A suite needs something that is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Plan:
    """What a suite is to run: its thread counts and ISA are those of the header."""

    header: Header
    selection: Selection
    quick: bool
    only_isa: bool


@dataclass(frozen=True)
class Suite(Generic[_R]):
    """A set of benchmarks, and how its results are shown.

    `default_threads` gets the number torch uses by default, `peers` tells the version of each peer or why it is
    skipped, `read` makes a result of what JSON holds of it, `run` gets a plan and a function that prints a line while
    it works, `tables` sets the results as Markdown, and `plot` draws them. `fresh_memory` says whether every large
    result is to be mapped anew.
    """

    summary: str
    default_threads: Callable[[int], Sequence[int]]
    peers: Callable[[], Mapping[str, str]]
    read: Callable[[dict[str, Any]], _R]
    run: Callable[[Plan, Callable[[str], None]], list[_R]]
    tables: Callable[[Report[_R]], str]
    plot: Callable[[Report[_R], Path], None] | None = None
    fresh_memory: bool = True


def find_suites() -> dict[str, Suite[Any]]:
    """Every suite by its name, which is that of its module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").SUITE for name in names}
