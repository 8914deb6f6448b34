"""transformers: importing this module teaches `from_pretrained` and `save_pretrained` compressed checkpoints.

    import bitmask.hf
    model = AutoModelForCausalLM.from_pretrained(directory)  # linear weights stay compressed in memory
    model.save_pretrained(directory, save_compressed=True)  # or save_compressed="sparse-24-bitmask"

`from_pretrained` reads the checkpoints of every release that `bitmask.files` reads. `"dequantize": true` in their
`quantization_config`, or BITMASK_DEQUANTIZE=1 in the environment, gives dense weights. Checkpoints of other kinds,
quantized ones of compressed-tensors among them, go the way that they went before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmask.calls import FormatError
from bitmask.files.config import BITMASK_24_FORMAT, BITMASK_FORMAT, BitmaskConfig, quantization_of
from bitmask.files.contents import COMPONENTS, OpenFiles, read_contents
from bitmask.files.load import assemble
from bitmask.files.pretrained import infer_config, with_compression
from bitmask.linear import frozen_parameter

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
    """The config of a checkpoint that is loaded here: bitmasks, 2:4 or not, and no quantization with them."""
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
    PreTrainedModel.save_pretrained = with_compression(PreTrainedModel.save_pretrained)


def _with_modern_place(get_config_dict: Any) -> Any:
    """Early releases wrote their config where transformers does not look for it."""

    @functools.wraps(get_config_dict)
    def wrapped(cls: type, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        fields, unused = get_config_dict(cls, *args, **kwargs)
        early = fields.get("compression_config")
        early = early if isinstance(early, Mapping) else {}
        sparsity = early.get("sparsity_config") or fields.get("sparsity_config")
        is_ours = isinstance(sparsity, Mapping) and {"format", "global_sparsity"} <= sparsity.keys()
        if is_ours and not fields.get("quantization_config") and not quantization_of(early):
            config = BitmaskConfig.from_dict(sparsity)
            if config.format in _COMPRESSED_FORMATS:
                fields = config.in_model_config(fields)
        return fields, unused

    return wrapped


_register()

__all__ = ["BitmaskQuantizationConfig", "BitmaskQuantizer", "infer_config"]
