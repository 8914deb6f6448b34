"""Stand-in for `bitmask.compress_`, to be deleted when the package has it (see the import in networks.py)."""

from functools import partial

import torch
from torch import Tensor, nn

from bitmask import BitmaskTensor


def compress_(model: nn.Module, progress: bool = True) -> nn.Module:
    """Turn the weights of all `nn.Linear` modules into BitmaskTensor parameters, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed = BitmaskTensor.from_dense(module.weight)
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.forward = partial(_forward, packed, module.bias)  # type: ignore[method-assign]
    return model


def _forward(weight: BitmaskTensor, bias: Tensor | None, x: Tensor) -> Tensor:
    parts = weight.values, weight.bitmasks, weight.row_offsets
    y: Tensor = torch.ops.bitmask.linear(x, *parts, weight.shape[1], bias)
    return y
