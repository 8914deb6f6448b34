"""Builds the native core. What is compiled is found by listing csrc/, so adding a kernel is adding its file.

BITMASK_CUDA=1 insists on the CUDA library (and fails if it cannot be built), 0 leaves it out; unset, it is built where
both a usable toolkit and a CUDA build of torch are present.
"""

import os
import platform
from pathlib import Path

import pybind11
import torch
from setuptools import setup
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
    return [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"] if kinds else []


def cuda_toolkit_problem() -> str | None:
    """Why a CUDA library cannot be built here, or None.

    An nvcc on PATH is no proof of a toolkit: headers, libcudart and compiler must be there together.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    home = cpp_extension.CUDA_HOME
    if home is None:
        return "no CUDA toolkit found (CUDA_HOME is not set)"
    include, libraries = Path(home, "include"), [Path(home, name) for name in ("lib64", "lib")]
    if not (include / "cuda_runtime.h").exists():
        return f"no cuda_runtime.h under {include}"
    if not any((library / "libcudart_static.a").exists() for library in libraries):
        return f"no libcudart_static.a under {home}"
    if not Path(home, "bin", "nvcc").exists():
        return f"no nvcc under {home}"
    return None


def cpu_extension() -> cpp_extension.CppExtension:
    flags = sanitizer_flags()
    return cpp_extension.CppExtension(
        "bitmask._C",
        sources("module.cpp", "ops.cpp", "ops_linear.cpp", "parallel.cpp", "cpu/*.cpp"),
        include_dirs=[pybind11.get_include()],
        depends=headers(),
        define_macros=DEFINES,
        extra_compile_args={"cxx": CXX_FLAGS + flags},
        extra_link_args=flags,
    )


def cuda_extensions() -> list[cpp_extension.CUDAExtension]:
    """The second library, holding only CUDA implementations; empty where it is not wanted or cannot be built."""
    wanted = os.environ.get("BITMASK_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"BITMASK_CUDA: got {wanted!r}, expected 0, 1 or unset")
    cuda_sources = sources("ops_cuda.cpp", "cuda/*.cu")
    problem = cuda_toolkit_problem() if cuda_sources else "this version of bitmask has no CUDA sources"
    if wanted == "1" and problem:
        raise SystemExit(f"BITMASK_CUDA=1, but {problem}")
    if wanted == "0" or problem:
        return []
    return [
        cpp_extension.CUDAExtension(
            "bitmask._C_cuda",
            cuda_sources,
            depends=headers(),
            define_macros=[*DEFINES, ("USE_CUDA", None)],
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++17"]},
            libraries=["cudart_static"],
        )
    ]


if platform.system() == "Windows":
    raise SystemExit("bitmask builds with g++ or clang++ on Linux; on Windows use WSL")

setup(ext_modules=[cpu_extension(), *cuda_extensions()], cmdclass={"build_ext": cpp_extension.BuildExtension})
