"""Dense weights at the pace of memory, and that pace: saturated.cpp, compiled when it is first asked for."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.machine import thread_count
from benchmarks.memory import huge_page_clone
from benchmarks.timer import Budget, Contender, interleave, torch_threads

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-w")
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name in ("bf16", "fp16", "fp32")}


class NoCompilerError(RuntimeError):
    """The yardstick cannot be built here; the message says why."""


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NoCompilerError("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        compiled, linked = Path(folder, "saturated.o"), Path(folder, "saturated.so")
        _call(compiler, *_FLAGS, "-fopenmp", "-c", str(_SOURCE), "-o", str(compiled))
        # Linked without OpenMP, it uses torch's: the threads of a second team would compete for the cores.
        _call(compiler, "-shared", str(compiled), "-o", str(linked))
        try:
            library = ctypes.CDLL(str(linked))
        except OSError as error:
            raise NoCompilerError(f"torch brings no OpenMP of this compiler ({error})") from error
    pointer, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name in _NAMES.values():
        function = getattr(library, f"linear_{name}")
        function.argtypes, function.restype = (pointer, pointer, pointer, size, size, count), None
    library.read_all.argtypes, library.read_all.restype = (pointer, size, count), ctypes.c_uint64
    return library


def _call(*command: str) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise NoCompilerError(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise NoCompilerError(f"{command[0]}: {error.stderr.strip().splitlines()[0]}") from error


def saturated_status() -> str:
    """The compiler's flags, or why there is no such yardstick here."""
    try:
        _library()
    except NoCompilerError as error:
        return f"skipped: {error}"
    return " ".join(_FLAGS[1:3])


def saturated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)` for one contiguous row x [1, k] on torch's number of threads."""
    y = x.new_empty(1, weight.shape[0])
    function = getattr(_library(), f"linear_{_NAMES[x.dtype]}")
    function(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *weight.shape, torch.get_num_threads())
    return y


def read_bandwidth(threads: int, nbytes: int, rounds: int = 9) -> float:
    """GB/s of the best of `rounds` readings of a buffer of `nbytes` in huge pages."""
    source = huge_page_clone(torch.ones(nbytes // 8, dtype=torch.int64))
    library = _library()
    with torch_threads(threads):
        budget = Budget(min_rounds=rounds, max_rounds=rounds, slow_rounds=0, seconds=0.0)
        read = Contender(lambda _: library.read_all(source.data_ptr(), source.numel(), threads))
        (summary,) = interleave([read], 1, budget)
    return source.nbytes / summary.min_ms / 1e6


def read_bandwidths(threads: Sequence[int], nbytes: int, say: Callable[[str], None]) -> dict[int, float | None]:
    """GB/s for each number of threads, None where it cannot be measured; `say` tells of them."""
    found: dict[int, float | None] = dict.fromkeys(threads)
    if saturated_status().startswith("skipped"):
        return found
    for count in found:
        found[count] = read_bandwidth(count, nbytes)
        say(f"{'Read bandwidth':<16}{found[count]:.1f} GB/s on {thread_count(count)}")
    return found
