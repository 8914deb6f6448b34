"""demo.py and smoke_test.py as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import smoke_test
from benchmarks.plot import have_matplotlib

ROOT = Path(__file__).parent.parent

REPORT = r"""Generating a tensor of size=\[4096, 4096\] and precision=torch.float16 with sparsity=0.5

dense_tensor: 32.0000 MB

bitmask_tensor: 18.0\d\d\d MB
  values: (15.9|16.0)\d\d\d MB
  bitmasks: 2.0000 MB
  row_offsets: 0.0312 MB
"""


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_random_tensor():
    done = run("demo.py")
    assert done.returncode == 0
    assert re.fullmatch(REPORT, done.stdout)


def test_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "dense": torch.ones(64, 256),
        "half": torch.eye(256).half(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "negative_zero": torch.tensor([[-0.0] * 64 + [float("nan")]]),
        "fp8": torch.eye(64).to(torch.float8_e4m3fn),
        "mask": torch.eye(8, dtype=torch.bool),
        "bytes": torch.arange(256, dtype=torch.uint8).reshape(16, 16),
    }
    save_file(tensors, path)
    done = run("demo.py", path)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert set(tensors) <= set(rows)
    assert "FAILED" not in done.stdout
    assert "dense: would take" in rows["dense"]
    assert "dense: would take" not in rows["half"]
    assert "8 tensors" in done.stdout.splitlines()[-1]


def test_checkpoint_pruned(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(128, 512), "bias": torch.randn(128)}, path)
    done = run("demo.py", path, "--prune", "0.75")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert rows["weight"][3] == "0.7500"
    assert rows["bias"][3] == "0.0000"


@pytest.mark.parametrize(
    ("content", "arguments"),
    [(None, []), (b"not a checkpoint", []), (b"", ["--prune", "2"])],
    ids=["absent", "junk", "2"],
)
def test_bad_command_lines_say_why(tmp_path, content, arguments):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    done = run("demo.py", path, *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "model.safetensors" in done.stderr or "--prune" in done.stderr


def test_prune_needs_a_checkpoint():
    done = run("demo.py", "--prune", "0.5")
    assert done.returncode == 2
    assert "--prune needs a checkpoint" in done.stderr


def test_smoke_test():
    done = run("smoke_test.py")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Values tensor([1., 2., 5., 3., 4., 5.])") == 2
    assert done.stdout.count("Bitmask Unpacked tensor([1, 0, 1, 1, 1, 0, 1, 0, 1], dtype=torch.uint8)") == 2
    assert done.stdout.count("Bitmask Packed Binary ['01011101', '00000001']") == 2
    assert "scalar: ok" in done.stdout


def test_smoke_test_of_a_device():
    """The CPU stands in for a GPU."""
    assert not smoke_test.failures_on(torch.device("cpu"))


def test_smoke_test_of_a_device_with_portable_kernels(monkeypatch):
    """Triton has no kernels for blocks and 2:4."""
    monkeypatch.setattr(smoke_test.native, "DEVICES", frozenset())
    for module in (smoke_test.ops_block, smoke_test.ops_two_four, smoke_test.ops_block_two_four):
        monkeypatch.setattr(smoke_test, module.__name__.rsplit(".", 1)[-1], None)
    assert not smoke_test.failures_on(torch.device("cpu"))


FORMATS = ["dense", "COO", "CSR", "CSC", "BSR", "2:4", "bitmask"]


def test_formats_of_a_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(64, 128), "other": torch.ones(3)}, path)
    done = run("demo.py", path, "--formats", "--tensor", "weight", "--prune", "0.75")
    assert done.returncode == 0, done.stderr
    comparison, crossovers = done.stdout.split("From which share of zeros on, ")
    assert comparison.startswith("64x128 float32, 75.0% zeros, times on ")
    assert [line.split()[0] for line in comparison.splitlines()[3:10]] == FORMATS
    assert "Smallest: bitmask" in comparison
    assert "Fastest at m = 128: " in comparison
    assert crossovers.startswith("64x128 float32\n")
    assert [line.split()[0] for line in crossovers.splitlines()[3:9]] == FORMATS[1:]
    assert "faster, m = 1 " in crossovers


def test_formats_without_products(tmp_path):
    """Bytes alone."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.eye(64, dtype=torch.int8)}, path)
    done = run("demo.py", path, "--formats", "--tensor", "weight")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("64x64 int8, 98.4% zeros\n")
    assert "m = 1" not in done.stdout


def test_formats_name_the_tensors_there_are(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, path)
    refused = "--tensor: got c, expected one of a, b"
    for arguments, status, message in ([], 2, "needs --tensor, one of a, b"), (["--tensor", "c"], 1, refused):
        done = run("demo.py", path, "--formats", *arguments)
        assert done.returncode == status
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor", "a"], "--tensor and --plot need --formats"),
        (["--plot", "a.png"], "--tensor and --plot need --formats"),
        (["--formats", "--tensor", "a"], "--tensor needs a checkpoint"),
        (["--formats", "--prune", "0.5"], "--prune needs a checkpoint"),
    ],
)
def test_options_of_formats(arguments, message):
    done = run("demo.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(not have_matplotlib(), reason="needs matplotlib")
def test_formats_are_plotted(tmp_path):
    path, plot = tmp_path / "model.safetensors", tmp_path / "formats.png"
    save_file({"weight": torch.randn(64, 64).bfloat16()}, path)
    done = run("demo.py", path, "--formats", "--tensor", "weight", "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert plot.stat().st_size > 1000
