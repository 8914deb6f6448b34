"""CompressedTensor: what every `torch.Tensor` whose storage is a compressed layout has in common.

A subclass says what is its own: the names and checks of its parts, how they are made of a dense tensor and back, how
rows are cut out of them and how they are multiplied. handlers.py says, for all of them, what torch ops do.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bitmask.calls import FormatError

if TYPE_CHECKING:
    from typing_extensions import Self

_Compressed = TypeVar("_Compressed", bound="CompressedTensor")

# What compressed tensors do on their parts, by torch op; handlers.py fills it.
HANDLERS: dict[Any, Callable[..., Any]] = {}


class DecompressWarning(UserWarning):
    """An operation had no kernel for compressed tensors and ran on a dense copy.

    Silence with ``warnings.filterwarnings("ignore", category=bitmask.DecompressWarning)``.
    """


class _Parts:
    """The parts of one tensor, held once for all its aliases, so that what is copied into one reaches all."""

    def __init__(self, parts: Iterable[Tensor], borrowed: bool) -> None:
        self.borrowed = borrowed  # rows of another tensor, in which other rows would find no place
        self.replace(parts)

    def replace(self, parts: Iterable[Tensor]) -> None:
        self.parts = list(parts)
        self._seen = [(weakref.ref(part), _version_of(part)) for part in self.parts]

    def untouched(self) -> bool:
        """Whether the parts are those of `replace`, not written to since, as far as torch counts writes."""
        return all(
            seen() is part and version is not None and version == _version_of(part)
            for part, (seen, version) in zip(self.parts, self._seen, strict=True)
        )


def _version_of(part: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count (inference mode)."""
    return None if part.is_inference() else part._version


def part_property(position: int) -> Any:
    """A property that reads and replaces the part at a position of `part_names`."""

    def replace(self: CompressedTensor, part: Tensor) -> None:
        self._held.parts[position] = part

    return property(lambda self: self._held.parts[position], replace)


def _row_access(name: str) -> Any:
    """A method of Tensor that cuts out rows, uncompiled, since where rows begin may be data.

    Rows are detached, so that autograd does not take them for views of the wrapper, which compilers would replay.
    """
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def access(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(CompressedTensor, torch.detach, method(self, *args, **kwargs))

    return torch.compiler.disable(access)  # type: ignore[no-untyped-call]


class CompressedTensor(Tensor):
    """A tensor with the shape, dtype and device of a dense one, stored as parts, the first of which are its values.

    What BitmaskTensor says of parameters, copies, writing and operations without a kernel is what is written here.
    """

    # What a subclass sets, or writes for itself below.
    part_names: ClassVar[tuple[str, ...]]
    _check_parts: ClassVar[Callable[..., None]]  # (*parts): raises unless kinds, dtypes and devices are right
    _check_part_sizes: ClassVar[Callable[..., None]]  # (*parts, shape): raises unless their sizes fit it
    _rebuild: ClassVar[Callable[..., Any]]  # (*parts, shape, is_parameter): unpickles, proving the parts

    _held: _Parts
    values = part_property(0)
    _stored = part_property(0)  # torch.export sees an inner tensor only under a name that torch.Tensor does not have

    @classmethod
    def from_dense(cls, tensor: Tensor, *, keep_negative_zero: bool = False) -> Self:
        """Compress a dense tensor; gradients do not flow through."""
        raise NotImplementedError

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """Decompress; equal to what was compressed, in `dtype` if one is given.

        Raises:
            FormatError: the parts were changed since they were proven.
        """
        dense = self._decompress()
        return dense if dtype is None else dense.to(dtype)

    def _decompress(self) -> Tensor:
        raise NotImplementedError

    def _rows(self, start: int, stop: int, shape: Sequence[int]) -> Self:
        """The flattened rows [start, stop), borrowed, as a tensor of `shape`; parts are views where they can be."""
        raise NotImplementedError

    @staticmethod
    def _linear(x: Tensor, parts: Sequence[Tensor], in_features: int, bias: Tensor | None) -> Tensor:
        """`F.linear` with the parts of a weight [out_features, in_features]."""
        raise NotImplementedError

    @staticmethod
    def _converts(source: torch.dtype, target: torch.dtype) -> bool:
        """Whether converting the values, from one dtype to another one, converts the tensor."""
        raise NotImplementedError

    # What all have in common.

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    @classmethod
    def _wrap(cls, parts: Sequence[Tensor], shape: Sequence[int], borrowed: bool = False) -> Self:
        """Wrap parts as they are, as an inference tensor only where they are such: views of others may not be."""
        inference = parts[0].is_inference()
        with nullcontext() if inference == torch.is_inference_mode_enabled() else torch.inference_mode(inference):
            wrapper: Self = Tensor._make_wrapper_subclass(
                cls, torch.Size(shape), dtype=parts[0].dtype, device=parts[0].device, requires_grad=False
            )
        wrapper._held = _Parts(parts, borrowed)
        return wrapper

    @property
    def nnz(self) -> int:
        """Number of stored elements."""
        count: int = self.values.numel()
        return count

    @property
    def sparsity(self) -> float:
        """Fraction of elements that are not stored, 0 to 1 (0 for a tensor without elements)."""
        return 1 - self.nnz / self.numel() if self.numel() > 0 else 0.0

    @property
    def compressed_nbytes(self) -> int:
        """Bytes of the parts; `nbytes` is what the dense tensor would take."""
        return sum(part.nbytes for part in self._parts())

    def _parts(self) -> tuple[Tensor, ...]:
        """The parts, which anyone may have replaced or resized: dtypes and sizes are checked, contents are not."""
        parts = tuple(self._held.parts)
        self._check_parts(*parts)
        if parts[0].dtype != self.dtype:
            raise FormatError(f"values: got dtype {parts[0].dtype}, expected {self.dtype}, the dtype of the tensor")
        self._check_part_sizes(*parts, self.shape)
        return parts

    def _map_parts(self, change: Callable[[Tensor], Tensor]) -> Self:
        return self._wrap([change(part) for part in self._parts()], self.shape)

    def _alias(self) -> Self:
        """Another wrapper around the same held parts."""
        alias = self._wrap(self._parts(), self.shape)
        alias._held = self._held
        return alias

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Shape, dtype and how well it compresses; never the elements."""
        try:
            self._parts()
            contents = f"nnz={self.nnz}, sparsity={self.sparsity:.4f}, compressed_nbytes={self.compressed_nbytes}"
        except (TypeError, ValueError) as error:
            contents = f"faulty: {error}"
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"nbytes={self.nbytes}, {contents})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares nothing; a parameter stays one."""
        if id(self) not in memo:
            copied = self._map_parts(torch.clone)
            copied._held = memo.setdefault(id(self._held), copied._held)  # aliases stay aliases of each other
            memo[id(self)] = mark_parameter(copied, getattr(self, "_is_param", False))
        result: Self = memo[id(self)]
        return result

    def __copy__(self) -> Self:
        """An alias: as with dense tensors, what is copied into one reaches the other."""
        return mark_parameter(self._alias(), getattr(self, "_is_param", False))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the parts, cut out of any larger storage they are views of."""
        parts = [part if part.untyped_storage().nbytes() == part.nbytes else part.clone() for part in self._parts()]
        return self._rebuild, (*parts, tuple(self.shape), getattr(self, "_is_param", False))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Names of the inner tensors, for torch.compile and friends."""
        return ["_stored", *self.part_names[1:]], None

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: None, outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> Self:
        """The inverse of `__tensor_flatten__`."""
        return cls._wrap([inner[name] for name in ("_stored", *cls.part_names[1:])], outer_size)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile's cache may key on: everything but the data."""
        return repr(
            [type(self).__name__, self.shape, *((part.shape, part.dtype, part.device) for part in self._parts())]
        )

    # Attributes that torch would set on the wrapper behind the parts' back.

    @property
    def requires_grad(self) -> bool:
        """False: the stored weight is frozen."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise TypeError(
                f"a {type(self).__name__} is frozen and takes no gradient: "
                "use nn.Parameter(tensor, requires_grad=False), or train to_dense()"
            )

    # Ways to rows.
    __getitem__ = _row_access("__getitem__")
    select = _row_access("select")
    narrow = _row_access("narrow")
    split = _row_access("split")
    chunk = _row_access("chunk")
    unbind = _row_access("unbind")

    def __setitem__(self, index: object, value: object) -> None:
        """Refuse: elements are immutable."""
        raise TypeError(_refused_write(self))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refuse gradients: the stored weight is frozen."""
        self.requires_grad = requires_grad
        return self

    @property
    def data(self) -> Tensor:
        """This tensor, detached; assigning another one of the same shape, dtype and device takes its parts."""
        return self.detach()

    @data.setter
    def data(self, source: Tensor) -> None:
        if not isinstance(source, type(self)):
            kind = type(self).__name__
            raise TypeError(
                f"data: got {type(source).__name__}, expected a {kind}; copy_ compresses a dense tensor, and to_empty "
                f"takes no {kind} that is on that device already"
            )
        kinds = [(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in (source, self)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"data: got shape, dtype and device {kinds[0]}, expected {kinds[1]}")
        self._held = source._held

    # What torch would read from a dense storage that is not there.

    def numpy(self, *, force: bool = False) -> Any:
        """The dense tensor as a NumPy array."""
        return self.to_dense().numpy(force=force)

    def tolist(self) -> Any:
        """The dense tensor as nested lists."""
        return self.to_dense().tolist()

    def __dlpack__(self, **kwargs: Any) -> Any:
        """The dense tensor as a DLPack capsule."""
        return self.to_dense().__dlpack__(**kwargs)

    def _refuse_storage(self, *args: object, **kwargs: object) -> Any:
        """Refuse: there is no dense storage."""
        parts = f"{', '.join(self.part_names[:-1])} and {self.part_names[-1]}"
        raise TypeError(f"a {type(self).__name__} has no dense storage: use its {parts}, or to_dense()")

    data_ptr = storage = _typed_storage = apply_ = map_ = map2_ = _refuse_storage

    def untyped_storage(self) -> torch.UntypedStorage:
        """A storage without memory (device meta): tracers ask for one to tell tensors apart."""
        storage: Any = torch.UntypedStorage
        return storage(0, device="meta")  # type: ignore[no-any-return]

    def share_memory_(self) -> Self:
        """Move the parts to shared memory, in place."""
        for part in self._parts():
            part.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        """Whether the parts are in shared memory."""
        return all(part.is_shared() for part in self._parts())  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Catch F.linear, which autograd would take apart; everything else goes on as if this method were not here."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _opaque_linear(*args, **kwargs)
        return _proceed(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` on compressed tensors where there is a way, else on dense copies."""
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        result = func.decompose(*args, **kwargs) if handler is None else handler(func, *args, **kwargs)
        return _run_dense(func, args, kwargs) if result is NotImplemented else result


def detached(tensor: Tensor) -> Tensor:
    """What `from_dense` compresses: no compressed tensor, and without its history."""
    if isinstance(tensor, CompressedTensor):
        raise TypeError(f"tensor: got a {type(tensor).__name__}, expected a dense tensor")
    return tensor.detach() if isinstance(tensor, Tensor) else tensor


_proceed: Any = torch._C._disabled_torch_function_impl  # calls a function past every __torch_function__


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _opaque_linear(*args: Any, **kwargs: Any) -> Any:
    """F.linear by its handler; opaque to torch.compile, which traces the ops inside afterwards."""
    linear = torch.nn.functional.linear
    result = HANDLERS[torch.ops.aten.linear.default](linear, *args, **kwargs)
    return _proceed(linear, (), args, kwargs) if result is NotImplemented else result


def mark_parameter(tensor: _Compressed, is_parameter: bool) -> _Compressed:
    """The same tensor, which torch takes for an nn.Parameter if told so."""
    if is_parameter:
        tensor._is_param = True  # how torch marks a wrapper subclass as nn.Parameter
    return tensor


def _refused_write(tensor: CompressedTensor) -> str:
    return (
        f"a {type(tensor).__name__} cannot be written to in place: change to_dense() and compress again, or use copy_"
    )


def _run_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op without a handler on dense copies, one for each tensor; refuse ops that write to a compressed one."""
    compressed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, CompressedTensor)]
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            for leaf in tree_leaves(given):
                if isinstance(leaf, CompressedTensor):
                    raise TypeError(f"{func}: {_refused_write(leaf)}")
    dense_copies: dict[int, Tensor] = {}

    def to_dense(tensor: CompressedTensor) -> Tensor:
        if id(tensor) not in dense_copies:
            dense_copies[id(tensor)] = tensor.to_dense()
        return dense_copies[id(tensor)]

    args, kwargs = tree_map_only(CompressedTensor, to_dense, (args, kwargs))
    name = type(compressed[0]).__name__
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    caveat = f"; writing to the result will not change the {name}" if is_view else ""
    warnings.warn(
        f"{func} has no kernel for {name} and ran on a dense copy{caveat}",
        DecompressWarning,
        stacklevel=_stack_level() + 1,
    )
    return func(*args, **kwargs)


def _stack_level() -> int:
    """The stack level, for a caller of this function, of the code outside this file that it works for."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals is globals():
        level, frame = level + 1, frame.f_back
    return level
