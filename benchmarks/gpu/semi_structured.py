"""2:4 on a GPU with cold weights: packing beside a copy, products beside the best dense one and torch's; 2:4 blocks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.block_sparse.result import FORWARD
from benchmarks.block_sparse.weights import BlockWeight
from benchmarks.cases import Selection, Shape, Workload, dense_input, shape_name
from benchmarks.gpu.contest import Entrant, contest
from benchmarks.gpu.dense import DENSE, dense_entrants, fastest
from benchmarks.gpu.plan import GpuPlan
from benchmarks.gpu.products import GpuProductResult, dense_nbytes, product_tables
from benchmarks.linear.measure import Reference
from benchmarks.linear.result import BITMASK
from benchmarks.timer import Budget
from bitmask import prune_24_
from bitmask.ops_block import bsr_linear
from bitmask.ops_block_two_four import bsr_linear_24
from bitmask.ops_two_four import linear_24, pack_24, unpack_24

PACK, PRUNE, UNPACK = "pack", "prune and pack", "unpack"

_ROWS = (1, 16, 512, 4096, 4, 64, 128, 2048)  # what matters most comes first, for the case that time is up
_DEFAULT = Selection(((4096, 4096), (14336, 4096)), ("bf16", "fp16", "fp32"), (), _ROWS, (64,))
_QUICK = Selection(((96, 64), (64, 128)), ("bf16", "fp32"), (), (1, 3), (16,))
_DENSITY = 0.25  # of the blocks
_BUDGET = Budget(min_rounds=5, max_rounds=15, slow_rounds=3, seconds=0.05)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)
_FEWEST_LAYERS, _MOST_LAYERS = 2, 64


@dataclass(frozen=True)
class _Cell:
    """What there is to do with one weight."""

    part: str
    dtype: str
    shape: Shape
    rows: int = 0
    block: int = 0

    def __str__(self) -> str:
        """The cell in words."""
        blocks = f", {_DENSITY:.0%} of blocks of {self.block}" if self.block else ""
        rows = f", m = {self.rows}" if self.rows else ""
        return f"{self.part}, {shape_name(self.shape)} {self.dtype}{blocks}{rows}"


def run(plan: GpuPlan) -> list[GpuProductResult]:
    """Packing first, then the products for which there is time."""
    results: list[GpuProductResult] = []
    selection = plan.selection.over(_QUICK if plan.quick else _DEFAULT)
    for dtype, shape in product(selection.dtypes, selection.shapes):
        weights = _weights(plan, dtype, shape)
        cells: list[tuple[_Cell, Callable[[GpuPlan, _Cell, Sequence[Tensor]], list[GpuProductResult]]]] = [
            (_Cell(PACK, dtype, shape), _codec)
        ]
        cells += [(_Cell(FORWARD, dtype, shape, m), _products) for m in selection.rows]
        cells += [(_Cell(FORWARD, dtype, shape, m, b), _blocks) for b in selection.blocks for m in selection.rows]
        for cell, measure in plan.in_time(cells):
            plan.say(f"\n{cell}, {len(weights)} layers")
            found = measure(plan, cell, weights)
            for result in found:
                plan.say(result.line())
            results += found
        del weights
        plan.device.release()
    return results


def _weights(plan: GpuPlan, dtype: str, shape: Shape) -> list[Tensor]:
    """Equal 2:4 weights at different places, so many that even packed no cache holds them."""
    first = prune_24_(dense_input(Workload(shape, dtype, 0.0), plan.header.seed, plan.device.where))
    count = min(max(-(-plan.uncached_nbytes // (first.nbytes // 2)), _FEWEST_LAYERS), _MOST_LAYERS)
    return [first.clone() for _ in range(count)]


def _results(
    plan: GpuPlan,
    cell: _Cell,
    yardsticks: Sequence[Entrant],
    others: Sequence[tuple[Entrant, int]],
    density: float,
    layers: int,
) -> list[GpuProductResult]:
    """Of the fastest of the yardsticks, and of all others, each with the bytes of its weight."""
    budget = _QUICK_BUDGET if plan.quick else _BUDGET
    entrants = [*yardsticks, *(entrant for entrant, _ in others)]
    timings = contest(plan.device, entrants, budget, str(cell), plan.say)
    best = fastest(yardsticks, timings)
    whole = dense_nbytes(cell.shape, cell.dtype)
    shown = [(DENSE, best, whole)] + [(each.name, each.name, size) for each, size in others if each.name in timings]
    return [
        GpuProductResult(
            contender=contender,
            dtype=cell.dtype,
            sparsity=0.5,
            summary=timings[name].summary,
            shape=cell.shape,
            rows=cell.rows,
            layers=layers,
            dense_nbytes=whole,
            weight_nbytes=nbytes,
            dense_ms=timings[best].summary.median_ms,
            part=cell.part,
            block=cell.block,
            density=density,
            tf32=False,
            way=name if contender == DENSE else "",
            captured=timings[name].captured,
        )
        for contender, name, nbytes in shown
    ]


# Packing: the yardstick is a copy, the density the share of its bytes that must be moved.


def _codec(plan: GpuPlan, cell: _Cell, weights: Sequence[Tensor]) -> list[GpuProductResult]:
    expected = pack_24(weights[0].cpu())
    packed = [pack_24(weight) for weight in weights]
    nbytes = sum(part.nbytes for part in expected)
    copy = Entrant("copy", [weight.clone for weight in weights], partial(torch.equal, weights[0]))

    def same_parts(found: tuple[Tensor, Tensor]) -> bool:
        return all(torch.equal(part.cpu(), right) for part, right in zip(found, expected, strict=True))

    # What must say whether it fails waits for the GPU.
    entrants = [
        Entrant(PACK, [partial(pack_24, weight) for weight in weights], same_parts, captured=False),
        Entrant(PRUNE, [partial(pack_24, weight, True) for weight in weights], same_parts),
        Entrant(UNPACK, [partial(unpack_24, *p) for p in packed], partial(torch.equal, weights[0]), captured=False),
    ]
    share = (nbytes + weights[0].nbytes) / (2 * weights[0].nbytes)
    return _results(plan, cell, [copy], [(each, nbytes) for each in entrants], share, len(weights))


# Products.


def _products(plan: GpuPlan, cell: _Cell, weights: Sequence[Tensor]) -> list[GpuProductResult]:
    x = plan.random_rows(cell.dtype, cell.rows, cell.shape[1])
    is_right = partial(Reference(x, weights[0], rounded_parts=True).accepts, lossy=False)
    packed = [pack_24(weight) for weight in weights]
    nbytes = sum(part.nbytes for part in packed[0])
    others = [(Entrant(BITMASK, [partial(linear_24, x, *parts) for parts in packed], is_right), nbytes)]
    others += [(each, nbytes) for each in _torch_entrants(plan, x, weights, is_right)]
    return _results(plan, cell, dense_entrants(plan.device, x, weights, is_right), others, 0.5, len(weights))


def _torch_entrants(
    plan: GpuPlan, x: Tensor, weights: Sequence[Tensor], is_right: Callable[[Tensor], bool]
) -> list[Entrant]:
    """torch's own 2:4 tensors, with both libraries that it knows."""
    entrants = []
    for name, kind in (("torch CUTLASS 2:4", "CUTLASS"), ("torch cuSPARSELt 2:4", "CUSPARSELT")):
        try:
            pack: Any = getattr(torch.sparse, f"SparseSemiStructuredTensor{kind}").from_dense
            sparse = [pack(weight) for weight in weights]
        except Exception as error:  # whatever others may raise
            plan.say(f"{name} left out: {error!r}")
            continue
        entrants.append(Entrant(name, [partial(functional.linear, x, each) for each in sparse], is_right, peer=True))
    return entrants


def _blocks(plan: GpuPlan, cell: _Cell, weights: Sequence[Tensor]) -> list[GpuProductResult]:
    """Blocks that are 2:4, beside the same blocks as dense ones."""
    x = plan.random_rows(cell.dtype, cell.rows, cell.shape[1])
    where, n = plan.device.where, cell.shape[0]
    weight = BlockWeight.cut_from(weights[0], cell.block, 1 - _DENSITY)
    values, metadata = pack_24(weight.values)
    count = min(max(-(-plan.uncached_nbytes // values.nbytes), _FEWEST_LAYERS), _MOST_LAYERS)
    masked = weights[0] * weight.elements_mask.to(where)
    dense = [masked.clone() for _ in range(count)]
    is_right = partial(Reference(x, masked, rounded_parts=True).accepts, lossy=False)
    crow, col = weight.index
    indices = [(crow.to(where, copy=True), col.to(where, copy=True)) for _ in range(count)]
    halves = [partial(bsr_linear_24, x, values.clone(), metadata.clone(), *index, n) for index in indices]
    wholes = [partial(bsr_linear, x, weight.values.clone(), *index, n) for index in indices]
    others = [
        (Entrant(BITMASK, halves, is_right), values.nbytes + metadata.nbytes),
        (Entrant("bitmask, dense blocks", wholes, is_right), weight.values.nbytes),
    ]
    share = weight.kept_elements / 2 / masked.numel()
    return _results(plan, cell, dense_entrants(plan.device, x, dense, is_right), others, share, count)


def tables(results: Sequence[GpuProductResult]) -> Iterable[str]:
    """Products, then packing beside a copy."""
    return product_tables(results)
