"""What was found: a timed cell, its figures, and how a run is written to JSON, read back and set as Markdown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Shape
from benchmarks.machine import Header
from benchmarks.timer import Summary

COPY = "copy"
HUGE_PAGE_COPY = "copy, huge pages"
COMPRESS = "compress"
DECOMPRESS = "decompress"

_FORMAT = 1


@dataclass(frozen=True)
class Result:
    """One contender in one cell.

    `moved_nbytes` is what must be read and written at the least, `copy_ms` the median of `dense.clone()` in the same
    cell, and `copy_bandwidth` the GB/s of a copy between existing buffers with as many threads.
    """

    contender: str
    isa: str | None
    operation: str
    shape: Shape
    dtype: str
    sparsity: float
    threads: int
    summary: Summary
    dense_nbytes: int
    compressed_nbytes: int
    moved_nbytes: int
    copy_ms: float
    copy_bandwidth: float

    @property
    def label(self) -> str:
        """The contender, with its instruction set."""
        return f"{self.contender} {self.isa}" if self.isa else self.contender

    @property
    def gb_per_s(self) -> float:
        """GB of dense data per second, at the median."""
        return self.dense_nbytes / self.summary.median_ms / 1e6

    @property
    def copy_ratio(self) -> float:
        """Time as a multiple of a copy's (less is faster)."""
        return self.summary.median_ms / self.copy_ms

    @property
    def floor_ratio(self) -> float:
        """What `copy_ratio` would be if only the bytes moved mattered."""
        return self.moved_nbytes / (2 * self.dense_nbytes)

    @property
    def bandwidth_share(self) -> float:
        """Bytes moved per second as a share of the machine's copy bandwidth."""
        return self.moved_nbytes / self.summary.median_ms / 1e6 / self.copy_bandwidth

    @property
    def size_ratio(self) -> float:
        """Compressed bytes as a share of dense bytes."""
        return self.compressed_nbytes / self.dense_nbytes

    def line(self) -> str:
        """The cell on one line of plain text."""
        spread = f"[{self.summary.q1_ms:.2f}..{self.summary.q3_ms:.2f}]"
        time = f"{self.summary.median_ms:>9.2f} ms {spread:<17}"
        ratio = f"{self.copy_ratio:>8.2f}x copy (floor {self.floor_ratio:.2f}x)"
        speed = f"{self.gb_per_s:>7.2f} GB/s{ratio}{self.bandwidth_share:>6.0%} of bandwidth"
        return f"{self.operation:<11}{self.label:<20}{time}{speed}"

    def to_json(self) -> dict[str, Any]:
        """Fields and figures."""
        figures = ("gb_per_s", "copy_ratio", "floor_ratio", "bandwidth_share", "size_ratio")
        return asdict(self) | {name: getattr(self, name) for name in figures}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Result":
        """Read back the fields; figures are computed again."""
        fields = {name: stored[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {"shape": tuple(stored["shape"]), "summary": Summary(**stored["summary"])})


@dataclass(frozen=True)
class Report:
    """A whole run of one suite; `peers` holds the version of each peer, or why it was skipped."""

    suite: str
    header: Header
    peers: dict[str, str]
    results: tuple[Result, ...]

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
    def load(cls, path: Path) -> "Report":
        """Read a run that `save` wrote; `ValueError` where the file is something else."""
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a benchmark report of format {_FORMAT}")
        results = tuple(Result.from_json(stored) for stored in document["results"])
        return cls(document["suite"], Header.from_json(document["header"]), document["peers"], results)

    def markdown_header(self) -> str:
        """The hardware and versions as a Markdown paragraph."""
        header = self.header
        return (
            f"Hardware: {header.hardware()}; copy bandwidth {header.bandwidth()} (read + write); "
            f"{header.huge_pages()}.\n"
            f"Software: {header.software()}, {header.system}; {header.date[:10]}."
        )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1])] + [text.rjust(width) for text, width in others]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])
