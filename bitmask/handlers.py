"""What torch ops do on a CompressedTensor without decompressing it.

A handler takes the op and its arguments; if it returns NotImplemented, the op runs on a dense copy. To teach compressed
tensors an op, write its handler and enter it in the table at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch._subclasses.functional_tensor import FunctionalTensor

from bitmask import calls
from bitmask.compressed_tensor import HANDLERS, CompressedTensor

aten = torch.ops.aten


def _alias(func: Any, tensor: CompressedTensor) -> CompressedTensor:
    return tensor._alias()


def _clone(func: Any, tensor: CompressedTensor, *, memory_format: object = None) -> CompressedTensor:
    return tensor._map_parts(torch.clone)


def _to_copy(
    func: Any,
    tensor: CompressedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **layout: Any,
) -> Any:
    """Converts the parts. A value that rounds to zero stays stored, which the format allows."""
    if layout.get("layout") not in (None, torch.strided) or layout.get("pin_memory"):
        return NotImplemented
    if dtype is not None and dtype != tensor.dtype and not tensor._converts(tensor.dtype, dtype):
        return NotImplemented
    values, *indices = tensor._parts()
    values = values.to(dtype=dtype, device=device, non_blocking=non_blocking, copy=True)
    indices = [part.to(device=device, non_blocking=non_blocking, copy=True) for part in indices]
    return tensor._wrap([values, *indices], tensor.shape)


def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What load_state_dict does; into a compressed tensor it replaces the parts."""
    if not isinstance(target, CompressedTensor):
        return target.copy_(source.to_dense() if isinstance(source, CompressedTensor) else source, non_blocking)
    kind = type(target)
    if not isinstance(source, Tensor):
        raise TypeError(f"copy_: got {type(source).__name__}, expected a torch.Tensor")
    if is_fake(target.values) or isinstance(target.values, FunctionalTensor):
        raise NotImplementedError(
            f"copy_: writing to a {kind.__name__} cannot be compiled; do it outside torch.compile"
        )
    if target._held.borrowed:
        raise TypeError(
            f"copy_: rows of a {kind.__name__} cannot be written to: copy into the whole tensor, or clone the rows"
        )
    if source.shape != target.shape:
        raise ValueError(f"copy_: got shape {tuple(source.shape)}, expected {tuple(target.shape)}")
    if isinstance(source, CompressedTensor) and not isinstance(source, kind):
        source = source.to_dense()
    with torch.inference_mode(False), torch.no_grad():  # parts made in inference mode could not be trained with
        source = source.to(dtype=target.dtype, device=target.device)
        copied = source._map_parts(torch.clone) if isinstance(source, CompressedTensor) else kind.from_dense(source)
        target._held.replace(copied._parts())
    return target


def _slice(
    func: Any, tensor: CompressedTensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Any:
    """Whole rows are cut out of the parts; other dimensions only where nothing is cut."""
    size = tensor.shape[dim]
    first, last, step = slice(start, stop, step).indices(size)
    if (first, last, step) == (0, size, 1):
        return _alias(func, tensor)
    if dim not in (0, -tensor.ndim) or step != 1 or tensor.ndim < 2:
        return NotImplemented
    last = max(first, last)
    rows = math.prod(tensor.shape[1:-1])
    return tensor._rows(first * rows, last * rows, [last - first, *tensor.shape[1:]])


def _select(func: Any, tensor: CompressedTensor, dim: int, index: int) -> Any:
    if dim not in (0, -tensor.ndim) or tensor.ndim < 2:
        return NotImplemented
    if not -tensor.shape[0] <= index < tensor.shape[0]:
        raise IndexError(f"select: got index {index}, expected one below {tensor.shape[0]}, the size of dimension 0")
    index += tensor.shape[0] if index < 0 else 0
    rows = math.prod(tensor.shape[1:-1])
    return tensor._rows(index * rows, (index + 1) * rows, tensor.shape[1:])


def _split(func: Any, tensor: CompressedTensor, size: int | Sequence[int], dim: int = 0) -> Any:
    if dim not in (0, -tensor.ndim) or tensor.ndim < 2:
        return NotImplemented
    lengths = [piece.shape[0] for piece in func(_stand_in(tensor), size, dim)]  # torch's own checks and rounding
    ends = list(accumulate(lengths))
    return [_slice(func, tensor, 0, end - length, end) for length, end in zip(lengths, ends, strict=True)]


def _unbind(func: Any, tensor: CompressedTensor, dim: int = 0) -> Any:
    if dim not in (0, -tensor.ndim) or tensor.ndim < 2:
        return NotImplemented
    return [_select(func, tensor, 0, index) for index in range(tensor.shape[0])]


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Straight from the parts."""
    if not isinstance(weight, CompressedTensor) or isinstance(input, CompressedTensor):
        return NotImplemented
    if isinstance(bias, CompressedTensor):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        if weight.ndim != 2 or weight.dtype not in calls.LINEAR_DTYPES or calls.differentiates_forward():
            return NotImplemented
        parts, columns = weight._parts(), weight.shape[1]
    return weight._linear(input, parts, columns, bias)


def _is_pinned(func: Any, tensor: CompressedTensor, device: Any = None) -> bool:
    return all(part.is_pinned() for part in tensor._parts())


def _stand_in(tensor: CompressedTensor) -> Tensor:
    """A dense tensor of the same shape, dtype and device that takes one element of memory."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _like(func: Any, tensor: CompressedTensor, *args: Any, **kwargs: Any) -> Any:
    """A new dense tensor that takes only shape, dtype and device from this one."""
    return func(_stand_in(tensor), *args, **kwargs)


HANDLERS.update(
    {
        aten.alias.default: _alias,
        aten.detach.default: _alias,
        aten.clone.default: _clone,
        aten._to_copy.default: _to_copy,
        aten.copy_.default: _copy_,
        aten.slice.Tensor: _slice,
        aten.select.int: _select,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split,
        aten.unbind.int: _unbind,
        aten.is_pinned.default: _is_pinned,
        aten.linear.default: _linear,
        **dict.fromkeys(
            (
                aten.empty_like.default,
                aten.zeros_like.default,
                aten.ones_like.default,
                aten.full_like.default,
                aten.rand_like.default,
                aten.randn_like.default,
                aten.new_empty.default,
                aten.new_empty_strided.default,
                aten.new_zeros.default,
                aten.new_ones.default,
                aten.new_full.default,
            ),
            _like,
        ),
    }
)
