"""The files of a checkpoint directory: which shards there are, and its JSON files, neither of which is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from bitmask.calls import FormatError
from bitmask.files.replacing import replacing

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

_MOST_JSON_BYTES = 100 << 20  # as much as safetensors allow a header


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FormatError: not JSON, not an object, too deep or too large; NaN and infinities are not JSON.
        OSError: the file is missing or cannot be read.
    """
    size = path.stat().st_size
    if size > _MOST_JSON_BYTES:
        raise FormatError(f"{path}: got {size} bytes, expected at most {_MOST_JSON_BYTES}")

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"{path}: got {constant}, expected a JSON number")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: got {type(content).__name__}, expected an object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def shard_files(path: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint, `path` itself or those of the directory `path`, and their indexed keys.

    Raises:
        FormatError: an index that names files which are absent or not in the directory, or is not of the one file.
        OSError: nothing there.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
        return {path: []}
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if index.exists():
        shards = _indexed(index)
        if single.exists() and single not in shards:
            raise FormatError(f"{path}: got both {SINGLE_FILE} and {INDEX_FILE}, expected that of the latest save only")
        return shards
    if single.exists():
        return {single: []}
    raise FileNotFoundError(f"{path}: got a directory without {SINGLE_FILE} and {INDEX_FILE}, expected one of them")


def _indexed(index: Path) -> dict[Path, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map: got {type(weight_map).__name__}, expected an object with entries")
    shards: dict[Path, list[str]] = {}
    for key, name in weight_map.items():
        shards.setdefault(_shard(index, key, name), []).append(key)
    return shards


def _shard(index: Path, key: str, name: Any) -> Path:
    """A file that lies beside the index, or an error."""
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..") and "\0" not in name
    if not plain or "\\" in name:
        raise FormatError(f"{index}: {key}: got {name!r}, expected the name of a file in the same directory")
    shard: Path = index.parent / name
    if not shard.is_file():
        raise FormatError(f"{index}: {key}: got {name!r}, which is not there")
    return shard
