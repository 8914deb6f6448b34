"""What is found about one way to multiply by a sparse weight: on any device, and on a CPU."""

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.cases import Shape
from benchmarks.report import CpuResult, Result

DENSE = "F.linear"
SATURATED = "dense, saturated"
BITMASK = "bitmask"


@dataclass(frozen=True)
class LinearTiming(Result):
    """One contender for y = x W^T with x [rows, k] and W [n, k], which is `shape`.

    `weight_nbytes` is what the contender stores of W, `dense_ms` the median of the dense yardstick in the same cell.
    Every contender went through `layers` weights in turn.
    """

    shape: Shape
    rows: int
    layers: int
    dense_nbytes: int
    weight_nbytes: int
    dense_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster than the dense yardstick."""
        return self.dense_ms / self.summary.median_ms

    @property
    def gb_per_s(self) -> float:
        """GB of the stored weight per second."""
        return self.weight_nbytes / self.summary.median_ms / 1e6

    @property
    def gflop_per_s(self) -> float:
        """GFLOP per second, counting all elements of the dense weight."""
        n, k = self.shape
        return 2 * self.rows * n * k / self.summary.median_ms / 1e6


@dataclass(frozen=True)
class LinearResult(LinearTiming, CpuResult):
    """One contender in one cell on a CPU, where the dense yardstick is `F.linear`.

    `compressed_nbytes` is what bitmask stores of W, `saturated_ms` the median of that contender in the same cell.
    `read_bandwidth` is in GB/s, for as many threads.
    """

    FIGURES: ClassVar[tuple[str, ...]] = (
        "speedup",
        "saturated_speedup",
        "ceiling",
        "ceiling_share",
        "gb_per_s",
        "gflop_per_s",
    )

    compressed_nbytes: int
    saturated_ms: float | None
    read_bandwidth: float | None

    @property
    def saturated_speedup(self) -> float | None:
        """How many times faster than dense weights at the pace of memory."""
        return None if self.saturated_ms is None else self.saturated_ms / self.summary.median_ms

    @property
    def ceiling(self) -> float:
        """What `saturated_speedup` of bitmask would be if only bytes counted."""
        return self.dense_nbytes / self.compressed_nbytes

    @property
    def ceiling_share(self) -> float | None:
        """How much of the ceiling was reached."""
        return None if self.saturated_speedup is None else self.saturated_speedup / self.ceiling

    def line(self) -> str:
        """The result on one line of plain text."""
        spread = f"[{self.summary.q1_ms:.3f}..{self.summary.q3_ms:.3f}]"
        text = f"{self.contender:<21}{self.summary.median_ms:>10.3f} ms {spread:<21}{self.speedup:>6.2f}x {DENSE}"
        if self.saturated_speedup is not None:
            text += f"{self.saturated_speedup:>7.2f}x saturated"
        if self.contender == BITMASK:
            share = "" if self.ceiling_share is None else f", {self.ceiling_share:.0%} reached"
            text += f" (ceiling {self.ceiling:.2f}x{share})"
        return f"{text}{self.gb_per_s:>8.1f} GB/s{self.gflop_per_s:>9.0f} GFLOP/s"
