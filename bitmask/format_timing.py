"""How long a matrix takes to convert to each sparse format, and a product with it in each."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.format_bytes import BITMASK, BSR, COO, CSC, CSR, DENSE, TWO_FOUR, short_indices_suffice
from bitmask.ops_block import bsr_linear
from bitmask.semi_structured import SemiStructuredTensor

_MOST_CALLS = 21
_ENOUGH_SECONDS = 0.3  # after which a contender is called no more


@dataclass(frozen=True)
class Format:
    """How a format is made of a dense matrix, and how x W^T is computed in it."""

    make: Callable[[Tensor], Any]
    multiply: Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class ProductTimes:
    """Median `milliseconds` by rows of x and format, and the `problems` of the formats that are absent."""

    milliseconds: dict[int, dict[str, float]]
    problems: dict[str, str]


def formats(block_shape: tuple[int, int]) -> dict[str, Format]:
    """Every format by its name; BSR's product is this library's, those of torch's other layouts are torch's.

    CSR and CSC have int32 indices where they suffice: torch multiplies several times as fast by them.
    """
    return {
        DENSE: Format(lambda dense: dense, F.linear),
        COO: Format(lambda dense: BitmaskTensor.from_dense(dense).to_coo(), torch_linear),
        CSR: Format(lambda dense: with_short_indices(BitmaskTensor.from_dense(dense).to_csr()), torch_linear),
        CSC: Format(lambda dense: with_short_indices(BitmaskTensor.from_dense(dense).to_csc()), torch_linear),
        BSR: Format(lambda dense: BitmaskTensor.from_dense(dense).to_bsr(block_shape), block_linear),
        TWO_FOUR: Format(SemiStructuredTensor.from_dense, F.linear),
        BITMASK: Format(BitmaskTensor.from_dense, F.linear),
    }


def with_short_indices(matrix: Tensor) -> Tensor:
    """A matrix in CSR or CSC with int32 indices, which MKL takes as they are, or as it is where they do not suffice."""
    if not short_indices_suffice(len(matrix.values()), *matrix.shape):
        return matrix
    by_row = matrix.layout is torch.sparse_csr
    starts = matrix.crow_indices() if by_row else matrix.ccol_indices()
    positions = matrix.col_indices() if by_row else matrix.row_indices()
    parts = starts.int(), positions.int(), matrix.values()
    return torch.sparse_compressed_tensor(
        *parts, matrix.shape, layout=matrix.layout, device=matrix.device, check_invariants=False
    )


def torch_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)` for x [m, k] and a weight in one of torch's sparse layouts, the way torch does it best."""
    return torch.mv(weight, x[0])[None] if len(x) == 1 else torch.mm(weight, x.T).T


def block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)` for x [m, k] and a weight in torch's BSR layout, by this library."""
    return bsr_linear(x, weight.values(), weight.crow_indices(), weight.col_indices(), len(weight))


def convert_times(dense: Tensor, chosen: Mapping[str, Format]) -> dict[str, float]:
    """Median milliseconds of making each chosen format of a matrix, in turn."""
    with _without_notices():
        return medians({name: partial(each.make, dense) for name, each in chosen.items() if name != DENSE})


def product_times(dense: Tensor, chosen: Mapping[str, Format], rows: Iterable[int]) -> ProductTimes:
    """Time x W^T in each chosen format of W in turn; what torch cannot multiply by, or gets wrong, is left out."""
    found = ProductTimes({}, {})
    with _without_notices():
        weights = {name: each.make(dense) for name, each in chosen.items()}
        for count in rows:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(count, dense.shape[1], generator=generator, device="cpu").to(dense.dtype)
            exact = F.linear(x.float(), dense.float()) if dense.itemsize < 4 else F.linear(x, dense)
            calls = {name: partial(each.multiply, x, weights[name]) for name, each in chosen.items()}
            problems = {name: _problem(call, exact, x) for name, call in calls.items()}
            found.problems.update({name: problem for name, problem in problems.items() if problem})
            found.milliseconds[count] = medians({name: call for name, call in calls.items() if not problems[name]})
    return found


@contextmanager
def _without_notices() -> Iterator[None]:
    """Without what torch says when it first makes tensors in its sparse layouts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        yield


def _problem(call: Callable[[], Tensor], exact: Tensor, x: Tensor) -> str:
    """Why a product is not to be timed, or nothing; where the result is not finite, any is right."""
    dtype = str(x.dtype).removeprefix("torch.")
    try:
        error = float((call().to(exact.dtype) - exact).norm() / exact.norm())
    except RuntimeError as refusal:
        if not isinstance(refusal, NotImplementedError) and "MKL" not in str(refusal):  # which some builds are without
            raise
        return f"torch has no product with it in {dtype}"
    allowed = 2 * torch.finfo(x.dtype).eps + math.sqrt(x.shape[1]) * torch.finfo(exact.dtype).eps
    return f"its product is {error:.1%} off in {dtype}, and left out" if error > allowed else ""


def medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of calls in turn, after one of each; slow ones sit out later rounds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(_MOST_CALLS):
        for name, call in calls.items():
            if sum(samples[name]) < _ENOUGH_SECONDS * 1e3:
                start = time.perf_counter_ns()
                result = call()
                samples[name].append((time.perf_counter_ns() - start) / 1e6)
                del result
    return {name: statistics.median(taken) for name, taken in samples.items()}
