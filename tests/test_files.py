"""Compressed safetensors files: what is written, what is read, what is refused."""

import json
import math
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time

import pytest
import torch
from conftest import ALL_DTYPES, assert_bits_equal, random_dense, random_numbers, run_python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bitmask
from bitmask import BitmaskConfig, BitmaskTensor, FormatError, load_compressed, load_rows, save_compressed
from bitmask.files import compress_checkpoint, decompress_checkpoint, list_checkpoint, verify_checkpoint
from bitmask.files.replacing import moved_in, replacing

SPARSE = random_numbers(33, 70)
SAFETENSORS_DTYPES = [
    dtype for dtype in ALL_DTYPES if dtype not in (torch.complex32, torch.complex128, torch.float8_e8m0fnu)
]


def equal(left, right):
    """Same names, and tensors equal but for the sign of zeros."""
    assert left.keys() == right.keys()
    for name in left:
        assert_bits_equal(left[name] + 0, right[name] + 0)
    return True


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def tensors():
    return {
        "a.weight": SPARSE,
        "a.bias": torch.randn(33),
        "deep.b.weight": random_numbers(4, 3, 16, seed=1),
        "dense.weight": torch.randn(5, 9),
        "odd/../name\n.weight": random_numbers(64, 64, seed=2),
        "": torch.ones(3),
    }


# ------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("style", ["module", "parameter"])
@pytest.mark.parametrize("decompress", [True, False])
def test_round_trip(path, tensors, style, decompress):
    save_compressed(tensors, path, key_style=style)
    loaded = dict(load_compressed(path, decompress=decompress))
    compressed = {name for name, tensor in loaded.items() if isinstance(tensor, BitmaskTensor)}
    assert not decompress or not compressed
    assert decompress or {"a.weight", "odd/../name\n.weight"} <= compressed
    dense = {name: tensor.to_dense() if name in compressed else tensor for name, tensor in loaded.items()}
    assert equal(dense, tensors)
    assert path.stat().st_size < sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES, ids=str)
def test_every_dtype_bit_for_bit(path, dtype):
    dense = random_dense((40, 90), dtype)
    save_compressed({"w.weight": dense}, path, keep_negative_zero=True)
    stored = dict(load_compressed(path, decompress=False))["w.weight"]
    assert isinstance(stored, BitmaskTensor)
    assert_bits_equal(stored.to_dense(), dense)


def test_the_layout_is_that_of_the_latest_release(path):
    save_compressed({"layer.weight": SPARSE, "layer.bias": torch.ones(3)}, path)
    stored = load_file(path)
    values, bitmasks, row_offsets = bitmask.compress(SPARSE)
    assert set(stored) == {
        "layer.compressed",
        "layer.bitmask",
        "layer.shape",
        "layer.row_offsets",
        "layer.bias",
    }
    assert_bits_equal(stored["layer.compressed"], values)
    assert_bits_equal(stored["layer.bitmask"], bitmasks)
    assert_bits_equal(stored["layer.row_offsets"], row_offsets)
    assert stored["layer.shape"].tolist() == [33, 70]


def test_nothing_grows(path):
    """A tensor that compression does not shrink is stored as it is, and so is one below the sparsity asked for."""
    tensors = {"a.weight": torch.randn(20, 20), "b.weight": random_numbers(20, 20, density=0.8)}
    save_compressed(tensors, path, min_sparsity=0.5)
    assert load_file(path).keys() == tensors.keys()


def test_names_of_one_tensor_are_stored_once(path):
    tied = {"a.weight": SPARSE, "b.weight": SPARSE, "c": torch.ones(4)}
    tied["d"] = tied["c"]
    save_compressed(tied, path)
    assert len(load_file(path)) == 5
    loaded = dict(load_compressed(path))
    assert equal(loaded, tied)
    assert loaded["a.weight"] is loaded["b.weight"]


def test_views_of_one_storage(path):
    base = torch.randn(10, 10)
    tensors = {"a": base[:5], "b": base[5:], "c": base.T, "d": base[2:7]}
    save_compressed(tensors, path)
    assert equal(dict(load_compressed(path)), {name: tensor.contiguous() for name, tensor in tensors.items()})


def test_a_compressed_tensor_of_any_name(path):
    """One that no release could name in its way is written in the other."""
    save_compressed({"w": BitmaskTensor.from_dense(SPARSE)}, path)
    assert set(load_file(path)) == {"w.compressed", "w.bitmask", "w.shape", "w.row_offsets"}
    assert equal(dict(load_compressed(path)), {"w": SPARSE})


def test_model(path):
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 8))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(32, 64) < 0.3)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bitmask.save_compressed_model(model, path, compression_format=BitmaskConfig().format)
    fresh = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 8))
    fresh.load_state_dict(dict(load_compressed(path, compression_config=BitmaskConfig())))
    assert equal(dict(fresh.state_dict()), expected)
    bitmask.compress_(model)
    bitmask.save_compressed_model(model, path)
    assert equal(dict(load_compressed(path)), expected)


def test_lazily_conjugated_tensors_are_tensors_of_their_own(path):
    numbers = torch.randn(20, 20, dtype=torch.complex64)
    tensors = {"a": numbers, "b": numbers.conj(), "c.weight": numbers.conj(), "d": numbers.conj().imag}
    save_compressed(tensors, path)
    assert equal(dict(load_compressed(path)), {name: tensor.resolve_conj() for name, tensor in tensors.items()})


@pytest.mark.parametrize("name", ["x.shape", "x.bitmask", "a.compressed"])
def test_a_name_that_would_not_come_back(path, name):
    with pytest.raises(ValueError, match=r"x|a\.compressed"):
        save_compressed({"a.weight": SPARSE, name: torch.ones(2)}, path)
    assert not litter(path.parent)


def test_names_of_no_weights(path):
    save_compressed({"experts": SPARSE, "w": SPARSE + SPARSE}, path)
    assert "experts.bitmask" in load_file(path)
    assert equal(dict(load_compressed(path)), {"experts": SPARSE, "w": SPARSE + SPARSE})


def test_dense_format(path, tensors):
    save_compressed({**tensors, "a.weight": BitmaskTensor.from_dense(SPARSE)}, path, "dense")
    assert equal(load_file(path), tensors)


def test_one_dense_tensor_at_a_time(path, tensors):
    save_compressed(tensors, path)
    generator = load_compressed(path)
    next(generator)
    path.unlink()  # what is open stays readable, and a generator that is dropped closes it
    generator.close()


# ------------------------------------------------------------------------------------------ early layouts


def entries(dense, prefix="w.weight", **changes):
    """The four components of a tensor; a change to None leaves one out."""
    values, bitmasks, row_offsets = bitmask.compress(dense)
    shape = torch.tensor(dense.shape, dtype=torch.int64)
    parts = {"compressed": values, "bitmask": bitmasks, "shape": shape, "row_offsets": row_offsets} | changes
    return {f"{prefix}.{component}": part for component, part in parts.items() if part is not None}


def read(path, name="w.weight"):
    return dict(load_compressed(path))[name]


def test_scalar_row_offsets_of_vectors(path):
    dense = random_numbers(100)
    save_file(entries(dense, "w.bias", row_offsets=torch.tensor(0)) | entries(SPARSE), path)
    assert_bits_equal(read(path, "w.bias"), dense)


def test_a_shard_of_biases_alone(path):
    """Releases that compressed these wrote whole names before the components."""
    dense = random_numbers(100)
    save_file(entries(dense, "w.bias", row_offsets=torch.tensor(0)), path)
    assert_bits_equal(read(path, "w.bias"), dense)


def test_row_offsets_over_the_first_dimension_only(path):
    dense = random_numbers(3, 4, 16)
    counts = (dense != 0).sum(-1)
    save_file(entries(dense, row_offsets=counts.cumsum(0) - counts), path)
    assert_bits_equal(read(path), dense)


@pytest.mark.parametrize("cols", [64, 30])
def test_two_four(path, cols):
    """Groups of four may straddle rows where the columns are no multiple of four."""
    dense = torch.randn(6 * cols // 4, 4)
    dense[torch.arange(len(dense)), torch.randint(0, 2, (len(dense),))] = 0
    dense[torch.arange(len(dense)), torch.randint(2, 4, (len(dense),))] = 0
    dense = dense.reshape(6, cols)
    values, bitmasks, _ = bitmask.compress(dense)
    shape = torch.tensor([[6], [cols]])
    changes = {"compressed": values.reshape(6, cols // 2), "shape": shape, "row_offsets": None, "bitmask": bitmasks}
    save_file(entries(dense, "w", **changes), path)
    assert_bits_equal(read(path), dense)
    assert_bits_equal(load_rows(path, "w.weight", 2, 5), dense[2:5])


@pytest.mark.parametrize(
    "model_config",
    [
        {
            "sparsity_config": {
                "format": "sparse_bitmask",
                "global_sparsity": 50.0,
                "sparsity_structure": "unstructured",
            }
        },
        {"sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5, "registry_requires_subclass": False}},
        {"compression_config": {"sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5}}},
        {"quantization_config": {"sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5}}},
    ],
)
def test_config_of_every_release(model_config):
    assert BitmaskConfig.from_model_config(model_config) == BitmaskConfig(global_sparsity=0.5)


def test_config_keeps_what_is_said_of_quantization():
    before = {"a": 1, "quantization_config": {"quant_method": "fp8", "config_groups": {}, "sparsity_config": {}}}
    after = BitmaskConfig(global_sparsity=0.5).in_model_config(before)
    assert after["quantization_config"]["quant_method"] == "fp8"
    assert BitmaskConfig.from_model_config(after) == BitmaskConfig(global_sparsity=0.5)
    without = BitmaskConfig("dense").in_model_config(after)
    assert "sparsity_config" not in without["quantization_config"]
    assert "config_groups" in without["quantization_config"]


def test_config_without_sparsity():
    assert BitmaskConfig.from_model_config({"quantization_config": {"quant_method": "gptq"}}) is None
    assert BitmaskConfig("dense").in_model_config({"a": 1}) == {"a": 1}
    assert BitmaskConfig("dense", 0.6).to_dict()["targets"] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "sparse-unheard-of"},
        {"format": ["sparse-bitmask"]},
        {"format": None},
        {},
        [],
        {"format": "dense", "global_sparsity": math.nan},
        {"format": "dense", "global_sparsity": -1},
        {"format": "dense", "global_sparsity": 101},
        {"format": "dense", "global_sparsity": "0.5"},
        {"format": "dense", "global_sparsity": True},
        {"format": "dense", "sparsity_structure": "3:4"},
        {"format": "dense", "targets": "Linear"},
        {"format": "dense", "ignore": [1]},
    ],
)
def test_config_refuses(fields):
    with pytest.raises(FormatError):
        BitmaskConfig.from_dict(fields)


# ------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("name", ["a.weight", "deep.b.weight", "dense.weight"])
@pytest.mark.parametrize("style", ["module", "parameter"])
def test_rows(path, tensors, name, style):
    save_compressed(tensors, path, key_style=style)
    dense = tensors[name]
    for start, stop in ((0, 0), (0, 1), (1, 3), (0, len(dense)), (len(dense), len(dense))):
        assert_bits_equal(load_rows(path, name, start, stop), dense[start:stop])


def test_rows_that_are_not_there(path, tensors):
    save_compressed(tensors, path)
    for start, stop in ((0, 34), (-1, 3), (3, 2)):
        with pytest.raises(IndexError, match="0 to 33"):
            load_rows(path, "a.weight", start, stop)
    with pytest.raises(IndexError, match="dimensions"):
        load_rows(path, "a.bias", 0, 1)
    with pytest.raises(KeyError, match="nothing"):
        load_rows(path, "nothing", 0, 1)


def test_rows_are_proven(path):
    changed = bitmask.compress(SPARSE)[2]
    changed[10:] = 10**15
    save_file(entries(SPARSE, row_offsets=changed), path)
    with pytest.raises(FormatError, match="offsets"):
        load_rows(path, "w.weight", 10, 20)


def test_only_those_rows_are_read(tmp_path):
    """Of a sparse file only what is read takes pages of memory: a process that loads two rows stays small."""
    path = tmp_path / "large.safetensors"
    torch.manual_seed(0)
    save_compressed({"w.weight": torch.randn(16384, 4096).mul_(torch.rand(16384, 4096) < 0.3)}, path)
    code = f"""
import bitmask
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
before = resident()
rows = bitmask.load_rows({str(path)!r}, 'w.weight', 9000, 9002)
assert rows.shape == (2, 4096)
print(resident() - before)
"""
    used = int(run_python(code).stdout)
    assert path.stat().st_size > 80 << 20
    assert used < 24 << 20


# ------------------------------------------------------------------------------------------ hostile files


HOSTILE = {
    "values missing": {"compressed": None},
    "bitmask missing": {"bitmask": None},
    "shape missing": {"shape": None},
    "row offsets missing": {"row_offsets": None},
    "values of two dimensions": {"compressed": torch.zeros(3, 3, 3)},
    "too few values": {"compressed": torch.zeros(3)},
    "too many values": {"compressed": torch.zeros(33 * 70 + 1)},
    "values of a dtype without codec": {"compressed": torch.zeros(3, dtype=torch.complex64)},
    "bitmask of another dtype": {"bitmask": torch.zeros(33, 9, dtype=torch.int8)},
    "bitmask too short": {"bitmask": torch.zeros(33, 8, dtype=torch.uint8)},
    "bitmask flat": {"bitmask": torch.zeros(33 * 9, dtype=torch.uint8)},
    "all bits set": {"bitmask": torch.full((33, 9), 255, dtype=torch.uint8)},
    "no bits set": {"bitmask": torch.zeros(33, 9, dtype=torch.uint8)},
    "shape of another dtype": {"shape": torch.tensor([33, 70], dtype=torch.int32)},
    "shape negative": {"shape": torch.tensor([-33, -70])},
    "shape overflows": {"shape": torch.tensor([2**62, 70])},
    "shape terabytes": {"shape": torch.tensor([2**40, 1])},
    "shape terabytes without columns": {"shape": torch.tensor([2**62, 0]), "bitmask": torch.zeros(0, 0).byte()},
    "shape of a matrix": {"shape": torch.tensor([[33, 70], [1, 1]])},
    "shape of many dimensions": {"shape": torch.ones(65, dtype=torch.int64)},
    "shape empty": {"shape": torch.zeros(0, dtype=torch.int64)},
    "row offsets of another dtype": {"row_offsets": torch.zeros(33, dtype=torch.int32)},
    "row offsets zero": {"row_offsets": torch.zeros(33, dtype=torch.int64)},
    "row offsets negative": {"row_offsets": torch.arange(33) - 5},
    "row offsets far": {"row_offsets": torch.arange(33) * 2**58},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_components(path, changes):
    save_file({**entries(SPARSE, **changes), "other": torch.ones(2)}, path)
    with pytest.raises(FormatError, match="model"):
        dict(load_compressed(path))
    with pytest.raises(FormatError):
        load_rows(path, "w.weight", 0, 33)


def test_padding_bits(path):
    _, bitmasks, _ = bitmask.compress(SPARSE)
    bitmasks[3, -1] |= 0x80
    save_file(entries(SPARSE, bitmask=bitmasks), path)
    with pytest.raises(FormatError, match="padding"):
        dict(load_compressed(path))


def test_both_dense_and_compressed(path):
    save_file(entries(SPARSE) | {"w.weight": SPARSE}, path)
    with pytest.raises(FormatError, match="both"):
        dict(load_compressed(path))


def test_shape_is_an_ordinary_name(path):
    """Where nothing is compressed; next to compressed tensors it is a component of one."""
    save_file({"x.shape": torch.ones(2)}, path)
    assert list(dict(load_compressed(path))) == ["x.shape"]
    save_file({"x.shape": torch.ones(2), **entries(SPARSE)}, path)
    with pytest.raises(FormatError, match="compressed"):
        dict(load_compressed(path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"bitmask_keys": "other"}, "bitmask_keys"),
        ({"bitmask_alias:v": "nothing"}, "nothing"),
        ({"bitmask_alias:w.weight": "w.weight"}, "another"),
        ({"bitmask_alias:v": "w.weight", "bitmask_alias:u": "v"}, "no tensor"),
    ],
)
def test_hostile_metadata(path, metadata, message):
    save_file(entries(SPARSE), path, metadata)
    with pytest.raises(FormatError, match=message):
        dict(load_compressed(path))


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\x80\x04N.", struct.pack("<Q", 2**60), b"\x02\0\0\0\0\0\0\0{}x"])
def test_not_safetensors(path, content):
    path.write_bytes(content)
    with pytest.raises(FormatError, match="model"):
        dict(load_compressed(path))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        next(load_compressed(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="index"):
        next(load_compressed(tmp_path))


def test_format_that_the_config_denies(path):
    save_compressed({"w.weight": SPARSE}, path)
    with pytest.raises(FormatError, match="dense"):
        dict(load_compressed(path, BitmaskConfig("dense")))


@pytest.mark.parametrize("config", ["dense", {"format": "dense"}])
def test_what_is_no_config(path, config):
    save_compressed({"w.weight": SPARSE}, path)
    kind = type(config).__name__
    with pytest.raises(TypeError, match=f"compression_config: got {kind}, expected a BitmaskConfig"):
        dict(load_compressed(path, config))
    with pytest.raises(TypeError, match=f"config: got {kind}, expected a BitmaskConfig"):
        compress_checkpoint(path, path.with_name("other"), config=config)


def test_no_memory_to_load_into(path):
    save_compressed({"w.weight": SPARSE}, path)
    with pytest.raises(ValueError, match=r"^device: got meta, expected one that has memory"):
        dict(load_compressed(path, device="meta"))


def test_truncated_or_trailing(path, tensors):
    save_compressed(tensors, path)
    whole = path.read_bytes()
    for size in {*random.Random(0).sample(range(len(whole)), 200), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            dict(load_compressed(path))
    path.write_bytes(whole + b"x")
    with pytest.raises(FormatError):
        dict(load_compressed(path))


def test_mutations(path):
    """One byte of a valid file changed: an error, or what was stored but for that byte, never anything else."""
    dense = random_numbers(9, 21)
    save_compressed({"w.weight": dense, "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    numbers = random.Random(0)
    refused = 0
    for _ in range(3000):
        position = numbers.randrange(len(whole))
        mutated = bytearray(whole)
        mutated[position] ^= 1 << numbers.randrange(8)
        path.write_bytes(mutated)
        try:
            loaded = dict(load_compressed(path))
        except FormatError:
            refused += 1
            continue
        expected = {"w.weight": dense, "b": torch.ones(3)}
        header = 8 + int.from_bytes(whole[:8], "little")
        names = expected if position >= header else loaded  # which a changed header may have renamed
        differing = sum(
            int((loaded[name] != tensor).sum()) for name, tensor in zip(names, loaded.values(), strict=True)
        )
        assert differing <= 1, "one byte of the values is one element"
    assert refused > 1000


def mutated_field(components, numbers):
    """The components with one field changed: an element, a length, a dtype, a rank, or the component gone."""
    component = numbers.choice(sorted(components))
    part = components[component]
    kind = numbers.randrange(6)
    changed = part.clone()
    if kind == 0:
        flat = changed.view(-1).view(torch.uint8)
        flat[numbers.randrange(len(flat))] ^= 1 << numbers.randrange(8)
    elif kind == 1:
        changed = part[: max(len(part) - 1 - numbers.randrange(3), 0)].clone()
    elif kind == 2:
        changed = torch.cat([part, part[: 1 + numbers.randrange(3)]])
    elif kind == 3:
        wrong = [dtype for dtype in (torch.int32, torch.uint8, torch.float64, torch.int64) if dtype != part.dtype]
        changed = part.to(numbers.choice(wrong))
    elif kind == 4:
        changed = numbers.choice([part.reshape(-1, 1, 1), part.unsqueeze(0), part.reshape(-1)]).clone()
    else:
        return {name: each for name, each in components.items() if name != component}, component, kind
    return {**components, component: changed}, component, kind


def check_field_mutations(whole, dense, path):
    """Changes one field of `dense`, stored as `whole`: an error, or the identical result, but for a value's bits."""
    numbers = random.Random(0)
    refused = 0
    for _ in range(2000):
        components, component, kind = mutated_field(whole, numbers)
        save_file({f"w.weight.{name}": part for name, part in components.items()} | {"b": torch.ones(2)}, path)
        try:
            loaded = dict(load_compressed(path))
        except FormatError:
            refused += 1
            continue
        assert loaded.keys() == {"w.weight", "b"}
        differing = int((loaded["w.weight"].to(dense.dtype) != dense).sum())
        # Other bits or another dtype of the values contradict nothing.
        allowed = {0: 1, 3: dense.numel()} if component == "compressed" else {}
        assert differing <= allowed.get(kind, 0), (component, kind)
    assert refused > 1000


def test_field_mutations(path):
    """One field of a compressed tensor changed: an error, or the identical result, but for a value's own bits."""
    dense = random_numbers(7, 32)
    dense[:, -1] = 1.0  # else a shape of fewer columns would fit, too
    values, bitmasks, row_offsets = bitmask.compress(dense)
    shape = torch.tensor(dense.shape, dtype=torch.int64)
    whole = {"compressed": values, "bitmask": bitmasks, "shape": shape, "row_offsets": row_offsets}
    check_field_mutations(whole, dense, path)


# ------------------------------------------------------------------------------------------ shards


def sharded(directory, tensors, count=3):
    """A directory as transformers writes it, the components of a tensor spread over the shards."""
    names = sorted(tensors)
    weight_map = {}
    for shard in range(count):
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        save_file({key: tensors[key] for key in names[shard::count]}, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(names[shard::count], name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_components_spread_over_shards(tmp_path):
    sharded(tmp_path, entries(SPARSE, "w") | {"b": torch.ones(4), "c": torch.zeros(2)})
    assert equal(dict(load_compressed(tmp_path)), {"w.weight": SPARSE, "b": torch.ones(4), "c": torch.zeros(2)})
    assert_bits_equal(load_rows(tmp_path, "w.weight", 3, 9), SPARSE[3:9])


def test_key_in_two_shards(tmp_path):
    sharded(tmp_path, {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(FormatError, match="a"):
        dict(load_compressed(tmp_path))


def test_shards_that_name_differently(tmp_path):
    sharded(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, count=2)
    for shard, style in ((1, "module"), (2, "parameter")):
        path = tmp_path / f"model-0000{shard}-of-00002.safetensors"
        save_file(load_file(path) | entries(SPARSE, f"w{shard}"), path, {"bitmask_keys": style})
    with pytest.raises(FormatError, match="bitmask_keys"):
        dict(load_compressed(tmp_path))


def test_a_shard_of_another_save(tmp_path):
    sharded(tmp_path, {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)})
    save_file({"other": torch.ones(2)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(FormatError, match="b: is not there"):
        dict(load_compressed(tmp_path))
    sharded(tmp_path, {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)})
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="both"):
        dict(load_compressed(tmp_path))


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a\0b", "absent.safetensors", "", ".", "..", "sub/x", "a\\b", 3, None]
)
def test_hostile_shard_names(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="index"):
        dict(load_compressed(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 10**5, '{"a": NaN}', "\xff", '{"a": 1} x']
)
def test_hostile_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match="index"):
        dict(load_compressed(tmp_path))


# ------------------------------------------------------------------------------------------ replacing


def litter(directory):
    return [name for name in os.listdir(directory) if name != "model.safetensors"]


@pytest.mark.parametrize("after", range(8))
def test_killed_while_moving_in(tmp_path, after):
    """Old or new, whole, or without the file that makes it readable."""
    directory, source = tmp_path / "directory", tmp_path / "source"
    for folder, names in ((directory, ("config", "a", "b", "stale")), (source, ("config", "a", "b", "c"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    killed = os.fork()
    if killed == 0:
        renames = iter([os.rename] * after)
        os.rename = lambda *paths: next(renames, lambda *_: os._exit(1))(*paths)
        moved_in(source, directory, {"stale"}, tmp_path / "old", "config")
        os._exit(0)
    assert os.waitpid(killed, 0)[1] == (0 if after == 8 else 256)
    there = {path.name: path.read_text() for path in directory.iterdir()}
    assert "config" not in there or there == dict.fromkeys(("config", "a", "b", "stale"), "directory")
    everywhere = sorted(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert everywhere == ["directory"] * 4 + ["source"] * 4


@pytest.mark.parametrize("after", range(9))
def test_an_error_while_moving_in(tmp_path, after, monkeypatch):
    directory, source = tmp_path / "directory", tmp_path / "source"
    for folder, names in ((directory, ("config", "a", "stale")), (source, ("config", "a", "b", "c"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    rename, count = os.rename, iter(range(100))

    def failing(*paths):
        if next(count) == after:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(os, "rename", failing)
    if after < 7:
        with pytest.raises(KeyboardInterrupt):
            moved_in(source, directory, {"stale"}, tmp_path / "old", "config")
        expected = dict.fromkeys(("config", "a", "stale"), "directory")
    else:
        moved_in(source, directory, {"stale"}, tmp_path / "old", "config")
        expected = dict.fromkeys(("config", "a", "b", "c"), "source")
    assert {path.name: path.read_text() for path in directory.iterdir()} == expected


def test_saving_over_what_is_mapped(path, tensors):
    save_compressed(tensors, path)
    loaded = dict(load_compressed(path, decompress=False))
    save_compressed(loaded, path)
    assert equal(dict(load_compressed(path)), tensors)


def test_mode_and_link_are_kept(tmp_path, tensors):
    real, link = tmp_path / "real", tmp_path / "link"
    real.touch(mode=0o640)
    real.chmod(0o640)
    link.symlink_to(real)
    save_compressed(tensors, link)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert equal(dict(load_compressed(real)), tensors)
    mask = os.umask(0o027)
    try:
        save_compressed(tensors, tmp_path / "new")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_failure_leaves_the_old_file(path):
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert not litter(path.parent)


def test_disk_full(path, tensors):
    """A limit on the size of files stands in for the end of the disk."""
    path.write_text("old")
    code = f"""
import resource, signal, torch, bitmask
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    bitmask.save_compressed({{"w": torch.randn(100, 100)}}, {str(path)!r})
except Exception as error:
    print(type(error).__name__)
"""
    assert run_python(code).stdout.strip() in ("OSError", "SafetensorError")
    assert path.read_text() == "old"
    assert not litter(path.parent)


def test_a_directory_that_is_not_there(tmp_path, tensors):
    with pytest.raises(FileNotFoundError):
        save_compressed(tensors, tmp_path / "nowhere" / "x")
    with pytest.raises(IsADirectoryError):
        save_compressed(tensors, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_saving(tmp_path, number):
    """Whenever it is killed, the file is whole: that of one save or of another."""
    path = tmp_path / "model.safetensors"
    code = f"""
import signal, torch, bitmask
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
for number in range(10**6):
    bitmask.save_compressed({{"w.weight": torch.full((500, 1000), float(number + 1))}}, {str(path)!r})
    print(number, flush=True)
"""
    delays = random.Random(int(number))
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        time.sleep(delays.random() * 0.2)
        process.send_signal(number)
        process.wait(60)
        loaded = dict(load_compressed(path))["w.weight"]
        assert bool((loaded == loaded[0, 0]).all())
        assert float(loaded[0, 0]) >= 1
        if number == signal.SIGINT:
            assert not litter(tmp_path)


# ------------------------------------------------------------------------------------------ checkpoints


def checkpoint(directory):
    directory.mkdir()
    tensors = {
        "a.weight": SPARSE,
        "b.weight": random_numbers(40, 40, seed=3, dtype=torch.bfloat16),
        "b.bias": torch.randn(40),
        "steps": torch.tensor(3),
    }
    sharded(directory, tensors)
    (directory / "config.json").write_text('{"model_type": "x"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_text("other weights")
    return tensors


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bitmask", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_command_line(tmp_path):
    source, small, back = tmp_path / "source", tmp_path / "small", tmp_path / "back"
    tensors = checkpoint(source)
    assert run_command("compress", source, small).returncode == 0
    assert equal(dict(load_compressed(small)), tensors)
    assert sorted(os.listdir(small)) == sorted(set(os.listdir(source)) - {"pytorch_model.bin"})
    config = json.loads((small / "config.json").read_text())
    assert BitmaskConfig.from_model_config(config).format == "sparse-bitmask"
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert {"a.bitmask", "b.compressed", "b.bias"} <= index["weight_map"].keys()
    listing = run_command("inspect", small).stdout
    assert "'a.weight'" in listing
    assert "4 tensors" in listing
    assert run_command("verify", small, "--against", source).returncode == 0
    assert run_command("decompress", small, back).returncode == 0
    assert (back / "config.json").read_text() == json.dumps({"model_type": "x"}, indent=2) + "\n"
    for shard in sorted(source.glob("*.safetensors")):
        assert equal(load_file(back / shard.name), load_file(shard))


def test_command_line_errors(tmp_path):
    source = tmp_path / "source"
    checkpoint(source)
    for arguments, message in (
        (("compress", tmp_path / "nothing", tmp_path / "x"), "nothing"),
        (("compress", source, source), "there already"),
        (("verify", source / "tokenizer.json"), "tokenizer.json"),
        (("compress", source, tmp_path / "x", "--prune", "2"), "expected 0 to 1"),
    ):
        done = run_command(*arguments)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_verify_finds_the_difference(tmp_path):
    source, small = tmp_path / "source", tmp_path / "small"
    checkpoint(source)
    compress_checkpoint(source, small, prune=0.9)
    assert verify_checkpoint(small) == 4
    with pytest.raises(FormatError, match=r"a\.weight|b\.weight"):
        verify_checkpoint(small, source)
    assert {tensor.name for tensor in list_checkpoint(small)} == {"a.weight", "b.weight", "b.bias", "steps"}


def test_a_failed_conversion_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    checkpoint(source)
    (source / "config.json").write_text("[")
    (tmp_path / "empty").mkdir()
    for target in ("empty", "new"):
        with pytest.raises(FormatError, match="config"):
            decompress_checkpoint(source, tmp_path / target)
    assert not list((tmp_path / "empty").iterdir())
    assert not (tmp_path / "new").exists()


def test_what_is_not_converted(tmp_path):
    source, small = tmp_path / "source", tmp_path / "small"
    checkpoint(source)
    (source / ".git").mkdir()
    with pytest.raises(FileExistsError, match="inside"):
        compress_checkpoint(source, source / "deep" / "small")
    compress_checkpoint(source, small)
    assert not (small / ".git").exists()
    (source / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(FormatError, match="quantization"):
        compress_checkpoint(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_memory_is_that_of_a_shard(tmp_path):
    """The part that is mapped, what is made of it, and a little, of six; malloc returns blocks of more than 32 MiB."""
    tensors = {f"{layer}.weight": random_numbers(9216, 1024, seed=layer) for layer in range(6)}
    (tmp_path / "source").mkdir()
    sharded(tmp_path / "source", tensors, count=6)
    code = f"""
from benchmarks.memory import peak_growth
from bitmask.files import compress_checkpoint, decompress_checkpoint
for convert, source, target in ((compress_checkpoint, "source", "small"), (decompress_checkpoint, "small", "back")):
    print(peak_growth(lambda: convert({str(tmp_path)!r} + "/" + source, {str(tmp_path)!r} + "/" + target))[1])
"""
    peaks = [int(line) for line in run_python(code).stdout.split()]
    assert len(peaks) == 2
    assert max(peaks) < 3 * 9216 * 1024 * 4


def test_metadata_of_others_is_kept(tmp_path):
    source, small, back = (tmp_path / name for name in ("a", "b", "c"))
    save_file({"a.weight": SPARSE}, source, {"format": "pt", "author": "them", "bitmask_version": "other"})
    compress_checkpoint(source, small)
    decompress_checkpoint(small, back)
    for path in (small, back):
        with safe_open(path, "pt") as file:
            assert file.metadata()["author"] == "them"
            assert file.metadata()["bitmask_version"] == bitmask.__version__


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu], ids=str)
def test_dtypes_that_are_not_compressed(tmp_path, dtype):
    source, small = tmp_path / "a", tmp_path / "b"
    save_file({"a.weight": torch.zeros(8, 8, dtype=torch.uint8).view(dtype)}, source)
    compress_checkpoint(source, small)
    assert verify_checkpoint(small, source) == 1


@pytest.mark.parametrize("pruning", [{"prune": 0.5}, {"prune_24": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint16, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu], ids=str)
def test_dtypes_that_are_not_pruned(tmp_path, dtype, pruning):
    source, small = tmp_path / "a", tmp_path / "b"
    octets = torch.full((8, 8), 0x51, dtype=torch.uint8)
    save_file({"a.weight": octets.view(dtype), "b.weight": torch.ones(8, 64)}, source)
    assert compress_checkpoint(source, small, **pruning).keys() == {"a.weight"}
    found = dict(load_compressed(small))
    assert torch.equal(found["a.weight"].view(torch.uint8), octets)
    assert int(found["b.weight"].count_nonzero()) == 256


def test_single_file(tmp_path):
    source, small, back = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    tensors = {"a.weight": SPARSE, "b": torch.ones(2)}
    save_file(tensors, source)
    compress_checkpoint(source, small)
    decompress_checkpoint(small, back)
    assert small.stat().st_size < source.stat().st_size
    assert equal(load_file(back), tensors)


def test_aliases_survive(tmp_path):
    source, small = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_compressed({"a.weight": SPARSE, "b.weight": SPARSE}, source, "dense")
    compress_checkpoint(source, small)
    assert equal(dict(load_compressed(small)), {"a.weight": SPARSE, "b.weight": SPARSE})
    assert len(load_file(small)) == 4


def test_wrong_arguments(path, tensors):
    for arguments, options, error in (
        (([SPARSE],), {}, TypeError),
        ((None,), {}, TypeError),
        (({"a": [1.0]},), {}, TypeError),
        (({3: torch.ones(1)},), {}, TypeError),
        (({"a": torch.ones(1, device="meta")},), {}, ValueError),
        (({"a": SPARSE.to_sparse()},), {}, TypeError),
        (({"a": SPARSE.to(torch.complex128)},), {}, TypeError),
        ((tensors,), {"compression_format": "zip"}, FormatError),
        ((tensors,), {"key_style": "other"}, ValueError),
        ((tensors,), {"key_style": []}, ValueError),
        ((tensors,), {"min_sparsity": 2}, ValueError),
        ((tensors,), {"min_sparsity": "x"}, TypeError),
        ((tensors,), {"metadata": ["a"]}, TypeError),
        ((tensors,), {"metadata": {1: "a"}}, TypeError),
        ((tensors,), {"metadata": {"a": 1}}, TypeError),
        (({"a.weight": SPARSE, "a.compressed": torch.ones(2)},), {}, ValueError),
    ):
        with pytest.raises(error, match=r": got |: is an entry of two tensors"):
            save_compressed(arguments[0], path, **options)
        assert not path.exists()
    with pytest.raises(TypeError, match="Module"):
        bitmask.save_compressed_model(tensors, path)
    with pytest.raises(TypeError, match=r"prune: got '0\.5', expected a number from 0 to 1"):
        compress_checkpoint(path, path, prune="0.5")
