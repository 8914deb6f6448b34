"""Files exchanged with releases of compressed-tensors, both ways, bit for bit.

Each release is a folder below BITMASK_RELEASES named by its version, made by
`pip install --no-deps --target DIR/VERSION compressed-tensors==VERSION`; their common needs (pydantic, loguru,
transformers) are those of this environment.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import assert_bits_equal, random_numbers, run_python
from safetensors.torch import load_file

from bitmask import SemiStructuredTensor, load_compressed, save_compressed
from bitmask.files import compress_checkpoint
from bitmask.files.config import BITMASK_24_FORMAT as FORMAT_24
from bitmask.files.contents import COMPONENTS

RELEASES = Path(os.environ.get("BITMASK_RELEASES", "nowhere"))
EARLY = ["0.3.3", "0.6.0", "0.8.1"]  # P is the whole name of a tensor
LATE = "0.14.0.1"  # P is the name less `.weight`

needs_releases = pytest.mark.skipif(not RELEASES.is_dir(), reason="BITMASK_RELEASES names no folder")

TENSORS = {
    "layers.0.q_proj.weight": random_numbers(40, 70),
    "layers.0.mlp.weight": random_numbers(16, 64, seed=1, dtype=torch.bfloat16),
    "layers.0.half.weight": random_numbers(9, 13, seed=2, dtype=torch.float16),
    "empty.weight": torch.zeros(8, 24),
    "full.weight": torch.ones(8, 24),
}
VECTORS = {
    "layers.0.q_proj.bias": random_numbers(40, seed=3),
    "norm.weight": torch.ones(70),
    "off.weight": torch.zeros(70),
}


def run_release(version, code):
    """Run code that sees one release as `compressed_tensors`."""
    folder = RELEASES / version
    assert folder.is_dir(), f"{folder} is missing"
    run_python(f"import sys; sys.path.insert(0, {str(folder)!r})\nimport torch\n{code}")


@pytest.fixture
def paths(tmp_path):
    """A file of dense tensors for the release to start from, and one for what it makes of it."""
    dense = tmp_path / "dense.pt"
    torch.save(TENSORS | VECTORS, dense)
    return dense, tmp_path / "model.safetensors"


def assert_loads(path, expected):
    loaded = dict(load_compressed(path))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bits_equal(loaded[name], tensor)


@needs_releases
@pytest.mark.parametrize("version", EARLY)
def test_read_early_releases(paths, version):
    """Which compress every tensor, vectors too."""
    dense, path = paths
    run_release(
        version,
        f"from compressed_tensors import save_compressed\n"
        f"save_compressed(torch.load({str(dense)!r}), {str(path)!r}, compression_format='sparse-bitmask')",
    )
    assert_loads(path, TENSORS | VECTORS)


@needs_releases
def test_read_late_release(paths):
    dense, path = paths
    run_release(
        LATE,
        f"""
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import BitmaskConfig
from safetensors.torch import save_file
compressor = BaseCompressor.load_from_registry("sparse-bitmask", config=BitmaskConfig())
state = torch.load({str(dense)!r})
save_file(compressor.compress(state, {{name.removesuffix(".weight") for name in {list(TENSORS)!r}}}), {str(path)!r})
""",
    )
    assert_loads(path, TENSORS | VECTORS)


def assert_same_file(path, expected):
    loaded = torch.load(path)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bits_equal(loaded[name], tensor)


@needs_releases
@pytest.mark.parametrize("version", EARLY)
def test_written_for_early_releases(paths, version):
    """The early ones know nothing of dense tensors in a compressed file, so these are given compressed ones only."""
    back, path = paths
    compressed = {name: TENSORS[name] for name in ("layers.0.q_proj.weight", "layers.0.mlp.weight", "empty.weight")}
    save_compressed(compressed, path, key_style="parameter")
    run_release(
        version,
        f"""
from compressed_tensors import BitmaskConfig, load_compressed
loaded = dict(load_compressed({str(path)!r}, compression_config=BitmaskConfig()))
torch.save(loaded, {str(back)!r})
""",
    )
    assert_same_file(back, compressed)


@needs_releases
def test_written_for_late_release(paths):
    back, path = paths
    save_compressed(TENSORS | VECTORS, path)
    run_release(
        LATE,
        f"""
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import BitmaskConfig
compressor = BaseCompressor.load_from_registry("sparse-bitmask", config=BitmaskConfig())
torch.save(dict(compressor.decompress({str(path)!r})), {str(back)!r})
""",
    )
    assert_same_file(back, TENSORS | VECTORS)


# ------------------------------------------------------------------------------------------ 2:4


def two_of_four(rows, cols, seed=0, dtype=torch.float32):
    """A matrix of which every four neighbours in a row have two non-zeros, which are all that can be stored."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, cols // 4, 4, generator=generator).argsort(-1) < 2
    return torch.where(kept.view(rows, cols), torch.randn(rows, cols, generator=generator), 0.0).to(dtype)


def few_of_four():
    """Each mask of one or no non-zero, in a row of its own; the release stores other zeros where it is column 1."""
    masks = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return (masks * torch.tensor([3.0])).repeat(1, 5)


TWO_FOUR = {
    "layers.0.q_proj.weight": two_of_four(40, 72),
    "layers.0.mlp.weight": two_of_four(16, 64, seed=1, dtype=torch.bfloat16),
    "layers.0.half.weight": two_of_four(9, 12, seed=2, dtype=torch.float16),
    "layers.0.double.weight": two_of_four(1, 4, seed=3, dtype=torch.float64),
    "layers.0.byte.weight": two_of_four(8, 24, seed=4, dtype=torch.float8_e4m3fn),
    "layers.0.integer.weight": two_of_four(8, 24, seed=5).sign().to(torch.int8),
    "empty.weight": torch.zeros(8, 24),
}
BESIDE = {"layers.0.q_proj.bias": torch.ones(40), "norm": torch.ones(72)}
PRELUDE_24 = """
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import Sparse24BitMaskConfig
from safetensors.torch import load_file, save_file
compressor = BaseCompressor.load_from_registry("sparse-24-bitmask", config=Sparse24BitMaskConfig())
"""


def compress_with_release(dense, path):
    """The file that the release writes for what lies in `dense`, and what it makes of that again."""
    run_release(
        LATE,
        f"""{PRELUDE_24}
save_file(compressor.compress(torch.load({str(dense)!r})), {str(path)!r})
torch.save(dict(compressor.decompress({str(path)!r})), {str(dense)!r})
""",
    )


@needs_releases
def test_read_two_four(paths):
    dense, path = paths
    torch.save(TWO_FOUR | BESIDE, dense)
    compress_with_release(dense, path)
    assert_same_file(dense, TWO_FOUR | BESIDE)
    assert_loads(path, TWO_FOUR | BESIDE)
    entries = load_file(path)
    for name, tensor in load_compressed(path, decompress=False):
        prefix = name.removesuffix(".weight")
        if name in TWO_FOUR:
            assert isinstance(tensor, SemiStructuredTensor)
            assert_bits_equal(tensor.values, entries[f"{prefix}.compressed"])
            assert_bits_equal(tensor.metadata, entries[f"{prefix}.bitmask"])


@needs_releases
@pytest.mark.parametrize("cols", [32, 30])
def test_read_two_four_that_was_pruned(paths, cols):
    """The release makes anything 2:4, across rows too where the columns are no multiple of four."""
    dense, path = paths
    torch.manual_seed(0)
    torch.save({"w.weight": torch.randn(8, cols), "few.weight": few_of_four()}, dense)
    compress_with_release(dense, path)
    assert_loads(path, torch.load(dense))


@needs_releases
def test_written_two_four(paths):
    back, path = paths
    tensors = TWO_FOUR | BESIDE | {"few.weight": few_of_four(), "full.weight": torch.ones(8, 24)}
    save_compressed(tensors, path, FORMAT_24)
    run_release(LATE, f"{PRELUDE_24}torch.save(dict(compressor.decompress({str(path)!r})), {str(back)!r})")
    assert_same_file(back, tensors)


@needs_releases
def test_two_four_is_written_alike(paths, tmp_path):
    """Name by name and bit for bit, but for the zeros stored beside a non-zero in column 1."""
    dense, path = paths
    few = few_of_four()[[0, 1, 3, 4]]
    torch.save(TWO_FOUR | BESIDE | {"few.weight": few}, dense)
    compress_with_release(dense, path)
    save_compressed(TWO_FOUR | BESIDE | {"few.weight": few}, tmp_path / "ours", FORMAT_24)
    theirs, ours = load_file(path), load_file(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for key, entry in theirs.items():
        assert_bits_equal(ours[key], entry)


@needs_releases
@pytest.mark.parametrize("compression_format", ["sparse-bitmask", FORMAT_24])
def test_written_checkpoint(tmp_path, compression_format):
    """A directory of shards, loaded by what config.json says, as the release loads it into a model."""
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 100}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    compress_checkpoint(tmp_path / "dense", tmp_path / "small", compression_format, prune_24=True)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    run_release(
        LATE,
        f"""
import transformers
from compressed_tensors.compressors import ModelCompressor
model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained({str(tmp_path / "dense")!r}))
compressor = ModelCompressor.from_pretrained({str(tmp_path / "small")!r})
assert compressor.sparsity_config.format == {compression_format!r}
compressor.decompress({str(tmp_path / "small")!r}, model)
torch.save(model.state_dict(), {str(tmp_path / "back")!r})
""",
    )
    assert_same_file(tmp_path / "back", dict(load_compressed(tmp_path / "small")))


def test_component_names():
    """What all releases call the components."""
    assert COMPONENTS == ("compressed", "bitmask", "shape", "row_offsets")
