"""What was found: how the results of a run are written to JSON, read back and set as Markdown."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from typing_extensions import Self

from benchmarks.machine import Header
from benchmarks.timer import Summary

_FORMAT = 1


@dataclass(frozen=True)
class Result:
    """One contender in one cell, from which suites derive theirs.

    FIGURES are the properties that JSON holds beside the fields, PARTS the fields that are dataclasses themselves.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ()
    PARTS: ClassVar[Mapping[str, type]] = {"summary": Summary}

    contender: str
    dtype: str
    sparsity: float
    summary: Summary

    def to_json(self) -> dict[str, Any]:
        """Fields and figures."""
        return asdict(self) | {name: getattr(self, name) for name in self.FIGURES}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """Read back the fields; figures are computed again."""
        values = {field.name: stored[field.name] for field in fields(cls)}
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        parts = {name: part(**stored[name]) for name, part in cls.PARTS.items()}
        return cls(**values | tuples | parts)


@dataclass(frozen=True)
class CpuResult(Result):
    """One contender in one cell, on so many threads."""

    threads: int


_R = TypeVar("_R", bound=CpuResult)
_Key = TypeVar("_Key")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Report(Generic[_R]):
    """A whole run of one suite; `peers` holds the version of each peer, or why it was skipped."""

    suite: str
    header: Header
    peers: dict[str, str]
    results: tuple[_R, ...]

    def save(self, path: Path) -> None:
        """Write the run as JSON."""
        document = {
            "format": _FORMAT,
            "suite": self.suite,
            "header": asdict(self.header),
            "peers": self.peers,
            "results": [result.to_json() for result in self.results],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, readers: Mapping[str, Callable[[dict[str, Any]], _R]]) -> "Report[_R]":
        """Read a run that `save` wrote, `readers` making the results of each suite of what JSON holds of them.

        `ValueError` where the file is something else.
        """
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a benchmark report of format {_FORMAT}")
        if document["suite"] not in readers:
            raise ValueError(f"{path} is of an unknown suite, {document['suite']!r}")
        read = readers[document["suite"]]
        results = tuple(read(stored) for stored in document["results"])
        return cls(document["suite"], Header.from_json(document["header"]), document["peers"], results)

    def markdown_header(self) -> str:
        """The hardware and versions as a Markdown paragraph."""
        header = self.header
        return (
            f"Hardware: {header.hardware()}; copy bandwidth {header.bandwidth()} (read + write); "
            f"{header.huge_pages()}.\n"
            f"Software: {header.software()}, {header.system}; {header.date[:10]}."
        )


def reader_of(*kinds: type[CpuResult]) -> Callable[[dict[str, Any]], CpuResult]:
    """Read a result of the one kind that has the fields of what is stored."""

    def read(stored: dict[str, Any]) -> CpuResult:
        names = stored.keys()
        (kind,) = (each for each in kinds if names == {field.name for field in fields(each)} | set(each.FIGURES))
        return kind.from_json(stored)

    return read


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> list[tuple[_Key, list[_Item]]]:
    """The items of each key, keys in the order in which they appear."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1])] + [text.rjust(width) for text, width in others]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def or_dash(value: float | None, style: str) -> str:
    """A figure as text, or a dash where there is none."""
    return "-" if value is None else format(value, style)
