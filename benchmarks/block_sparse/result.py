"""What is found about one way to do one part of a layer's work with a block-sparse weight."""

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.cases import Shape
from benchmarks.report import CpuResult

DENSE = "dense"
BITMASK = "bitmask"
TORCH_BSR = "torch BSR"

FORWARD = "forward"
FORWARD_24 = "forward 2:4"  # of blocks that are 2:4
GRAD_INPUT = "dX"
GRAD_WEIGHT = "dW"
STEP = "step"
PRODUCTS = {FORWARD: 1, FORWARD_24: 1, GRAD_INPUT: 1, GRAD_WEIGHT: 1, STEP: 3}  # in each part


@dataclass(frozen=True)
class BlockSparseResult(CpuResult):
    """One contender for one part of the work of a layer with W [n, k], which is `shape`, and x [rows, k].

    `block` is the height and width of the blocks, 0 where W is dense; `kept_elements` of W are in kept blocks.
    `dense_ms` is the median of the dense way in the same cell. Every contender went through `layers` weights in turn.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("density", "speedup", "ideal", "ideal_share", "gflop_per_s")

    part: str
    shape: Shape
    rows: int
    block: int
    kept_elements: int
    layers: int
    dense_ms: float

    @property
    def density(self) -> float:
        """The share of W that is kept."""
        return self.kept_elements / (self.shape[0] * self.shape[1])

    @property
    def speedup(self) -> float:
        """How many times faster than the dense way."""
        return self.dense_ms / self.summary.median_ms

    @property
    def ideal(self) -> float:
        """What the speedup would be if kept elements took as long as those of a dense weight."""
        return 1 / self.density

    @property
    def ideal_share(self) -> float:
        """How much of the ideal was reached."""
        return self.speedup / self.ideal

    @property
    def gflop_per_s(self) -> float:
        """GFLOP per second, counting the elements of kept blocks."""
        return 2 * PRODUCTS[self.part] * self.rows * self.kept_elements / self.summary.median_ms / 1e6

    def line(self) -> str:
        """The result on one line of plain text."""
        spread = f"[{self.summary.q1_ms:.3f}..{self.summary.q3_ms:.3f}]"
        text = f"{self.contender:<10}{self.density:>5.0%}{self.block or '':>5}{self.summary.median_ms:>10.3f} ms "
        text += f"{spread:<21}{self.gflop_per_s:>7.0f} GFLOP/s{self.speedup:>7.2f}x"
        return text if self.contender == DENSE else f"{text} of {self.ideal:.2f}x ideal ({self.ideal_share:.0%})"
