"""BitmaskConfig: how a checkpoint says that its weights are stored compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from bitmask.calls import FormatError

BITMASK_FORMAT = "sparse-bitmask"
BITMASK_24_FORMAT = "sparse-24-bitmask"
DENSE_FORMAT = "dense"

# Every spelling that a release has written, and the format it means.
_FORMATS = {
    "sparse-bitmask": BITMASK_FORMAT,
    "sparse_bitmask": BITMASK_FORMAT,
    "sparse-24-bitmask": BITMASK_24_FORMAT,
    "sparse_24_bitmask": BITMASK_24_FORMAT,
    "dense": DENSE_FORMAT,
    "dense-sparsity": DENSE_FORMAT,
    "dense_sparsity": DENSE_FORMAT,
}
_STRUCTURES = ("unstructured", "2:4", "0:0")
_STRUCTURE_OF_FORMAT = {BITMASK_24_FORMAT: "2:4"}


@dataclass
class BitmaskConfig:
    """What the sparsity part of a model's config.json says.

    Attributes:
        format: "sparse-bitmask", "sparse-24-bitmask" or "dense" (sparse weights that are stored dense).
        global_sparsity: fraction of zeros in all weights, 0 to 1.
        sparsity_structure: "unstructured", "2:4" or "0:0"; by default that of the format.
        targets, ignore: names or kinds of layers that are, or are not, compressed; None where the file says nothing.

    >>> config = BitmaskConfig(global_sparsity=0.5)
    >>> BitmaskConfig.from_model_config(config.to_model_config()) == config
    True
    >>> BitmaskConfig.from_dict({"format": "sparse_bitmask", "global_sparsity": 50.0}).global_sparsity
    0.5
    """

    format: str = BITMASK_FORMAT
    global_sparsity: float = 0.0
    sparsity_structure: str = ""
    targets: list[str] | None = None
    ignore: list[str] | None = None

    def __post_init__(self) -> None:
        self.format = format_of(self.format)
        self.global_sparsity = _fraction_of(self.global_sparsity)
        structure = str(self.sparsity_structure or _STRUCTURE_OF_FORMAT.get(self.format, "unstructured")).lower()
        if structure not in _STRUCTURES:
            raise FormatError(
                f"sparsity_structure: got {self.sparsity_structure!r}, expected one of {', '.join(_STRUCTURES)}"
            )
        self.sparsity_structure = structure
        self.targets = _names_of("targets", self.targets)
        self.ignore = _names_of("ignore", self.ignore)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BitmaskConfig:
        """The config of a `sparsity_config` mapping; fields that mean nothing here are passed over.

        Raises:
            FormatError: not a mapping, an unknown format or structure, a sparsity that is none.
        """
        if not isinstance(fields, Mapping):
            raise FormatError(f"sparsity_config: got {type(fields).__name__}, expected a mapping")
        if "format" not in fields:
            raise FormatError(f"sparsity_config: got the fields {sorted(map(str, fields))}, expected one named format")
        structure = fields.get("sparsity_structure")
        sparsity = fields.get("global_sparsity")
        return cls(
            format=fields["format"],
            global_sparsity=0.0 if sparsity is None else sparsity,
            sparsity_structure="" if structure is None else structure,
            targets=fields.get("targets"),
            ignore=fields.get("ignore"),
        )

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any]) -> BitmaskConfig | None:
        """The config that a model's config.json carries, wherever its release put it; None if there is none.

        Releases of compressed-tensors wrote it at the root (0.3), in `compression_config` (0.4 to 0.6) and in
        `quantization_config` (0.7 on).

        Raises:
            FormatError: one is there but cannot be read.
        """
        if not isinstance(model_config, Mapping):
            raise FormatError(f"config: got {type(model_config).__name__}, expected a mapping")
        places = (model_config, model_config.get("compression_config"), model_config.get("quantization_config"))
        for place in places:
            found = place.get(_SPARSITY) if isinstance(place, Mapping) else None
            if found:
                return cls.from_dict(found)
        return None

    def to_dict(self) -> dict[str, Any]:
        """The `sparsity_config` mapping.

        A config that only states facts about dense weights names no targets: vLLM refuses it otherwise.
        """
        fields = asdict(self)
        if self.format == DENSE_FORMAT:
            fields["targets"] = fields["ignore"] = []
        return fields

    def to_model_config(self) -> dict[str, Any]:
        """A config.json that says nothing but this."""
        return self.in_model_config({})

    def in_model_config(self, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """A model's config.json with this config in place of any other; what it says of quantization stays.

        The place is where the latest releases read it. That of a dense checkpoint goes to the root, which no loader
        takes for a reason to ask for a library; without sparsity worth telling it leaves no trace.
        """
        changed = {key: value for key, value in model_config.items() if key != _SPARSITY}
        quantization: dict[str, Any] = {}
        for place in ("compression_config", "quantization_config"):
            found = changed.pop(place, None)
            if isinstance(found, Mapping):
                quantization |= {key: value for key, value in found.items() if key not in (_SPARSITY, _OUR_VERSION)}
        quantizes = quantization_of(quantization)
        if self.format != DENSE_FORMAT:
            about = {"quant_method": _METHOD, "version": _WRITTEN_LAYOUT, **quantization}
            return {
                **changed,
                # Beside it, compressed-tensors would take an unknown field for quantization.
                "quantization_config": {**about, _SPARSITY: {**self.to_dict(), _OUR_VERSION: version("bitmask")}},
            }
        if self.global_sparsity >= _WORTH_TELLING:
            changed[_SPARSITY] = self.to_dict()
        return {**changed, "quantization_config": quantization} if quantizes else changed


def check_config(name: str, config: object) -> None:
    """Raise TypeError unless it is a BitmaskConfig or None."""
    if not isinstance(config, BitmaskConfig | None):
        raise TypeError(f"{name}: got {type(config).__name__}, expected a BitmaskConfig")


def quantization_of(fields: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says anything of quantization, beside sparsity and whose it is."""
    beside = {"quant_method", "version", "transform_config", "dequantize", _SPARSITY, _OUR_VERSION}
    other_method = fields.get("quant_method", _METHOD) != _METHOD
    return other_method or any(value for key, value in fields.items() if key not in beside)


# What config.json calls the library that defined the layouts.
_METHOD = "compressed-tensors"

# The release of compressed-tensors whose layout is written.
_WRITTEN_LAYOUT = "0.14.0.1"

_SPARSITY = "sparsity_config"
_OUR_VERSION = "bitmask_version"

# The global sparsity from which a dense checkpoint says that it is sparse.
_WORTH_TELLING = 0.05


def format_of(name: Any) -> str:
    """The format that a name means, in any release's spelling.

    Raises:
        FormatError: a name of no format that is read here.

    >>> format_of("sparse_bitmask")
    'sparse-bitmask'
    """
    if not isinstance(name, str) or name not in _FORMATS:
        raise FormatError(f"format: got {name!r}, expected one of {', '.join(sorted(_FORMATS))}")
    return _FORMATS[name]


def _fraction_of(sparsity: Any) -> float:
    """A sparsity as a fraction; early files give it in percent."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity <= 100:
        raise FormatError(f"global_sparsity: got {sparsity!r}, expected a fraction 0 to 1 or a percentage up to 100")
    return float(sparsity) if sparsity <= 1 else sparsity / 100


def _names_of(field: str, names: Any) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{field}: got {names!r}, expected a list of names")
    return list(names)
