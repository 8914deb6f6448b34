"""A dense copy of a weight that is not made before something is done with it, and that refuses to be written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only


class DenseCopy(Tensor):
    """Stands for what `make` gives, which is called for every operation; gradients flow through it.

    Code that only looks at weights stays cheap so. Being no plain tensor, it also keeps nn.TransformerEncoderLayer from
    its fused inference, which would multiply by the dense copy instead of calling the layer. What is written to a copy
    would be lost: that is refused, of views and detached ones, too, and so is asking for its memory. What numpy() and
    `__dlpack__` give is memory of their own.

    >>> copy = DenseCopy(lambda: torch.ones(2, 3), (2, 3), torch.ones(1))
    >>> copy.shape, copy @ torch.ones(3)
    (torch.Size([2, 3]), tensor([3., 3.]))
    >>> copy[0].zero_()
    Traceback (most recent call last):
    TypeError: weight: got zero_ of a dense copy; write to values
    """

    _make: Callable[[], Tensor]

    def __new__(cls, make: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> DenseCopy:
        """A tensor of this shape, in all else as `like`."""
        copy: DenseCopy = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        torch._C._set_throw_on_mutable_data_ptr(copy)  # to_dlpack asks past Python, and would take a null pointer
        copy._make = make
        return copy

    @property
    def __cuda_array_interface__(self) -> Any:
        """None, whatever the device: libraries ask who has one, and would be given memory."""
        raise AttributeError("weight: got __cuda_array_interface__ of a dense copy; use layer.to_dense().weight")

    def _refuse_operator(self, *args: object) -> Any:
        """Refuse here: torch takes the TypeError of an operator for "not implemented", and would do it out of place."""
        raise TypeError("weight: got an in-place operator of a dense copy; write to values")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = _refuse_operator
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = __ipow__ = _refuse_operator  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the copy, unless the function needs no elements; what shares its memory is a copy as well."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LOOKS:
                return func(*args)
            if func in _MEMORY:
                raise TypeError(f"weight: got {func.__name__} of a dense copy; use layer.to_dense().weight")
            made: list[Tensor] = []
            result = _on_copies(func, args, kwargs, made)
            owned = {_memory(tensor) for tensor in made} - {None}

            def guarded(tensor: Tensor) -> Tensor:
                return DenseCopy(lambda: tensor, tensor.shape, tensor) if _memory(tensor) in owned else tensor

            return tree_map_only(Tensor, guarded, result)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For what comes past `__torch_function__`, as custom autograd functions do."""
        return _on_copies(func, args, kwargs, [])


# What can be said of a tensor without its elements.
_LOOKS = [getattr(Tensor, name).__get__ for name in ("device", "dtype", "ndim", "requires_grad", "shape")]

# What gives memory away: it would be that of a copy, gone by then or written to in vain.
_MEMORY = [
    *(getattr(Tensor, name) for name in ("data_ptr", "storage", "untyped_storage")),
    getattr(Tensor, "const_data_ptr", None),  # not in torch 2.10
]


def _on_copies(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> Any:
    """What the function gives for the copies, which are listed in `made`."""
    kwargs = kwargs or {}
    if any(isinstance(target, DenseCopy) for target in tree_iter(_targets(func, args, kwargs))):
        raise TypeError(f"weight: got {func.__name__} of a dense copy; write to values")

    def make(copy: DenseCopy) -> Tensor:
        made.append(copy.__dict__["_make"]())
        return made[-1]

    args, kwargs = tree_map_only(DenseCopy, make, (args, kwargs))
    return func(*args, **kwargs)


def _memory(tensor: Tensor) -> int | None:
    """What tells memory apart from other memory; sparse tensors and those of torch.func say nothing of theirs."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else None


def _targets(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a function writes to: by the schema of an op, by name and options of another function."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        func = getattr(func, torch._C._jit_resolve_packet(func._qualified_op_name, *args, **kwargs))
    schema = getattr(func, "_schema", None)
    if schema is not None:
        given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
        return [given.get(arg.name) for arg in schema.arguments if arg.alias_info and arg.alias_info.is_write]
    name = func.__name__
    in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__")
    first = args[:1] or kwargs.values() if in_place or kwargs.get("inplace") else ()
    renormed = () if kwargs.get("max_norm") is None else args  # by embeddings, the rows that they look up
    return [*first, *renormed, kwargs.get("out")]
