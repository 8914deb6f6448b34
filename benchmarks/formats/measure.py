"""One cell: a conversion by this library and by torch, or products in all formats, each proven right first."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Workload, rotated
from benchmarks.codec.measure import WrongRoundTripError
from benchmarks.formats.contenders import LAYOUTS, Layout, pattern_input, stored_nbytes
from benchmarks.formats.result import OURS, TORCH, ConversionResult
from benchmarks.timer import Budget, Contender, interleave, torch_threads
from bitmask import BitmaskTensor


def measure_conversions(
    workload: Workload, pattern: str, threads: int, budget: Budget, uncached_nbytes: int
) -> list[ConversionResult]:
    """Time both ways between a bitmask and the layouts of a pattern, beside torch's ways from and to a dense matrix.

    Raises `WrongRoundTripError` where this library or torch changes values.
    """
    inputs = rotated(pattern_input(workload, pattern), uncached_nbytes)
    with torch_threads(threads):
        return [
            result for layout in LAYOUTS[pattern] for result in _both_ways(workload, pattern, layout, inputs, budget)
        ]


def _both_ways(
    workload: Workload, pattern: str, layout: Layout, inputs: Sequence[Tensor], budget: Budget
) -> list[ConversionResult]:
    packed = [BitmaskTensor.from_dense(dense) for dense in inputs]
    sparse = [layout.from_dense(dense) for dense in inputs]
    _prove(workload, layout, inputs[0], packed[0], sparse[0])
    conversions: dict[str, tuple[tuple[Callable[[Any], object], Sequence[Any]], ...]] = {
        f"to {layout.name}": ((layout.from_bitmask, packed), (layout.from_dense, inputs)),
        f"from {layout.name}": ((BitmaskTensor.from_sparse, sparse), (Tensor.to_dense, sparse)),
    }
    results = []
    for conversion, (ours, of_torch) in conversions.items():
        contenders = [Contender(partial(_nth, *ours)), Contender(partial(_nth, *of_torch), slow=True)]
        summaries = interleave(contenders, len(inputs), budget)
        results += [
            ConversionResult(
                contender=name,
                dtype=workload.dtype,
                sparsity=workload.sparsity,
                threads=torch.get_num_threads(),
                summary=summary,
                conversion=conversion,
                pattern=pattern,
                shape=workload.shape,
                nbytes=stored_nbytes(sparse[0]),
                torch_ms=summaries[1].median_ms,
            )
            for name, summary in zip((OURS, TORCH), summaries, strict=True)
        ]
    return results


def _prove(workload: Workload, layout: Layout, dense: Tensor, packed: BitmaskTensor, sparse: Tensor) -> None:
    """Both make the same parts, and each way back gives the same elements."""
    ours = layout.from_bitmask(packed)
    same = ours.layout == sparse.layout and stored_nbytes(ours) == stored_nbytes(sparse)
    back = [ours.to_dense(), sparse.to_dense(), BitmaskTensor.from_sparse(sparse).to_dense()]
    if not same or not all(torch.equal(each, dense) for each in back):
        raise WrongRoundTripError(f"{layout.name} of {workload} is not what torch makes of it")


def _nth(function: Callable[[Any], object], arguments: Sequence[Any], index: int) -> object:
    return function(arguments[index])
