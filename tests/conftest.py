"""Fixtures and builders shared by the tests; tensors are made from bytes, so that any bit pattern can occur."""

import io
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitmask
from benchmarks.gpu.device import reason_against
from bitmask.compressed_tensor import CompressedTensor
from bitmask.ops import DTYPES

ALL_DTYPES = sorted(DTYPES, key=str)
ISAS = bitmask.available_isas()

# One dtype for each element width, for tests in which only the width matters.
WIDTH_DTYPES = [torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]

# Mantissa bits of the dtypes built as IEEE 754 says: sign, exponent (all ones: infinity or NaN), mantissa.
MANTISSA_BITS = {torch.float8_e5m2: 2, torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
COMPLEX_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes gigabytes of memory and many seconds; deselect with -m 'not slow'")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set of this machine."""
    before = bitmask.get_isa()
    bitmask.set_isa(request.param)
    yield request.param
    bitmask.set_isa(before)


@pytest.fixture(params=ALL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Runs the test once with each dtype that has a codec."""
    return request.param


NO_GPU = reason_against()
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=f"no GPU to test on: {NO_GPU}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Runs the test once on the CPU, where its logic is proven, and once on a GPU, where there is one."""
    return torch.device(request.param)


@pytest.fixture
def flush_denormals() -> Iterator[None]:
    """The CPU's mode in which floating-point instructions take subnormals for zeros."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


allows_decompression = pytest.mark.filterwarnings("ignore::bitmask.DecompressWarning")


@pytest.fixture
def decompression_is_an_error(request: pytest.FixtureRequest) -> Iterator[None]:
    """For modules to use, where a DecompressWarning that a test neither allows nor waits for is a failure."""
    with warnings.catch_warnings():
        if not any("DecompressWarning" in mark.args[0] for mark in request.node.iter_markers("filterwarnings")):
            warnings.simplefilter("error", bitmask.DecompressWarning)
        yield


@pytest.fixture
def seed() -> None:
    """Makes random numbers of torch the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def element_size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def tensor_of_words(words: Sequence[int], dtype: torch.dtype, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor whose elements have the given bit patterns."""
    size = element_size(dtype)
    octets = b"".join(word.to_bytes(size, "little") for word in words)
    flat = torch.tensor(list(octets), dtype=torch.uint8).view(dtype)
    return flat if shape is None else flat.reshape(list(shape))


def random_dense(shape: Sequence[int], dtype: torch.dtype, density: float = 0.4, seed: int = 0) -> Tensor:
    """Random bits (all NaNs and subnormals included), with all but about `density` of the elements zero."""
    generator = torch.Generator().manual_seed(seed)
    count, size = math.prod(shape), element_size(dtype)
    octets = torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        octets &= 1
    octets[torch.rand(count, generator=generator) >= density] = 0
    return octets.reshape(-1).view(dtype).reshape(list(shape))


def random_numbers(*shape: int, density: float = 0.4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ordinary sparse numbers, for tests that calculate."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=generator) < density, numbers, 0.0).to(dtype)


def two_four_numbers(*shape: int, density: float = 0.4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ordinary numbers that are 2:4, many groups of which have fewer than two."""
    return bitmask.prune_24_(random_numbers(*shape, density=density, seed=seed, dtype=dtype))


def special_words(dtype: torch.dtype) -> list[int]:
    """Bit patterns at the edges of a dtype: zeros of both signs, subnormals, infinities, NaNs of all kinds."""
    if dtype == torch.bool:
        return [0, 1]
    bits = 8 * element_size(dtype)
    if dtype in COMPLEX_PARTS:
        parts = special_words(COMPLEX_PARTS[dtype])
        return [real | imag << (bits // 2) for real in parts for imag in parts]
    sign = 1 << (bits - 1)
    if dtype not in MANTISSA_BITS:
        return [0, 1, sign - 1, sign, sign | 1, 2 * sign - 1]
    mantissa = MANTISSA_BITS[dtype]
    infinity = sign - (1 << mantissa)
    quiet, payload = infinity | 1 << (mantissa - 1), 1
    unsigned = [0, 1, (1 << mantissa) - 1, infinity, infinity | payload, quiet, quiet | payload, 1 << mantissa]
    return [word | s for s in (0, sign) for word in unsigned]


def octets_of(tensor: Tensor) -> Tensor:
    """The bytes of the elements in row-major order."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def assert_bits_equal(got: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bits: -0.0 differs from 0.0, and a NaN equals only itself."""
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(octets_of(got), octets_of(expected))


def assert_parts_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """`assert_bits_equal` for values, bitmasks and row_offsets."""
    for got_part, expected_part in zip(got, expected, strict=True):
        assert_bits_equal(got_part, expected_part)


def parts_of(tensor: CompressedTensor) -> list[Tensor]:
    """What a compressed tensor is stored as."""
    return [getattr(tensor, name) for name in tensor.part_names]


def assert_is_compressed(tensor: Tensor, dense: Tensor) -> None:
    """A compressed tensor that stands for `dense`, with parts that hold."""
    assert isinstance(tensor, CompressedTensor)
    assert (tensor.shape, tensor.dtype, tensor.device) == (dense.shape, dense.dtype, dense.device)
    if isinstance(tensor, bitmask.BitmaskTensor):
        bitmask.BitmaskTensor.from_parts(*parts_of(tensor), tensor.shape)
    else:
        bitmask.SemiStructuredTensor.from_parts(*parts_of(tensor))
    assert torch.equal(tensor.to_dense(), dense)


def assert_is_linear(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """`y` is x @ dense.T + bias within the rounding that the op may do.

    Products of 16-bit numbers are exact in the float32 of the sums, so each of the `columns` additions and a
    conversion or two are the only roundings there, each relative to a partial sum, which the sum of magnitudes bounds;
    the result is rounded once to its dtype. For float64 the yardstick has the same error, hence the factor of two.
    """
    assert (y.shape, y.dtype, y.device) == ((*x.shape[:-1], dense.shape[0]), x.dtype, x.device)
    wide = [None if t is None else t.detach().double() for t in (x, dense, bias)]
    exact = F.linear(*wide)
    magnitude = F.linear(*(None if t is None else t.abs() for t in wide))
    unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    info = torch.finfo(x.dtype)
    bound = 2 * (x.shape[-1] + 3) * unit * magnitude + 0.51 * info.eps * exact.abs() + info.tiny * info.eps
    error = (y.detach().double() - exact).abs()
    assert bool((error <= bound).all()), f"off by {float((error / bound).max()):.1f} times the bound"


def parts_are_valid(values, bitmasks, row_offsets, shape):
    """The rules of the layout, spelled out anew in plain Python."""
    rows, cols = math.prod(shape[:-1]), shape[-1]
    row_bytes = -(-cols // 8)
    if values.ndim != 1 or list(bitmasks.shape) != [rows, row_bytes] or list(row_offsets.shape) != [rows]:
        return False
    offsets = [*row_offsets.tolist(), values.numel()]
    words = [int.from_bytes(bytes(row), "little") for row in bitmasks.tolist()]
    counts_fit = all(offsets[row + 1] - offsets[row] == word.bit_count() for row, word in enumerate(words))
    return offsets[0] == 0 and counts_fit and all(word < 1 << cols for word in words)


def mutate(values, bitmasks, row_offsets, shape, randint):
    """One small random change, to a copy; some changes leave the parts valid."""
    values, bitmasks, row_offsets, shape = values.clone(), bitmasks.clone(), row_offsets.clone(), list(shape)
    kind = randint(7)
    if kind == 0:
        bitmasks.view(-1)[randint(bitmasks.numel())] ^= 1 << randint(8)
    elif kind == 1:
        bitmasks.view(-1)[randint(bitmasks.numel())] = randint(256)
    elif kind == 2:
        row_offsets[randint(row_offsets.numel())] += randint(5) - 2
    elif kind == 3:
        row_offsets.view(torch.uint8)[randint(row_offsets.numel() * 8)] ^= 1 << randint(8)
    elif kind == 4:
        values = torch.cat([values, values])[: max(values.numel() + randint(5) - 2, 0)]
    elif kind == 5:
        values.view(torch.uint8)[randint(values.nbytes)] ^= 1 << randint(8)
    else:
        shape[randint(2)] += randint(3) - 1
    return values, bitmasks, row_offsets, shape


def mutations(parts, shape, count):
    """`count` times the parts of a matrix and its shape with one small change, the same ones in every run."""
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        yield mutate(*parts, shape, lambda limit: int(torch.randint(limit, (), generator=generator)))


def available_memory() -> int:
    """Bytes of memory free for this process, as far as Linux says; elsewhere none, so that the test is skipped."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return 0


# Views of 70 columns of a tensor [80, 140]: the strides and shapes that the rows of a product can have.
VIEWS_OF_ROWS = {
    "transposed": lambda x: x[:70, :40].t().contiguous().t()[:12],
    "every second column": lambda x: x[:9, ::2],
    "every second row": lambda x: x[::2, :70],
    "expanded row": lambda x: x[:1, :70].expand(20, 70),
    "expanded scalar": lambda x: x[3, 4].expand(3, 70),
    "storage offset": lambda x: x.reshape(-1)[1:71],
    "1-D": lambda x: x[0, :70],
    "3-D": lambda x: x[:30, :70].reshape(2, 15, 70),
    "permuted": lambda x: x[:30, :70].reshape(5, 6, 70).permute(1, 0, 2),
    "no rows": lambda x: x[:0, :70],
    "no rows, 3-D": lambda x: x[:30, :70].reshape(5, 6, 70)[:, :0],
    "4-D of ones": lambda x: x[:1, :70].reshape(1, 1, 1, 70),
}


def run_python(
    code: str, timeout: float = 120, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; what it prints is the result. The timeout is a guard against hanging."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


FORK = """
import os
{setup}
if {use_before}:
    assert works()
pid = os.fork()
if pid == 0:
    try:
        os._exit(0 if works() else 1)
    finally:
        os._exit(2)
_, status = os.waitpid(pid, 0)
print("child", os.waitstatus_to_exitcode(status))
print("parent", works())
"""


def assert_works_after_fork(setup: str, use_before: bool) -> None:
    """Runs `setup`, which defines `works()`, in a process of its own, then `works()` in a child of it and in itself."""
    done = run_python(FORK.format(setup=setup, use_before=use_before), timeout=60)
    assert done.stdout.splitlines() == ["child 0", "parent True"]


def assert_exports(model: nn.Module, op: Any, x: Tensor, strict: bool) -> None:
    """torch.export makes one call of `op` of a model, for any number of rows of x, that works when it is loaded."""
    rows = torch.export.Dim("rows")
    exported = torch.export.export(model, (torch.ones(3, x.shape[-1]),), dynamic_shapes=({0: rows},), strict=strict)
    assert [node.target for node in exported.graph.nodes].count(op) == 1
    assert not exported.constants
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), model(x))
