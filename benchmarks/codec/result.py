"""What is found about one way to compress or decompress a matrix: on any device, and on a CPU."""

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.cases import Shape
from benchmarks.report import CpuResult, Result

COPY = "copy"
HUGE_PAGE_COPY = "copy, huge pages"
COMPRESS = "compress"
DECOMPRESS = "decompress"


@dataclass(frozen=True)
class CodecTiming(Result):
    """One contender in one cell.

    `moved_nbytes` is what must be read and written at the least, `copy_ms` the median of `dense.clone()` in the same
    cell, and `copy_bandwidth` the GB/s of a copy between existing buffers (on a CPU: with as many threads).
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("gb_per_s", "copy_ratio", "floor_ratio", "bandwidth_share", "size_ratio")

    operation: str
    shape: Shape
    dense_nbytes: int
    compressed_nbytes: int
    moved_nbytes: int
    copy_ms: float
    copy_bandwidth: float

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


@dataclass(frozen=True)
class CodecResult(CodecTiming, CpuResult):
    """One contender in one cell on a CPU; `isa` is the instruction set it was told to use, if it can be told."""

    isa: str | None

    @property
    def label(self) -> str:
        """The contender, with its instruction set."""
        return f"{self.contender} {self.isa}" if self.isa else self.contender

    def line(self) -> str:
        """The cell on one line of plain text."""
        spread = f"[{self.summary.q1_ms:.2f}..{self.summary.q3_ms:.2f}]"
        time = f"{self.summary.median_ms:>9.2f} ms {spread:<17}"
        ratio = f"{self.copy_ratio:>8.2f}x copy (floor {self.floor_ratio:.2f}x)"
        speed = f"{self.gb_per_s:>7.2f} GB/s{ratio}{self.bandwidth_share:>6.0%} of bandwidth"
        return f"{self.operation:<11}{self.label:<20}{time}{speed}"
