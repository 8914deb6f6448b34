"""Compressed safetensors files of 2:4 weights: what is written, what is read, what is refused."""

import json
import os
import random

import pytest
import torch
from conftest import assert_bits_equal, random_dense, random_numbers, run_python
from safetensors.torch import load_file, save_file
from test_files import check_field_mutations, run_command, sharded

import bitmask
from bitmask import (
    BitmaskConfig,
    BitmaskTensor,
    FormatError,
    SemiStructuredTensor,
    load_compressed,
    load_rows,
    ops_two_four,
)
from bitmask.files import (
    compress_checkpoint,
    decompress_checkpoint,
    list_checkpoint,
    save_compressed,
    save_compressed_model,
    verify_checkpoint,
)
from bitmask.ops_two_four import TWO_FOUR_DTYPES

FORMAT = "sparse-24-bitmask"


def two_four(rows, cols, seed=0, dtype=torch.float32, stored=2):
    """A matrix of which every four neighbours in a row have `stored` non-zeros."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, cols // 4, 4, generator=generator).argsort(-1) < stored
    return torch.where(kept.view(rows, cols), torch.randn(rows, cols, generator=generator), 0.0).to(dtype)


WEIGHT = two_four(33, 68)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def dense_of(tensors):
    return {name: tensor.to_dense() if type(tensor) is not torch.Tensor else tensor for name, tensor in tensors.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert_bits_equal(tensor, right[name])


def read(path, name="w.weight", **options):
    return dict(load_compressed(path, **options))[name]


# ------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("style", ["module", "parameter"])
def test_round_trip(path, style):
    tensors = {"a.weight": WEIGHT, "b.weight": two_four(4, 16, seed=1, stored=1), "a.bias": torch.randn(33)}
    save_compressed(tensors, path, FORMAT, key_style=style)
    kept = dict(load_compressed(path, decompress=False))
    assert {name for name, tensor in kept.items() if isinstance(tensor, SemiStructuredTensor)} == {
        "a.weight",
        "b.weight",
    }
    assert_same(dense_of(kept), tensors)
    assert_same(dict(load_compressed(path, BitmaskConfig(FORMAT))), tensors)


@pytest.mark.parametrize("dtype", sorted(TWO_FOUR_DTYPES, key=str), ids=str)
def test_every_dtype_bit_for_bit(path, dtype):
    dense = random_dense((40, 48), dtype, density=1.0)
    drop = torch.rand(40, 12, 4).argsort(-1) >= 2
    dense.view(torch.uint8).view(40, 48, -1)[drop.view(40, 48)] = 0
    save_compressed({"w.weight": dense}, path, FORMAT, keep_negative_zero=True)
    stored = read(path, decompress=False)
    assert isinstance(stored, SemiStructuredTensor)
    assert_bits_equal(stored.to_dense(), dense)


def test_the_layout_is_that_of_the_latest_release(path):
    save_compressed({"layer.weight": WEIGHT, "layer.bias": torch.ones(3)}, path, FORMAT)
    values, bitmasks, _ = bitmask.compress(WEIGHT)
    expected = {
        "layer.compressed": values.view(33, 34),
        "layer.bitmask": bitmasks,
        "layer.shape": torch.tensor([[33], [68]]),
        "layer.bias": torch.ones(3),
    }
    assert_same(load_file(path), expected)


def mapping_of(tensor):
    """The file that a tensor's memory is mapped from, as Linux says; empty if none is."""
    address = tensor.data_ptr()
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, *_, name = line.split(maxsplit=5) if line.count(" ") > 5 else (*line.split(), "")
            start, stop = (int(end, 16) for end in span.split("-"))
            if start <= address < stop:
                return name.strip()
    return ""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the system does not list mappings")
def test_it_is_mapped(path):
    """Values and metadata are not copied out of the file."""
    save_compressed({"w.weight": WEIGHT}, path, FORMAT)
    weight = read(path, decompress=False)
    rows = load_rows(path, "w.weight", 3, 9, decompress=False)
    assert mapping_of(weight.values) == mapping_of(weight.metadata) == str(path)
    assert mapping_of(rows.values) == str(path)
    assert mapping_of(weight.to_dense()) != str(path)


def test_devices(path, device):
    """Where there are no kernels for 2:4, it is kept as the bitmask that it is as well."""
    save_compressed({"w.weight": WEIGHT.to(device)}, path, FORMAT)
    assert_bits_equal(read(path, device=device), WEIGHT.to(device))
    kept = read(path, device=device, decompress=False)
    assert type(kept) is (SemiStructuredTensor if device.type in ops_two_four.DEVICES else BitmaskTensor)
    assert_bits_equal(kept.to_dense(), WEIGHT.to(device))


def test_devices_without_kernels(path, monkeypatch):
    save_compressed({"w.weight": WEIGHT}, path, FORMAT)
    monkeypatch.setattr(ops_two_four, "DEVICES", frozenset())
    kept = read(path, decompress=False)
    assert type(kept) is BitmaskTensor
    assert_bits_equal(kept.to_dense(), WEIGHT)


STAY_DENSE = {
    "three of four": two_four(8, 16, stored=3),
    "columns no multiple of four": two_four(8, 16)[:, :14].contiguous(),
    "a vector": two_four(1, 16)[0],
    "three dimensions": two_four(8, 16).view(2, 4, 16),
    "no rows": torch.zeros(0, 8),
    "no columns": torch.zeros(8, 0),
    "a dtype without 2:4": torch.zeros(8, 8, dtype=torch.complex64),
}


@pytest.mark.parametrize("dense", STAY_DENSE.values(), ids=STAY_DENSE.keys())
@pytest.mark.parametrize("kind", ["dense", "BitmaskTensor"])
def test_what_stays_dense(path, dense, kind):
    given = dense if kind == "dense" else BitmaskTensor.from_dense(dense)
    save_compressed({"w.weight": given, "v.weight": WEIGHT}, path, FORMAT)
    assert "w.weight" in load_file(path)
    assert_bits_equal(read(path), dense)
    assert isinstance(read(path, "v.weight", decompress=False), SemiStructuredTensor)


def test_negative_zeros(path):
    """Dropped by default, as in a bitmask; those that a given tensor stores stay."""
    dense = torch.tensor([[-0.0, 1.0, 2.0, 0.0], [-0.0, 0.0, 3.0, 0.0]])
    save_compressed({"w.weight": dense}, path, FORMAT)
    assert_bits_equal(read(path), dense + 0)
    save_compressed({"w.weight": dense}, path, FORMAT, keep_negative_zero=True)
    assert "w.weight" in load_file(path)  # three elements of the first four are to be kept
    for given in (
        BitmaskTensor.from_dense(dense, keep_negative_zero=True),
        BitmaskTensor.from_dense(dense[1:], keep_negative_zero=True),
        SemiStructuredTensor.from_dense(dense[1:], keep_negative_zero=True),
    ):
        save_compressed({"w.weight": given}, path, FORMAT)
        assert_bits_equal(read(path), given.to_dense())
    assert read(path)[0, 0].signbit()


def test_a_given_2_4_tensor_is_written_as_it_is(path):
    """With the zeros that it stores, wherever they are, and whatever `min_sparsity` says."""
    metadata = torch.tensor([[0b0101_1010]], dtype=torch.uint8)
    given = SemiStructuredTensor.from_parts(torch.tensor([[1.0, 0.0, -0.0, 2.0]]), metadata)
    save_compressed({"w.weight": given}, path, FORMAT, min_sparsity=0.9)
    kept = read(path, decompress=False)
    assert_bits_equal(kept.values, given.values)
    assert_bits_equal(kept.metadata, metadata)


def test_a_given_2_4_tensor_of_any_name(path):
    save_compressed({"w": SemiStructuredTensor.from_dense(WEIGHT)}, path, FORMAT)
    assert set(load_file(path)) == {"w.compressed", "w.bitmask", "w.shape"}
    assert_bits_equal(read(path, "w"), WEIGHT)


def test_compressed_tensors_in_the_files_of_other_formats(path):
    semi, bits = SemiStructuredTensor.from_dense(WEIGHT), BitmaskTensor.from_dense(WEIGHT)
    for compression_format, kind in (
        ("sparse-bitmask", BitmaskTensor),
        (FORMAT, SemiStructuredTensor),
        ("dense", torch.Tensor),
    ):
        save_compressed({"a.weight": semi, "b.weight": bits}, path, compression_format)
        loaded = dict(load_compressed(path, decompress=False))
        assert {type(tensor) for tensor in loaded.values()} == {kind}
        assert_same(dense_of(loaded), {"a.weight": WEIGHT, "b.weight": WEIGHT})


def test_given_tensors_without_2_4_components(path):
    """Components are those of a matrix: other 2:4 tensors are stored dense, as none in files has other dimensions."""
    for dense in (two_four(1, 16)[0], two_four(8, 16).view(2, 4, 16), torch.zeros(4, 0)):
        save_compressed({"w.weight": SemiStructuredTensor.from_dense(dense)}, path, FORMAT)
        assert_same(load_file(path), {"w.weight": dense})


def test_names_of_one_tensor_are_stored_once(path):
    semi = SemiStructuredTensor.from_dense(WEIGHT)
    for tensor in (WEIGHT, semi):
        save_compressed({"a.weight": tensor, "b.weight": tensor}, path, FORMAT)
        assert len(load_file(path)) == 3
        loaded = dict(load_compressed(path, decompress=False))
        assert loaded["a.weight"] is loaded["b.weight"]
        assert_bits_equal(loaded["a.weight"].to_dense(), WEIGHT)


def test_model(path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    with torch.no_grad():
        bitmask.prune_24_(model[0].weight)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_compressed_model(model, path, FORMAT)
    assert {"0.compressed", "2.weight"} <= load_file(path).keys()
    assert_same(dict(load_compressed(path)), expected)
    fresh = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    fresh.load_state_dict(dict(load_compressed(path)))
    assert_same(dict(fresh.state_dict()), expected)


def test_min_sparsity_counts_zeros(path):
    """Stored ones too: a matrix with one non-zero in four is 75% zeros."""
    tensors = {"half.weight": WEIGHT, "quarter.weight": two_four(8, 16, stored=1)}
    save_compressed(tensors, path, FORMAT, min_sparsity=0.75)
    assert {"half.weight", "quarter.compressed"} <= load_file(path).keys()


def test_saving_over_what_is_mapped(path):
    save_compressed({"a.weight": WEIGHT, "b": torch.ones(3)}, path, FORMAT)
    loaded = dict(load_compressed(path, decompress=False))
    save_compressed(loaded, path, FORMAT)
    assert_same(dict(load_compressed(path)), {"a.weight": WEIGHT, "b": torch.ones(3)})


# ------------------------------------------------------------------------------------------ rows


def test_rows(path):
    save_compressed({"w.weight": WEIGHT}, path, FORMAT)
    for start, stop in ((0, 0), (0, 1), (1, 3), (0, 33), (33, 33)):
        rows = load_rows(path, "w.weight", start, stop, decompress=False)
        assert isinstance(rows, SemiStructuredTensor)
        assert_bits_equal(rows.to_dense(), WEIGHT[start:stop])
        assert_bits_equal(load_rows(path, "w.weight", start, stop), WEIGHT[start:stop])
    with pytest.raises(IndexError, match="0 to 33"):
        load_rows(path, "w.weight", 0, 34)


def test_rows_are_proven(path):
    faulty = entries(WEIGHT)
    faulty["w.weight.bitmask"][10, 0] ^= 1
    save_file(faulty, path)
    assert_bits_equal(load_rows(path, "w.weight", 11, 20), WEIGHT[11:20])
    with pytest.raises(FormatError, match="row"):
        load_rows(path, "w.weight", 10, 20)


def test_only_those_rows_are_read(path):
    save_compressed({"w.weight": two_four(8192, 4096)}, path, FORMAT)
    code = f"""
import bitmask
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
bitmask.SemiStructuredTensor.from_dense(bitmask.torch.zeros(4, 4))
before = resident()
rows = bitmask.load_rows({str(path)!r}, 'w.weight', 4000, 4002)
assert rows.shape == (2, 4096)
print(resident() - before)
"""
    assert path.stat().st_size > 64 << 20
    assert int(run_python(code).stdout) < 24 << 20


# ------------------------------------------------------------------------------------------ hostile files


def entries(dense, prefix="w.weight", **changes):
    """The components of a 2:4 matrix; a change to None leaves one out."""
    semi = SemiStructuredTensor.from_dense(dense)
    shape = torch.tensor(dense.shape)[:, None]
    parts = {"compressed": semi.values, "bitmask": semi.metadata, "shape": shape} | changes
    return {f"{prefix}.{component}": part for component, part in parts.items() if part is not None}


def bits_of(change):
    """The bitmask of WEIGHT, changed."""
    bits = SemiStructuredTensor.from_dense(WEIGHT).metadata
    change(bits)
    return bits


def of_shape(*sizes):
    return torch.tensor(sizes)[:, None]


HOSTILE = {
    "values missing": {"compressed": None},
    "bitmask missing": {"bitmask": None},
    "shape missing": {"shape": None},
    "row offsets beside": {"row_offsets": torch.arange(33) * 34},
    "row offsets of any dtype": {"row_offsets": torch.zeros(33)},
    "values flat": {"compressed": torch.zeros(33 * 34)},
    "values of three dimensions": {"compressed": torch.zeros(33, 17, 2)},
    "values transposed": {"compressed": torch.zeros(34, 33)},
    "too few values in a row": {"compressed": torch.zeros(33, 33)},
    "too few rows of values": {"compressed": torch.zeros(32, 34)},
    "as many values as elements": {"compressed": torch.zeros(33, 68)},
    "no values": {"compressed": torch.zeros(0, 34)},
    "values without columns": {"compressed": torch.zeros(33, 0)},
    "values of a dtype without 2:4": {"compressed": torch.zeros(33, 34, dtype=torch.complex64)},
    "values of a dtype that is two elements": {
        "compressed": torch.zeros(33, 34, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    },
    "bitmask of another dtype": {"bitmask": torch.zeros(33, 9, dtype=torch.int8)},
    "bitmask too narrow": {"bitmask": torch.zeros(33, 8, dtype=torch.uint8)},
    "bitmask too wide": {"bitmask": torch.zeros(33, 10, dtype=torch.uint8)},
    "bitmask too short": {"bitmask": torch.zeros(32, 9, dtype=torch.uint8)},
    "bitmask flat": {"bitmask": torch.zeros(33 * 9, dtype=torch.uint8)},
    "all bits set": {"bitmask": torch.full((33, 9), 255, dtype=torch.uint8)},
    "no bits set": {"bitmask": torch.zeros(33, 9, dtype=torch.uint8)},
    "a bit missing": {"bitmask": bits_of(lambda bits: bits[20, 3].bitwise_and_(bits[20, 3] - 1))},
    "two bits missing": {"bitmask": bits_of(lambda bits: bits[20, 3].bitwise_and_(0xF0))},
    "three bits set": {"bitmask": bits_of(lambda bits: bits[32, 7].bitwise_or_(0x70))},
    "two bits moved into the next four": {"bitmask": bits_of(lambda bits: bits[5, 0].fill_(0xF0))},
    "two bits moved into the next row": {
        "bitmask": bits_of(lambda bits: (bits[5, 8].fill_(0), bits[6, 0].fill_(0x3F), None)[-1])
    },
    "padding bits": {"bitmask": bits_of(lambda bits: bits[32, 8].bitwise_or_(0x30))},
    "padding bits instead": {"bitmask": bits_of(lambda bits: bits[32, 8].bitwise_left_shift_(4))},
    "shape of another dtype": {"shape": of_shape(33, 68).int()},
    "shape of a matrix with other columns": {"shape": of_shape(33, 72)},
    "shape of a matrix with other rows": {"shape": of_shape(34, 68)},
    "shape transposed": {"shape": of_shape(68, 33)},
    "shape of one dimension": {"shape": of_shape(33 * 68)},
    "shape of three dimensions": {"shape": of_shape(3, 11, 68)},
    "shape of no dimensions": {"shape": torch.zeros(0, 1, dtype=torch.int64)},
    "shape of odd columns": {"shape": of_shape(33, 67)},
    "shape without fours": {"shape": of_shape(33, 66), "compressed": torch.zeros(33, 33)},
    "shape negative": {"shape": of_shape(-33, -68)},
    "shape overflows": {"shape": of_shape(2**62, 68)},
    "shape terabytes": {"shape": of_shape(2**40, 4)},
    "shape a row of terabytes": {"shape": of_shape(33, 2**40)},
    "shape terabytes without columns": {
        "shape": of_shape(2**62, 0),
        "compressed": torch.zeros(2**62, 0),
        "bitmask": torch.zeros(2**62, 0, dtype=torch.uint8),
    },
    "shape in rows": {"shape": torch.tensor([[33, 68]])},
    "shape with more": {"shape": torch.tensor([[33, 68], [1, 1]])},
    "shape of many dimensions": {"shape": torch.ones(65, 1, dtype=torch.int64)},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_components(path, changes):
    save_file({**entries(WEIGHT, **changes), "other": torch.ones(2)}, path)
    with pytest.raises(FormatError, match=rf"{path}: .*w\.weight\."):
        dict(load_compressed(path))
    with pytest.raises(FormatError, match=r"w\.weight"):
        load_rows(path, "w.weight", 0, 33)
    with pytest.raises(FormatError, match=r"w\.weight"):
        verify_checkpoint(path)


def test_the_faulty_group_is_named(path):
    save_file(entries(WEIGHT, bitmask=HOSTILE["three bits set"]["bitmask"]), path)
    with pytest.raises(FormatError, match=rf"{path}: w\.weight\.bitmask: row 32\D.*60"):
        read(path)


def test_columns_without_fours(path):
    """Which compressed-tensors writes so that fours reach into the next row: read as the bitmask that they are."""
    dense = two_four(1, 180).view(6, 30)
    values, bitmasks, _ = bitmask.compress(dense)
    parts = {"w.compressed": values.view(6, 15), "w.bitmask": bitmasks, "w.shape": of_shape(6, 30)}
    save_file(parts, path)
    assert isinstance(read(path, decompress=False), BitmaskTensor)
    assert_bits_equal(read(path), dense)
    assert_bits_equal(load_rows(path, "w.weight", 2, 5), dense[2:5])
    save_file(parts | {"w.compressed": torch.zeros(6, 14)}, path)
    with pytest.raises(FormatError, match="columns / 2"):
        read(path)


def test_byte_mutations(path):
    """One bit of a valid file changed: an error, or what was stored but for that element, never anything else."""
    dense = two_four(9, 20)
    save_compressed({"w.weight": dense, "b": torch.ones(3)}, path, FORMAT)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
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
        names = expected if position >= header else loaded  # which a changed header may have renamed
        differing = sum(
            int((loaded[name] != tensor).sum()) for name, tensor in zip(names, loaded.values(), strict=True)
        )
        assert differing <= 1
    assert refused > 1000


def test_field_mutations(path):
    """One field changed: an error, or the identical result, but for a value's own bits or its dtype."""
    dense = two_four(7, 32)
    whole = {key.rpartition(".")[2]: part for key, part in entries(dense).items()}
    check_field_mutations(whole, dense, path)


# ------------------------------------------------------------------------------------------ checkpoints


def checkpoint(directory, **tensors):
    directory.mkdir()
    tensors = {
        "a.weight": WEIGHT,
        "b.weight": two_four(40, 40, seed=3, dtype=torch.bfloat16),
        "b.bias": torch.randn(40),
        "full.weight": torch.randn(8, 12),
        **tensors,
    }
    sharded(directory, tensors)
    (directory / "config.json").write_text('{"model_type": "x"}')
    return tensors


def formats_in(source):
    return {tensor.name: tensor.format for tensor in list_checkpoint(source)}


def config_of(directory):
    return BitmaskConfig.from_model_config(json.loads((directory / "config.json").read_text()))


def test_components_spread_over_shards(tmp_path):
    sharded(tmp_path, entries(WEIGHT, "w") | {"b": torch.ones(4)})
    assert len({path.name for path in tmp_path.glob("*.safetensors")}) == 3
    assert isinstance(read(tmp_path, decompress=False), SemiStructuredTensor)
    assert_same(dict(load_compressed(tmp_path)), {"w.weight": WEIGHT, "b": torch.ones(4)})
    assert_bits_equal(load_rows(tmp_path, "w.weight", 3, 9), WEIGHT[3:9])
    compress_checkpoint(tmp_path, tmp_path.with_name("again"), FORMAT)
    assert_same(dict(load_compressed(tmp_path.with_name("again"))), {"w.weight": WEIGHT, "b": torch.ones(4)})


def test_command_line(tmp_path):
    source, small, back = tmp_path / "source", tmp_path / "small", tmp_path / "back"
    tensors = checkpoint(source)
    done = run_command("compress", source, small, "--format", FORMAT)
    assert done.returncode == 0
    assert done.stdout.startswith("'full.weight' stays dense: row 0, columns 0 to 3: got 4 non-zeros")
    assert len(done.stdout.splitlines()) == 1
    assert_same(dict(load_compressed(small)), tensors)
    config = config_of(small)
    assert (config.format, config.sparsity_structure) == (FORMAT, "2:4")
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    assert config.global_sparsity == pytest.approx(zeros / sum(tensor.numel() for tensor in tensors.values()))
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert {"a.bitmask", "b.compressed", "b.bias", "full.weight"} <= index["weight_map"].keys()
    assert not any(key.endswith("row_offsets") for key in index["weight_map"])
    listing = run_command("inspect", small).stdout
    assert [FORMAT in line for line in listing.splitlines()].count(True) == 2
    assert run_command("verify", small, "--against", source).returncode == 0
    assert run_command("decompress", small, back).returncode == 0
    for shard in sorted(source.glob("*.safetensors")):
        assert_same(load_file(back / shard.name), load_file(shard))


def test_command_line_errors(tmp_path):
    source = tmp_path / "source"
    checkpoint(source)
    for arguments, message, code in (
        (("compress", source, tmp_path / "x", "--format", "2:4"), "sparse-24-bitmask", 2),
        (("compress", source, source, "--format", FORMAT), "there already", 1),
    ):
        done = run_command(*arguments)
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    save_file(entries(WEIGHT, bitmask=HOSTILE["padding bits"]["bitmask"]), tmp_path / "faulty")
    for command in (("verify",), ("decompress", tmp_path / "x"), ("compress", tmp_path / "x")):
        done = run_command(command[0], tmp_path / "faulty", *command[1:])
        assert done.returncode == 1
        assert "w.weight" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_from_format_to_format(tmp_path):
    """Either is a source for the other; unstructured weights are dense in the one and bitmasks in the other."""
    tensors = checkpoint(tmp_path / "source", **{"loose.weight": random_numbers(32, 64, density=0.2)})
    compress_checkpoint(tmp_path / "source", tmp_path / "bits")
    kept_dense = compress_checkpoint(tmp_path / "bits", tmp_path / "fours", FORMAT)
    assert kept_dense.keys() == {"full.weight", "loose.weight"}
    assert "row" in kept_dense["loose.weight"]
    assert formats_in(tmp_path / "fours")["loose.weight"] == "dense"
    kept_dense = compress_checkpoint(tmp_path / "fours", tmp_path / "again", "sparse-bitmask")
    assert kept_dense.keys() == {"full.weight"}
    assert formats_in(tmp_path / "again") == formats_in(tmp_path / "bits")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "bits")
    for directory in ("bits", "fours", "again"):
        assert verify_checkpoint(tmp_path / directory, tmp_path / "source") == len(tensors)


def test_prune_24(tmp_path):
    weight, conv, odd = torch.randn(16, 24), torch.randn(4, 3, 8), torch.randn(5, 6)
    tensors = {"a.weight": weight, "conv.weight": conv, "odd.weight": odd, "a.bias": torch.randn(16), "table": weight}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "source")
    kept_dense = compress_checkpoint(tmp_path / "source", tmp_path / "small", FORMAT, prune_24=True)
    assert kept_dense.keys() == {"conv.weight", "odd.weight", "table"}
    expected = tensors | {"a.weight": bitmask.prune_24_(weight.clone())}
    assert_same(dict(load_compressed(tmp_path / "small")), expected)
    assert_same(load_file(tmp_path / "source"), tensors)
    largest = weight.abs().view(-1, 4).topk(2).values.sort().values
    assert torch.equal(expected["a.weight"].abs().view(-1, 4).sort().values[:, 2:], largest)
    compress_checkpoint(tmp_path / "source", tmp_path / "bits", prune_24=True)
    assert formats_in(tmp_path / "bits")["a.weight"] == "sparse-bitmask"
    assert_same(dict(load_compressed(tmp_path / "bits")), expected)
    done = run_command("compress", tmp_path / "source", tmp_path / "again", "--format", FORMAT, "--prune-24")
    assert done.returncode == 0
    assert_same(dict(load_compressed(tmp_path / "again")), expected)


def test_help_says_what_is_pruned():
    text = " ".join(run_command("compress", "--help").stdout.split())
    assert "in floating-point matrices named *weight whose columns are a multiple of four" in text


def test_prune_both_ways(tmp_path):
    """First the fraction, of the whole weight, then the rest to 2:4."""
    weight = torch.randn(32, 32)
    save_file({"a.weight": weight}, tmp_path / "source")
    compress_checkpoint(tmp_path / "source", tmp_path / "small", FORMAT, prune=0.6, prune_24=True)
    expected = bitmask.prune_24_(bitmask.prune.prune_by_magnitude(weight, 0.6))
    assert_same(dict(load_compressed(tmp_path / "small")), {"a.weight": expected})
    assert formats_in(tmp_path / "small") == {"a.weight": FORMAT}


def test_aliases_survive(tmp_path):
    save_compressed({"a.weight": WEIGHT, "b.weight": WEIGHT}, tmp_path / "a", "dense")
    compress_checkpoint(tmp_path / "a", tmp_path / "b", FORMAT)
    decompress_checkpoint(tmp_path / "b", tmp_path / "c")
    for name, count in (("b", 3), ("c", 1)):
        assert len(load_file(tmp_path / name)) == count
        assert_same(dict(load_compressed(tmp_path / name)), {"a.weight": WEIGHT, "b.weight": WEIGHT})


def test_formats_of_a_conversion(tmp_path):
    save_file({"a.weight": WEIGHT}, tmp_path / "a")
    compress_checkpoint(tmp_path / "a", tmp_path / "b", config=BitmaskConfig(FORMAT))
    assert formats_in(tmp_path / "b") == {"a.weight": FORMAT}
    for arguments in (
        {"compression_format": "dense"},
        {"config": BitmaskConfig("dense")},
        {"compression_format": "zip"},
        {"compression_format": "sparse-bitmask", "config": BitmaskConfig(FORMAT)},
    ):
        with pytest.raises(ValueError, match="format"):
            compress_checkpoint(tmp_path / "a", tmp_path / "c", **arguments)
    assert not os.path.exists(tmp_path / "c")


def test_structure_of_a_config():
    assert BitmaskConfig(FORMAT).sparsity_structure == "2:4"
    assert BitmaskConfig().sparsity_structure == "unstructured"
    assert BitmaskConfig("sparse-bitmask", sparsity_structure="2:4").sparsity_structure == "2:4"
    told = BitmaskConfig(FORMAT, 0.5, targets=["Linear"])
    assert BitmaskConfig.from_model_config(told.to_model_config()) == told
    assert BitmaskConfig.from_dict({"format": "sparse_24_bitmask", "global_sparsity": 50}) == BitmaskConfig(FORMAT, 0.5)
