"""Whole models: compressing the weights of their linear layers in place, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from bitmask import calls, ops, ops_two_four
from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.compressed_tensor import CompressedTensor
from bitmask.linear import BitmaskLinear, frozen_parameter
from bitmask.semi_structured import SemiStructuredTensor

Filter = Callable[[str, nn.Module], bool]

# Where a layer remembers whether its weight took a gradient before it was compressed.
_TRAINABLE = "_weight_was_trainable"

# The reason of a weight that nothing keeps from being compressed.
_NOT_YET = "not compressed yet, or compress_ was told not to"


@dataclass(frozen=True)
class LinearWeight:
    """One weight of linear layers, and every place in the model that holds it."""

    layers: dict[str, nn.Linear]
    elsewhere: list[tuple[str, nn.Module, str]]  # name and module, which is not one of the layers, and its parameter

    @property
    def tensor(self) -> Tensor:
        """Not held here: a dense weight must be freed as soon as its layers have the compressed one."""
        return next(iter(self.layers.values())).weight


@dataclass(frozen=True)
class CompressionRow:
    """One weight in a CompressionReport.

    Attributes:
        layers: names of the linear layers that have this weight; several, if it is tied.
        sparsity: fraction of zeros (of elements not stored, if compressed); NaN where there is no kernel to count them.
        dense_nbytes, compressed_nbytes: what it takes in either form, whichever it has now; the same where it has no
            compressed form.
        compressed: whether it is compressed now.
        reason: why it is not; empty if it is.
    """

    layers: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    sparsity: float
    dense_nbytes: int
    compressed_nbytes: int
    compressed: bool
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now."""
        return self.compressed_nbytes if self.compressed else self.dense_nbytes


@dataclass(frozen=True)
class CompressionReport:
    """What compressing does for each linear weight of a model; `str()` gives a table.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> _ = model[0].weight.data.fill_(0)
    >>> print(compression_report(compress_(model, progress=False)))
    layer    shape    dtype    sparsity  dense MB  compressed MB  kept dense, because
    0      64 x 64  float32      1.0000     0.016          0.001
    2       2 x 64  float32      0.0000     0.001          0.001  it would not shrink
    total                                   0.017          0.002  with what is kept dense
    """

    rows: list[CompressionRow]

    @property
    def dense_nbytes(self) -> int:
        """Bytes of all these weights, if all were dense."""
        return sum(row.dense_nbytes for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all these weights now."""
        return sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        """An aligned table with totals; a weight that is kept dense shows what it would take compressed."""
        header = ("layer", "shape", "dtype", "sparsity", "dense MB", "compressed MB", "kept dense, because")
        lines = [header, *(_cells(row) for row in self.rows)]
        totals = (_megabytes(self.dense_nbytes), _megabytes(self.nbytes))
        lines.append(("total", "", "", "", *totals, "with what is kept dense"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        left = (0, len(header) - 1)
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def compress_(
    model: nn.Module,
    filter_fn: Filter | None = None,
    min_sparsity: float | None = None,
    progress: bool = True,
    format: str = "bitmask",
) -> nn.Module:
    """Compress the weights of a model's linear layers in place, where that makes them smaller; returns the model.

    Each becomes a BitmaskTensor or a SemiStructuredTensor parameter, which is frozen. Modules, names, hooks, and
    `state_dict` keys stay; tied weights stay tied. `compression_report` says which weights stay dense and why: those
    that are also used by something other than the `forward` of `nn.Linear`, are computed from other parameters, are not
    of the format, or would not shrink. What is compressed already stays as it is, in either format.

    Args:
        model: of which weights may be replaced; an optimizer that holds them has to be made anew.
        filter_fn: called with the name and module of each linear layer; where it is false, the weight stays dense.
        min_sparsity: the least fraction of zeros that is worth it, 0 to 1; by default any that makes it smaller.
        progress: show a progress bar.
        format: "bitmask", or "2:4" for weights that have at most two non-zeros in every four columns, as `prune_24_`
            leaves them.

    Raises:
        TypeError: not a module, a filter that cannot be called, or a `min_sparsity` that is not a number.
        ValueError: `min_sparsity` outside 0 to 1, or another format.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> _ = nn.init.sparse_(model[0].weight, sparsity=0.75)
    >>> compress_(model, progress=False)[0].weight
    BitmaskTensor(shape=(64, 64), dtype=torch.float32, device='cpu', nbytes=16384, nnz=1024, sparsity=0.7500,
    compressed_nbytes=5120)
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: got {filter_fn!r}, expected a function of name and module")
    if min_sparsity is not None:
        calls.check_fraction("min_sparsity", min_sparsity)
    into = _format_of(format)
    for weight in tqdm(linear_weights(model), desc="Compressing", unit="weight", disable=not progress):
        row = _row(weight, into)
        if row.reason != _NOT_YET:
            continue
        if filter_fn is not None and not all(filter_fn(name, layer) for name, layer in weight.layers.items()):
            continue
        if min_sparsity is None or row.sparsity >= min_sparsity:
            _compress(weight, into)
    return model


def decompress_(model: nn.Module, progress: bool = True) -> nn.Module:
    """Undo `compress_`: the weights of linear layers become dense parameters, in place; returns the model.

    Tied weights stay tied, and those that took a gradient take one again. A BitmaskLinear stays compressed: it has
    `to_dense`.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> before = nn.init.sparse_(model[0].weight, sparsity=0.75)
    >>> after = decompress_(compress_(model, progress=False), progress=False)[0].weight
    >>> torch.equal(after, before), after.requires_grad
    (True, True)
    """
    for weight in tqdm(linear_weights(model), desc="Decompressing", unit="weight", disable=not progress):
        bound = any(isinstance(layer, BitmaskLinear) for layer in weight.layers.values())
        if isinstance(weight.tensor, CompressedTensor) and not bound:
            trainable = any([layer.__dict__.pop(_TRAINABLE, False) for layer in weight.layers.values()])
            _replace(weight, nn.Parameter(weight.tensor.to_dense(), requires_grad=trainable))
    return model


def compression_report(model: nn.Module, format: str = "bitmask") -> CompressionReport:
    """What `compress_` with this format did, or would do, for each weight of the linear layers of a model.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 4.0, 5.0]]))
    >>> [row.reason for row in compression_report(model, "2:4").rows]
    ['it is not 2:4: row 1, columns 0 to 3: got 3 non-zeros, expected at most 2',
     'its 2 in_features are no multiple of 4']
    """
    into = _format_of(format)
    return CompressionReport([_row(weight, into) for weight in linear_weights(model)])


def linear_weights(model: nn.Module) -> list[LinearWeight]:
    """Each distinct weight of the model's linear layers, once, with all that holds it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    weights: dict[int, LinearWeight] = {}
    for name, module in model.named_modules():
        tensor = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
        if isinstance(module, nn.Linear) and isinstance(tensor, Tensor):
            computed = module._parameters.get("weight") is None
            weights.setdefault(id(module if computed else tensor), LinearWeight({}, [])).layers[name] = module
    for name, module in model.named_modules():
        for slot, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in weights and not (isinstance(module, nn.Linear) and slot == "weight"):
                weights[id(tensor)].elsewhere.append((name, module, slot))
    return [weight for weight in weights.values() if not is_lazy(weight.tensor)]


def use_against(weight: LinearWeight) -> str:
    """Which use of a weight allows no other in its place; empty if only `nn.Linear.forward` uses it."""
    if weight.elsewhere:
        places = (
            f"{name}.{slot} ({type(module).__name__})".removeprefix(".") for name, module, slot in weight.elsewhere
        )
        return f"it is also {', '.join(places)}"
    for name, layer in weight.layers.items():
        if layer._parameters.get("weight") is None:
            return "it is computed from other parameters"
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention uses it without calling the layer"
        if type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__:
            return f"{name or 'the model'} ({type(layer).__name__}) has a forward of its own"
    return ""


@dataclass(frozen=True)
class _Format:
    """A compressed form for weights.

    Attributes:
        devices: kinds of device that have kernels for it.
        compress: makes it of a dense weight.
        nbytes: the bytes that it takes, by the dense weight and how many non-zeros that has.
        reason_against: why a dense weight cannot take it, whatever its size; empty if it can.
    """

    devices: frozenset[str]
    compress: Callable[[Tensor], CompressedTensor]
    nbytes: Callable[[Tensor, int], int]
    reason_against: Callable[[Tensor], str]

    def has_kernels_for(self, tensor: Tensor) -> bool:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.ndim == 2
        return plain and tensor.dtype in calls.LINEAR_DTYPES and tensor.device.type in self.devices


def _bitmask_nbytes(tensor: Tensor, nnz: int) -> int:
    return nnz * tensor.itemsize + math.prod(ops.bitmask_sizes(tensor.shape)) + 8 * len(tensor)


def _semi_structured_nbytes(tensor: Tensor, nnz: int) -> int:
    return tensor.nbytes // 2 + math.prod(ops.bitmask_sizes(tensor.shape))


def _reason_against_24(tensor: Tensor) -> str:
    if tensor.shape[1] % 4 != 0:
        return f"its {tensor.shape[1]} in_features are no multiple of 4"
    try:
        ops_two_four.pack_24(tensor.detach())
    except ValueError as error:
        return f"it is not 2:4: {str(error).removeprefix('dense: ')}"
    return ""


_FORMATS = {
    "bitmask": _Format(ops.DEVICES, BitmaskTensor.from_dense, _bitmask_nbytes, lambda tensor: ""),
    "2:4": _Format(ops_two_four.DEVICES, SemiStructuredTensor.from_dense, _semi_structured_nbytes, _reason_against_24),
}


def _format_of(name: str) -> _Format:
    if name not in tuple(_FORMATS):
        raise ValueError(f"format: got {name!r}, expected one of {', '.join(map(repr, _FORMATS))}")
    return _FORMATS[name]


def _compress(weight: LinearWeight, into: _Format) -> None:
    for layer in weight.layers.values():
        layer.__dict__[_TRAINABLE] = weight.tensor.requires_grad
    _replace(weight, frozen_parameter(into.compress(weight.tensor)))


def _replace(weight: LinearWeight, parameter: nn.Parameter) -> None:
    for layer in weight.layers.values():
        layer.weight = parameter
    for _, module, slot in weight.elsewhere:
        setattr(module, slot, parameter)


def _row(weight: LinearWeight, into: _Format) -> CompressionRow:
    tensor = weight.tensor
    compressed = isinstance(tensor, CompressedTensor)
    sparsity, nbytes, reason = math.nan, tensor.nbytes, use_against(weight)
    if isinstance(tensor, CompressedTensor):
        sparsity, nbytes, reason = tensor.sparsity, tensor.compressed_nbytes, ""
    elif into.has_kernels_for(tensor):
        sparsity, nbytes, reason_of_contents = _measure(tensor, into)
        reason = reason or reason_of_contents
    else:
        reason = reason or _no_kernel(tensor)
    return CompressionRow(
        tuple(weight.layers), tuple(tensor.shape), tensor.dtype, sparsity, tensor.nbytes, nbytes, compressed, reason
    )


def _measure(tensor: Tensor, into: _Format) -> tuple[float, int, str]:
    """Sparsity and compressed bytes of a dense weight, and why it is dense."""
    nnz = int(torch.count_nonzero(tensor))
    sparsity = 1 - nnz / tensor.numel() if tensor.numel() > 0 else 0.0
    if reason := into.reason_against(tensor):
        return sparsity, tensor.nbytes, reason
    nbytes = into.nbytes(tensor, nnz)
    return sparsity, nbytes, _NOT_YET if nbytes < tensor.nbytes else "it would not shrink"


def _no_kernel(tensor: Tensor) -> str:
    kind = "" if type(tensor) is nn.Parameter else f"{type(tensor).__name__} "
    shape = "" if tensor.ndim == 2 else f"{tensor.ndim}-dimensional "
    return f"there is no kernel for a {shape}{kind}weight of {_name_of(tensor.dtype)} on {tensor.device.type}"


def _cells(row: CompressionRow) -> tuple[str, ...]:
    return (
        " = ".join(name or "(model)" for name in row.layers),
        " x ".join(map(str, row.shape)),
        _name_of(row.dtype),
        f"{row.sparsity:.4f}",
        _megabytes(row.dense_nbytes),
        _megabytes(row.compressed_nbytes),
        row.reason,
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3f}"
