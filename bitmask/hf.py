"""transformers: importing this module teaches `from_pretrained` and `save_pretrained` compressed checkpoints.

    import bitmask.hf
    model = AutoModelForCausalLM.from_pretrained(directory)  # linear weights stay compressed in memory
    model.save_pretrained(directory, save_compressed=True)

`from_pretrained` reads the checkpoints of every release that `bitmask.files` reads. `"dequantize": true` in their
`quantization_config`, or BITMASK_DEQUANTIZE=1 in the environment, gives dense weights. Checkpoints of other kinds,
quantized ones of compressed-tensors among them, go the way that they went before.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.files.config import BITMASK_24_FORMAT, BITMASK_FORMAT, DENSE_FORMAT, BitmaskConfig, quantization_of
from bitmask.files.contents import COMPONENTS, OpenFiles, read_contents
from bitmask.files.convert import compress_checkpoint
from bitmask.files.load import assemble
from bitmask.files.shards import CONFIG_FILE, INDEX_FILE, read_json, write_json
from bitmask.linear import frozen_parameter
from bitmask.ops import FormatError

try:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("bitmask.hf needs transformers 5 or later: pip install 'bitmask[hf]'") from error

_METHOD = "compressed-tensors"  # what checkpoints call the library that wrote them
_COMPRESSED_FORMATS = (BITMASK_FORMAT, BITMASK_24_FORMAT)


class BitmaskQuantizationConfig(QuantizationConfigMixin):
    """What transformers keeps of a compressed checkpoint's config."""

    def __init__(self, sparsity_config: Mapping[str, Any], dequantize: bool = False, **others: Any) -> None:
        self.quant_method = _METHOD
        self.sparsity_config = dict(sparsity_config)
        self.dequantize = dequantize or os.environ.get("BITMASK_DEQUANTIZE", "0") not in ("", "0")


class _Assemble(ConversionOps):
    """Makes parameters of what a checkpoint stores for them: their components, or dense tensors as they are.

    The patterns are those of `BitmaskQuantizer.serialized_names`, alone for one parameter, or at the end of longer ones
    for several that transformers goes on to merge, such as experts: a list of tensors for each pattern.
    """

    def __init__(self, hf_quantizer: BitmaskQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The parameters by the pattern of a dense one; a weight that linear layers multiply by stays compressed."""
        dense = [each for each in source_patterns if each.rpartition(".")[2] in self.hf_quantizer.serialized_names]
        keep = len(dense) == 1 and self.hf_quantizer.keeps_compressed(model, full_layer_name)
        parameters: dict[str, Any] = {key: input_dict[key] for key in dense if key in input_dict}
        for pattern in dense:
            components = self._components_of(pattern, input_dict)
            if components is None:
                continue
            if pattern in parameters:
                raise FormatError(f"{full_layer_name}: is stored both dense and compressed, expected one of them")
            lengths = {len(tensors) for tensors in components.values()}
            if len(lengths) != 1:
                raise FormatError(
                    f"{full_layer_name}: got components of {sorted(lengths)} tensors, expected equally many"
                )
            tensors = [
                assemble(full_layer_name, {name: parts[index] for name, parts in components.items()})
                for index in range(lengths.pop())
            ]
            parameters[pattern] = [frozen_parameter(each) if keep else each.to_dense() for each in tensors]
        return parameters

    def _components_of(self, pattern: str, input_dict: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]] | None:
        """The components of what a pattern of a dense parameter names; None if there are none."""
        prefix, _, parameter = pattern.rpartition(".")
        _, *stored = self.hf_quantizer.serialized_names.get(parameter, [parameter])
        found = {
            component: input_dict[key]
            for component, name in zip(COMPONENTS, stored, strict=False)
            if (key := f"{prefix}.{name}" if prefix else name) in input_dict
        }
        return found or None


class BitmaskQuantizer(HfQuantizer):
    """Loads compressed checkpoints; afterwards the model is an ordinary one, with some weights compressed."""

    requires_calibration = False

    def __init__(self, quantization_config: BitmaskQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._names: list[str] = []

    def is_serializable(self) -> bool:
        """True: what is saved is dense or compressed anew."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Compressed weights are frozen, everything else is not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True."""
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Values are cast as the dense weight would be; bits and offsets never."""
        is_float = (
            param.get_dtype().startswith(("F", "BF")) if hasattr(param, "get_dtype") else param.dtype.is_floating_point
        )
        return dtype if is_float else None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Check all headers, and learn the names under which the checkpoint stores parameters."""
        with OpenFiles("cpu") as files:
            contents = read_contents(files, {Path(file): () for file in checkpoint_files or ()})
        last_names = {"weight", *(name.rpartition(".")[2] for name in contents.compressed)}
        self.serialized_names = {
            name: [name, *((f"{name}.{component}" if contents.prefixed else component) for component in COMPONENTS)]
            for name in last_names
        }
        self._names = list(contents.compressed)
        return model

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """One operation, which decides by itself what is to stay compressed."""
        return {"deserialize": _Assemble, "dequantize": _Assemble}

    def keeps_compressed(self, model: PreTrainedModel, name: str) -> bool:
        """Whether a parameter is the weight of a linear layer by itself, and not to be dense."""
        if self.quantization_config.dequantize or name in self._tied(model):
            return False
        module_name, _, parameter = name.rpartition(".")
        try:
            module = model.get_submodule(module_name)
        except AttributeError:
            return False
        return parameter == "weight" and type(module) is nn.Linear

    @staticmethod
    def _tied(model: PreTrainedModel) -> set[str]:
        tied: Mapping[str, str] = model.all_tied_weights_keys
        return {*tied, *tied.values()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leave an ordinary model behind, which saves by its own names."""
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions
        if hasattr(model, "hf_quantizer"):
            self.remove_quantization_config(model)
        return model


# --------------------------------------------------------------------------------------------------- registration


def _config_of(fields: Mapping[str, Any]) -> BitmaskConfig | None:
    """The config of a checkpoint that is loaded here: bitmasks, and no quantization with them."""
    if quantization_of(fields):
        return None
    config = BitmaskConfig.from_model_config({"quantization_config": fields})
    return config if config is not None and config.format in _COMPRESSED_FORMATS else None


def _register() -> None:
    """Put choosers in place of what transformers registers for checkpoints of compressed-tensors."""
    other_config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD]
    other_quantizer = auto.AUTO_QUANTIZER_MAPPING[_METHOD]

    class ConfigChooser(other_config):  # type: ignore[misc, valid-type]
        """The config class of compressed-tensors, but for checkpoints that are bitmasks."""

        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            chosen = other_config if _config_of(config_dict) is None else BitmaskQuantizationConfig
            return chosen.from_dict(config_dict, *args, **kwargs)

    def choose_quantizer(quantization_config: Any, **kwargs: Any) -> Any:
        ours = isinstance(quantization_config, BitmaskQuantizationConfig)
        return (BitmaskQuantizer if ours else other_quantizer)(quantization_config, **kwargs)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = ConfigChooser
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = choose_quantizer
    PreTrainedConfig.get_config_dict = classmethod(_with_modern_place(PreTrainedConfig.get_config_dict.__func__))
    PreTrainedModel.save_pretrained = _with_compression(PreTrainedModel.save_pretrained)


def _with_modern_place(get_config_dict: Any) -> Any:
    """Early releases wrote their config where transformers does not look for it."""

    @functools.wraps(get_config_dict)
    def wrapped(cls: type, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        fields, unused = get_config_dict(cls, *args, **kwargs)
        early = fields.get("compression_config")
        early = early if isinstance(early, Mapping) else {}
        if "quantization_config" not in fields and not quantization_of(early):
            config = BitmaskConfig.from_model_config(fields)
            if config is not None and config.format in _COMPRESSED_FORMATS:
                fields = config.in_model_config(fields)
        return fields, unused

    return wrapped


# --------------------------------------------------------------------------------------------------------- saving


def infer_config(model: nn.Module, compression_format: str = BITMASK_FORMAT) -> BitmaskConfig:
    """The config that a model's weights suggest: their sparsity, and "2:4" if more than 80% of linear weights are."""
    zeros = elements = 0
    for parameter in model.parameters():
        elements += parameter.numel()
        zeros += _zeros(parameter)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    two_four = sum(_is_two_four(weight) for weight in weights)
    structure = "2:4" if weights and two_four > 0.8 * len(weights) else "unstructured"
    return BitmaskConfig(compression_format, zeros / elements if elements else 0.0, structure)


def _zeros(tensor: Tensor) -> int:
    if isinstance(tensor, BitmaskTensor):
        return tensor.numel() - tensor.nnz
    return tensor.numel() - int(torch.count_nonzero(tensor.detach()))


def _is_two_four(weight: Tensor) -> bool:
    """Whether of every four neighbours in a row at least two are zero."""
    dense = _dense(weight.detach())
    if dense.shape[-1] % 4 != 0:
        return False
    return bool(((dense.reshape(-1, 4) == 0).sum(dim=1) >= 2).all())


def _with_compression(save_pretrained: Any) -> Any:
    @functools.wraps(save_pretrained)
    def wrapped(
        self: PreTrainedModel,
        save_directory: str | os.PathLike[str],
        *args: Any,
        sparsity_config: BitmaskConfig | None = None,
        save_compressed: bool = False,
        skip_compression_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        if not args and kwargs.get("state_dict") is None and _has_compressed(self):
            state = self.state_dict()
            kwargs["state_dict"] = {
                name: tensor.to_dense() if isinstance(tensor, BitmaskTensor) else tensor
                for name, tensor in state.items()
            }
        wanted = sparsity_config or (infer_config(self) if save_compressed else None)
        if wanted is not None and wanted.format != DENSE_FORMAT:
            if kwargs.get("push_to_hub"):
                raise ValueError("push_to_hub: save a compressed model first, then upload the directory")
            _save_compressed(
                lambda directory: save_pretrained(self, directory, *args, **kwargs), Path(save_directory), wanted
            )
            return
        save_pretrained(self, save_directory, *args, **kwargs)
        if not skip_compression_stats:
            _write_stats(self, Path(save_directory), wanted)

    return wrapped


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if isinstance(tensor, BitmaskTensor) else tensor


def _has_compressed(model: nn.Module) -> bool:
    return any(isinstance(parameter, BitmaskTensor) for parameter in model.parameters())


def _write_stats(model: PreTrainedModel, directory: Path, config: BitmaskConfig | None) -> None:
    """Say in config.json how sparse the dense weights are."""
    path = directory / CONFIG_FILE
    if path.exists():
        write_json(path, (config or infer_config(model, DENSE_FORMAT)).in_model_config(read_json(path)))


def _save_compressed(save_dense: Callable[[Path], None], directory: Path, config: BitmaskConfig) -> None:
    """Save dense into a directory beside the files, compress that, and move the outcome into their place."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bitmask.", dir=directory) as temporary:
        dense, compressed = Path(temporary, "dense"), Path(temporary, "compressed")
        save_dense(dense)
        compress_checkpoint(dense, compressed, config=config)
        shutil.rmtree(dense)
        made = {entry.name for entry in compressed.iterdir()}
        for stale in _weights_in(directory) - made:
            (directory / stale).unlink()
        for name in sorted(made, key=lambda name: name in (INDEX_FILE, CONFIG_FILE)):  # what others refer to first
            os.replace(compressed / name, directory / name)


def _weights_in(directory: Path) -> set[str]:
    """Weights of an earlier save, which would otherwise be loaded instead of, or together with, the new ones."""
    named = [*directory.glob("model*.safetensors"), directory / INDEX_FILE]
    return {path.name for path in named if path.is_file()}


_register()

__all__ = ["BitmaskQuantizationConfig", "BitmaskQuantizer", "infer_config"]
