"""Whole models: linear layers replaced by block-sparse ones in place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitmask import block_layout, block_patterns, native, ops_block
from bitmask.block_sparse import BlockSparseLinear
from bitmask.calls import LINEAR_DTYPES, check_block_shape
from bitmask.compressed_tensor import CompressedTensor
from bitmask.models import Filter, LinearWeight, linear_weights, use_against

# What becomes of a layer: the blocks that it keeps, and their shape.
_Cut = tuple[Tensor, tuple[int, int]]


# What stands for NaN where scores are compared.
_GREATEST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class PatchRow:
    """One linear layer of a model in a PatchReport.

    Attributes:
        names: all that the layer has in the model; several, if it is in several places.
        shape: out_features and in_features.
        regex: the first pattern that matches one of the names; None if none does.
        density: share of the weight's elements that are kept; 1 if the layer is dense.
        reason: why the layer cannot be replaced; empty if it can, or is.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    regex: str | None = None
    density: float = 1.0
    reason: str = ""

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]


@dataclass(frozen=True)
class PatchReport:
    """What a BlockSparseModelPatcher did, or would do, for each linear layer of a model; `str()` gives a table."""

    rows: list[PatchRow] = field(default_factory=list)

    def __str__(self) -> str:
        """An aligned table."""
        lines = [("layer", "shape", "density", "pattern", "stays dense, because")]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            names = " = ".join(name or "(model)" for name in row.names)
            lines.append((names, shape, f"{row.density:.4f}", row.regex or "", row.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def prune_blocks(
    module: nn.Module,
    density: float,
    block_shape: Sequence[int] = (32, 32),
    scope: str = "layer",
    filter_fn: Filter | None = None,
) -> nn.Module:
    """Keep the blocks of largest norm of a linear layer, or of all linear layers of a model, which is changed in place.

    A BlockSparseLinear keeps the largest of the blocks that it has, in place, with the block shape that it has, and
    gets no new ones. Layers whose weight or bias is tied or computed, or whose weight is used without their `forward`,
    stay dense, with a warning that says which and why. Optimizers have to be made anew; hooks of replaced layers stay
    behind.

    Args:
        module: an `nn.Linear`, of which a BlockSparseLinear is made, or a model, of which modules are replaced.
        density: share of the blocks of a whole weight to keep, above 0 and at most 1; each layer keeps one at least.
        block_shape: rows and columns of a block, where there are none yet.
        scope: "layer" keeps that share of each layer; "model" compares the blocks of all layers by the root mean square
            of their elements, so that blocks cut off at an edge compete with whole ones.
        filter_fn: called with the first name and the module of each layer that can be pruned, no other; where it is
            false, the layer stays as it is.

    Returns:
        The BlockSparseLinear, or the model.

    Raises:
        TypeError: an argument of the wrong kind, or a single layer whose kind or use allows no other in its place.
        ValueError: an argument out of range, or nothing that can be pruned.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> _ = model[0].weight.data.mul_(100)
    >>> for layer in prune_blocks(model, 0.625, scope="model")[::2]:
    ...     print(layer.density)
    1.0
    0.25
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected an nn.Module")
    block_patterns.check_density(density)
    sizes = check_block_shape(block_shape)
    if scope not in ("layer", "model"):
        raise ValueError(f"scope: got {scope!r}, expected 'layer' or 'model'")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: got {filter_fn!r}, expected a function of name and module")
    layers = _layers(module)
    if isinstance(module, nn.Linear) and layers and layers[0].reason:
        raise TypeError(f"module: got a {type(module).__name__} that cannot be replaced: {layers[0].reason}")
    layers = [replace(layer, reason=layer.reason or _place_against(layer.module)) for layer in layers]
    refused = "; ".join(f"{layer.name or '(model)'}: {layer.reason}" for layer in layers if layer.reason)
    able = [layer for layer in layers if not layer.reason]
    if not able:
        raise ValueError(f"module: got no linear layer that can be pruned ({refused or 'there is none at all'})")
    if refused:
        warnings.warn(f"layers that are not pruned: {refused}", stacklevel=2)
    chosen = [layer for layer in able if filter_fn is None or filter_fn(layer.name, layer.module)]
    shapes = {layer: getattr(layer.module, "block_shape", sizes) for layer in chosen}
    norms = {layer: _norms(layer.module, shapes[layer]) for layer in chosen}
    if scope == "model":
        patterns = _strongest(norms, shapes, density)
    else:
        patterns = {}
        for layer in chosen:
            patterns[layer] = _largest(norms[layer], density, layer.name)
    return _cut(module, {layer.module: (patterns[layer], shapes[layer]) for layer in chosen})


def _norms(layer: Any, block_shape: tuple[int, int]) -> Tensor:
    """The norm of each block of a linear layer; minus infinity where a BlockSparseLinear has none."""
    if isinstance(layer, BlockSparseLinear):
        return block_patterns.block_norms(layer.to_dense().weight, block_shape).masked_fill(~layer.pattern, -torch.inf)
    return block_patterns.block_norms(layer.weight, block_shape)


def _largest(norms: Tensor, density: float, name: str) -> Tensor:
    """The pattern of the largest blocks of a layer, of those that it has."""
    count = block_patterns.count_blocks(density, norms.numel(), name, stacklevel=4)
    return block_patterns.largest(norms, count) & ~norms.isneginf()


def _strongest(
    norms: Mapping[_Layer, Tensor], shapes: Mapping[_Layer, tuple[int, int]], density: float
) -> dict[_Layer, Tensor]:
    """The patterns of the blocks with the largest root mean squares over all layers; the best of each is among them."""
    scores = {}
    for layer, norm in norms.items():
        sizes = (layer.module.out_features, layer.module.in_features)
        heights, widths = (block_layout.block_sizes(*pair) for pair in zip(sizes, shapes[layer], strict=True))
        score = norm.double().cpu() / torch.outer(heights, widths).sqrt()
        # Only the best of each layer may be infinite, so that no NaN or overflow elsewhere comes before it.
        score = score.nan_to_num(nan=_GREATEST, posinf=_GREATEST, neginf=-torch.inf)
        if not score.isneginf().all():
            score.view(-1)[score.argmax()] = torch.inf
        scores[layer] = score
    total = sum(score.numel() for score in scores.values())
    least = sum(bool(score.isposinf().any()) for score in scores.values())
    count = block_patterns.nearest_count(density, total)
    if count < least:
        warnings.warn(
            f"density: {density} of {total} blocks is {count}; each of {least} layers keeps one", stacklevel=3
        )
    every = torch.cat(
        [torch.empty(0, dtype=torch.float64, device="cpu"), *(score.view(-1) for score in scores.values())]
    )
    pattern = block_patterns.largest(every, max(count, least))
    parts = torch.split(pattern, [score.numel() for score in scores.values()])
    return {
        layer: part.view(score.shape) & ~score.isneginf()
        for (layer, score), part in zip(scores.items(), parts, strict=True)
    }


# What a pattern of BlockSparseModelPatcher may say, and how it is checked.
_OPTIONS: dict[str, Callable[[Any], object]] = {
    "density": block_patterns.check_density,
    "block_shape": check_block_shape,
    "pattern": block_patterns.check_pattern,
}


class BlockSparseModelPatcher:
    r"""Replaces the linear layers of a model whose names match, in place, before or after it was trained.

    >>> model = nn.TransformerEncoderLayer(64, 4, 128)
    >>> patcher = BlockSparseModelPatcher()
    >>> patcher.add_pattern(r"linear[0-9]", {"density": 0.5})
    >>> patcher
    BlockSparseModelPatcher of nn.Linear, not of transformers' Conv1D: 'linear[0-9]': {'density': 0.5}
    >>> print(patcher.patch_model(model))
    layer               shape     density  pattern      stays dense, because
    self_attn.out_proj  64 x 64   1.0000                nn.MultiheadAttention uses it without calling the layer
    linear1             128 x 64  0.5000   linear[0-9]
    linear2             64 x 128  0.5000   linear[0-9]
    >>> model(torch.ones(5, 1, 64)).shape
    torch.Size([5, 1, 64])
    """

    def __init__(self) -> None:
        self._patterns: dict[str, dict[str, Any]] = {}

    def __repr__(self) -> str:
        """The patterns."""
        patterns = ", ".join(f"{regex!r}: {options}" for regex, options in self._patterns.items()) or "no pattern yet"
        return f"{type(self).__name__} of nn.Linear, not of transformers' Conv1D: {patterns}"

    def add_pattern(self, regex: str, options: Mapping[str, Any]) -> None:
        """Say what becomes of the layers whose whole names match; where several patterns do, the first one counts.

        Args:
            regex: a regular expression, for `re.fullmatch`.
            options: `block_shape`, and either `density` or `pattern`, as `BlockSparseLinear.from_dense` takes them.

        Raises:
            TypeError, ValueError: an invalid or repeated regex, an unknown option, one of the wrong kind or range, or
                both `density` and `pattern`.
        """
        if not isinstance(regex, str):
            raise TypeError(f"regex: got {type(regex).__name__}, expected a string")
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"regex: got {regex!r}, which is none: {error}") from None
        if regex in self._patterns:
            raise ValueError(f"regex: got {regex!r} again, expected each one once")
        if not isinstance(options, Mapping):
            raise TypeError(f"options: got {type(options).__name__}, expected a dict")
        for name, option in options.items():
            if name not in _OPTIONS:
                raise ValueError(f"options: got {name!r}, expected {', '.join(_OPTIONS)}")
            _OPTIONS[name](option)
        if "density" in options and "pattern" in options:
            raise ValueError("options: got density and pattern, expected at most one of them")
        self._patterns[regex] = dict(options)

    def get_patchable_layers(self, model: nn.Module) -> PatchReport:
        """The linear layers of a model, the pattern that each matches, and why some cannot be replaced.

        Raises:
            TypeError: not a module.

        >>> print(BlockSparseModelPatcher().get_patchable_layers(nn.TransformerEncoderLayer(64, 4, 128)))
        layer               shape     density  pattern  stays dense, because
        self_attn.out_proj  64 x 64   1.0000            nn.MultiheadAttention uses it without calling the layer
        linear1             128 x 64  1.0000
        linear2             64 x 128  1.0000
        """
        rows = []
        for layer in _layers(model):
            if isinstance(layer.module, BlockSparseLinear):
                continue
            regex = next(
                (regex for regex in self._patterns if any(re.fullmatch(regex, name) for name in layer.names)), None
            )
            reason = layer.reason or _place_against(layer.module, "pattern" in self._patterns.get(regex or "", {}))
            if layer.module is model and not reason:
                reason = "it is the model: BlockSparseLinear.from_dense"
            rows.append(PatchRow(layer.names, _shape_of(layer.module), regex, reason=reason))
        return PatchReport(rows)

    def patch_model(self, model: nn.Module) -> PatchReport:
        """Replace each layer that matches by the BlockSparseLinear that `from_dense` makes of it; says what was done.

        Layers that match but cannot be replaced stay dense, with a warning. Optimizers have to be made anew; hooks of
        replaced layers stay behind.

        Raises:
            TypeError: not a module.
            ValueError: no pattern at all, one by which no layer would be replaced, or one whose `pattern` does not fit
                a layer; nothing is replaced then.
        """
        report = self.get_patchable_layers(model)
        if not self._patterns:
            raise ValueError("regex: got no pattern, expected add_pattern first")
        matched = [row for row in report.rows if row.regex is not None and not row.reason]
        for regex in self._patterns:
            if all(row.regex != regex for row in matched):
                raise ValueError(f"regex: got {regex!r}, by which no layer would be replaced:\n{report}")
        cuts: dict[nn.Module, _Cut] = {}
        for row in matched:
            layer = model.get_submodule(row.name)
            cuts[layer] = _cut_by(self._patterns[row.regex or ""], layer, row.name)
        if refused := [f"{row.name}: {row.reason}" for row in report.rows if row.regex is not None and row.reason]:
            warnings.warn(f"layers that match but stay dense: {'; '.join(refused)}", stacklevel=2)
        _cut(model, cuts)
        return PatchReport([_with_density(row, model) for row in report.rows])


def _cut_by(options: Mapping[str, Any], layer: Any, name: str) -> _Cut:
    """What options make of a layer; raises ValueError unless their pattern, if there is one, has its size."""
    block_shape = check_block_shape(options.get("block_shape", (32, 32)))
    if "pattern" not in options:
        norms = _norms(layer, block_shape)
        count = block_patterns.count_blocks(options.get("density", 0.5), norms.numel(), name, stacklevel=4)
        return block_patterns.largest(norms, count), block_shape
    try:
        block_patterns.check_pattern(options["pattern"], block_layout.grid_of(layer.weight.shape, block_shape))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return options["pattern"], block_shape


@dataclass(frozen=True)
class _Layer:
    """A layer, all names that it has in a model, and why it cannot be replaced or pruned wherever its numbers are."""

    names: tuple[str, ...]
    module: Any
    reason: str

    @property
    def name(self) -> str:
        return self.names[0]


def _layers(model: nn.Module) -> list[_Layer]:
    """The linear layers of a model in its order, block-sparse ones too."""
    reasons: dict[nn.Module, str] = {}
    weights = linear_weights(model)
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for slot, tensor in module._parameters.items():
            places.setdefault(id(tensor), []).append(f"{name}.{slot}".removeprefix("."))
    for weight in weights:
        for layer in weight.layers.values():
            reasons[layer] = _reason_against(weight) or _reason_against_bias(layer, places)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        if isinstance(module, BlockSparseLinear):
            reasons[module] = _reason_against_pruning(module, places)
        elif type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
            reasons[module] = "transformers' Conv1D is no nn.Linear: its weight is [in_features, out_features]"
    return [_Layer(tuple(names[module]), module, reasons[module]) for module in names if module in reasons]


def _reason_against(weight: LinearWeight) -> str:
    """Why layers with this weight cannot be replaced, wherever it is; empty if they can."""
    tensor = weight.tensor
    if isinstance(tensor, CompressedTensor):
        return "its weight is compressed: decompress_ the model first"
    if len(weight.layers) > 1:
        return f"{' and '.join(weight.layers)} share one weight"
    if reason := use_against(weight):
        return reason
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.ndim != 2:
        return f"its weight is a {tensor.ndim}-dimensional {type(tensor).__name__}, not a plain matrix"
    if tensor.dtype not in LINEAR_DTYPES:
        return f"its weight is of {tensor.dtype}, not of float32, bfloat16, float16 or float64"
    return ""


def _reason_against_bias(layer: nn.Linear, places: Mapping[int, Sequence[str]]) -> str:
    """Why the bias of a layer cannot go to another layer; empty if it can."""
    bias = layer._parameters.get("bias")
    if bias is None:
        return "" if layer.bias is None else "its bias is no parameter, but computed from others or a buffer"
    same = places[id(bias)]
    return f"{' and '.join(same)} are one parameter" if len(same) > 1 else ""


def _reason_against_pruning(layer: BlockSparseLinear, places: Mapping[int, Sequence[str]]) -> str:
    """Why a block-sparse layer cannot get fewer blocks; empty if it can."""
    values = layer._parameters.get("values")
    if values is None:
        return "its values are computed from other parameters"
    if len(places[id(values)]) > 1:
        return "it shares its values"
    return "its values are sharded" if hasattr(values, "__tensor_flatten__") else ""


def _place_against(layer: Any, pattern_is_known: bool = False) -> str:
    """Why a layer cannot be replaced or pruned while its numbers are where they are; empty if it can."""
    tensor = layer.values if isinstance(layer, BlockSparseLinear) else layer.weight
    if tensor.is_meta:
        return "" if pattern_is_known else "it is on device meta: load it first"
    device = tensor.device.type
    if device in ops_block.DEVICES or isinstance(layer, BlockSparseLinear):
        return ""
    if device == "cuda":
        return f"it is on device cuda, for which there are no kernels here: {native.cuda_missing}"
    return f"it is on device {device}: block-sparse layers run on cpu and cuda only"


def _shape_of(layer: Any) -> tuple[int, ...]:
    """out_features and in_features of an nn.Linear or a Conv1D."""
    return tuple(layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1])


def _cut(model: nn.Module, cuts: Mapping[nn.Module, _Cut]) -> nn.Module:
    """Leave layers of a model only these blocks, in all places that they have; returns it, or what replaces it."""
    twins: dict[nn.Module, BlockSparseLinear] = {}
    for layer, (pattern, block_shape) in cuts.items():
        if isinstance(layer, nn.Linear):
            twins[layer] = BlockSparseLinear.from_dense(layer, block_shape=block_shape, pattern=pattern)
    for layer, (pattern, _) in cuts.items():
        if isinstance(layer, BlockSparseLinear):
            layer.update_pattern_(pattern)
    for parent in list(model.modules()):
        for slot, child in list(parent._modules.items()):
            if child in twins:
                setattr(parent, slot, twins[child])
    return twins.get(model, model)


def _with_density(row: PatchRow, model: nn.Module) -> PatchRow:
    """The row as the model is now."""
    layer = model.get_submodule(row.name)
    return replace(row, density=layer.density) if isinstance(layer, BlockSparseLinear) else row
