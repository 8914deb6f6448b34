"""What the tests of this folder share. Every reference comes from the CPU: its kernels, or float64."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitmask import ops

Parts = tuple[Tensor, Tensor, Tensor]


def parts_on(device: torch.device, dense: Tensor, keep_negative_zero: bool = False) -> Parts:
    """The parts that the CPU makes of `dense`, moved to `device`."""
    values, bitmasks, row_offsets = (part.to(device) for part in ops.compress(dense.cpu(), keep_negative_zero))
    return values, bitmasks, row_offsets


def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph, and what the work returns, which is where every replay writes."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def assert_is_product(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """`y` is x @ dense.T + bias within the rounding that a kernel, or cuBLAS in its place, may do.

    Sums are of float32 (of float64 for float64), in any order, so that each addition is off by a part of a partial
    sum, which the sum of magnitudes bounds. The result is rounded once; cuBLAS may also round the sums of a few parts
    of a row before it adds them, which are about as large as the root of the sum of squares.
    """
    assert (y.shape, y.dtype) == ((*x.shape[:-1], dense.shape[0]), x.dtype)
    wide = [None if t is None else t.detach().cpu().double() for t in (x, dense, bias)]
    exact = F.linear(*wide)
    magnitude = F.linear(*(None if t is None else t.abs() for t in wide))
    squares = F.linear(*(None if t is None else t.square() for t in wide))
    unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    info = torch.finfo(x.dtype)
    bound = 2 * (x.shape[-1] + 3) * unit * magnitude + info.eps * (exact.abs() + squares.sqrt()) + info.tiny * info.eps
    error = (y.detach().cpu().double() - exact).abs()
    assert bool((error <= bound).all()), f"off by {float((error / bound).max()):.1f} times the bound"
