"""save_pretrained of transformers, which compresses on demand and tells how sparse what it saves is."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmask import ops
from bitmask.calls import FormatError
from bitmask.compressed_tensor import CompressedTensor
from bitmask.files.config import (
    BITMASK_24_FORMAT,
    BITMASK_FORMAT,
    DENSE_FORMAT,
    BitmaskConfig,
    check_config,
    format_of,
)
from bitmask.files.convert import compress_checkpoint
from bitmask.files.replacing import moved_in
from bitmask.files.shards import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json, write_json
from bitmask.semi_structured import SemiStructuredTensor

_QUANTIZATION = "quantization_config"


def with_compression(save_pretrained: Any) -> Any:
    """The method with three more options: `sparsity_config`, `save_compressed` and `skip_compression_stats`.

    `save_compressed` is True or the name of a format; True means that in which the model's weights are compressed.
    """
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def wrapped(
        self: nn.Module,
        save_directory: str | os.PathLike[str],
        *args: Any,
        sparsity_config: BitmaskConfig | None = None,
        save_compressed: bool | str = False,
        skip_compression_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        call = signature.bind(self, save_directory, *args, **kwargs)
        call.apply_defaults()
        options, directory = call.arguments, Path(save_directory)
        options["state_dict"] = _dense_state(self, options["state_dict"])
        if not options["is_main_process"]:  # which writes nothing
            save_pretrained(*call.args, **call.kwargs)
            return
        wanted = _wanted(self, sparsity_config, save_compressed)
        compresses = wanted is not None and wanted.format != DENSE_FORMAT

        def save_dense(place: Path) -> None:
            options["save_directory"] = place
            save_pretrained(*call.args, **call.kwargs)
            if not skip_compression_stats and not compresses:
                _write_stats(self, place, sparsity_config)

        for option in ("push_to_hub", "variant"):
            if compresses and options[option]:
                raise ValueError(
                    f"{option}: got {options[option]!r}, expected none where the model is saved compressed"
                )
        if compresses or (_is_compressed(directory) and not options["push_to_hub"]):
            _save_beside(save_dense, directory, wanted if compresses else None)
        else:
            save_dense(directory)

    return wrapped


def _wanted(model: nn.Module, config: BitmaskConfig | None, save_compressed: bool | str) -> BitmaskConfig | None:
    """How a model is to be saved; None if dense, and nobody said so."""
    check_config("sparsity_config", config)
    told = format_of(save_compressed) if isinstance(save_compressed, str) else None
    if config is not None:
        if told not in (None, config.format):
            raise ValueError(f"save_compressed: got {told!r}, expected {config.format!r}, that of sparsity_config")
        return config
    return infer_config(model, told) if save_compressed else None


def infer_config(model: nn.Module, compression_format: str | None = None) -> BitmaskConfig:
    """The config that a model's weights suggest: their sparsity, and "2:4" if more than 80% of linear weights are.

    The format is by default "sparse-24-bitmask" if the model has compressed weights and all are 2:4, else
    "sparse-bitmask".

    Raises:
        ValueError: weights that are not in memory.

    >>> infer_config(nn.Linear(4, 4).requires_grad_(False).apply(lambda layer: layer.weight.zero_())).global_sparsity
    0.8
    """
    zeros = elements = 0
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name}: got a meta tensor, expected one with data")
        elements += parameter.numel()
        zeros += _zeros(parameter)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    two_four = sum(_is_two_four(weight) for weight in weights)
    structure = "2:4" if weights and two_four > 0.8 * len(weights) else ""
    kinds: set[type] = {type(parameter) for parameter in model.parameters() if isinstance(parameter, CompressedTensor)}
    natural = BITMASK_24_FORMAT if kinds == {SemiStructuredTensor} else BITMASK_FORMAT
    return BitmaskConfig(compression_format or natural, zeros / elements if elements else 0.0, structure)


def _zeros(tensor: Tensor) -> int:
    stored = tensor.values if isinstance(tensor, CompressedTensor) else tensor
    return tensor.numel() - int(torch.count_nonzero(_comparable(stored)))


def _is_two_four(weight: Tensor) -> bool:
    """Whether of every four neighbours in a row at least two are zero."""
    if isinstance(weight, SemiStructuredTensor):
        return True
    dense = _comparable(_dense(weight))
    if dense.shape[-1] % 4 != 0:
        return False
    return bool(((dense.reshape(-1, 4) == 0).sum(dim=1) >= 2).all())


def _comparable(tensor: Tensor) -> Tensor:
    """Torch has no comparisons of float8, which float16 or float32 holds exactly."""
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if isinstance(tensor, CompressedTensor) else tensor


def _dense_state(model: nn.Module, state: dict[str, Any] | None) -> dict[str, Any] | None:
    """What to save instead of compressed parameters; None where there are none."""
    if state is None and not any(isinstance(parameter, CompressedTensor) for parameter in model.parameters()):
        return None
    return {name: _dense(tensor) for name, tensor in (model.state_dict() if state is None else state).items()}


def _write_stats(model: nn.Module, directory: Path, config: BitmaskConfig | None) -> None:
    """Say in config.json how sparse the dense weights are, if they can be looked at and it says nothing of the kind."""
    path = directory / CONFIG_FILE
    if not path.exists() or not all(_can_be_counted(parameter) for parameter in model.parameters()):
        return
    before = read_json(path)
    if _QUANTIZATION not in before:
        after = (config or infer_config(model, DENSE_FORMAT)).in_model_config(before)
        if after != before:
            write_json(path, after)


def _can_be_counted(parameter: Tensor) -> bool:
    ordinary = type(parameter) is nn.Parameter or isinstance(parameter, CompressedTensor)
    return ordinary and not parameter.is_meta and parameter.dtype in ops.DTYPES


def _is_compressed(directory: Path) -> bool:
    """Whether a compressed model is there, whose weights must not be read by the config of a dense one."""
    path = directory / CONFIG_FILE
    try:
        config = BitmaskConfig.from_model_config(read_json(path)) if path.exists() else None
    except FormatError:
        return False
    return config is not None and config.format != DENSE_FORMAT


def _save_beside(save_dense: Callable[[Path], None], directory: Path, config: BitmaskConfig | None) -> None:
    """Save into a directory beside the files, compress that if told how, and move the outcome into their place."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bitmask.", dir=directory) as temporary:
        saved = Path(temporary, "saved")
        save_dense(saved)
        if config is not None:
            dense = saved.rename(Path(temporary, "dense"))
            compress_checkpoint(dense, saved, config=config)
            shutil.rmtree(dense)
        moved_in(saved, directory, _weights_in(directory), Path(temporary, "old"), CONFIG_FILE)


def _weights_in(directory: Path) -> set[str]:
    """Weights of an earlier save, which would otherwise be loaded instead of, or together with, the new ones."""
    names = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|" + "|".join(map(re.escape, (SINGLE_FILE, INDEX_FILE))))
    return {path.name for path in directory.iterdir() if names.fullmatch(path.name)}
