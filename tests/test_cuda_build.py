"""The CUDA library: where it is built, and what it does where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_python
from torch._subclasses.fake_tensor import FakeTensorMode

import bitmask
from bitmask import BitmaskTensor, calls, native, ops

ROOT = Path(__file__).parents[1]
OPS = ["compress", "compress_into", "decompress", "linear", "linear_backward_input", "validate"]

needs_cuda_ops = pytest.mark.skipif(native.cuda_missing is not None, reason=str(native.cuda_missing))


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path):
    """A folder with all that setup.py looks for."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    (tmp_path / "include" / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13020\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    return tmp_path


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("BITMASK_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


# The toolkit.


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        (None, None),
        ("include/cuda_runtime.h", "no cuda_runtime.h"),
        ("lib/libcudart_static.a", "no libcudart_static.a"),
        ("bin/nvcc", "no nvcc"),
    ],
)
def test_toolkit_is_complete(setup_py, toolkit, missing, problem):
    if missing is None:
        assert setup_py.toolkit_problem(toolkit) is None
    else:
        (toolkit / missing).unlink()
        assert problem in setup_py.toolkit_problem(toolkit)


def test_nvcc_on_path_is_no_proof_of_a_toolkit(setup_py, tmp_path):
    """A wrapper in /usr/local/bin makes torch take /usr/local for a toolkit."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert "no cuda_runtime.h" in setup_py.toolkit_problem(tmp_path)
    assert setup_py.find_toolkit(str(tmp_path)) != tmp_path or not Path("/usr/local/cuda/bin/nvcc").exists()


def test_libraries_in_lib64(setup_py, toolkit):
    (toolkit / "lib").rename(toolkit / "lib64")
    assert setup_py.toolkit_problem(toolkit) is None


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_the_environment_says_where_the_toolkit_is(setup_py, toolkit, monkeypatch, name):
    monkeypatch.setenv(name, str(toolkit / "elsewhere"))
    assert setup_py.find_toolkit(str(toolkit)) == toolkit / "elsewhere"
    assert "no cuda_runtime.h" in setup_py.cuda_problem(toolkit / "elsewhere", "13.0")


def test_versions_of_toolkit_and_torch(setup_py, toolkit):
    assert setup_py.toolkit_version(toolkit) == "13.2"
    assert setup_py.cuda_problem(toolkit, "13.0") is None
    assert "built with CUDA 12.8" in setup_py.cuda_problem(toolkit, "12.8")
    assert "has no CUDA" in setup_py.cuda_problem(toolkit, None)
    assert "no CUDA toolkit was found" in setup_py.cuda_problem(None, "13.0")


# BITMASK_CUDA and TORCH_CUDA_ARCH_LIST.


def test_bitmask_cuda(setup_py, monkeypatch):
    assert setup_py.wants_cuda(None)
    assert not setup_py.wants_cuda("there is no nvcc")
    monkeypatch.setenv("BITMASK_CUDA", "0")
    assert not setup_py.wants_cuda(None)
    monkeypatch.setenv("BITMASK_CUDA", "1")
    assert setup_py.wants_cuda(None)
    with pytest.raises(SystemExit, match="BITMASK_CUDA=1, but there is no nvcc"):
        setup_py.wants_cuda("there is no nvcc")
    monkeypatch.setenv("BITMASK_CUDA", "yes")
    with pytest.raises(SystemExit, match="BITMASK_CUDA: got 'yes', expected 0, 1 or unset"):
        setup_py.wants_cuda(None)


def test_bitmask_cuda_1_fails_loudly(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "BITMASK_CUDA": "1", "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "BITMASK_CUDA=1, but " in done.stderr


def test_architectures(setup_py, monkeypatch):
    names, flags = setup_py.cuda_architectures()
    assert names == "sm_80;sm_86;sm_89;sm_90a;compute_90"
    assert flags[-2:] == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX")
    assert setup_py.cuda_architectures() == ("sm_80;sm_90a;compute_90a", [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0;Hopper")
    assert setup_py.cuda_architectures() == ("sm_100;Hopper", [])


def test_serialized_instructions_fail_the_resources(tmp_path):
    """Of wgmma, which ptxas mentions in passing."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'ptxas info : wgmma.mma_async instructions are serialized due to a branch' >&2\n")
    nvcc.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "tests/cuda/resources.py", "csrc/cuda/block_warpgroup.cu"],
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "block_warpgroup.cu: ptxas info : wgmma" in done.stderr


def test_sources_of_the_cuda_library(setup_py, toolkit, monkeypatch):
    monkeypatch.setattr(setup_py.cpp_extension, "CUDA_HOME", None)  # which the next call sets
    extension = setup_py.cuda_extension(toolkit)
    assert str(toolkit) == setup_py.cpp_extension.CUDA_HOME
    assert {"csrc/ops_cuda.cpp", "csrc/cuda/codec.cu"} <= set(extension.sources)
    assert not any("cpu" in source for source in extension.sources)
    assert "cudart_static" in extension.libraries
    assert "cudart" not in extension.libraries


# Loading.


def test_a_cpu_torch_leaves_the_cuda_library_alone(monkeypatch, tmp_path):
    """Though the installation has it: this one could not even be loaded."""
    broken = tmp_path / native.CUDA_LIBRARY.name
    broken.write_bytes(b"no library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in native._load_cuda(broken)


def test_a_build_without_cuda_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built without CUDA" in native._load_cuda(tmp_path / native.CUDA_LIBRARY.name)


def test_a_library_that_does_not_load_is_warned_about(monkeypatch, tmp_path):
    broken = tmp_path / native.CUDA_LIBRARY.name
    broken.write_bytes(b"no library")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(RuntimeWarning, match=f"without CUDA: {broken.name} cannot be loaded: .*build bitmask again"):
        problem = native._load_cuda(broken)
    assert "cannot be loaded" in problem


def test_ops_on_cuda_tensors_say_why_there_are_none(monkeypatch):
    monkeypatch.setattr(native, "cuda_missing", "bitmask was built without CUDA")
    message = "Could not run 'bitmask::compress' with arguments from the 'CUDA' backend."

    def refuse(*args):
        raise NotImplementedError(message)

    with pytest.raises(NotImplementedError, match="no kernels for CUDA here: bitmask was built without CUDA") as caught:
        calls.call(refuse)
    assert str(caught.value.__cause__) == message


def test_out_of_memory_comes_out_as_torch_has_it():
    def refuse(*args):
        raise RuntimeError(f"{bitmask._C.OUT_OF_MEMORY}bitmask: cannot allocate")

    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. bitmask: cannot allocate"):
        calls.call(refuse)


def test_build_info():
    info = bitmask.build_info()
    assert info["cuda_missing"] == native.cuda_missing
    assert ("cuda" in native.DEVICES) == (native.cuda_missing is None)
    assert (info["cuda_toolkit"] is None) == (native.cuda_missing is not None)
    assert (info["cuda_architectures"] is None) == (native.cuda_missing is not None)


# A CUDA build of torch, with or without a GPU.


@needs_cuda_ops
@pytest.mark.parametrize("op", OPS)
def test_ops_are_registered_for_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bitmask::{op}", "CUDA")


@needs_cuda_ops
def test_the_cuda_runtime_stays_inside():
    """torch's own may be of another version: neither may be taken for the other."""
    symbols = subprocess.run(["nm", "-D", native.CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert [name for name in names if name.startswith(("cuda", "__cuda", "cu"))] == []
    needed = subprocess.run(["readelf", "-d", native.CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "cudart" not in needed
    assert "torch_python" not in needed


@needs_cuda_ops
def test_fake_cuda_tensors_are_traced():
    with FakeTensorMode(allow_non_fake_inputs=False):
        values = torch.empty(7, device="cuda")
        bitmasks = torch.empty(5, 3, dtype=torch.uint8, device="cuda")
        row_offsets = torch.empty(5, dtype=torch.int64, device="cuda")
        weight = BitmaskTensor(values, bitmasks, row_offsets, [5, 20])
        x = torch.empty(2, 4, 20, device="cuda")
        results = [
            ops.linear(x, values, bitmasks, row_offsets, 20),
            torch.nn.functional.linear(x, weight),
            ops.decompress(values, bitmasks, row_offsets, [5, 20]),
            ops.compress_into(torch.empty(5, 20, device="cuda"), values, bitmasks, row_offsets),
        ]
    assert {result.device.type for result in results} == {"cuda"}
    assert [tuple(result.shape) for result in results] == [(2, 4, 5), (2, 4, 5), (5, 20), ()]


@needs_cuda_ops
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_torch_says_so():
    tensor = BitmaskTensor.from_dense(torch.eye(3))
    with pytest.raises(RuntimeError, match=r"NVIDIA|CUDA"):
        tensor.cuda()
    assert torch.equal(tensor.to_dense(), torch.eye(3))


def test_import_does_not_start_cuda():
    """Which would take hundreds of megabytes of a GPU, and forbid to fork."""
    assert run_python("import torch, bitmask; print(torch.cuda.is_initialized())").stdout.split() == ["False"]
