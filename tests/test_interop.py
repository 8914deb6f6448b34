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

from bitmask import load_compressed, save_compressed
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


@needs_releases
def test_read_two_four(paths):
    dense, path = paths
    run_release(
        LATE,
        f"""
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import Sparse24BitMaskConfig
from safetensors.torch import save_file
compressor = BaseCompressor.load_from_registry("sparse-24-bitmask", config=Sparse24BitMaskConfig())
torch.manual_seed(0)
weight = torch.randn(8, 32)
save_file(compressor.compress({{"w.weight": weight}}), {str(path)!r})
torch.save(dict(compressor.decompress({str(path)!r})), {str(dense)!r})
""",
    )
    assert_loads(path, torch.load(dense))


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


def test_component_names():
    """What all releases call the components."""
    assert COMPONENTS == ("compressed", "bitmask", "shape", "row_offsets")
