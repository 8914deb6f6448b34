"""What is found about one way to write or read a checkpoint."""

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.report import CpuResult

DENSE = "safetensors"
COPIED = "safetensors, copied"  # out of the mapped file, as a model does that takes a state_dict
BITMASK = "bitmask"
KEPT = "bitmask, kept compressed"
PEER = "compressed-tensors"

SAVE = "save"
LOAD_COLD = "load, cold"
LOAD_WARM = "load, warm"
CONVERT = "convert"


@dataclass(frozen=True)
class CheckpointResult(CpuResult):
    """One contender in one cell.

    `dense_ms` is the median of safetensors on the dense tensors in the same cell, `peak_nbytes` how far the process
    grew at most while converting, of which `shard_nbytes` is one shard of dense tensors.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("dense_ratio", "gb_per_s", "size_ratio")

    operation: str
    dense_nbytes: int
    file_nbytes: int
    dense_ms: float | None
    peak_nbytes: int | None = None
    shard_nbytes: int | None = None

    @property
    def dense_ratio(self) -> float | None:
        """Time as a multiple of that of safetensors on dense tensors (less is faster)."""
        return None if self.dense_ms is None else self.summary.median_ms / self.dense_ms

    @property
    def gb_per_s(self) -> float:
        """GB of dense data per second, at the median."""
        return self.dense_nbytes / self.summary.median_ms / 1e6

    @property
    def size_ratio(self) -> float:
        """Bytes of the file as a share of dense bytes."""
        return self.file_nbytes / self.dense_nbytes

    def line(self) -> str:
        """The cell on one line of plain text."""
        ratio = "" if self.dense_ratio is None else f"{self.dense_ratio:>7.2f}x dense"
        peak = "" if self.peak_nbytes is None else f"  peak {self.peak_nbytes / 1e6:.0f} MB"
        spread = f"[{self.summary.q1_ms:.0f}..{self.summary.q3_ms:.0f}]"
        time = f"{self.summary.median_ms:>9.0f} ms {spread:<14}"
        return f"{self.operation:<12}{self.contender:<26}{time}{self.gb_per_s:>6.2f} GB/s{ratio}{peak}"
