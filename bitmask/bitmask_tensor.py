"""BitmaskTensor: a `torch.Tensor` whose storage is the bitmask layout."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bitmask import ops
from bitmask.calls import FormatError

# What BitmaskTensor does on compressed parts, by torch op; handlers.py fills it.
HANDLERS: dict[Any, Callable[..., Any]] = {}


class DecompressWarning(UserWarning):
    """An operation had no kernel for compressed tensors and ran on a dense copy.

    Silence with ``warnings.filterwarnings("ignore", category=bitmask.DecompressWarning)``.
    """


class _Parts:
    """The parts of one tensor, held once for all its aliases, so that what is copied into one reaches all."""

    def __init__(self, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, borrowed: bool) -> None:
        self.borrowed = borrowed  # rows of another tensor, in which other rows would find no place
        self.replace(values, bitmasks, row_offsets)

    def replace(self, values: Tensor, bitmasks: Tensor, row_offsets: Tensor) -> None:
        self.values, self.bitmasks, self.row_offsets = values, bitmasks, row_offsets
        self._seen = [(weakref.ref(part), _version_of(part)) for part in (values, bitmasks, row_offsets)]

    def checked(self, dtype: torch.dtype, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The parts, which anyone may have replaced or resized: dtypes and sizes are checked, contents are not."""
        parts = self.values, self.bitmasks, self.row_offsets
        ops.check_parts(*parts)
        if self.values.dtype != dtype:
            raise FormatError(f"values: got dtype {self.values.dtype}, expected {dtype}, the dtype of the tensor")
        ops.check_part_sizes(*parts, shape)
        return parts

    def untouched(self) -> bool:
        """Whether the parts are those of `replace`, not written to since, as far as torch counts writes."""
        parts = self.values, self.bitmasks, self.row_offsets
        return all(
            seen() is part and version is not None and version == _version_of(part)
            for part, (seen, version) in zip(parts, self._seen, strict=True)
        )


def _version_of(part: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count (inference mode)."""
    return None if part.is_inference() else part._version


def _part(name: str) -> Any:
    """A property that reads and replaces one of the parts."""
    return property(lambda self: getattr(self._held, name), lambda self, part: setattr(self._held, name, part))


def _row_access(name: str) -> Any:
    """A method of Tensor that cuts out rows, uncompiled, since where rows begin is data.

    Rows are detached, so that autograd does not take them for views of the wrapper, which compilers would replay.
    """
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def access(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(BitmaskTensor, torch.detach, method(self, *args, **kwargs))

    return torch.compiler.disable(access)  # type: ignore[no-untyped-call]


class BitmaskTensor(Tensor):
    """A tensor stored as its non-zero elements and one bit per element that says where they go (FORMAT.md).

    It has the shape, dtype and device of the dense tensor, can be an `nn.Parameter(..., requires_grad=False)`, and
    travels through `state_dict`, `to`, `deepcopy`, pickling and `torch.save`. Its elements are immutable but for
    `copy_`. An operation without a kernel here runs on a dense copy and says so with a `DecompressWarning`; that goes
    for views too, other than rows, so writing to such a result does not change the tensor.

    Attributes:
        values: [nnz] in the dense dtype, row by row.
        bitmasks: uint8 [..., ceil(cols / 8)], least significant bit first.
        row_offsets: int64 [rows], index of each row's first value; rows are all dimensions but the last, flattened.

    >>> dense = torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 0.0]])
    >>> compressed = BitmaskTensor.from_dense(dense)
    >>> compressed.values
    tensor([1., 2., 5., 3.])
    >>> torch.equal(compressed.to_dense(), dense)
    True
    """

    _held: _Parts
    values = _part("values")
    bitmasks = _part("bitmasks")
    row_offsets = _part("row_offsets")
    _stored = _part("values")  # torch.export sees an inner tensor only under a name that torch.Tensor does not have

    @staticmethod
    def __new__(
        cls: type[BitmaskTensor], values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]
    ) -> BitmaskTensor:
        """Wrap parts as they are; `from_dense` and `from_parts` are the public ways in."""
        wrapper: BitmaskTensor = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=values.dtype, device=values.device, requires_grad=False
        )
        wrapper._held = _Parts(values, bitmasks, row_offsets, borrowed=False)
        return wrapper

    def __init__(self, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> None:
        super().__init__()

    @classmethod
    def from_dense(cls, tensor: Tensor, *, keep_negative_zero: bool = False) -> BitmaskTensor:
        """Compress a dense tensor of any shape, strides and supported dtype; gradients do not flow through.

        Args:
            tensor: what to compress; it is not kept.
            keep_negative_zero: store -0.0 (bit-exact); by default it counts as zero and comes back as +0.0.

        Raises:
            TypeError: a sparse, quantized, nested or already compressed tensor, or a dtype without a codec.
        """
        if isinstance(tensor, BitmaskTensor):
            raise TypeError("tensor: got a BitmaskTensor, expected a dense tensor")
        if isinstance(tensor, Tensor):
            tensor = tensor.detach()
        return cls(*ops.compress(tensor, keep_negative_zero), tensor.shape)

    @classmethod
    def from_parts(cls, values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int]) -> BitmaskTensor:
        """Wrap existing parts (not copied) of a tensor of `shape`, after proving them consistent.

        `bitmasks` may be [rows, ceil(cols / 8)] or keep the leading dimensions of `shape`.

        Raises:
            FormatError: parts that contradict each other or the shape.
            TypeError, ValueError: a part of the wrong kind, dtype or device.

        >>> bits = torch.tensor([[0b101]], dtype=torch.uint8)
        >>> BitmaskTensor.from_parts(torch.tensor([7, 8]), bits, torch.tensor([0]), [1, 3]).to_dense()
        tensor([[7, 0, 8]])
        """
        values, bitmasks, row_offsets = (
            part.detach() if isinstance(part, Tensor) else part for part in (values, bitmasks, row_offsets)
        )
        sizes = ops.validate(values, bitmasks, row_offsets, shape)
        return cls(values, bitmasks.reshape(ops.bitmask_sizes(sizes)), row_offsets, sizes)

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """Decompress; equal to what was compressed, in `dtype` if one is given.

        Raises:
            FormatError: the parts were changed since they were proven.
        """
        dense = ops.decompress(*self._parts(), self.shape)
        return dense if dtype is None else dense.to(dtype)

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
        """Bytes of the three parts; `nbytes` is what the dense tensor would take."""
        return sum(part.nbytes for part in self._parts())

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._held.checked(self.dtype, self.shape)

    def _map_parts(self, change: Callable[[Tensor], Tensor]) -> BitmaskTensor:
        values, bitmasks, row_offsets = (change(part) for part in self._parts())
        return BitmaskTensor(values, bitmasks, row_offsets, self.shape)

    def _alias(self) -> BitmaskTensor:
        """Another wrapper around the same held parts."""
        alias = self._map_parts(lambda part: part)
        alias._held = self._held
        return alias

    def _rows(self, start: int, stop: int, shape: Sequence[int]) -> BitmaskTensor:
        """The flattened rows [start, stop) as a tensor of `shape`; values and bitmasks are views.

        Where a part was written to, all of them are proven again first; writes that torch does not count (through
        NumPy or `.data`) are the writer's business here. `to_dense` always proves.
        """
        values, bitmasks, offsets = self._parts()
        if not self._held.untouched():
            ops.validate(values, bitmasks, offsets, self.shape)
            self._held.replace(values, bitmasks, offsets)
        begin, end = (int(offsets[row]) if row < len(offsets) else values.numel() for row in (start, stop))
        bitmasks = bitmasks.reshape(len(offsets), bitmasks.shape[-1])[start:stop].reshape(ops.bitmask_sizes(shape))
        rows = BitmaskTensor(values[begin:end], bitmasks, offsets[start:stop] - begin, shape)
        rows._held.borrowed = True
        return rows

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Shape, dtype and how well it compresses; never the elements."""
        try:
            self._parts()
            contents = f"nnz={self.nnz}, sparsity={self.sparsity:.4f}, compressed_nbytes={self.compressed_nbytes}"
        except (TypeError, ValueError) as error:
            contents = f"faulty: {error}"
        return (
            f"BitmaskTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"nbytes={self.nbytes}, {contents})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> BitmaskTensor:
        """A copy that shares nothing; a parameter stays one."""
        if id(self) not in memo:
            copied = self._map_parts(torch.clone)
            copied._held = memo.setdefault(id(self._held), copied._held)  # aliases stay aliases of each other
            memo[id(self)] = _mark_parameter(copied, getattr(self, "_is_param", False))
        result: BitmaskTensor = memo[id(self)]
        return result

    def __copy__(self) -> BitmaskTensor:
        """An alias: as with dense tensors, what is copied into one reaches the other."""
        return _mark_parameter(self._alias(), getattr(self, "_is_param", False))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the parts, cut out of any larger storage they are views of."""
        parts = [part if part.untyped_storage().nbytes() == part.nbytes else part.clone() for part in self._parts()]
        return _rebuild, (*parts, tuple(self.shape), getattr(self, "_is_param", False))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Names of the inner tensors, for torch.compile and friends."""
        return ["_stored", "bitmasks", "row_offsets"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: None, outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> BitmaskTensor:
        """The inverse of `__tensor_flatten__`."""
        return BitmaskTensor(inner["_stored"], inner["bitmasks"], inner["row_offsets"], outer_size)

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
                "a BitmaskTensor is frozen and takes no gradient: use nn.Parameter(tensor, requires_grad=False), "
                "or train to_dense()"
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
        raise TypeError(
            "a BitmaskTensor cannot be written to in place: change to_dense() and compress again, or use copy_"
        )

    def requires_grad_(self, requires_grad: bool = True) -> BitmaskTensor:
        """Refuse gradients: the stored weight is frozen."""
        self.requires_grad = requires_grad
        return self

    @property
    def data(self) -> Tensor:
        """This tensor, detached; assigning another one of the same shape, dtype and device takes its parts."""
        return self.detach()

    @data.setter
    def data(self, source: Tensor) -> None:
        if not isinstance(source, BitmaskTensor):
            raise TypeError(f"data: got {type(source).__name__}, expected a BitmaskTensor")
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
        raise TypeError("a BitmaskTensor has no dense storage: use its values, bitmasks and row_offsets, or to_dense()")

    data_ptr = storage = _typed_storage = apply_ = map_ = map2_ = _refuse_storage

    def untyped_storage(self) -> torch.UntypedStorage:
        """A storage without memory (device meta): tracers ask for one to tell tensors apart."""
        storage: Any = torch.UntypedStorage
        return storage(0, device="meta")  # type: ignore[no-any-return]

    def share_memory_(self) -> BitmaskTensor:
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


_proceed: Any = torch._C._disabled_torch_function_impl  # calls a function past every __torch_function__


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _opaque_linear(*args: Any, **kwargs: Any) -> Any:
    """F.linear by its handler; opaque to torch.compile, which traces the ops inside afterwards."""
    linear = torch.nn.functional.linear
    result = HANDLERS[torch.ops.aten.linear.default](linear, *args, **kwargs)
    return _proceed(linear, (), args, kwargs) if result is NotImplemented else result


def _mark_parameter(tensor: BitmaskTensor, is_parameter: bool) -> BitmaskTensor:
    if is_parameter:
        tensor._is_param = True  # how torch marks a wrapper subclass as nn.Parameter
    return tensor


def _rebuild(
    values: Tensor, bitmasks: Tensor, row_offsets: Tensor, shape: Sequence[int], is_parameter: bool
) -> BitmaskTensor:
    """Unpickle: what a file says is proven first."""
    return _mark_parameter(BitmaskTensor.from_parts(values, bitmasks, row_offsets, shape), is_parameter)


torch.serialization.add_safe_globals([_rebuild])


def _run_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op without a handler on dense copies, one for each tensor; refuse ops that write to a BitmaskTensor."""
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and any(isinstance(leaf, BitmaskTensor) for leaf in tree_leaves(given)):
            raise TypeError(
                f"{func}: a BitmaskTensor cannot be written to in place: change to_dense() and compress again, "
                "or use copy_"
            )
    dense_copies: dict[int, Tensor] = {}

    def to_dense(tensor: BitmaskTensor) -> Tensor:
        if id(tensor) not in dense_copies:
            dense_copies[id(tensor)] = tensor.to_dense()
        return dense_copies[id(tensor)]

    args, kwargs = tree_map_only(BitmaskTensor, to_dense, (args, kwargs))
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    caveat = "; writing to the result will not change the BitmaskTensor" if is_view else ""
    warnings.warn(
        f"{func} has no kernel for BitmaskTensor and ran on a dense copy{caveat}",
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
