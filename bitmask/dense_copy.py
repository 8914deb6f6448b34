"""A dense copy of a weight that is not made before something is done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class DenseCopy(Tensor):
    """Stands for what `make` gives, which is called for every operation; gradients flow through it.

    Code that only looks at weights stays cheap so. Being no plain tensor, it also keeps nn.TransformerEncoderLayer from
    its fused inference, which would multiply by the dense copy instead of calling the layer.

    >>> copy = DenseCopy(lambda: torch.ones(2, 3), (2, 3), torch.ones(1))
    >>> copy.shape, copy @ torch.ones(3)
    (torch.Size([2, 3]), tensor([3., 3.]))
    """

    _make: Callable[[], Tensor]

    def __new__(cls, make: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> DenseCopy:
        """A tensor of this shape, in all else as `like`."""
        copy: DenseCopy = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        copy._make = make
        return copy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the copy, unless the function needs no elements."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LOOKS:
                return func(*args)
            return _on_copies(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For what comes past `__torch_function__`, as custom autograd functions do."""
        return _on_copies(func, args, kwargs)


# What can be said of a tensor without its elements.
_LOOKS = [getattr(Tensor, name).__get__ for name in ("device", "dtype", "ndim", "requires_grad", "shape")]


def _on_copies(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map_only(DenseCopy, lambda copy: copy.__dict__["_make"](), (args, kwargs or {}))
    return func(*args, **kwargs)
