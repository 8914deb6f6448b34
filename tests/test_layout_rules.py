"""The rules that keep the rooms of the project apart, checked by reading the sources."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
KERNEL_FILES = sorted(path for wing in ("cpu", "cuda") for path in (CSRC / wing).rglob("*") if path.is_file())
VOCABULARY_FILES = sorted([*(CSRC / "cpu").glob("simd_*.h"), *(CSRC / "cpu" / "generic").glob("*.h")])
ISA_FILES = sorted((CSRC / "cpu").glob("isa_*.cpp"))
TORCH_FREE_FILES = [
    *KERNEL_FILES,
    *(CSRC / name for name in ("layout.h", "two_four_patterns.h", "checks.h", "block_index.h", "module.cpp")),
]
# Constants that kernels of every device share.
SHARED_FILES = [CSRC / "layout.h", CSRC / "two_four_patterns.h"]
PYTHON_FILES = sorted((ROOT / "bitmask").rglob("*.py"))

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def includes(path: Path) -> list[str]:
    """Included names, <system> ones in their brackets."""
    found = INCLUDE.findall(path.read_text())
    return [f"<{name}>" if bracket == "<" else name for bracket, name in found]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_rules_find_the_files_they_are_about():
    """A moved folder must not leave the tests below with nothing to check."""
    assert {"isa_scalar.cpp", "isa_avx2.cpp", "isa_avx512.cpp", "isa_neon.cpp"} <= {path.name for path in ISA_FILES}
    assert {"simd_scalar.h", "simd_neon.h", "codec.h"} <= {path.name for path in VOCABULARY_FILES}
    modules = {"calls", "ops", "ops_block", "ops_two_four", "reference", "bitmask_tensor", "linear", "models"}
    assert modules <= {path.stem for path in PYTHON_FILES}


# C++ and CUDA.


@pytest.mark.parametrize("path", TORCH_FREE_FILES, ids=name_of)
def test_no_torch_header(path):
    torch_headers = [name for name in includes(path) if re.match(r"<?(torch|ATen|c10|caffe2)\b", name)]
    assert torch_headers == []


@pytest.mark.parametrize("path", KERNEL_FILES, ids=name_of)
def test_wings_do_not_see_each_other_nor_the_python_module(path):
    own, other = ("cpu", "cuda") if path.is_relative_to(CSRC / "cpu") else ("cuda", "cpu")
    inside = [(path.parent / name).resolve() for name in includes(path) if not name.startswith("<")]
    allowed = [CSRC / own, *SHARED_FILES]
    strangers = [name_of(file) for file in inside if not any(file.is_relative_to(place) for place in allowed)]
    assert strangers == [], f"{other} and everything above must stay out of {own}"
    assert not any("pybind11" in name or "Python.h" in name for name in includes(path))


@pytest.mark.parametrize("path", VOCABULARY_FILES, ids=name_of)
def test_vocabulary_and_algorithms_include_nothing(path):
    """They stand inside a namespace and a target region, where a header would be compiled for the wrong CPU."""
    assert includes(path) == []
    assert "std::" not in path.read_text()


@pytest.mark.parametrize("path", ISA_FILES, ids=name_of)
def test_isa_files_include_intrinsics_and_kernels_only(path):
    own = re.compile(r"kernels\.h|tables\.h|simd_\w+\.h|generic/\w+\.h")
    system = {"<immintrin.h>", "<arm_neon.h>"}
    assert [name for name in includes(path) if name not in system and not own.fullmatch(name)] == []


@pytest.mark.parametrize("path", ISA_FILES, ids=name_of)
def test_system_headers_come_before_the_target_region(path):
    text = path.read_text()
    region = re.search(r"#pragma (GCC target|clang attribute push)", text)
    if region is None:
        assert path.stem in ("isa_scalar", "isa_neon"), "needs no options beyond those of the architecture"
    else:
        assert not re.search(r"#\s*include\s*<", text[region.start() :])


@pytest.mark.parametrize("path", [*SHARED_FILES, CSRC / "cpu" / "kernels.h"], ids=name_of)
def test_shared_headers_stay_plain(path):
    assert set(includes(path)) <= {"<cstddef>", "<cstdint>", *(f"../{shared.name}" for shared in SHARED_FILES)}


def test_inline_ptx_lives_in_files_of_its_own():
    comment = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    own = {"ptx.cuh", "ptx_warpgroup.cuh"}
    files = [file for file in KERNEL_FILES if file.is_relative_to(CSRC / "cuda") and file.name not in own]
    assert [name_of(f) for f in files if re.search(r"\b(asm|__asm__)\b", comment.sub("", f.read_text()))] == []


# Python.

# What a module may import from the package; those not named here may import any module, as long as no cycle results.
ALLOWED = {
    "reference": set(),
    "native": {"_C"},
    "portable": set(),
    "calls": {"_C", "native"},
    "ops": {"calls", "native", "portable", "reference"},
    "ops_block": {"calls", "native"},
    "ops_block_two_four": {"calls", "ops_block", "ops_two_four"},
    "ops_convert": {"calls", "ops", "reference"},
    "ops_two_four": {"calls", "native", "ops", "reference"},
    "cutlass_layout": {"calls", "ops_two_four"},
}


def package_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            found.add(f"relative import in line {node.lineno}")
        elif isinstance(node, ast.ImportFrom) and node.module == "bitmask":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitmask."):
            found.add(node.module.removeprefix("bitmask."))
        elif isinstance(node, ast.Import):
            found.update(
                alias.name.removeprefix("bitmask.") for alias in node.names if alias.name.startswith("bitmask.")
            )
    return found


def outside_imports(path: Path) -> set[str]:
    """Top-level names of the other packages that a file imports when it is imported, the standard library left out."""
    nodes = ast.parse(path.read_text()).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"bitmask"}


def module_of(path: Path) -> str:
    """The name below the package; that of a folder is its __init__.py."""
    parts = path.relative_to(ROOT / "bitmask").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PYTHON_FILES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_modules_below_them(module):
    imported = package_imports(MODULES[module])
    assert imported <= {*MODULES, "_C"}, "from bitmask import <a public name> would close a circle"
    assert imported <= ALLOWED.get(module, imported)


def test_few_modules_import_the_native_module():
    importers = {module for module, path in MODULES.items() if "_C" in package_imports(path)}
    assert importers == {"__init__", "calls", "native"}


def test_reference_needs_torch_alone():
    assert outside_imports(MODULES["reference"]) == {"torch"}


def test_imports_have_no_cycle():
    below = {module: package_imports(path) - {"_C"} for module, path in MODULES.items()}
    while ready := [module for module, rest in below.items() if not rest & below.keys()]:
        for module in ready:
            del below[module]
    assert below == {}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_native_ops_are_called_in_one_place(module):
    """Everything else goes through the functions of ops.py and its sisters, which name the errors."""
    families = {"ops", "ops_block", "ops_block_two_four", "ops_convert", "ops_two_four"}
    assert module in families or "torch.ops.bitmask" not in MODULES[module].read_text()
