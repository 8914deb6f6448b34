"""The native ops against the reference, bit for bit, and what they say to bad input."""

import copy
import math
import warnings

import pytest
import torch
from conftest import (
    ALL_DTYPES,
    ISAS,
    WIDTH_DTYPES,
    assert_bits_equal,
    assert_parts_equal,
    available_memory,
    element_size,
    mutate,
    octets_of,
    parts_are_valid,
    random_dense,
    random_numbers,
    special_words,
    tensor_of_words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend

import bitmask
from bitmask import BitmaskTensor, FormatError, ops, reference

EDGE_COLUMNS = [0, 1, 7, 8, 9, 63, 64, 65, 130]
UINT8, INT64 = torch.uint8, torch.int64


def assert_same_as_reference(dense, keep_negative_zero=False):
    """Both directions of the native ops give the bits of the reference; returns the parts."""
    expected = reference.compress(dense, keep_negative_zero)
    parts = ops.compress(dense, keep_negative_zero)
    assert_parts_equal(parts, expected)
    ops.validate(*parts, dense.shape)
    restored = ops.decompress(*parts, dense.shape)
    assert_bits_equal(restored, reference.decompress(*expected, dense.shape))
    if keep_negative_zero:
        assert torch.equal(octets_of(restored), octets_of(dense))
    return parts


# Every op, instruction set, dtype and edge shape.


@pytest.mark.parametrize("cols", EDGE_COLUMNS)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_edge_columns(isa, dtype, cols, density):
    dense = random_dense([3, cols], dtype, density, seed=cols)
    assert_same_as_reference(dense)
    assert_same_as_reference(dense, keep_negative_zero=True)


@pytest.mark.parametrize("cols", [9, 64, 200])
def test_special_values(isa, dtype, cols):
    """Zeros of both signs, subnormals, NaNs of all kinds: in every lane of a vector, and in the tail."""
    pool = special_words(dtype)
    words = [pool[(row + column) % len(pool)] for row in range(len(pool)) for column in range(cols)]
    dense = tensor_of_words(words, dtype, [len(pool), cols])
    assert_same_as_reference(dense)
    assert_same_as_reference(dense, keep_negative_zero=True)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 0), (0, 2**40), (2**20, 0), ()], ids=str)
def test_shapes_without_elements_or_dimensions(isa, dtype, shape):
    values, bitmasks, row_offsets = assert_same_as_reference(random_dense(shape, dtype, density=1.0, seed=3))
    assert list(bitmasks.shape) == ops.bitmask_sizes(shape)
    assert row_offsets.numel() == reference.rows_and_columns(shape)[0]
    assert values.numel() <= 1


@pytest.mark.parametrize("shape", [(5,), (4, 9), (2, 3, 70), (2, 1, 3, 5), (1, 2, 1, 2, 17)], ids=str)
def test_any_rank(isa, shape):
    values, bitmasks, row_offsets = assert_same_as_reference(random_dense(shape, torch.float32))
    assert values.ndim == 1
    assert bitmasks.shape == (*shape[:-1], math.ceil(shape[-1] / 8))
    assert row_offsets.shape == (math.prod(shape[:-1]),)


@pytest.mark.parametrize("shape", [(1, 65536), (1, 65537), (2, 131072), (1, 300000), (3, 100001)], ids=str)
@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
def test_long_rows_that_are_split_over_tasks(isa, width_dtype, shape):
    assert_same_as_reference(random_dense(shape, width_dtype, density=0.3))


@pytest.mark.parametrize("shape", [(100000, 3), (70000, 1), (1025, 64), (3000, 65)], ids=str)
@pytest.mark.parametrize("width_dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_many_short_rows(isa, width_dtype, shape):
    assert_same_as_reference(random_dense(shape, width_dtype))


@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
def test_outputs_of_many_megabytes(isa, width_dtype):
    """Large enough for memory that is fetched and mapped in other ways than that of small tensors."""
    rows = (40 << 20) // (4099 * element_size(width_dtype))
    dense = random_dense([64, 4099], width_dtype).repeat(rows // 64 + 1, 1)
    parts = ops.compress(dense, keep_negative_zero=True)
    assert_bits_equal(ops.decompress(*parts, dense.shape), dense)


@pytest.mark.parametrize("width_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(5, 65), (40, 70000)], ids=str)
def test_subnormals_are_kept_when_the_cpu_flushes_them(isa, flush_denormals, width_dtype, shape):
    count = math.prod(shape)
    pool = tensor_of_words([1, 0], width_dtype)  # the smallest subnormal, and zero
    dense = pool.repeat(count // 2 + 1)[:count].reshape(shape)
    values, _, _ = assert_same_as_reference(dense)
    assert values.numel() == (count + 1) // 2


@pytest.mark.parametrize(("keep_negative_zero", "nnz"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.complex128], ids=str)
def test_negative_zero(dtype, keep_negative_zero, nnz):
    dense = torch.tensor([0.0, -0.0, 2.0]).to(dtype)
    parts = ops.compress(dense, keep_negative_zero)
    assert parts[0].numel() == nnz
    kept_sign = torch.signbit(ops.decompress(*parts, [3])[1].to(torch.complex128).real)
    assert kept_sign.item() is keep_negative_zero


def test_complex_number_with_one_zero_part_is_kept_whole():
    dense = torch.tensor([complex(-0.0, 3.0), complex(3.0, -0.0), complex(-0.0, -0.0)])
    values, bitmasks, _ = ops.compress(dense)
    assert bitmasks.tolist() == [0b011]
    assert_bits_equal(values, dense[:2])


# Strides, views and parameters.


def strided_views(dense):
    """Views of a [6, 10] tensor that are not contiguous, overlap, or start inside their storage."""
    return {
        "transposed": dense.t(),
        "every second column": dense[:, ::2],
        "every second row": dense[1::2],
        "last columns": dense[:, -3:],
        "last rows": dense[-2:],
        "flipped through its transpose": dense.t()[-4:].t(),
        "storage offset": dense.reshape(-1)[1:],
        "expanded row": dense[:1].expand(7, 10),
        "expanded scalar": dense[3, 4].expand(5, 9),
        "overlapping": dense.reshape(-1).as_strided([5, 9], [2, 3]),
        "permuted": dense.reshape(2, 3, 10).permute(2, 0, 1),
        "diagonal": dense.diagonal(),
        "one column": dense[:, 3],
        "unsqueezed": dense[:, None, :, None],
    }


@pytest.mark.parametrize("name", list(strided_views(torch.zeros(6, 10))))
@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
def test_strided_views(isa, width_dtype, name):
    view = strided_views(random_dense([6, 10], width_dtype, density=0.6))[name]
    assert_parts_equal(assert_same_as_reference(view), ops.compress(view.clone(memory_format=torch.contiguous_format)))


def test_channels_last():
    dense = random_numbers(2, 5, 3, 4)
    parts = ops.compress(dense.contiguous(memory_format=torch.channels_last))
    assert_parts_equal(parts, ops.compress(dense))
    restored = ops.decompress(*parts, dense.shape)
    assert restored.is_contiguous()
    assert torch.equal(restored, dense)


@pytest.mark.parametrize("complex_dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
def test_conj_and_neg_views(isa, complex_dtype):
    dense = random_dense([5, 9], complex_dtype, density=0.6)
    conjugate = dense.conj()
    assert conjugate.is_conj()
    assert_same_as_reference(conjugate)
    imaginary = conjugate.imag
    assert imaginary.is_neg()
    assert_same_as_reference(imaginary)
    assert_same_as_reference(imaginary[1:, ::2])
    assert_same_as_reference(dense.real)


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
def test_decompress_of_parts_that_are_views(isa, width_dtype, offset):
    """Parts cut out of larger buffers at unaligned places, as from a file."""
    dense = random_dense([7, 100], width_dtype)
    inside = []
    for part in ops.compress(dense):
        buffer = torch.zeros(part.numel() + 8, dtype=part.dtype)
        buffer[offset : offset + part.numel()] = part.reshape(-1)
        inside.append(buffer[offset : offset + part.numel()].view(part.shape))
    assert_bits_equal(ops.decompress(*inside, [7, 100]), ops.decompress(*ops.compress(dense), [7, 100]))


def test_decompress_of_strided_parts():
    dense = random_numbers(6, 30)
    apart = [torch.stack([part, torch.zeros_like(part)], dim=-1)[..., 0] for part in ops.compress(dense)]
    assert not any(part.is_contiguous() for part in apart)
    assert torch.equal(ops.decompress(*apart, [6, 30]), dense)


def test_bitmasks_may_be_flattened_to_rows():
    dense = random_numbers(2, 3, 10)
    values, bitmasks, row_offsets = ops.compress(dense)
    assert torch.equal(ops.decompress(values, bitmasks.reshape(6, 2), row_offsets, [2, 3, 10]), dense)


@pytest.mark.parametrize("make", [torch.nn.Parameter, lambda t: t.clone().requires_grad_(), torch.Tensor.detach])
def test_parameters_and_leaves(make):
    dense = random_numbers(4, 20)
    assert_parts_equal(ops.compress(make(dense)), ops.compress(dense))


def test_inputs_are_not_changed():
    dense = random_numbers(5, 70)
    parts = ops.compress(dense)
    before = copy.deepcopy((dense, *parts))
    ops.decompress(*parts, dense.shape)
    ops.compress(dense.t(), True)
    assert_parts_equal((dense, *parts), before)


def test_outputs_own_their_memory():
    dense = random_numbers(5, 70, density=1.0)
    values, bitmasks, row_offsets = ops.compress(dense)
    restored = ops.decompress(values, bitmasks, row_offsets, dense.shape)
    assert len({part.untyped_storage().data_ptr() for part in (dense, values, bitmasks, row_offsets, restored)}) == 5
    for part in (values, bitmasks, row_offsets, restored):
        assert part.untyped_storage().nbytes() == part.nbytes


# Random shapes and contents.

shapes = st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 17, 63, 64, 65, 70]), max_size=2).flatmap(
    lambda last: st.lists(st.integers(1, 4), max_size=2).map(lambda first: [*first, *last])
)


@settings(max_examples=400, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(ALL_DTYPES),
    isa_name=st.sampled_from(ISAS),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 1.0]),
    keep_negative_zero=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_round_trip_of_random_tensors(shape, dtype, isa_name, density, keep_negative_zero, seed):
    bitmask.set_isa(isa_name)
    try:
        assert_same_as_reference(random_dense(shape, dtype, density, seed), keep_negative_zero)
    finally:
        bitmask.set_isa(None)


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.sampled_from(special_words(torch.float16)), min_size=1, max_size=150),
    keep_negative_zero=st.booleans(),
)
def test_round_trip_of_special_words(words, keep_negative_zero):
    """Small enough lists for a failure to shrink to one element."""
    assert_same_as_reference(tensor_of_words(words, torch.float16), keep_negative_zero)


# Gradients.


def test_gradient_through_both_ops_is_masked():
    dense = random_numbers(5, 70).requires_grad_()
    weight = random_numbers(5, 70, density=1.0, seed=1)
    (ops.decompress(*ops.compress(dense), dense.shape) * weight).sum().backward()
    assert torch.equal(dense.grad, weight * (dense != 0))


def test_gradient_of_expanded_and_strided_outputs():
    values, bitmasks, row_offsets = ops.compress(random_numbers(4, 9))
    values.requires_grad_()
    ops.decompress(values, bitmasks, row_offsets, [4, 9]).t().sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


@pytest.mark.parametrize("shape", [(), (7,), (3, 9), (2, 2, 5), (3, 0)], ids=str)
def test_gradcheck_of_decompress(shape):
    values, bitmasks, row_offsets = ops.compress(random_numbers(*shape, density=0.5, dtype=torch.float64))

    def restore(values):
        return ops.decompress(values, bitmasks, row_offsets, shape)

    assert torch.autograd.gradcheck(restore, values.requires_grad_())
    assert torch.autograd.gradgradcheck(restore, values)


def test_gradcheck_of_compress():
    """The mask must not change under the small steps of gradcheck, so no element is zero here."""
    dense = (random_numbers(3, 9, density=1.0, dtype=torch.float64) + 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda dense: ops.compress(dense)[0], dense)


def test_gradcheck_of_compress_with_a_fixed_mask():
    values, bitmasks, row_offsets = ops.compress(random_numbers(3, 9, dtype=torch.float64))

    def there_and_back(values):
        return ops.compress(ops.decompress(values, bitmasks, row_offsets, [3, 9]))[0]

    assert torch.autograd.gradcheck(there_and_back, values.requires_grad_())


def test_bitmasks_and_offsets_carry_no_gradient():
    values, bitmasks, row_offsets = ops.compress(random_numbers(3, 9).requires_grad_())
    assert (values.requires_grad, bitmasks.requires_grad, row_offsets.requires_grad) == (True, False, False)


def test_complex_gradient():
    dense = torch.tensor([[1 + 2j, 0j, -3j]], dtype=torch.complex128).requires_grad_()
    weight = torch.tensor([[2 - 1j, 5 + 5j, 1 + 4j]], dtype=torch.complex128)
    (ops.decompress(*ops.compress(dense), [1, 3]) * weight).sum().abs().backward()
    expected = dense.detach().clone().requires_grad_()
    (expected * weight * (expected.detach() != 0)).sum().abs().backward()
    torch.testing.assert_close(dense.grad, expected.grad)


# What opcheck asks of an op, and torch.compile.

OPCHECK_INPUTS = {
    "matrix": lambda: random_numbers(4, 20),
    "no elements": lambda: random_numbers(0, 5),
    "scalar": lambda: torch.tensor(2.0),
    "half, 3-D, all zero": lambda: torch.zeros(2, 3, 9, dtype=torch.float16),
    "integers": lambda: random_numbers(4, 20).to(torch.int32),
    "with gradient": lambda: random_numbers(4, 20).requires_grad_(),
}


@pytest.mark.parametrize("name", OPCHECK_INPUTS)
def test_opcheck(name):
    dense = OPCHECK_INPUTS[name]()
    parts = [part.detach() for part in ops.compress(dense)]
    if dense.requires_grad:
        parts[0].requires_grad_()
    library.opcheck(torch.ops.bitmask.compress.default, (dense, False))
    library.opcheck(torch.ops.bitmask.decompress.default, (*parts, list(dense.shape)))
    library.opcheck(torch.ops.bitmask.validate.default, (*parts, list(dense.shape)))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_decompress(fresh_dynamo, backend):
    dense = random_numbers(4, 20)
    parts = ops.compress(dense)
    compiled = torch.compile(lambda *parts: ops.decompress(*parts, [4, 20]) * 2, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*parts), dense * 2)


def test_compiled_compress_then_decompress(fresh_dynamo):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def round_trip(dense):
        values, bitmasks, row_offsets = ops.compress(dense)
        return ops.decompress(values * 2, bitmasks, row_offsets, dense.shape)

    for seed in range(3):
        dense = random_numbers(4, 20, seed=seed)
        assert torch.equal(round_trip(dense), dense * 2)


def test_compiled_with_dynamic_shapes(fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def round_trip(dense):
        return ops.decompress(*ops.compress(dense), dense.shape)

    for rows, cols in [(4, 20), (5, 9), (70, 64)]:
        dense = random_numbers(rows, cols)
        assert torch.equal(round_trip(dense), dense)
    assert counter.frame_count == 1


def test_compiled_gradient(fresh_dynamo):
    dense = random_numbers(4, 20)
    values, bitmasks, row_offsets = ops.compress(dense)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(values):
        return ops.decompress(values, bitmasks, row_offsets, [4, 20]).pow(2).sum()

    values.requires_grad_()
    loss(values).backward()
    assert torch.equal(values.grad, 2 * values.detach())


def test_compiled_call_still_checks_its_parts(fresh_dynamo):
    values, bitmasks, row_offsets = ops.compress(random_numbers(4, 20))
    compiled = torch.compile(lambda *parts: ops.decompress(*parts, [4, 20]), fullgraph=True, backend="aot_eager")
    # A compiled call reaches the native op without the Python function around it: torch's version decides the type.
    with pytest.raises((ValueError, RuntimeError), match=r"row_offsets\[0\]: got 1, expected 0"):
        compiled(values, bitmasks, row_offsets + 1)


def test_compiled_validation_is_not_dropped(fresh_dynamo):
    """It returns nothing, so a compiler would take it for dead code."""
    parts = ops.compress(random_numbers(4, 20))

    def check(values, bitmasks, row_offsets):
        ops.validate(values, bitmasks, row_offsets, [4, 20])
        return values + 1

    compiled = torch.compile(check, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*parts), parts[0] + 1)
    with pytest.raises((ValueError, RuntimeError), match=r"row_offsets\[0\]: got 1, expected 0"):
        compiled(parts[0], parts[1], parts[2] + 1)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0,), ()])
def test_gradients_of_tensors_without_elements(shape):
    dense = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    values, bitmasks, row_offsets = ops.compress(dense)
    ops.decompress(values, bitmasks, row_offsets, shape).sum().backward()
    assert torch.equal(dense.grad, torch.zeros(shape, dtype=torch.float64))


# compress_into.


def buffers_for(dense, capacity):
    """Values, bitmasks and row_offsets to write to, full of ones, and a few more values to see what lies behind."""
    rows, _ = reference.rows_and_columns(dense.shape)
    room = torch.ones((capacity + 9) * element_size(dense.dtype), dtype=UINT8).view(dense.dtype)
    bitmasks = torch.full(ops.bitmask_sizes(dense.shape), 0xFF, dtype=UINT8)
    return room, [room[:capacity], bitmasks, torch.full([rows], -1)]


@pytest.mark.parametrize("shape", [(5, 130), (2, 70001), (300, 9), (0, 5), (5, 0), (7,), ()], ids=str)
@pytest.mark.parametrize("spare", [-20, -1, 0, 9])
@pytest.mark.parametrize("keep_negative_zero", [False, True])
def test_compress_into_buffers_of_any_capacity(isa, shape, spare, keep_negative_zero):
    dense = random_dense(shape, torch.float32)
    values, bitmasks, row_offsets = reference.compress(dense, keep_negative_zero)
    room, buffers = buffers_for(dense, max(0, values.numel() + spare))
    before = room.clone()
    nnz = ops.compress_into(dense, *buffers, keep_negative_zero)
    assert_bits_equal(nnz, torch.tensor(values.numel()))
    written = min(values.numel(), buffers[0].numel())
    assert_parts_equal([room[:written], *buffers[1:]], [values[:written], bitmasks, row_offsets])
    assert_bits_equal(room[written:], before[written:])


def test_compress_into_of_a_view_and_flat_bitmasks(dtype):
    dense = random_dense([9, 6, 70], dtype).transpose(0, 1)
    expected = reference.compress(dense)
    _, (values, bitmasks, row_offsets) = buffers_for(dense, expected[0].numel())
    flat = bitmasks.reshape(54, 9)
    assert ops.compress_into(dense, values, flat, row_offsets).item() == expected[0].numel()
    assert_parts_equal([values, bitmasks, row_offsets], expected)


def test_compress_into_counts_as_writing():
    dense = random_numbers(4, 20)
    compressed = BitmaskTensor.from_dense(random_numbers(4, 20, density=1.0))
    parts = [compressed.values, compressed.bitmasks, compressed.row_offsets]
    versions = [part._version for part in parts]
    ops.compress_into(dense, *parts)
    assert all(part._version > version for part, version in zip(parts, versions, strict=True))
    with pytest.raises(FormatError, match="values: got 80 elements"):
        compressed[1:3]


def test_compress_into_opcheck():
    dense = random_numbers(4, 20)
    _, buffers = buffers_for(dense, 40)
    library.opcheck(torch.ops.bitmask.compress_into.default, (dense, False, *buffers))


def test_compress_into_takes_no_gradient():
    dense = random_numbers(4, 20).requires_grad_()
    _, buffers = buffers_for(dense, 80)
    assert not ops.compress_into(dense, *buffers).requires_grad
    assert not any(part.requires_grad for part in buffers)
    with pytest.raises(TypeError, match="values: got a tensor that requires a gradient"):
        ops.compress_into(dense, buffers[0].requires_grad_(), *buffers[1:])


def test_compiled_compress_into(fresh_dynamo):
    dense = random_numbers(4, 20)
    expected = reference.compress(dense)
    _, buffers = buffers_for(dense, expected[0].numel())
    compiled = torch.compile(lambda *args: ops.compress_into(*args) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(dense, *buffers).item() == expected[0].numel() + 1
    assert_parts_equal(buffers, expected)


BAD_BUFFERS = [
    (0, lambda t: t.to(torch.float64), TypeError, "values: got dtype torch.float64, expected torch.float32"),
    (0, lambda t: t[None], FormatError, "values: got 2 dimensions"),
    (0, lambda t: t.repeat(2)[::2], ValueError, "values: got strides .* expected contiguous"),
    (0, lambda t: t.to("meta"), ValueError, "bitmasks: got device cpu, expected meta"),
    (0, lambda t: t.to_sparse(), TypeError, "values: got a torch.sparse_coo"),
    (0, lambda t: t.tolist(), TypeError, "values: got list"),
    (1, lambda t: t.to(torch.int8), TypeError, "bitmasks: got dtype torch.int8"),
    (1, lambda t: t[:, :2], FormatError, r"bitmasks: got size \[4, 2\]"),
    (1, lambda t: t.t().contiguous().t(), ValueError, "bitmasks: got strides .* expected contiguous"),
    (1, lambda t: t[:1].expand(4, 3), ValueError, "bitmasks: got strides .* expected contiguous"),
    (2, lambda t: t.to(torch.int32), TypeError, "row_offsets: got dtype torch.int32"),
    (2, lambda t: t[:3], FormatError, r"row_offsets: got size \[3\]"),
    (2, lambda t: t.repeat(2)[::2], ValueError, "row_offsets: got strides .* expected contiguous"),
]


@pytest.mark.parametrize(("index", "change", "error", "message"), BAD_BUFFERS)
def test_compress_into_refuses_bad_buffers(index, change, error, message):
    dense = random_numbers(4, 20)
    _, buffers = buffers_for(dense, 80)
    buffers[index] = change(buffers[index])
    with pytest.raises(error, match=message):
        ops.compress_into(dense, *buffers)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        torch.ops.bitmask.compress_into(dense, False, *buffers)


def test_compress_into_refuses_buffers_that_overlap():
    memory = torch.zeros(4096, dtype=UINT8)
    dense = memory[:320].view(torch.float32).view(4, 20)
    apart = [memory[1024:1344].view(torch.float32), memory[2048:2060].view(4, 3), memory[3072:3104].view(torch.int64)]
    assert ops.compress_into(dense, *apart).item() == 0
    onto = {
        "values": memory[316:636].view(torch.float32),
        "bitmasks": memory[1340:1352].view(4, 3),
        "row_offsets": memory[2040:2072].view(torch.int64),
    }
    for index, (name, buffer) in enumerate(onto.items()):
        buffers = [*apart[:index], buffer, *apart[index + 1 :]]
        with pytest.raises(ValueError, match=f"{name}: got memory that overlaps"):
            ops.compress_into(dense, *buffers)


def test_compress_into_refuses_storage_that_shrank():
    dense = random_numbers(4, 20)
    _, buffers = buffers_for(dense, 80)
    buffers[1].untyped_storage().resize_(5)
    with pytest.raises(ValueError, match="bitmasks: got a storage of 5 bytes, expected at least 12"):
        ops.compress_into(dense, *buffers)


# Bad input: tensors that cannot be compressed.

UNSUPPORTED_DTYPES = [
    getattr(torch, name) for name in ("float4_e2m1fn_x2", "bits8", "bits1x8", "bits16") if hasattr(torch, name)
]


@pytest.mark.parametrize("unsupported", UNSUPPORTED_DTYPES, ids=str)
def test_compress_refuses_dtypes_without_a_codec(unsupported):
    dense = torch.zeros(4, dtype=UINT8).view(unsupported)
    with pytest.raises(TypeError, match=f"dense: got dtype {unsupported}, expected"):
        ops.compress(dense)


@pytest.mark.parametrize("unsupported", ["int4", "uint1", "uint7"])
def test_compress_refuses_dtypes_below_a_byte(unsupported):
    dense = torch.empty(4, dtype=UINT8).view(getattr(torch, unsupported))
    with pytest.raises(TypeError, match=f"dense: got dtype torch.{unsupported}, expected"):
        ops.compress(dense)


def odd_tensors():
    """Tensors that have no dense storage of their elements."""
    dense = random_numbers(4, 6)
    return {
        "torch.sparse_coo": dense.to_sparse_coo(),
        "torch.sparse_csr": dense.to_sparse_csr(),
        "torch.sparse_csc": dense.to_sparse_csc(),
        "torch.sparse_bsr": dense.to_sparse_bsr((2, 2)),
        "torch.sparse_bsc": dense.to_sparse_bsc((2, 2)),
        "nested": torch.nested.nested_tensor([dense[0], dense[1, :3]]),
        "nested (jagged)": torch.nested.nested_tensor([dense[0], dense[1, :3]], layout=torch.jagged),
        "torch.qint8": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        **({"torch._mkldnn": dense.to_mkldnn()} if torch.backends.mkldnn.is_available() else {}),
    }


ODD_TENSORS = [
    "torch.sparse_coo",
    "torch.sparse_csr",
    "torch.sparse_csc",
    "torch.sparse_bsr",
    "torch.sparse_bsc",
    "nested",
    "nested (jagged)",
    "torch.qint8",
    "torch._mkldnn",
]


@pytest.fixture(scope="module")
def odd():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that each of these is in beta
        return odd_tensors()


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_compress_refuses_tensors_that_are_not_dense(odd, name):
    if name not in odd:
        pytest.skip("not in this build of torch")
    with pytest.raises(TypeError, match=rf"(?i)dense: got .*{name.split()[0]}.*, expected"):
        ops.compress(odd[name])


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_raw_compress_refuses_tensors_that_are_not_dense(odd, name):
    if name not in odd:
        pytest.skip("not in this build of torch")
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)):
        torch.ops.bitmask.compress(odd[name], False)


@pytest.mark.parametrize("not_a_tensor", [None, 3, [[1.0, 0.0]], "tensor"])
def test_compress_refuses_what_is_no_tensor(not_a_tensor):
    with pytest.raises(TypeError, match=rf"dense: got {type(not_a_tensor).__name__}, expected a torch.Tensor"):
        ops.compress(not_a_tensor)


# Bad input: parts. The matrix is 1 0 2 0 0 0 0 0 3 / all zero / 4 5 0 0 0 0 0 0 0.

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def good_parts():
    return {
        "values": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        "bitmasks": torch.tensor([[5, 1], [0, 0], [3, 0]], dtype=UINT8),
        "row_offsets": torch.tensor([0, 3, 3]),
        "shape": [3, 9],
    }


BAD_PARTS = [
    # Dtypes.
    ("values", lambda t: t.to(UINT8).view(torch.bits8), TypeError, "values: got dtype torch.bits8, expected"),
    ("values", lambda t: t.to(UINT8).view(torch.float4_e2m1fn_x2), TypeError, "values: got dtype torch.float4"),
    ("bitmasks", lambda t: t.to(torch.int8), TypeError, "bitmasks: got dtype torch.int8, expected torch.uint8"),
    ("bitmasks", lambda t: t.to(torch.bool), TypeError, "bitmasks: got dtype torch.bool, expected torch.uint8"),
    ("row_offsets", lambda t: t.to(torch.int32), TypeError, "row_offsets: got dtype torch.int32, expected torch.int64"),
    ("row_offsets", lambda t: t.float(), TypeError, "row_offsets: got dtype torch.float32, expected torch.int64"),
    # Kinds.
    ("values", lambda t: t.tolist(), TypeError, "values: got list, expected a torch.Tensor"),
    ("bitmasks", lambda t: t.numpy(), TypeError, "bitmasks: got ndarray, expected a torch.Tensor"),
    ("row_offsets", lambda t: None, TypeError, "row_offsets: got NoneType, expected a torch.Tensor"),
    ("values", lambda t: t.to_sparse(), TypeError, "values: got a torch.sparse_coo tensor, expected a dense"),
    ("bitmasks", lambda t: t.to_sparse(), TypeError, "bitmasks: got a torch.sparse_coo tensor, expected a dense"),
    ("row_offsets", lambda t: t.to_sparse(), TypeError, "row_offsets: got a torch.sparse_coo tensor, expected a dense"),
    ("values", BitmaskTensor.from_dense, TypeError, "values: got .*BitmaskTensor.*expected"),
    ("bitmasks", BitmaskTensor.from_dense, TypeError, "bitmasks: got .*BitmaskTensor.*expected"),
    ("row_offsets", BitmaskTensor.from_dense, TypeError, "row_offsets: got .*BitmaskTensor.*expected"),
    # Devices.
    ("values", lambda t: t.to("meta"), ValueError, "bitmasks: got device cpu, expected meta"),
    ("bitmasks", lambda t: t.to("meta"), ValueError, "bitmasks: got device meta, expected cpu"),
    ("row_offsets", lambda t: t.to("meta"), ValueError, "row_offsets: got device meta, expected cpu"),
    # Sizes.
    ("values", lambda t: t[None], FormatError, "values: got 2 dimensions, expected 1"),
    ("values", lambda t: t[0], FormatError, "values: got 0 dimensions, expected 1"),
    ("bitmasks", lambda t: t.reshape(-1), FormatError, r"bitmasks: got size \[6\], expected \[3, 2\]"),
    ("bitmasks", lambda t: t[None], FormatError, r"bitmasks: got size \[1, 3, 2\], expected \[3, 2\]"),
    ("bitmasks", lambda t: t[:, :1], FormatError, r"bitmasks: got size \[3, 1\], expected \[3, 2\]"),
    ("bitmasks", lambda t: t[:2], FormatError, r"bitmasks: got size \[2, 2\], expected \[3, 2\]"),
    ("bitmasks", lambda t: t.t(), FormatError, r"bitmasks: got size \[2, 3\], expected \[3, 2\]"),
    ("bitmasks", lambda t: t[0, 0], FormatError, r"bitmasks: got size \[\], expected \[3, 2\]"),
    ("row_offsets", lambda t: t[:2], FormatError, r"row_offsets: got size \[2\], expected \[3\]"),
    ("row_offsets", lambda t: torch.tensor([0, 3, 3, 5]), FormatError, r"row_offsets: got size \[4\], expected \[3\]"),
    ("row_offsets", lambda t: t[None], FormatError, r"row_offsets: got size \[1, 3\], expected \[3\]"),
    ("row_offsets", lambda t: t[0], FormatError, r"row_offsets: got size \[\], expected \[3\]"),
    # Contents.
    ("values", lambda t: t[:-1], FormatError, "values: got 4 elements, expected 5"),
    ("values", lambda t: t.repeat(2), FormatError, "values: got 10 elements, expected 5"),
    ("values", lambda t: t[:0], FormatError, r"row_offsets\[1\]: got 3, expected 0 to 0"),
    ("bitmasks", lambda t: t | torch.tensor([0, 2], dtype=UINT8), FormatError, "bitmasks: row 0 has padding bits set"),
    ("bitmasks", lambda t: t ^ torch.tensor([64, 0], dtype=UINT8), FormatError, r"row_offsets\[1\]: got 3, expected 4"),
    ("bitmasks", torch.zeros_like, FormatError, r"row_offsets\[1\]: got 3, expected 0"),
    ("row_offsets", lambda t: t + 1, FormatError, r"row_offsets\[0\]: got 1, expected 0"),
    ("row_offsets", lambda t: torch.tensor([0, -1, 3]), FormatError, r"row_offsets\[1\]: got -1, expected no less"),
    ("row_offsets", lambda t: torch.tensor([0, 3, 2]), FormatError, r"row_offsets\[2\]: got 2, expected no less"),
    ("row_offsets", lambda t: torch.tensor([0, 3, 6]), FormatError, r"row_offsets\[2\]: got 6, expected 0 to 5"),
    ("row_offsets", lambda t: torch.tensor([0, 2, 3]), FormatError, r"row_offsets\[1\]: got 2, expected 3"),
    ("row_offsets", lambda t: torch.tensor([0, 3, 4]), FormatError, r"row_offsets\[2\]: got 4, expected 3"),
    ("row_offsets", lambda t: torch.full([3], INT64_MIN), FormatError, rf"row_offsets\[0\]: got {INT64_MIN}, expected"),
    ("row_offsets", lambda t: torch.full([3], INT64_MAX), FormatError, rf"row_offsets\[0\]: got {INT64_MAX}, expected"),
    ("row_offsets", lambda t: torch.tensor([0, INT64_MIN, 3]), FormatError, rf"row_offsets\[1\]: got {INT64_MIN}"),
    ("row_offsets", lambda t: torch.tensor([0, INT64_MAX, 3]), FormatError, rf"row_offsets\[1\]: got {INT64_MAX}"),
    ("row_offsets", lambda t: torch.tensor([0, 3, INT64_MAX]), FormatError, rf"row_offsets\[2\]: got {INT64_MAX}"),
    # Shapes.
    ("shape", lambda s: [3, -9], FormatError, r"shape: got \[3, -9\], expected no negative size"),
    ("shape", lambda s: [-1], FormatError, r"shape: got \[-1\], expected no negative size"),
    ("shape", lambda s: [INT64_MIN, 9], FormatError, "shape: got .*, expected no negative size"),
    ("shape", lambda s: [2**32, 2**32], FormatError, "shape: got .*, expected fewer than 2.63 elements"),
    ("shape", lambda s: [2**62, 2], FormatError, "shape: got .*, expected fewer than 2.63 elements"),
    ("shape", lambda s: [2**62, 2, 0], FormatError, "shape: got .*, expected fewer than 2.63 elements"),
    ("shape", lambda s: [0, 2**62, 4], FormatError, "shape: got .*, expected fewer than 2.63 elements"),
    ("shape", lambda s: [2**63], FormatError, "shape: got .*, expected sizes below 2.63"),
    ("shape", lambda s: [2**64, 0], FormatError, "shape: got .*, expected sizes below 2.63"),
    ("shape", lambda s: [-(2**64)], FormatError, "shape: got .*, expected"),
    ("shape", lambda s: [2**62, 0], FormatError, r"bitmasks: got size \[3, 2\], expected \[4611686018427387904, 0\]"),
    ("shape", lambda s: [3, 8], FormatError, r"bitmasks: got size \[3, 2\], expected \[3, 1\]"),
    ("shape", lambda s: [3, 2**60], FormatError, r"bitmasks: got size \[3, 2\], expected \[3, "),
    ("shape", lambda s: [2**50, 9], FormatError, r"bitmasks: got size \[3, 2\], expected \[1125899906842624, 2\]"),
    ("shape", lambda s: [], FormatError, r"bitmasks: got size \[3, 2\], expected \[1, 1\]"),
    ("shape", lambda s: [3.0, 9], TypeError, "shape: got .*, expected a sequence of integers"),
    ("shape", lambda s: "39", TypeError, "shape: got .*, expected a sequence of integers"),
    ("shape", lambda s: [[3, 9]], TypeError, "shape: got .*, expected a sequence of integers"),
    ("shape", lambda s: None, TypeError, "shape: got .*, expected a sequence of integers"),
    ("shape", lambda s: 27, TypeError, "shape: got .*, expected a sequence of integers"),
]
BAD_PART_IDS = [f"{i}-{field}-{message[:50]}" for i, (field, _, _, message) in enumerate(BAD_PARTS)]


def bad_parts(field, change):
    parts = good_parts()
    parts[field] = change(parts[field])
    return parts


@pytest.mark.parametrize(("field", "change", "error", "message"), BAD_PARTS, ids=BAD_PART_IDS)
@pytest.mark.parametrize("call", [ops.decompress, ops.validate, BitmaskTensor.from_parts])
def test_bad_parts(call, field, change, error, message):
    parts = bad_parts(field, change)
    with pytest.raises(error, match=message) as caught:
        call(**parts)
    assert caught.type is error


RAW_BAD_PARTS = [case[:2] for case in BAD_PARTS if case[1] != BitmaskTensor.from_dense]  # which brings its own dispatch


@pytest.mark.parametrize(("field", "change"), RAW_BAD_PARTS)
@pytest.mark.parametrize("op", ["decompress", "validate"])
def test_bad_parts_straight_to_the_native_op(op, field, change):
    """Past the Python checks: some exception of torch or ours, never a crash, never a result."""
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError, OverflowError)):
        getattr(torch.ops.bitmask, op)(*bad_parts(field, change).values())


@pytest.mark.parametrize("part", ["values", "bitmasks", "row_offsets"])
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_parts_that_are_not_dense(odd, name, part):
    if name not in odd:
        pytest.skip("not in this build of torch")
    with pytest.raises(TypeError, match=rf"{part}: got .*expected"):
        ops.decompress(**{**good_parts(), part: odd[name]})
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
        torch.ops.bitmask.decompress(*{**good_parts(), part: odd[name]}.values())


def long_row_parts():
    """Two rows that are each split over tasks, with 2 and 3 elements."""
    dense = torch.zeros(2, 70001)
    dense[0, 3] = dense[0, 66000] = dense[1, 0] = dense[1, 65536] = dense[1, 70000] = 1.0
    return [*ops.compress(dense), [2, 70001]]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2], r"row_offsets\[0\]: got 1, expected 0"),
        ([-1, 2], r"row_offsets\[0\]: got -1, expected 0 to 5"),
        ([0, -1], r"row_offsets\[1\]: got -1, expected no less"),
        ([0, 1], r"row_offsets\[1\]: got 1, expected 2"),
        ([0, 3], r"row_offsets\[1\]: got 3, expected 2"),
        ([0, 6], r"row_offsets\[1\]: got 6, expected 0 to 5"),
        ([0, INT64_MAX], rf"row_offsets\[1\]: got {INT64_MAX}"),
        ([INT64_MIN, INT64_MIN], rf"row_offsets\[0\]: got {INT64_MIN}"),
        ([2, 0], r"row_offsets\[0\]: got 2, expected 0"),
    ],
)
def test_bad_row_offsets_of_long_rows(offsets, message):
    values, bitmasks, _, shape = long_row_parts()
    with pytest.raises(FormatError, match=message):
        ops.decompress(values, bitmasks, torch.tensor(offsets), shape)


@pytest.mark.parametrize(
    ("where", "bit", "message"),
    [
        ((0, 8750), 0x02, "bitmasks: row 0 has padding bits set past column 70001"),
        ((1, 8750), 0x80, "bitmasks: row 1 has padding bits set past column 70001"),
        ((0, 0), 0x01, r"row_offsets\[1\]: got 2, expected 3"),
        ((0, 8192), 0x01, r"row_offsets\[1\]: got 2, expected 3"),
        ((1, 8191), 0x01, "values: got 5 elements, expected 6"),
    ],
)
def test_bad_bitmasks_of_long_rows(where, bit, message):
    values, bitmasks, row_offsets, shape = long_row_parts()
    bitmasks[where] |= bit
    with pytest.raises(FormatError, match=message):
        ops.decompress(values, bitmasks, row_offsets, shape)


@pytest.mark.parametrize("cols", [70001, 13])
def test_padding_bits_that_keep_the_count(cols):
    """One bit moved from a column into the padding: every count still agrees."""
    dense = torch.zeros(2, cols)
    dense[0, 0] = dense[1, 0] = 1.0
    values, bitmasks, row_offsets = ops.compress(dense)
    bitmasks[1, 0], bitmasks[1, -1] = 0, 0x80
    with pytest.raises(FormatError, match="bitmasks: row 1 has padding bits set"):
        ops.decompress(values, bitmasks, row_offsets, [2, cols])


@pytest.mark.parametrize("count", [0, 4, 6, 100000])
def test_wrong_number_of_values_of_long_rows(count):
    _, bitmasks, row_offsets, shape = long_row_parts()
    with pytest.raises(FormatError, match=f"(values: got {count} elements|row_offsets.*: got)"):
        ops.decompress(torch.ones(count), bitmasks, row_offsets, shape)


def test_lowest_faulty_row_is_the_one_reported():
    """Whichever thread finds its fault first."""
    dense = torch.ones(3000, 100)
    values, bitmasks, row_offsets = ops.compress(dense)
    for row in (2900, 1500, 700):
        bitmasks[row, 0] = 0
    with pytest.raises(FormatError, match=r"row_offsets\[701\]: got 70100, expected 70092"):
        ops.validate(values, bitmasks, row_offsets, dense.shape)


@pytest.mark.parametrize("shape", [[2**40, 8], [1, 2**60], [2**62, 0], [0, 2**62], [2**31, 2**31]], ids=str)
def test_tiny_parts_with_a_huge_shape_fail_before_allocating(shape):
    with pytest.raises(FormatError, match="bitmasks: got size"):
        ops.decompress(torch.ones(1), torch.ones(1, 1, dtype=UINT8), torch.zeros(1, dtype=INT64), shape)


def test_values_without_rows():
    with pytest.raises(FormatError, match="values: got 1 elements, expected 0"):
        ops.decompress(torch.ones(1), torch.empty(0, 1, dtype=UINT8), torch.empty(0, dtype=INT64), [0, 8])


def test_format_error_is_a_value_error():
    assert issubclass(FormatError, ValueError)


# Mutations.


@pytest.mark.parametrize(
    ("shape", "width_dtype", "count"),
    [
        ((5, 13), torch.float32, 1500),
        ((1, 64), UINT8, 500),
        ((3, 70), torch.float64, 1000),
        ((2, 66001), torch.int8, 40),
    ],
    ids=str,
)
def test_mutated_parts_are_refused_or_decompress_as_the_reference_does(isa, shape, width_dtype, count):
    good = ops.compress(random_dense(shape, width_dtype))
    generator = torch.Generator().manual_seed(count)
    refused = 0
    for _ in range(count):
        parts = mutate(*good, shape, lambda limit: int(torch.randint(limit, (), generator=generator)))
        for _ in range(int(torch.randint(2, (), generator=generator))):
            parts = mutate(*parts, lambda limit: int(torch.randint(limit, (), generator=generator)))
        if parts_are_valid(*parts):
            assert_bits_equal(ops.decompress(*parts), reference.decompress(*parts))
        else:
            refused += 1
            with pytest.raises(FormatError):
                ops.decompress(*parts)
    assert 0 < refused < count


# More elements than an int32 can count.


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**31 + 65,), (2**15 + 1, 2**16)], ids=str)
@pytest.mark.parametrize("background", [0, 7])
def test_more_than_2_to_the_31_elements(shape, background):
    if available_memory() < 8 << 30:
        pytest.skip("needs 8 GB of free memory")
    dense = torch.full(shape, background, dtype=torch.int8)
    flat = dense.view(-1)
    count = flat.numel()
    places = [0, 70000, 2**31 - 1, 2**31, count - 1]
    for number, place in enumerate(places):
        flat[place] = 100 + number
    values, bitmasks, row_offsets = ops.compress(dense)
    assert values.numel() == (len(places) if background == 0 else count)
    if background == 0:
        assert values.tolist() == [100, 101, 102, 103, 104]
    assert bitmasks.view(-1)[2**28].item() & 1 == 1
    del dense
    restored = ops.decompress(values, bitmasks, row_offsets, shape).view(-1)
    assert [restored[place].item() for place in places] == [100, 101, 102, 103, 104]
    assert [restored[place + 1].item() for place in places[:-1]] == [background] * 2 + [103] + [background]
    assert int((restored[-(2**20) :] == background).sum()) >= 2**20 - 3
