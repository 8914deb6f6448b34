"""Tests of the Triton ops on CPU tensors, under Triton's interpreter.

test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1: Triton reads that as it is imported, and
compiles for GPUs without it.
"""

import itertools
import os
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ALL_DTYPES,
    WIDTH_DTYPES,
    assert_bits_equal,
    assert_parts_equal,
    mutate,
    parts_are_valid,
    random_dense,
    random_numbers,
    special_words,
    tensor_of_words,
)
from torch import library

import bitmask
from bitmask import FormatError, calls, ops, portable, reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton.py", allow_module_level=True)

from triton.runtime import interpreter

from bitmask import triton_codec, triton_linear

SHAPES = [(), (1,), (5,), (0, 4), (4, 0), (3, 3), (2, 3, 70), (3, 1025), (1, 2050), (300, 5), (2, 1024)]
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _bounds(monkeypatch):
    """Fails a test in which a kernel touches memory outside of the tensors that it was given."""
    native, launch, buffers = interpreter._interpreter, triton_codec.launch, []

    def record(kernel, programs, *arguments, **constants):
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        buffers[:] = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
        launch(kernel, programs, *arguments, **constants)

    def check(pointers, mask):
        for pointer in pointers[mask].tolist():
            assert any(begin <= pointer < end for begin, end in buffers), "access out of bounds"

    def load(pointers, mask, other, dtype):
        check(pointers, mask)
        return native.load(pointers, mask, other, dtype)

    def store(pointers, value, mask):
        check(pointers, mask)
        return native.store(pointers, value, mask)

    checking = SimpleNamespace(**{**vars(native), "load": load, "store": store})
    monkeypatch.setattr(interpreter, "_interpreter", checking)
    monkeypatch.setattr(triton_codec, "launch", record)
    monkeypatch.setattr(triton_linear, "launch", record)


def outcome(op, *args):
    """What a caller of bitmask.ops gets: the result, or the error's type and words."""
    try:
        return calls.call(op, *args, invalid=FormatError)
    except (ValueError, TypeError) as error:
        return type(error), str(error)


def assert_refused_alike(op, native, *args):
    """Both refuse the parts, in the same words."""
    expected = outcome(native, *args)
    assert expected[0] is FormatError
    assert outcome(op, *args) == expected


# ----------------------------------------------------------------------------------------------------------- codec


@pytest.mark.parametrize("keep_negative_zero", [False, True])
def test_all_bit_patterns_at_the_edges_of_a_dtype(dtype, keep_negative_zero):
    words = special_words(dtype)
    dense = tensor_of_words(words, dtype)
    parts = triton_codec.compress(dense, keep_negative_zero)
    assert_parts_equal(parts, reference.compress(dense, keep_negative_zero))
    assert_bits_equal(triton_codec.decompress(*parts, dense.shape), ops.decompress(*parts, dense.shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", WIDTH_DTYPES, ids=str)
def test_shapes_and_widths(shape, dtype):
    dense = random_dense(shape, dtype)
    parts = triton_codec.compress(dense, False)
    assert_parts_equal(parts, ops.compress(dense))
    assert_bits_equal(triton_codec.decompress(*parts, shape), ops.decompress(*parts, shape))
    triton_codec.validate(*parts, shape)


def test_tensors_that_are_not_contiguous():
    dense = random_dense((70, 9), torch.float32).t()
    parts = triton_codec.compress(dense, False)
    assert_parts_equal(parts, ops.compress(dense))
    strided = [part.repeat_interleave(2, 0)[::2] for part in parts]
    assert not any(part.is_contiguous() for part in strided)
    assert_bits_equal(triton_codec.decompress(*strided, dense.shape), ops.decompress(*parts, dense.shape))


def test_bitmasks_may_be_flat():
    dense = random_dense((2, 3, 11), torch.float16)
    values, bitmasks, row_offsets = ops.compress(dense)
    got = triton_codec.decompress(values, bitmasks.reshape(6, 2), row_offsets, dense.shape)
    assert_bits_equal(got, ops.decompress(values, bitmasks, row_offsets, dense.shape))


def test_dense_tensor_of_a_dtype_without_a_codec():
    with pytest.raises(TypeError, match="dense: got dtype"):
        triton_codec.compress(torch.zeros(3, dtype=torch.uint8).view(torch.bits8), False)


def buffers_for(dense, capacity):
    rows, _ = reference.rows_and_columns(dense.shape)
    bitmasks = torch.full(ops.bitmask_sizes(dense.shape), 255, dtype=torch.uint8)
    return torch.ones(capacity).to(dense.dtype), bitmasks, torch.full((rows,), -1)


@pytest.mark.parametrize("dtype", WIDTH_DTYPES, ids=str)
@pytest.mark.parametrize("surplus", [-3, 0, 5, "none"])
def test_compress_into_buffers_of_any_capacity(dtype, surplus):
    dense = random_dense((5, 70), dtype)
    values, bitmasks, row_offsets = ops.compress(dense)
    capacity = 0 if surplus == "none" else values.numel() + surplus
    buffers = buffers_for(dense, capacity)
    nnz = triton_codec.compress_into(dense, False, *buffers)
    assert_bits_equal(nnz, torch.tensor(values.numel()))
    assert_parts_equal(buffers[1:], [bitmasks, row_offsets])
    stored = min(capacity, values.numel())
    untouched = torch.ones(capacity - stored).to(dtype)
    assert_bits_equal(buffers[0], torch.cat([values[:stored], untouched]))


def test_compress_into_refuses_buffers_it_cannot_write_to():
    dense = random_dense((4, 16), torch.float32)
    values, bitmasks, row_offsets = buffers_for(dense, 64)
    wrong = [
        ((values.double(), bitmasks, row_offsets), "values: got dtype"),
        ((values.view(8, 8), bitmasks, row_offsets), "values: got 2 dimensions"),
        ((values[::2], bitmasks, row_offsets), "values: got strides"),
        ((dense.view(-1), bitmasks, row_offsets), "values: got memory that overlaps that of dense"),
        ((values, values[:2].view(torch.uint8).view(4, 2), row_offsets), "bitmasks: got memory that overlaps"),
        ((values, bitmasks[:3], row_offsets), "bitmasks: got size"),
        ((values, bitmasks, row_offsets[:3]), "row_offsets: got size"),
        ((values, bitmasks, row_offsets.int()), "row_offsets: got dtype"),
    ]
    for buffers, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            triton_codec.compress_into(dense, False, *buffers)


@pytest.mark.parametrize("shape", [(9, 13), (3, 1030), (4, 8)], ids=str)
def test_mutated_parts_are_refused_or_decompressed_as_they_say(shape):
    parts, randint = ops.compress(random_dense(shape, torch.float16)), random.Random(0).randrange
    seen = set()
    for _ in range(60):
        *mutated, sizes = mutate(*parts, shape, randint)
        valid = parts_are_valid(*mutated, sizes)
        seen.add(valid)
        got = outcome(triton_codec.decompress, *mutated, sizes)
        if valid:
            assert_bits_equal(got, reference.decompress(*mutated, sizes))
        else:
            assert got[0] is FormatError
    assert seen == {True, False}


def faulty_parts():
    """Parts whose contents are faulty, and the shape they claim."""
    shape = (3, 11)
    values, bitmasks, row_offsets = ops.compress(random_dense(shape, torch.float32, density=0.5))

    def changed(tensor, index, value):
        copy = tensor.clone()
        copy[index] = value
        return copy

    for row, offset in itertools.product(range(3), [-(2**63), -1, 2, 2**31, 2**63 - 1]):
        yield values, bitmasks, changed(row_offsets, row, offset), shape
    for row in range(3):
        yield values, changed(bitmasks, (row, 1), int(bitmasks[row, 1]) | 0x80), row_offsets, shape
        yield values, changed(bitmasks, (row, 0), int(bitmasks[row, 0]) ^ 0x10), row_offsets, shape
    yield values[:-1], bitmasks, row_offsets, shape
    yield torch.cat([values, values]), bitmasks, row_offsets, shape
    yield torch.cat([values, values[:1]]), bitmasks, row_offsets + 1, shape
    yield values[:0], bitmasks, row_offsets, shape
    yield values, bitmasks[:0], row_offsets[:0], (0, 11)
    yield values, bitmasks[:, :0], row_offsets, (3, 0)


def test_faulty_contents_are_refused_in_the_words_of_the_cpu():
    for *parts, shape in faulty_parts():
        assert_refused_alike(triton_codec.decompress, torch.ops.bitmask.decompress, *parts, shape)
        assert_refused_alike(triton_codec.validate, torch.ops.bitmask.validate, *parts, shape)


@pytest.mark.parametrize("shape", [(-1, -3, 8), (-3, 8), (2**40, 2**40, 0), (2**62, 2, 8), (3, -8)], ids=str)
def test_impossible_shapes(shape):
    values, bitmasks, row_offsets = torch.ones(3), torch.zeros(3, 1, dtype=torch.uint8), torch.zeros(3).long()
    with pytest.raises(FormatError):
        triton_codec.decompress(values, bitmasks, row_offsets, shape)


def test_storage_shrunk_under_a_tensor():
    values, bitmasks, row_offsets = ops.compress(random_dense((5, 40), torch.float32))
    values.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="values: got a storage of 8 bytes"):
        triton_codec.decompress(values, bitmasks, row_offsets, (5, 40))


@pytest.fixture
def far_program(monkeypatch):
    """Numbers the one program of a launch as if billions of elements came before it."""
    builder = interpreter.interpreter_builder
    set_size, set_index = builder.set_grid_dim, builder.set_grid_idx

    def number(index):
        monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: set_size(index + 1, y, z))
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_index(index, y, z))

    return number


def test_offsets_past_two_to_the_31(far_program):
    """The last row alone is worked on: pages of memory in front of it are never touched, so never there."""
    rows, cols, last = 2**22 + 1, 1024, 2**22
    far_program(last)
    sizes, tile = (rows, cols, cols // 8, 1), {"ROWS": 1, "COLS": cols}
    dense, bitmasks = torch.empty(rows, cols, dtype=torch.int8), torch.empty(rows, cols // 8, dtype=torch.uint8)
    starts, packed = torch.empty(rows, 1, dtype=torch.int64), torch.empty(2**32 + cols, dtype=torch.int8)
    line = random_dense((cols,), torch.int8)
    values, mask, _ = ops.compress(line)
    dense[last] = line

    triton_codec.launch(triton_codec.mark_nonzero, 1, dense, bitmasks, starts, *sizes, TESTED=-1, WORDS=1, **tile)
    assert_bits_equal(bitmasks[last], mask)
    assert starts[last] == values.numel()
    starts[last] = -1
    triton_codec.launch(triton_codec.count_bits, 1, bitmasks, starts, *sizes, **tile)
    assert starts[last] == values.numel()

    starts[last], capacity = 2**32, packed.numel()
    triton_codec.launch(triton_codec.pack_values, 1, dense, bitmasks, starts, packed, capacity, *sizes, WORDS=1, **tile)
    assert_bits_equal(packed[2**32 : 2**32 + values.numel()], values)
    dense[last] = -1
    triton_codec.launch(
        triton_codec.expand_values, 1, packed, bitmasks, starts, dense, capacity, *sizes, WORDS=1, **tile
    )
    assert_bits_equal(dense[last], line)


def test_masks_that_lead_past_the_last_value():
    """As when they are written to after they were counted: nothing is touched outside (see _bounds)."""
    values, dense = torch.tensor([7.0, 8.0]), torch.ones(2, 8)
    bitmasks, starts = torch.full((2, 1), 255, dtype=torch.uint8), torch.tensor([0, 1])
    arguments = (triton_codec._words(values), bitmasks, starts, triton_codec._words(dense), 2)
    triton_codec.Tiling.of(dense.shape).launch(triton_codec.expand_values, *arguments, WORDS=1)
    assert dense.tolist() == [[7.0, 8.0] + [0.0] * 6, [8.0] + [0.0] * 7]


# ---------------------------------------------------------------------------------------------------------- linear


def assert_linear_right(x, dense, bias):
    parts, k = ops.compress(dense), dense.shape[1]
    got = triton_linear.linear(x, *parts, k, bias)
    expected = reference.linear(x, *parts, k, bias)
    assert got.shape == expected.shape
    tolerance = TOLERANCES[x.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (17,), (64,), (65,)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(9, 515), (33, 65), (1, 1)])
def test_linear(dtype, leading, n, k):
    dense, x = random_numbers(n, k, dtype=dtype), random_numbers(*leading, k, density=1, dtype=dtype)
    assert_linear_right(x, dense, None)
    assert_linear_right(x, dense, random_numbers(n, density=1, seed=1, dtype=dtype))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_linear_of_nothing(m, n, k):
    assert_linear_right(random_numbers(m, k), random_numbers(n, k), None)
    assert_linear_right(random_numbers(m, k), random_numbers(n, k), torch.ones(n))


@pytest.mark.parametrize("m", [1, 2, 70])
@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_absent_weights_are_zeros(m, special):
    """Zero times infinity is NaN, as in the dense product."""
    dense = torch.zeros(10, 70)
    dense[3, 4], dense[5, 69] = 2.0, special
    x = torch.ones(m, 70)
    x[0, 4] = special
    assert_linear_right(x, dense, None)


def test_linear_past_two_to_the_31(far_program, monkeypatch):
    """The last row alone is worked on, as above."""
    launch = triton_linear.launch
    monkeypatch.setattr(triton_linear, "launch", lambda kernel, _, *args, **sizes: launch(kernel, 1, *args, **sizes))
    rows, cols, start = 2**25 + 1, 1024, 2**31
    far_program(rows // triton_linear._tile_sizes(1)["ROWS"])
    values, mask, _ = ops.compress(random_numbers(cols, dtype=torch.float16))
    packed = torch.empty(start + values.numel(), dtype=torch.float16)
    bitmasks = torch.empty(rows, cols // 8, dtype=torch.uint8)
    row_offsets, y = torch.empty(rows, dtype=torch.int64), torch.empty(1, rows, dtype=torch.float16)
    packed[start:], bitmasks[-1], row_offsets[-1] = values, mask, start
    x = random_numbers(1, cols, density=1, dtype=torch.float16)
    triton_linear._multiply(x, (packed, bitmasks, row_offsets), None, y)
    expected = reference.linear(x, values, mask.view(1, -1), torch.zeros(1).long(), cols)
    torch.testing.assert_close(y[:, -1:], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("m", [1, 3])
def test_products_are_not_rounded_on_the_way(m):
    """Sums that bfloat16 and float16 could not hold."""
    for dtype in (torch.bfloat16, torch.float16):
        assert_linear_right(torch.ones(m, 600, dtype=dtype), torch.full((2, 600), 1.125, dtype=dtype), None)
    x, dense = torch.full((m, 64), 1 + 2.0**-12), torch.full((2, 64), 1 - 2.0**-12)
    got = triton_linear.linear(x, *ops.compress(dense), 64)
    torch.testing.assert_close(got, torch.full((m, 2), 64 * (1 - 2.0**-24)), rtol=1e-7, atol=0)


def test_linear_takes_tensors_that_are_not_contiguous():
    dense, x, bias = random_numbers(9, 70), random_numbers(70, 3, density=1).t(), random_numbers(18)[::2]
    assert_linear_right(x, dense, bias)


@pytest.mark.parametrize("m", [1, 3, 70])
def test_faulty_weights_of_linear(m):
    x = torch.ones(m, 11)
    for values, bitmasks, row_offsets, (_, k) in faulty_parts():
        if row_offsets.numel() > 0:
            arguments = (x[:, :k], values, bitmasks, row_offsets, k)
            assert_refused_alike(triton_linear.linear, torch.ops.bitmask.linear, *arguments)
    with pytest.raises(FormatError):
        triton_linear.linear(x, torch.ones(2), bitmasks[:0], row_offsets[:0], 11)


@pytest.mark.parametrize("m", [1, 2])
def test_mutated_weights_are_refused_or_multiplied_as_they_say(m):
    shape, randint = (9, 13), random.Random(1).randrange
    parts = ops.compress(random_numbers(*shape))
    for _ in range(60):
        *mutated, sizes = mutate(*parts, shape, randint)
        x = random_numbers(m, sizes[1], density=1)
        got = outcome(triton_linear.linear, x, *mutated, sizes[1])
        if parts_are_valid(*mutated, [mutated[2].numel(), sizes[1]]):
            expected = reference.linear(x, *mutated, sizes[1])
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            assert got[0] is FormatError


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gradient_of_x(dtype):
    dense, grad = random_numbers(9, 70, dtype=dtype), random_numbers(2, 3, 9, density=1, dtype=dtype)
    parts = ops.compress(dense)
    got = triton_linear.linear_backward_input(grad, *parts, 70)
    expected = reference.linear_backward_input(grad, *parts, 70)
    torch.testing.assert_close(got, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_operands_that_do_not_fit():
    values, bitmasks, row_offsets = ops.compress(random_numbers(4, 16))
    weight = (values, bitmasks, row_offsets, 16)
    for call in [
        lambda: triton_linear.linear(torch.ones(2, 15), *weight),
        lambda: triton_linear.linear(torch.ones(2, 16).double(), *weight),
        lambda: triton_linear.linear(torch.ones(2, 16), *weight, torch.ones(3)),
        lambda: triton_linear.linear(torch.ones(2, 16).int(), values.int(), *weight[1:]),
        lambda: triton_linear.linear_backward_input(torch.ones(2, 5), *weight),
        lambda: triton_linear.linear_backward_input(torch.ones(2, 4).double(), *weight),
        lambda: triton_linear.linear_backward_input(torch.ones(2, 4).int(), values.int(), *weight[1:]),
    ]:
        with pytest.raises((TypeError, ValueError), match=r"(x|values|grad|bias): got"):
            call()


# -------------------------------------------------------------------------------------------------- behind the ops


@pytest.fixture
def _portable_on_cpu():
    """The CPU gets the ops of a GPU without native kernels, but for validate, which words the errors."""
    override = library.Library("bitmask", "IMPL")
    for op in portable.MODULES:
        if op != "validate":
            override.impl(op, portable.implementation(op), "CPU", allow_override=True)
    yield
    override._destroy()


@pytest.mark.usefixtures("_portable_on_cpu")
def test_compressed_layers_work(monkeypatch):
    launch, launched = triton_linear.launch, []

    def record(kernel, *args, **kwargs):
        launched.append(kernel)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(triton_linear, "launch", record)
    dense = torch.nn.Linear(70, 9)
    dense.weight.data[dense.weight.abs() < 0.05] = 0
    layer = bitmask.BitmaskLinear.from_dense(dense)
    assert_bits_equal(layer.weight.to_dense(), dense.weight.data)
    x = random_numbers(3, 70, density=1).requires_grad_()
    torch.testing.assert_close(layer(x), dense(x))
    assert launched == [triton_linear.multiply]
    (got,), (expected,) = (torch.autograd.grad(f(x).sum(), x) for f in (layer, dense))
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("_portable_on_cpu")
def test_gradients_of_the_codec():
    dense = random_numbers(4, 16).requires_grad_()
    values, bitmasks, row_offsets = ops.compress(dense)
    (2 * ops.decompress(values, bitmasks, row_offsets, dense.shape)).sum().backward()
    torch.testing.assert_close(dense.grad, 2.0 * (dense != 0))


@pytest.mark.usefixtures("_portable_on_cpu")
def test_faults_come_out_as_format_errors():
    values, bitmasks, row_offsets = ops.compress(random_numbers(4, 16))
    with pytest.raises(FormatError, match=r"row_offsets\[0\]: got 1, expected 0"):
        ops.decompress(values, bitmasks, row_offsets + 1, (4, 16))
    with pytest.raises(FormatError, match=r"row_offsets\[0\]: got 1, expected 0"):
        ops.linear(torch.ones(16), values, bitmasks, row_offsets + 1, 16)


def test_every_dtype_is_tested():
    assert set(ALL_DTYPES) == ops.DTYPES
