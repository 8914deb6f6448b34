"""A block-sparse layer on a GPU with cold weights: y, dX and dW beside the best dense products of cuBLAS."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.block_sparse.result import FORWARD, GRAD_INPUT, GRAD_WEIGHT
from benchmarks.block_sparse.weights import BlockWeight
from benchmarks.cases import Selection, Shape, Workload, dense_input, shape_name
from benchmarks.gpu.contest import Entrant, contest
from benchmarks.gpu.dense import DENSE, dense_entrants, fastest
from benchmarks.gpu.plan import GpuPlan
from benchmarks.gpu.products import GpuProductResult, dense_nbytes, product_tables
from benchmarks.linear.measure import Reference
from benchmarks.linear.result import BITMASK
from benchmarks.timer import Budget
from bitmask.ops_block import TransposedIndex, bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values

_SHAPES = ((4096, 4096), (14336, 4096))
_ROWS = (512, 16, 4096, 1, 2048)  # what matters most comes first, for the case that time is up
_DEFAULT = Selection(_SHAPES, ("bf16", "fp32"), (0.75, 0.9, 0.5), _ROWS, (64, 128, 32))
_QUICK = Selection(((96, 64), (40, 130)), ("bf16", "fp32"), (0.5,), (1, 3), (16,))
_FP32_ROWS = (16, 2048)  # and of float32, which is rarely trained in, these alone
_RIVAL_ROWS = (16, 512, 4096)  # torch compiles for each, which takes seconds
_CSR_ROWS, _CSR_DENSITY = 512, 0.1  # beyond which cuSPARSE takes longer than the rest of the cell
_BUDGET = Budget(min_rounds=5, max_rounds=15, slow_rounds=3, seconds=0.05)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=2, seconds=0.0)
_FEWEST_LAYERS, _MOST_LAYERS = 2, 1024
_FEW_ROWS, _LAYERS_OF_MANY_ROWS = 512, 8  # arithmetic decides beyond, and a pass over all layers would take long
_DENSE_SHARE = 8  # a share of the memory for the dense weights: beside them there are up to two transposed copies

Index = tuple[Tensor, Tensor]
IsRight = Callable[[Tensor], bool]


@dataclass(frozen=True)
class _Subject:
    """A weight to cut into blocks, and how products with it are to be done."""

    dtype: str
    tf32: bool
    block: int
    sparsity: float
    shape: Shape

    def __str__(self) -> str:
        """The subject in words."""
        precision = "tf32" if self.tf32 else self.dtype
        kept = f"{1 - self.sparsity:.0%} of blocks of {self.block}"
        return f"{shape_name(self.shape)} {precision}, {kept}"


@dataclass(frozen=True)
class _Blocks:
    """One layer's blocks."""

    values: Tensor
    index: Index
    transposed: TransposedIndex


@dataclass(frozen=True)
class _Layers:
    """Equal weights at different places, dense and as blocks, so many that no cache holds the blocks of all.

    The kept elements of all together are at least `plan.uncached_nbytes`, unless the dense weights would take too much.
    """

    subject: _Subject
    weight: BlockWeight
    dense: Sequence[Tensor]
    blocks: Sequence[_Blocks]

    @classmethod
    def of(cls, plan: GpuPlan, subject: _Subject) -> "_Layers":
        """Made on the device; blocks are drawn on the CPU."""
        where = plan.device.where
        first = dense_input(Workload(subject.shape, subject.dtype, 0.0), plan.header.seed, where)
        weight = BlockWeight.cut_from(first, subject.block, subject.sparsity)
        needed = -(-plan.uncached_nbytes // weight.values.nbytes)
        room = plan.header.hardware.memory_nbytes // _DENSE_SHARE
        count = min(max(needed, _FEWEST_LAYERS), _MOST_LAYERS, max(room // first.nbytes, 1))
        masked = first * weight.elements_mask.to(where)
        blocks = [
            _Blocks(
                weight.values.clone(),
                (weight.index[0].to(where, copy=True), weight.index[1].to(where, copy=True)),
                TransposedIndex(*(part.to(where, copy=True) for part in weight.transposed)),
            )
            for _ in range(count)
        ]
        return cls(subject, weight, [masked.clone() for _ in range(count)], blocks)

    def for_rows(self, m: int) -> "_Layers":
        """As many of them as a product of so many rows goes through."""
        most = len(self.dense) if m <= _FEW_ROWS else _LAYERS_OF_MANY_ROWS
        return replace(self, dense=self.dense[:most], blocks=self.blocks[:most])

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks of one layer and of where they lie."""
        first = self.blocks[0]
        return sum(part.nbytes for part in (first.values, *first.index))

    @property
    def density(self) -> float:
        """Share of the elements of W in kept blocks."""
        return self.weight.kept_elements / self.dense[0].numel()


def run(plan: GpuPlan) -> list[GpuProductResult]:
    """Every cell for which there is time."""
    results: list[GpuProductResult] = []
    selection = plan.selection.over(_QUICK if plan.quick else _DEFAULT)
    for subject in plan.in_time(_subjects(selection)):
        layers = _Layers.of(plan, subject)
        rows = [m for m in selection.rows if subject.dtype != "fp32" or plan.quick or m in _FP32_ROWS]
        for m, part in plan.in_time(product(rows or selection.rows, _PARTS), within=f"{subject}, (m, part) = "):
            some = layers.for_rows(m)
            plan.say(f"\n{part}, {subject}, m = {m}, {len(some.dense)} layers")
            with plan.device.precision(subject.tf32):
                found = _cell(plan, some, m, part)
            for result in found:
                plan.say(result.line())
            results += found
        del layers
        plan.device.release()
    return results


def _subjects(selection: Selection) -> list[_Subject]:
    """The first block and density come first; these alone also in float32, as such and as tf32."""
    kinds = [(dtype, tf32) for dtype in selection.dtypes for tf32 in ((False, True) if dtype == "fp32" else (False,))]
    return [
        _Subject(dtype, tf32, block, sparsity, shape)
        for block, sparsity, (dtype, tf32), shape in product(
            selection.blocks, selection.sparsities, kinds, selection.shapes
        )
        if dtype != "fp32" or (block, sparsity) == (selection.blocks[0], selection.sparsities[0])
    ]


def _cell(plan: GpuPlan, layers: _Layers, m: int, part: str) -> list[GpuProductResult]:
    subject = layers.subject
    n, k = subject.shape
    x, grad = (plan.random_rows(subject.dtype, m, columns) for columns in (k, n))
    dense, others = _PARTS[part](plan, layers, x, grad)
    budget = _QUICK_BUDGET if plan.quick else _BUDGET
    timings = contest(plan.device, [*dense, *others], budget, f"{part}, {subject}, m = {m}", plan.say)
    best = fastest(dense, timings)
    shown = {DENSE: best} | {each.name: each.name for each in others if each.name in timings}
    return [
        GpuProductResult(
            contender=contender,
            dtype=subject.dtype,
            sparsity=subject.sparsity,
            summary=timings[name].summary,
            shape=subject.shape,
            rows=m,
            layers=len(layers.dense),
            dense_nbytes=dense_nbytes(subject.shape, subject.dtype),
            weight_nbytes=dense_nbytes(subject.shape, subject.dtype) if contender == DENSE else layers.nbytes,
            dense_ms=timings[best].summary.median_ms,
            part=part,
            block=subject.block,
            density=layers.density,
            tf32=subject.tf32,
            way=name if contender == DENSE else "",
            captured=timings[name].captured,
        )
        for contender, name in shown.items()
    ]


# The dense entrants of each part, and the others.

_Entrants = tuple[list[Entrant], list[Entrant]]


def _judge(subject: _Subject, x: Tensor, weight: Tensor) -> IsRight:
    """Whether a result is x W^T."""
    return partial(Reference(x, weight, rounded_parts=True, tf32=subject.tf32).accepts, lossy=False)


def _forward(plan: GpuPlan, layers: _Layers, x: Tensor, grad: Tensor) -> _Entrants:
    n, _ = layers.subject.shape
    is_right = _judge(layers.subject, x, layers.dense[0])
    own = [partial(bsr_linear, x, each.values, *each.index, n) for each in layers.blocks]
    return dense_entrants(plan.device, x, layers.dense, is_right), [
        Entrant(BITMASK, own, is_right),
        *_torch_bsr(plan, layers, x, is_right),
        *_torch_csr(layers, x, is_right),
    ]


def _torch_bsr(plan: GpuPlan, layers: _Layers, x: Tensor, is_right: IsRight) -> list[Entrant]:
    """What torch multiplies with its own kernels in Triton, where blocks divide the weight."""
    shape = layers.subject.shape
    if any(size % layers.subject.block for size in shape) or not (plan.quick or len(x) in _RIVAL_ROWS):
        return []
    weights = [
        torch.sparse_bsr_tensor(*each.index, each.values, shape, check_invariants=False) for each in layers.blocks
    ]
    return [Entrant("torch BSR", [partial(functional.linear, x, weight) for weight in weights], is_right, peer=True)]


def _torch_csr(layers: _Layers, x: Tensor, is_right: IsRight) -> list[Entrant]:
    """cuSPARSE, by torch, with single elements, at the places of which it is told in 32 bits."""
    if round(layers.density, 2) > _CSR_DENSITY or len(x) > _CSR_ROWS:  # a whole number of blocks is kept
        return []
    calls = [partial(_by_csr, _csr_of(weight), x) for weight in layers.dense]
    return [Entrant("torch CSR", calls, is_right, peer=True)]


def _csr_of(weight: Tensor) -> Tensor:
    wide = weight.to_sparse_csr()
    index = wide.crow_indices().int(), wide.col_indices().int()
    return torch.sparse_csr_tensor(*index, wide.values(), wide.shape, check_invariants=False)


def _by_csr(weight: Tensor, x: Tensor) -> Tensor:
    return (weight @ x.T).T


def _grad_input(plan: GpuPlan, layers: _Layers, x: Tensor, grad: Tensor) -> _Entrants:
    _, k = layers.subject.shape
    transposed = [dense.T.contiguous() for dense in layers.dense]
    is_right = _judge(layers.subject, grad, transposed[0])
    own = [partial(bsr_linear_backward_input, grad, each.values, each.transposed, k) for each in layers.blocks]
    return dense_entrants(plan.device, grad, transposed, is_right), [Entrant(BITMASK, own, is_right)]


def _grad_weight(plan: GpuPlan, layers: _Layers, x: Tensor, grad: Tensor) -> _Entrants:
    """The x of each layer is another; the dense product has the whole of grad^T x."""
    cold = [x.clone() for _ in layers.blocks]
    is_right = _judge(layers.subject, grad.T, x.T)
    whole = (grad.double().T @ x.double()).to(x.dtype)
    kept = layers.weight.elements_mask.to(x.device)
    block = [layers.subject.block, layers.subject.block]
    own = [
        partial(bsr_linear_backward_values, grad, each, *blocks.index, block)
        for each, blocks in zip(cold, layers.blocks, strict=True)
    ]

    def blocks_are_right(values: Tensor) -> bool:
        return is_right(torch.where(kept, _spread(layers, values), whole))

    dense = dense_entrants(plan.device, grad.T, [each.T for each in cold], is_right)
    return dense, [Entrant(BITMASK, own, blocks_are_right)]


def _spread(layers: _Layers, values: Tensor) -> Tensor:
    """Blocks as a dense matrix, zero elsewhere."""
    (n, k), block, mask = layers.subject.shape, layers.subject.block, layers.weight.mask
    grid = values.new_zeros(*mask.shape, block, block)
    grid[mask.to(values.device)] = values
    return grid.transpose(1, 2).reshape(mask.shape[0] * block, mask.shape[1] * block)[:n, :k]


_PARTS: dict[str, Callable[[GpuPlan, _Layers, Tensor, Tensor], _Entrants]] = {
    FORWARD: _forward,
    GRAD_INPUT: _grad_input,
    GRAD_WEIGHT: _grad_weight,
}


def tables(results: Sequence[GpuProductResult]) -> Iterable[str]:
    """A table for each product, shape, dtype and block."""
    return product_tables(results)
