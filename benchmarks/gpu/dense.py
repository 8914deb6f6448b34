"""The dense yardstick on a GPU: cuBLAS in every way that is easily had. What counts in a cell is the fastest of them.

The same product can be asked of torch with the weight stored either way, with the result stored either way, as a matrix
times a vector, or with a bias, and of cuBLAS or cuBLASLt; each may end in another kernel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.contest import Entrant, Timing
from benchmarks.gpu.device import Device

DENSE = "dense"  # the contender, whichever way it was

Way = Callable[[Tensor, Tensor], Tensor]


def dense_entrants(
    device: Device, x: Tensor, weights: Sequence[Tensor], is_right: Callable[[Tensor], bool]
) -> list[Entrant]:
    """x [m, k] times each of the weights [n, k], in every way and by every library."""
    return [
        Entrant(f"{way}, {library}", [partial(_by, device, library, call) for call in calls], is_right)
        for way, calls in _calls(x, weights).items()
        for library in device.blas_libraries
    ]


def fastest(entrants: Iterable[Entrant], timings: Mapping[str, Timing]) -> str:
    """The name of the one whose median is the least."""
    return min((entrant.name for entrant in entrants), key=lambda name: timings[name].summary.median_ms)


def _calls(x: Tensor, weights: Sequence[Tensor]) -> Mapping[str, Sequence[Callable[[], Tensor]]]:
    no_bias = x.new_zeros(weights[0].shape[0])
    stored_by_column = [weight.T.contiguous() for weight in weights]
    ways: dict[str, Sequence[Callable[[], Tensor]]] = {
        "F.linear": [partial(functional.linear, x, weight) for weight in weights],
        "addmm": [partial(torch.addmm, no_bias, x, weight.T) for weight in weights],
        "mm, W by column": [partial(torch.mm, x, weight) for weight in stored_by_column],
        "mm, y by column": [partial(_by_column, x, weight) for weight in weights],
    }
    if len(x) == 1:
        ways["mv"] = [partial(_vector, x, weight) for weight in weights]
    return ways


def _by(device: Device, library: str, call: Callable[[], Tensor]) -> Tensor:
    with device.blas(library):
        return call()


def _by_column(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, x.T).T


def _vector(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x[0])[None]
