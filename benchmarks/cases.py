"""What is measured: shapes, element types and shares of zeros, and the inputs made from them.

Inputs are normal values with zeros at random places. No value is zero by accident (a tiny one would round to zero in
fp8 or int8), and every zero is +0.0, so that a bit-exact round trip can be asked of each contender.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}

Shape = tuple[int, int]

_SMALLEST = 1 / 32  # magnitude below which fp8 (and int8 at the scale below) might round to zero
_INT8_SCALE = 32.0  # four standard deviations reach the end of int8's range
_MOST_INPUTS = 8


@dataclass(frozen=True)
class Workload:
    """One matrix to compress: its shape, the name of its dtype and its share of zeros."""

    shape: Shape
    dtype: str
    sparsity: float

    @property
    def elements(self) -> int:
        """Number of elements of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.elements * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        """The workload in words."""
        return f"{shape_name(self.shape)} {self.dtype}, {self.sparsity:.0%} zeros"


@dataclass(frozen=True)
class Selection:
    """Shapes, dtypes, sparsities, rows and blocks asked for; an empty one leaves the choice to the suite."""

    shapes: tuple[Shape, ...] = ()
    dtypes: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()

    def over(self, default: "Selection") -> "Selection":
        """This selection, with the gaps filled from `default`."""
        return Selection(
            self.shapes or default.shapes,
            self.dtypes or default.dtypes,
            self.sparsities or default.sparsities,
            self.rows or default.rows,
            self.blocks or default.blocks,
        )

    def workloads(self) -> Iterator[Workload]:
        """Every combination, shape by shape."""
        for shape, dtype, sparsity in product(self.shapes, self.dtypes, self.sparsities):
            yield Workload(shape, dtype, sparsity)

    def admits(self, result: object) -> bool:
        """Whether a stored result belongs to this selection (an empty field admits everything)."""
        wanted = {
            "shape": self.shapes,
            "dtype": self.dtypes,
            "sparsity": self.sparsities,
            "rows": self.rows,
            "block": self.blocks,
        }
        return all(not values or getattr(result, name, None) in values for name, values in wanted.items())


def shape_name(shape: Shape) -> str:
    """The shape as it is written on the command line, for example `4096x4096`."""
    return f"{shape[0]}x{shape[1]}"


def parse_shape(text: str) -> Shape:
    """Read `ROWSxCOLS`."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"a shape is ROWSxCOLS with positive sizes, got {text!r}")
    return int(found.group(1)), int(found.group(2))


def dense_input(workload: Workload, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """A matrix of normal values where each element is zero with probability `workload.sparsity`."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = torch.randn(workload.shape, generator=generator, device=device)
    values = torch.copysign(normal.abs().clamp_min_(_SMALLEST), normal)
    zeros = torch.rand(workload.shape, generator=generator, device=device) < workload.sparsity
    if workload.dtype == "int8":
        values = values.mul_(_INT8_SCALE).round_().clamp_(-127, 127)
    return values.masked_fill_(zeros, 0.0).to(DTYPES[workload.dtype])


def rotated_inputs(workload: Workload, nbytes: int) -> list[Tensor]:
    """Enough inputs that a call on each touches about `nbytes`, so that none is still in a cache when read again."""
    return rotated(dense_input(workload), nbytes)


def rotated(first: Tensor, nbytes: int) -> list[Tensor]:
    """The same, of the elements of `first`."""
    return rolled(first, min(_MOST_INPUTS, -(-nbytes // (2 * first.nbytes))))


def rolled(first: Tensor, count: int) -> list[Tensor]:
    """`first` and count - 1 more with the same elements at other places; groups of four columns stay together."""
    bits = first.view(torch.uint8).flatten()
    step = 1004 * first.element_size()
    return [first] + [bits.roll(i * step).view(first.dtype).view(first.shape) for i in range(1, count)]
