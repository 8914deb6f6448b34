"""The portable ops: when they are registered, what they compile to, and their results (triton_kernels.py)."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_dense, random_numbers, run_python

from bitmask import ops, portable

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402

from bitmask import triton_codec, triton_linear  # noqa: E402

TARGETS = [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]


@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="Triton 3.6 cannot interpret with NumPy 2.4")
def test_results_under_the_interpreter():
    """In a process of its own, as Triton either interprets kernels or compiles them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).with_name("triton_kernels.py")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_bitmask_imports_no_kernels():
    code = "import sys, bitmask; print([name for name in sys.modules if name.startswith('bitmask.triton')])"
    assert run_python(code).stdout.strip() == "[]"


def test_bitmask_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import bitmask; print(bitmask.portable.devices())"
    assert run_python(code).stdout.strip() == "frozenset()"


@pytest.fixture
def registered(monkeypatch):
    """What register() registers if torch knows CUDA and Intel GPUs, and the native library has kernels for CUDA."""
    calls = []

    class Library:
        def impl(self, op, function, key):
            calls.append((op, key))

    monkeypatch.setattr(portable, "_library", Library())
    monkeypatch.setattr(portable, "devices", lambda: frozenset({"cuda", "xpu"}))
    return calls


def test_native_kernels_come_first(monkeypatch, registered):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: key == "CUDA")
    portable.register()
    assert registered == [(op, "XPU") for op in portable.MODULES]


def test_every_op_of_bitmasks_has_a_portable_implementation(monkeypatch, registered):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    portable.register()
    names = {name.removeprefix("bitmask::") for name in torch._C._dispatch_get_all_op_names() if "bitmask::" in name}
    two_four = {name for name in names if "_24" in name}
    conversions = {"coo_to_crow", "from_bsr", "from_csr", "to_bsr", "to_coo", "to_csc", "to_csr", "transpose"}
    defined = {name for name in names - two_four - conversions if not name.startswith("bsr_")}  # those are native alone
    assert set(registered) == {(op, key) for op in defined for key in ("CUDA", "XPU")}
    for op, module in portable.MODULES.items():
        assert callable(getattr(sys.modules[module], op))


def test_a_gpu_that_torch_knows_has_every_op():
    for device in portable.devices():
        for op in portable.MODULES:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bitmask::{op}", device.upper())
    assert portable.devices() < ops.DEVICES


@pytest.fixture
def launched(monkeypatch):
    """Kernels, with their arguments and constants, that would have been launched: all tensors are zeroed instead."""
    launches = []

    def record(kernel, programs, *arguments, **constants):
        launches.append((kernel, arguments, constants))
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()

    monkeypatch.setattr(triton_codec, "launch", record)
    monkeypatch.setattr(triton_linear, "launch", record)
    return launches


POINTERS = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


def compile_for(target, kernel, arguments, constants):
    types = [POINTERS[argument.dtype] if isinstance(argument, torch.Tensor) else "i64" for argument in arguments]
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True})


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_kernels_compile_without_a_gpu(target, launched, monkeypatch, tmp_path):
    """Down to machine code: narrow and wide elements, tiles of long and of short rows, each way to multiply."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    elements = [(torch.int8, (3, 2000)), (torch.float32, (3, 5)), (torch.complex128, (3, 2000))]
    for dtype, shape in elements:
        triton_codec.decompress(*triton_codec.compress(random_dense(shape, dtype), False), shape)
    for dtype, m in itertools.product(triton_linear._OPERANDS, (1, 2, 64)):
        x, y, weight = torch.ones(m, 70).to(dtype), torch.ones(m, 9).to(dtype), random_numbers(9, 70, dtype=dtype)
        triton_linear._multiply(x, ops.compress(weight), y[0], y)
    assert len(launched) == 4 * len(elements) + 3 * len(triton_linear._OPERANDS)
    binary = "cubin" if target.backend == "cuda" else "hsaco"
    for kernel, arguments, constants in launched:
        assert compile_for(target, kernel, arguments, constants).asm[binary]
