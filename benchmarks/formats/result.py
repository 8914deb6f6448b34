"""What is found about sparse formats: a conversion, or a product with a weight."""

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.cases import Shape
from benchmarks.linear.result import DENSE, LinearResult
from benchmarks.report import CpuResult

SCATTERED = "scattered"
BLOCKS = "blocks"
TWO_FOUR = "2:4"

OURS = "bitmask"
TORCH = "torch"


@dataclass(frozen=True)
class ConversionResult(CpuResult):
    """One contender for one conversion, for example "to CSR" of a bitmask (torch: of a dense matrix), or "from CSR".

    `pattern` says where the zeros are, `nbytes` is what the matrix takes in torch's layout, `torch_ms` the median of
    torch's way in the same cell.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("speedup",)

    conversion: str
    pattern: str
    shape: Shape
    nbytes: int
    torch_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster than torch's way."""
        return self.torch_ms / self.summary.median_ms

    def line(self) -> str:
        """The result on one line of plain text."""
        spread = f"[{self.summary.q1_ms:.2f}..{self.summary.q3_ms:.2f}]"
        text = f"{self.conversion:<11}{self.contender:<10}{self.summary.median_ms:>10.2f} ms {spread:<19}"
        return text if self.contender == TORCH else f"{text}{self.speedup:>7.2f}x torch"


@dataclass(frozen=True)
class FormatProductResult(LinearResult):
    """One format for y = x W^T, where the zeros of W are in `pattern`."""

    FIGURES: ClassVar[tuple[str, ...]] = ("speedup", "size_ratio", "gb_per_s", "gflop_per_s")

    pattern: str

    @property
    def size_ratio(self) -> float:
        """Stored bytes as a share of dense ones."""
        return self.weight_nbytes / self.dense_nbytes

    def line(self) -> str:
        """The result on one line of plain text."""
        spread = f"[{self.summary.q1_ms:.3f}..{self.summary.q3_ms:.3f}]"
        text = f"{self.contender:<21}{self.size_ratio:>8.1%} of dense{self.summary.median_ms:>12.3f} ms {spread:<21}"
        return f"{text}{self.speedup:>7.2f}x {DENSE}"
