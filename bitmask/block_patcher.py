"""Whole models: linear layers replaced by block-sparse ones in place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitmask import block_layout, block_patterns
from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.block_sparse import BlockSparseLinear
from bitmask.models import Filter, LinearWeight, linear_weights, reason_against


@dataclass(frozen=True)
class PatchRow:
    """One linear layer of a model in a PatchReport.

    Attributes:
        name: of the layer in the model.
        shape: out_features and in_features.
        regex: the first pattern that matches the name; None if none does.
        density: share of the weight's elements that are kept; 1 if the layer is dense.
        reason: why the layer cannot be replaced; empty if it can, or is.
    """

    name: str
    shape: tuple[int, int]
    regex: str | None = None
    density: float = 1.0
    reason: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What a BlockSparseModelPatcher did, or would do, for each linear layer of a model; `str()` gives a table."""

    rows: list[PatchRow] = field(default_factory=list)

    def __str__(self) -> str:
        """An aligned table."""
        lines = [("layer", "shape", "density", "pattern", "stays dense, because")]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            lines.append((row.name or "(model)", shape, f"{row.density:.4f}", row.regex or "", row.reason))
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

    Layers whose weight is tied, computed, or used without their `forward` stay dense: `get_patchable_layers` of a
    BlockSparseModelPatcher says which and why. Hooks of replaced layers stay behind.

    Args:
        module: an `nn.Linear`, of which a BlockSparseLinear is made, or a model, of which modules are replaced.
        density: share of the blocks to keep, above 0 and at most 1; each layer keeps one at least.
        block_shape: rows and columns of a block.
        scope: "layer" keeps that share of each layer; "model" compares the blocks of all layers by the root mean square
            of their elements, so that blocks cut off at an edge compete with whole ones.
        filter_fn: called with the name and module of each linear layer; where it is false, the layer stays dense.

    Returns:
        The BlockSparseLinear, or the model.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

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
    sizes = block_layout.check_block_shape(block_shape)
    if scope not in ("layer", "model"):
        raise ValueError(f"scope: got {scope!r}, expected 'layer' or 'model'")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: got {filter_fn!r}, expected a function of name and module")
    if isinstance(module, nn.Linear):
        return BlockSparseLinear.from_dense(module, density, sizes)
    layers = {
        name: layer
        for name, layer, reason in _linear_layers(module)
        if isinstance(layer, nn.Linear) and not reason and (filter_fn is None or filter_fn(name, layer))
    }
    options: dict[str, dict[str, Any]] = {name: {"density": density, "block_shape": sizes} for name in layers}
    if scope == "model" and layers:
        for name, pattern in _strongest(layers, density, sizes).items():
            options[name] = {"block_shape": sizes, "pattern": pattern}
    _replace(module, options)
    return module


def _strongest(layers: dict[str, nn.Linear], density: float, block_shape: tuple[int, int]) -> dict[str, Tensor]:
    """The patterns of the blocks with the largest root mean squares over all layers; the best of each is among them."""
    scores = {}
    for name, layer in layers.items():
        heights, widths = (
            block_layout.block_sizes(size, block) for size, block in zip(layer.weight.shape, block_shape, strict=True)
        )
        elements = torch.outer(heights, widths).to(layer.weight.device)
        score = block_patterns.block_norms(layer.weight, block_shape).double() / elements.sqrt()
        if score.numel() > 0:
            score.view(-1)[score.argmax()] = torch.inf
        scores[name] = score.cpu()
    pattern = block_patterns.largest_blocks(torch.cat([score.view(-1) for score in scores.values()])[None], density)
    parts = torch.split(pattern[0], [score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


# What a pattern of BlockSparseModelPatcher may say, and how it is checked.
_OPTIONS: dict[str, Callable[[Any], object]] = {
    "density": block_patterns.check_density,
    "block_shape": block_layout.check_block_shape,
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
            options: any of `density`, `block_shape`, and `pattern`, as `BlockSparseLinear.from_dense` takes them.

        Raises:
            TypeError, ValueError: an invalid or repeated regex, an unknown option, or one of the wrong kind or range.
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
            raise ValueError("options: got density and pattern, expected one of them")
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
        for name, layer, reason in _linear_layers(model):
            regex = next((regex for regex in self._patterns if re.fullmatch(regex, name)), None)
            rows.append(PatchRow(name, _shape_of(layer), regex, reason=reason))
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
        for row in matched:
            self._check_fit(row)
        if refused := [f"{row.name}: {row.reason}" for row in report.rows if row.regex is not None and row.reason]:
            warnings.warn(f"layers that match but stay dense: {'; '.join(refused)}", stacklevel=2)
        _replace(model, {row.name: self._patterns[row.regex or ""] for row in matched})
        return PatchReport([_with_density(row, model) for row in report.rows])

    def _check_fit(self, row: PatchRow) -> None:
        """Raise ValueError unless the pattern of a row's options has the size of its layer."""
        options = self._patterns[row.regex or ""]
        if "pattern" in options:
            block_shape = block_layout.check_block_shape(options.get("block_shape", (32, 32)))
            try:
                block_patterns.check_pattern(options["pattern"], block_layout.grid_of(row.shape, block_shape))
            except ValueError as error:
                raise ValueError(f"{row.name}: {error}") from None


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name and module of each linear layer in the order of the model, and why it cannot be replaced, if it cannot."""
    reasons = {}
    for weight in linear_weights(model):
        for layer in weight.layers.values():
            reasons[layer] = _reason_against(weight)
    for name, module in model.named_modules():
        if module in reasons:
            yield name, module, reasons[module] or ("" if name else "it is the model: BlockSparseLinear.from_dense")
        elif type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
            yield name, module, "transformers' Conv1D is no nn.Linear: its weight is [in_features, out_features]"


def _reason_against(weight: LinearWeight) -> str:
    """Why layers with this weight cannot be replaced; empty if they can."""
    if isinstance(weight.tensor, BitmaskTensor):
        return "its weight is compressed: decompress_ the model first"
    if len(weight.layers) > 1:
        return f"{' and '.join(weight.layers)} share one weight"
    return reason_against(weight)


def _shape_of(layer: Any) -> tuple[int, int]:
    """out_features and in_features of an nn.Linear or a Conv1D."""
    rows, cols = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
    return rows, cols


def _replace(model: nn.Module, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the block-sparse twins of the layers with these names in all places that the layers have in the model."""
    layers = {model.get_submodule(name): name for name in options}
    twins: dict[nn.Module, BlockSparseLinear] = {}
    for parent in list(model.modules()):
        for slot, child in list(parent._modules.items()):
            if isinstance(child, nn.Linear) and child in layers:
                if child not in twins:
                    twins[child] = BlockSparseLinear.from_dense(child, **options[layers[child]])
                setattr(parent, slot, twins[child])


def _with_density(row: PatchRow, model: nn.Module) -> PatchRow:
    """The row as the model is now."""
    layer = model.get_submodule(row.name)
    return replace(row, density=layer.density) if isinstance(layer, BlockSparseLinear) else row
