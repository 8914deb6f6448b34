"""One cell: every contender's y = x W^T proven right on the first layer, then all of them timed in turn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Workload
from benchmarks.linear.contenders import Product
from benchmarks.linear.result import BITMASK, DENSE, SATURATED, LinearResult
from benchmarks.timer import Budget, Contender, interleave, torch_threads

_CHECKED_COLUMNS = 256  # of y, spread over it: a product in float64 of all of them would take longer than the timing
_LOSSY_ERROR = 0.03  # relative, which int8 with one scale for each row stays below
_TF32_ERROR = 2.0**-9  # relative, of a product of two factors of which 10 bits of mantissa are left, cut or rounded


class WrongProductError(RuntimeError):
    """This library or the yardstick did not get y = x W^T right."""


@dataclass(frozen=True)
class Setting:
    """How a cell is run; `read_bandwidth` is in GB/s, None where it could not be measured."""

    threads: int
    budget: Budget
    read_bandwidth: float | None


class Reference:
    """y = x W^T in float64 for some columns of y, and how far from it rounding may lead.

    `rounded_parts` also allows what cuBLAS does: sums of parts of a row may be rounded before they are added. `tf32`
    allows that x and W are rounded to it, each element by itself, so that a lost part of a sum is still noticed.
    """

    def __init__(self, x: Tensor, weight: Tensor, rounded_parts: bool = False, tf32: bool = False) -> None:
        columns = torch.linspace(0, len(weight) - 1, min(len(weight), _CHECKED_COLUMNS)).long()
        self._columns = columns.to(weight.device)
        wide_x, wide_weight = x.double(), weight[self._columns].double()
        self._y = wide_x @ wide_weight.T
        sums = wide_x.abs() @ wide_weight.abs().T
        accumulated = math.sqrt(x.shape[1]) * torch.finfo(torch.float32).eps * sums
        self._tolerance = torch.finfo(x.dtype).eps * self._y.abs() + accumulated
        if rounded_parts:
            self._tolerance += torch.finfo(x.dtype).eps * (wide_x.square() @ wide_weight.square().T).sqrt()
        if tf32:
            self._tolerance += _TF32_ERROR * sums

    def accepts(self, y: Tensor, lossy: bool) -> bool:
        """Whether `y` is as near as its dtype allows, or, if lossy, near enough to be of use."""
        difference = (y[:, self._columns].double() - self._y).abs()
        if lossy:
            return bool(difference.norm() <= _LOSSY_ERROR * self._y.norm())
        return bool((difference <= self._tolerance).all())


def measure(
    workload: Workload, rows: int, products: Sequence[Product], setting: Setting, say: Callable[[str], None]
) -> list[LinearResult]:
    """Time every product for the same x [rows, k], which is warm, over weights that are not.

    A peer with a wrong result is left out and named; this library and `F.linear` raise `WrongProductError`.
    """
    x = torch.randn(rows, workload.shape[1], generator=torch.Generator().manual_seed(1))
    x = x.to(products[0].weights[0].dtype)
    reference = Reference(x, products[0].weights[0])
    with torch_threads(setting.threads):
        right = [product for product in products if _is_right(product, x, reference, workload, say)]
        layers = len(products[0].weights)
        contenders = [Contender(partial(_multiply, product, x), slow=product.peer) for product in right]
        summaries = interleave(contenders, layers, setting.budget)
    medians = {product.name: summary.median_ms for product, summary in zip(right, summaries, strict=True)}
    (compressed_nbytes,) = (product.weight_nbytes for product in products if product.name == BITMASK)
    return [
        LinearResult(
            contender=product.name,
            dtype=workload.dtype,
            sparsity=workload.sparsity,
            threads=setting.threads,
            summary=summary,
            shape=workload.shape,
            rows=rows,
            layers=layers,
            dense_nbytes=workload.dense_nbytes,
            compressed_nbytes=compressed_nbytes,
            weight_nbytes=product.weight_nbytes,
            dense_ms=medians[DENSE],
            saturated_ms=medians.get(SATURATED),
            read_bandwidth=setting.read_bandwidth,
        )
        for product, summary in zip(right, summaries, strict=True)
    ]


def _multiply(product: Product, x: Tensor, layer: int) -> Tensor:
    return product.multiply(x, product.weights[layer])


def _is_right(
    product: Product, x: Tensor, reference: Reference, workload: Workload, say: Callable[[str], None]
) -> bool:
    if reference.accepts(_multiply(product, x, 0), product.lossy):
        return True
    problem = f"{product.name} is wrong for {workload}, {len(x)} rows"
    if not product.peer:
        raise WrongProductError(problem)
    say(f"left out: {problem}")
    return False
