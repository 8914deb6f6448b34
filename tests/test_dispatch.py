"""The choice of instruction set: by the machine, by BITMASK_ISA, by set_isa."""

import platform
from pathlib import Path

import pytest
import torch
from conftest import ISAS, assert_parts_equal, random_dense, run_python

import bitmask

PRINT_ISA = "import bitmask; print(bitmask.get_isa())"
CPU_FLAGS = Path("/proc/cpuinfo")


@pytest.fixture(autouse=True)
def best_isa():
    yield
    bitmask.set_isa(None)


def test_available_isas_end_with_scalar():
    assert ISAS[-1] == "scalar"
    assert len(set(ISAS)) == len(ISAS)


@pytest.mark.skipif(not CPU_FLAGS.exists(), reason="needs /proc/cpuinfo")
def test_available_isas_are_those_of_the_cpu():
    """Best first, and none that the CPU lacks; the kernel lists what CPU and operating system support together."""
    flags = set(CPU_FLAGS.read_text().split())
    expected = []
    if platform.machine() in ("x86_64", "AMD64"):
        avx2 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt"} <= flags
        avx512 = avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512_vbmi2"} <= flags
        if avx512 and "avx512_bf16" in flags:
            expected.append("avx512_bf16")
        if avx512:
            expected.append("avx512")
        if avx2:
            expected.append("avx2")
    elif platform.machine() == "aarch64":
        expected.append("neon")
    assert [*expected, "scalar"] == ISAS


@pytest.mark.parametrize("name", ISAS)
def test_environment_forces_an_isa(name):
    assert run_python(PRINT_ISA, BITMASK_ISA=name).stdout.split() == [name]


def test_empty_environment_means_the_best():
    assert run_python(PRINT_ISA, BITMASK_ISA="").stdout.split() == [ISAS[0]]


@pytest.mark.parametrize("name", ["sse9", "AVX2", " scalar", "none"])
def test_unknown_name_in_the_environment_refuses_to_import(name):
    done = run_python(PRINT_ISA, check=False, BITMASK_ISA=name)
    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(("ImportError: ", "ValueError: "))
    assert f"BITMASK_ISA: got '{name}'" in last_line
    assert ", ".join(ISAS) in last_line


def test_the_forced_isa_can_be_changed_later():
    code = "import bitmask; bitmask.set_isa(None); print(bitmask.get_isa())"
    assert run_python(code, BITMASK_ISA="scalar").stdout.split() == [ISAS[0]]


@pytest.mark.parametrize("name", ISAS)
def test_set_isa(name):
    bitmask.set_isa(name)
    assert bitmask.get_isa() == name


@pytest.mark.parametrize("reset", [None, ""])
def test_set_isa_back_to_the_best(reset):
    bitmask.set_isa("scalar")
    bitmask.set_isa(reset)
    assert bitmask.get_isa() == ISAS[0]


@pytest.mark.parametrize("name", ["sse9", "SCALAR", "scalar "])
def test_set_isa_refuses_unknown_names_and_changes_nothing(name):
    bitmask.set_isa("scalar")
    with pytest.raises(ValueError, match=f"isa: got '{name}', expected .*: {', '.join(ISAS)}"):
        bitmask.set_isa(name)
    assert bitmask.get_isa() == "scalar"


@pytest.mark.parametrize("name", [3, ["scalar"], torch])
def test_set_isa_refuses_other_types(name):
    with pytest.raises(TypeError):
        bitmask.set_isa(name)


@pytest.mark.parametrize("width_dtype", [torch.bool, torch.float16, torch.float32, torch.float64, torch.complex128])
def test_every_isa_gives_the_same_bytes(width_dtype):
    dense = random_dense([50, 333], width_dtype)
    results = []
    for name in ISAS:
        bitmask.set_isa(name)
        parts = bitmask.compress(dense)
        results.append((*parts, bitmask.decompress(*parts, dense.shape)))
    for result in results[1:]:
        assert_parts_equal(result, results[0])


def test_import_needs_nothing_imported_before():
    """Torch's libraries are found although the caller never imported torch."""
    assert run_python("import bitmask; print('imported')").stdout.split() == ["imported"]


def test_build_info_names_compiler_and_torch():
    info = bitmask.build_info()
    assert {"compiler", "cxx_standard", "torch_target"} <= info.keys()
    assert info["cxx_standard"] >= 201703
    major, minor = map(int, info["torch_target"].split("."))
    assert (major, minor) <= tuple(int(number) for number in torch.__version__.split(".")[:2])
