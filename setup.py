"""Builds the native core. What is compiled is found by listing csrc/, so adding a kernel is adding its file.

BITMASK_CUDA=1 insists on the CUDA library (and fails if it cannot be built), 0 leaves it out; unset, it is built where
both a usable toolkit and a CUDA build of torch are present. TORCH_CUDA_ARCH_LIST names the GPUs it is built for.
"""

import os
import platform
import re
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
# LibTorch stable ABI of 2.10: one build serves every later torch.
TORCH_TARGET = (2, 10)
TORCH_TARGET_VERSION = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
# Unused parameters: torch's own headers have them.
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
DEFINES = [
    ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
    ("BITMASK_TORCH_TARGET", f'"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"'),
]
# Kernels find <ptx.cuh> by the include path, so that tests can put another file in its place.
CUDA_INCLUDE = "csrc/cuda"
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fvisibility=hidden"]
# What is compiled for which GPUs, in nvcc's terms: A100, A10 and RTX 30, L4 and RTX 40, H100 and H200; later ones
# translate the PTX when they first load it. (sm_90a has instructions that PTX for later GPUs must do without.)
CUDA_ARCHITECTURES = {
    "sm_80": "compute_80",
    "sm_86": "compute_86",
    "sm_89": "compute_89",
    "sm_90a": "compute_90a",
    "compute_90": "compute_90",
}


def sources(*patterns: str) -> list[str]:
    """Paths below csrc/, relative to the project as setuptools wants them, in a stable order."""
    found = [path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def headers() -> list[str]:
    """Every header: a change in one rebuilds all, which takes seconds."""
    return sources("**/*.h", "**/*.cuh")


def sanitizer_flags() -> list[str]:
    """BITMASK_SANITIZE=address,undefined instruments the extension (tests/native/run.sh uses it)."""
    kinds = os.environ.get("BITMASK_SANITIZE")
    if not kinds:
        return []
    # Optimised fully, instrumented kernels take minutes to compile.
    return [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


def find_toolkit(torch_home: str | None) -> Path | None:
    """Where the CUDA toolkit is: the environment's word is final, then what torch found, then the usual place.

    torch takes the folder above any nvcc on PATH, which need not be a toolkit.
    """
    told = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if told:
        return Path(told)
    places = [Path(home) for home in (torch_home, "/usr/local/cuda") if home]
    return next((home for home in places if toolkit_problem(home) is None), places[0] if torch_home else None)


def toolkit_problem(home: Path | None) -> str | None:
    """Why this is not a toolkit that CUDA can be built with, or None: compiler, headers and runtime must be there."""
    if home is None:
        return "no CUDA toolkit was found (CUDA_HOME is not set)"
    if not (home / "include" / "cuda_runtime.h").exists():
        return f"there is no cuda_runtime.h under {home / 'include'}"
    if not any((home / name / "libcudart_static.a").exists() for name in ("lib64", "lib")):
        return f"there is no libcudart_static.a under {home}"
    if not (home / "bin" / "nvcc").exists():
        return f"there is no nvcc under {home}"
    return None


def toolkit_version(home: Path) -> str:
    """Of the headers, as "13.0"."""
    number = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", (home / "include" / "cuda_runtime_api.h").read_text())
    return f"{int(number[1]) // 1000}.{int(number[1]) % 1000 // 10}" if number else "of unknown version"


def cuda_problem(home: Path | None, torch_cuda: str | None) -> str | None:
    """Why the CUDA library cannot be built, with this toolkit and for a torch of this version of CUDA, or None."""
    if torch_cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    problem = toolkit_problem(home)
    if problem is None and home is not None and toolkit_version(home).split(".")[0] != torch_cuda.split(".")[0]:
        return f"torch was built with CUDA {torch_cuda}, the toolkit in {home} is {toolkit_version(home)}"
    return problem


def wants_cuda(problem: str | None) -> bool:
    """Whether BITMASK_CUDA and what stands in the way say to build the CUDA library."""
    wanted = os.environ.get("BITMASK_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"BITMASK_CUDA: got {wanted!r}, expected 0, 1 or unset")
    if wanted == "1" and problem:
        raise SystemExit(f"BITMASK_CUDA=1, but {problem}")
    if wanted == "" and problem and torch.version.cuda is not None:
        print(f"bitmask: built without CUDA: {problem}", file=sys.stderr)
    return wanted != "0" and problem is None


def architecture_names(listed: str) -> str:
    """An entry of TORCH_CUDA_ARCH_LIST as nvcc names it, so that the library knows what it has; else as it stands."""
    number = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", listed)
    if number is None:
        return listed
    name = number[1] + number[2]
    return f"sm_{name};compute_{name}" if number[3] else f"sm_{name}"


def cuda_architectures() -> tuple[str, list[str]]:
    """What the CUDA library is built for, and nvcc's flags for it: none where torch reads TORCH_CUDA_ARCH_LIST."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if listed:
        return ";".join(map(architecture_names, listed)), []
    flags = [f"-gencode=arch={arch},code={code}" for code, arch in CUDA_ARCHITECTURES.items()]
    return ";".join(CUDA_ARCHITECTURES), flags


def cpu_extension() -> Extension:
    flags = sanitizer_flags()
    return cpp_extension.CppExtension(
        "bitmask._C",
        [path for path in sources("*.cpp", "cpu/*.cpp") if not path.endswith("_cuda.cpp")],
        include_dirs=[pybind11.get_include()],
        depends=headers(),
        define_macros=DEFINES,
        extra_compile_args={"cxx": CXX_FLAGS + flags},
        extra_link_args=flags,
    )


def cuda_extension(home: Path) -> Extension:
    """The second library, holding only CUDA implementations; not a Python module."""
    cpp_extension.CUDA_HOME = str(home)
    architectures, flags = cuda_architectures()
    extension: Extension = cpp_extension.CUDAExtension(
        "bitmask._C_cuda",
        sources("*_cuda.cpp", "cuda/*.cu", "cuda/*.cpp"),
        include_dirs=[str(ROOT / CUDA_INCLUDE)],
        depends=headers(),
        define_macros=[*DEFINES, ("USE_CUDA", None), ("BITMASK_CUDA_ARCHITECTURES", f'"{architectures}"')],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS + flags},
        # The CUDA runtime stays inside, where torch's own, which may be of another version, is not taken for it.
        extra_link_args=["-Wl,--exclude-libs,ALL"],
    )
    extension.libraries = ["torch", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    return extension


def extensions() -> list[Extension]:
    home = find_toolkit(cpp_extension.CUDA_HOME)
    cuda = wants_cuda(cuda_problem(home, torch.version.cuda))
    return [cpu_extension(), *([cuda_extension(home)] if cuda and home is not None else [])]


if __name__ == "__main__":
    if platform.system() == "Windows":
        raise SystemExit("bitmask builds with g++ or clang++ on Linux; on Windows use WSL")
    setup(ext_modules=extensions(), cmdclass={"build_ext": cpp_extension.BuildExtension})
