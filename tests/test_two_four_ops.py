"""2:4 packed, unpacked, validated and pruned, against the reference, bit for bit."""

import itertools
import math
import os

import pytest
import torch
from conftest import (
    ISAS,
    assert_bits_equal,
    assert_parts_equal,
    assert_works_after_fork,
    available_memory,
    element_size,
    random_dense,
    random_numbers,
    run_python,
    special_words,
    tensor_of_words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_interop import LATE, needs_releases, run_release
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import bitmask
from bitmask import BitmaskTensor, FormatError, reference
from bitmask.ops_two_four import TWO_FOUR_DTYPES, pack_24, prune_24, unpack_24, validate_24

DTYPES = sorted(TWO_FOUR_DTYPES, key=str)
WIDTH_DTYPES = [torch.int8, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(4,), (8,), (3, 4), (5, 12), (3, 60), (4, 64), (2, 68), (3, 128), (7, 132), (2, 3, 20), (2, 1, 3, 8)]
EMPTY_SHAPES = [(0,), (0, 8), (5, 0), (2, 0, 4), (0, 0), (2**20, 0), (0, 2**40), (2**62, 0)]
LONG_SHAPES = [(1, 65536), (1, 65540), (2, 131072), (3, 100004), (70000, 4), (1025, 64), (3000, 68)]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def random_two_four(shape, dtype, seed=0):
    """Random bits, at most two of every four elements, with all that can be stored otherwise."""
    dense = random_dense(shape, dtype, density=1.0, seed=seed)
    count, generator = math.prod(shape), torch.Generator().manual_seed(seed)
    ranks = torch.rand(count // 4, 4, generator=generator).argsort(dim=1)
    dropped = ranks >= torch.randint(0, 3, (count // 4, 1), generator=generator)
    dense.view(-1).view(torch.uint8).view(count, element_size(dtype))[dropped.reshape(-1)] = 0
    return dense


def assert_round_trip(dense):
    """The parts are those of the reference, and restore the tensor."""
    for keep in (False, True):
        parts = pack_24(dense, keep_negative_zero=keep)
        assert_parts_equal(parts, reference.pack_24(dense, keep_negative_zero=keep))
        validate_24(*parts)
        restored = unpack_24(*parts)
        assert_bits_equal(restored, reference.unpack_24(*parts))
    assert_bits_equal(restored, dense)


# Packed and unpacked.


def test_round_trip(isa, dtype):
    for shape in SHAPES:
        assert_round_trip(random_two_four(shape, dtype))


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_shapes_without_elements(dtype, shape):
    dense = torch.empty(shape, dtype=dtype)
    values, metadata = pack_24(dense)
    assert values.shape == (*shape[:-1], shape[-1] // 2)
    assert (metadata.shape, metadata.dtype) == ((*shape[:-1], -(-shape[-1] // 8)), torch.uint8)
    validate_24(values, metadata)
    assert unpack_24(values, metadata).shape == shape
    prune_24(dense)
    assert_parts_equal(pack_24(dense, prune=True), (values, metadata))


@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_long_rows_and_many_rows(isa, width_dtype, shape):
    dense = random_two_four(shape, width_dtype)
    values, metadata = pack_24(dense, keep_negative_zero=True)
    assert_bits_equal(unpack_24(values, metadata), dense)
    # All of the same as one bitmask tensor.
    bitmask_values = bitmask.compress(dense, keep_negative_zero=True)[0]
    counts = reference.unpack_bits(metadata, shape[1]).sum(dim=1)
    assert counts.unique().tolist() == [shape[1] // 2]
    stored = reference.nonzero_mask(values, keep_negative_zero=True)
    assert torch.equal(
        values.view(torch.uint8).view(*values.shape, -1)[stored].reshape(-1), bitmask_values.view(torch.uint8)
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(300, 2000), (1, 600000)], ids=str)
def test_number_of_threads_does_not_change_a_bit(isa, shape):
    dense, results = random_dense(shape, torch.bfloat16, density=0.7), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        parts, pruned = pack_24(dense, prune=True), dense.clone()
        prune_24(pruned)
        results.append((*parts, unpack_24(*parts), pruned))
    assert_parts_equal(results[1], results[0])
    assert_parts_equal(results[2], results[0])


def test_which_columns_are_stored(isa):
    """The table of FORMAT.md, for every mask of non-zeros that 2:4 allows."""
    stored = {"0000": "0011", "1000": "1010", "0100": "0110", "0010": "0011", "0001": "0011"}
    stored |= {mask: mask for mask in ("1100", "1010", "1001", "0110", "0101", "0011")}
    for mask, expected in stored.items():
        dense = torch.tensor([5 * int(bit) for bit in mask])
        values, metadata = pack_24(dense)
        assert f"{metadata.item():04b}"[::-1] == expected
        assert values.tolist() == [5 * int(bit) for bit, kept in zip(mask, expected, strict=True) if kept == "1"]


def test_stored_zeros_keep_their_bits(isa):
    dense = torch.tensor([3.0, -0.0, -0.0, -0.0])
    values, metadata = pack_24(dense)
    assert metadata.tolist() == [0b0101]
    assert_bits_equal(values, torch.tensor([3.0, -0.0]))
    with pytest.raises(ValueError, match="got 4 non-zeros"):
        pack_24(dense, keep_negative_zero=True)


@pytest.mark.parametrize("shape", [(5, 68), (2, 70000)], ids=str)
def test_subnormals_are_kept_when_the_cpu_flushes_them(isa, flush_denormals, shape):
    for width_dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        dense = torch.zeros(shape, dtype=width_dtype)
        dense.view(torch.uint8)[..., :: 4 * element_size(width_dtype)] = 1
        assert_bits_equal(unpack_24(*pack_24(dense)), dense)
        assert_bits_equal(unpack_24(*pack_24(dense, prune=True)), dense)


@pytest.mark.parametrize("float_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_subnormals_are_pruned_alike_when_the_cpu_flushes_them(isa, flush_denormals, float_dtype):
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[element_size(float_dtype)]
    dense = torch.randint(1, 100, (8, 136), generator=torch.Generator().manual_seed(0)).to(bits).view(float_dtype)
    for transposable in (False, True):
        flushing, expected = dense.clone(), dense.clone()
        prune_24(flushing, transposable)
        torch.set_flush_denormal(False)
        prune_24(expected, transposable)
        torch.set_flush_denormal(True)
        assert_bits_equal(flushing, expected)
        kept = expected.view(bits)
        blocks = dense.view(bits).reshape(2, 4, 34, 4)
        assert kept.count_nonzero() == kept.numel() // 2
        if transposable:  # the best pattern of each 4 x 4 keeps at least half, which any pattern and its opposite share
            assert (2 * kept.reshape(2, 4, 34, 4).sum((1, 3)) >= blocks.sum((1, 3))).all()


def strided_views(base):
    """Views of a tensor [8, 12, 16] whose last size is a multiple of four."""
    return {
        "transposed": base.transpose(0, 2)[..., :8],
        "every second column": base[..., ::2],
        "every second row": base[:, ::2],
        "expanded": base[:1].expand(3, 12, 16),
        "expanded element": base[0, 0, :1].expand(2, 8),
        "offset": base.reshape(-1)[3:19],
        "permuted": base.permute(1, 0, 2),
        "flipped": base.flip(2),
    }


@pytest.mark.parametrize("name", list(strided_views(torch.zeros(8, 12, 16))))
@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
def test_strided_views(isa, width_dtype, name):
    view = strided_views(random_dense((8, 12, 16), width_dtype, density=0.8))[name]
    parts = pack_24(view, prune=True)
    assert_parts_equal(parts, reference.pack_24(view, prune=True))
    assert_bits_equal(unpack_24(*parts), reference.unpack_24(*parts))


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
def test_parts_that_are_views(isa, width_dtype, offset):
    dense, inside = random_two_four((30, 132), width_dtype), []
    for part in pack_24(dense, keep_negative_zero=True):
        buffer = torch.zeros(part.numel() + 8, dtype=part.dtype)
        buffer[offset : offset + part.numel()] = part.reshape(-1)
        inside.append(buffer[offset : offset + part.numel()].view(part.shape))
    assert_bits_equal(unpack_24(*inside), dense)
    strided = [torch.stack([part, part], dim=-1)[..., 0] for part in inside]
    assert not strided[0].is_contiguous()
    assert_bits_equal(unpack_24(*strided), dense)


def test_negative_views():
    dense = torch.tensor([1 + 2j, 3 + 4j, 0j, 0j]).conj().imag
    assert dense.is_neg()
    assert_bits_equal(unpack_24(*pack_24(dense)), torch.tensor([-2.0, -4.0, 0.0, 0.0]))


def test_inputs_are_not_changed_and_outputs_own_their_memory():
    dense = random_two_four((4, 8), torch.float32)
    before = dense.clone()
    parts = pack_24(dense)
    kept = [part.clone() for part in parts]
    unpack_24(*parts).fill_(7)
    assert_parts_equal(parts, kept)
    assert_bits_equal(dense, before)


# The largest two.


@pytest.mark.parametrize("keep_negative_zero", [False, True])
def test_largest_of_random_bits(isa, dtype, keep_negative_zero):
    for shape, density in itertools.product([(3, 4), (9, 64), (4, 132), (2, 3, 20)], (0.5, 1.0)):
        dense = random_dense(shape, dtype, density)
        parts = pack_24(dense, True, keep_negative_zero)
        assert_parts_equal(parts, reference.pack_24(dense, True, keep_negative_zero))


@pytest.mark.parametrize("keep_negative_zero", [False, True])
def test_largest_of_special_values(isa, dtype, keep_negative_zero):
    """Every four of them, so that every order and every tie comes up."""
    words = special_words(dtype)
    chosen = words[:: max(1, len(words) // 6)] + words[-1:]
    dense = tensor_of_words(list(itertools.chain(*itertools.product(chosen, repeat=4))), dtype, (-1, 4))
    parts = pack_24(dense, True, keep_negative_zero)
    assert_parts_equal(parts, reference.pack_24(dense, True, keep_negative_zero))
    pruned = dense.clone()
    prune_24(pruned)
    if not keep_negative_zero:
        assert_bits_equal(pruned, unpack_24(*parts))


NAN, INF = math.nan, math.inf
LARGEST = {
    "magnitudes": (torch.float32, [1.0, -3.0, 2.0, 0.5], [0, -3.0, 2.0, 0]),
    "the first of equal ones": (torch.float32, [1.0, -1.0, 1.0, -1.0], [1.0, -1.0, 0, 0]),
    "the first of the second largest": (torch.float32, [1.0, -1.0, 2.0, 1.0], [1.0, 0, 2.0, 0]),
    "infinity": (torch.bfloat16, [INF, 3.0, -INF, 2.0], [INF, 0, -INF, 0]),
    "NaN is larger than infinity": (torch.float16, [INF, NAN, -INF, NAN], [0, NAN, 0, NAN]),
    "the least int8": (torch.int8, [127, -127, -128, 126], [127, 0, -128, 0]),
    "the least int64": (torch.int64, [2**63 - 1, -(2**63), 1 - 2**63, 5], [2**63 - 1, -(2**63), 0, 0]),
    "unsigned": (torch.uint8, [255, 127, 128, 1], [255, 0, 128, 0]),
    "uint64": (torch.uint64, [2**63, 2**63 - 1, 2**64 - 1, 7], [2**63, 0, 2**64 - 1, 0]),
    "bool": (torch.bool, [False, True, True, True], [False, True, True, False]),
    "float8": (torch.float8_e4m3fn, [-2.0, 1.0, 1.5, -3.0], [-2.0, 0, 0, -3.0]),
    "float8 whose sign alone is NaN": (torch.float8_e5m2fnuz, [NAN, 1.0, -2.0, 1.5], [NAN, 0, -2.0, 0]),
}


@pytest.mark.parametrize(("dtype", "dense", "expected"), LARGEST.values(), ids=LARGEST)
def test_largest_by_hand(isa, dtype, dense, expected):
    dense, expected = (torch.tensor(numbers, dtype=dtype) for numbers in (dense, expected))
    assert_bits_equal(unpack_24(*pack_24(dense, prune=True)), expected)
    prune_24(dense)
    assert_bits_equal(dense, expected)


# Pruned in place.


def test_prune_leaves_what_is_two_four_alone(isa, dtype):
    dense = random_two_four((5, 132), dtype)
    pruned = dense.clone()
    prune_24(pruned)
    assert_bits_equal(pruned, unpack_24(*pack_24(dense, prune=True)))
    mask = reference.nonzero_mask(dense)
    octets = [t.view(torch.uint8).view(*dense.shape, -1)[mask] for t in (pruned, dense)]
    assert torch.equal(*octets)


TRANSPOSABLE_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", TRANSPOSABLE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 12), (4, 132), (32, 32), (2, 3, 4, 20), (0, 4), (4, 0), (0, 8, 8)], ids=str)
@pytest.mark.parametrize("most", [100, 3])
def test_prune_in_rows_and_columns(isa, dtype, shape, most):
    """Few values make many ties; all sums of these are exact."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randint(-most, most, shape, generator=generator).to(dtype)
    pruned, expected = dense.clone(), dense.clone()
    prune_24(pruned, transposable=True)
    reference.prune_24_transposable(expected)
    assert_bits_equal(pruned, expected)
    for view in (pruned, pruned.mT):
        if 0 not in shape:
            pack_24(view)


@pytest.mark.parametrize("dtype", TRANSPOSABLE_DTYPES, ids=str)
def test_prune_in_rows_and_columns_of_extremes(isa, dtype):
    """NaNs come before infinities, and these before all numbers, however large."""
    largest = min(torch.finfo(dtype).max, 2.0**1022)  # a few of which add up to more than there is
    chosen = torch.tensor([0.0, 1.0, -2.0, largest, -largest, INF, -INF, NAN, torch.finfo(dtype).tiny], dtype=dtype)
    dense = chosen[torch.randint(0, len(chosen), (40, 72), generator=torch.Generator().manual_seed(0))]
    pruned, expected = dense.clone(), dense.clone()
    prune_24(pruned, transposable=True)
    reference.prune_24_transposable(expected)
    assert_bits_equal(pruned, expected)


def test_prune_is_seen_by_autograd():
    weight = random_numbers(4, 8, density=1.0).requires_grad_()
    squared = weight.pow(2).sum()
    version = weight._version
    prune_24(weight)
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.parametrize("transposable", [False, True])
def test_compiled_prune(fresh_dynamo, transposable):
    weight = random_numbers(8, 8, density=1.0)
    expected = weight.clone()
    prune_24(expected, transposable)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def prune(tensor):
        prune_24(tensor, transposable)
        return tensor + 1

    assert torch.equal(prune(weight), expected + 1)
    assert torch.equal(weight, expected)


@settings(max_examples=150, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), max_size=2),
    groups=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    isa_name=st.sampled_from(ISAS),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    keep=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_random_tensors(lead, groups, dtype, isa_name, density, keep, seed):
    bitmask.set_isa(isa_name)
    try:
        shape = (*lead, 4 * groups)
        dense = random_dense(shape, dtype, density, seed)
        parts = pack_24(dense, True, keep)
        assert_parts_equal(parts, reference.pack_24(dense, True, keep))
        assert_round_trip(random_two_four(shape, dtype, seed))
    finally:
        bitmask.set_isa(None)


# Gradients and compilers.


def test_gradients_are_masked(isa):
    dense = random_numbers(3, 8, density=1.0).requires_grad_()
    values, metadata = pack_24(dense, prune=True)
    assert values.requires_grad
    assert not metadata.requires_grad
    unpack_24(values * 2, metadata).sum().backward()
    assert torch.equal(dense.grad, 2.0 * reference.unpack_bits(metadata, 8))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 2, 12), (3, 0), (0, 4)], ids=str)
def test_gradcheck(shape):
    values, metadata = pack_24(random_numbers(*shape, density=1.0, dtype=torch.float64), prune=True)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: unpack_24(values, metadata), (values,))
    assert torch.autograd.gradgradcheck(lambda values: unpack_24(values, metadata), (values,))
    # Far from equal magnitudes a small step does not change which ones are kept.
    dense = torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64).reshape(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda dense: pack_24(dense, prune=True)[0], (dense,))
    assert torch.autograd.gradgradcheck(lambda dense: pack_24(dense, prune=True)[0], (dense,))


@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_forward_mode_and_transforms_are_refused(name):
    """Tangents would come back as zeros, which they are not."""
    dense = random_two_four((4, 20), torch.float32).nan_to_num()
    values, metadata = pack_24(dense)
    run, x = {"pack": (lambda x: pack_24(x)[0], dense), "unpack": (lambda x: unpack_24(x, metadata), values)}[name]
    with pytest.raises(NotImplementedError, match=f"{name}_24.default: has no forward-mode derivative"):
        torch.func.jvp(run, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        run(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match=f"{name}_24.default: has no gradient under torch.func"):
        torch.func.grad(lambda x: run(x).sum())(x)
    with forward_ad.dual_level():  # of something else
        assert torch.equal(run(x), run(x.clone()))


OPCHECK_INPUTS = {
    "matrix": lambda: random_two_four((4, 20), torch.float32),
    "no elements": lambda: torch.empty(0, 8),
    "3-D, all zero": lambda: torch.zeros(2, 3, 8, dtype=torch.float16),
    "integers": lambda: random_two_four((4, 20), torch.int32),
    "with gradient": lambda: random_two_four((4, 20), torch.float32).nan_to_num().requires_grad_(),
}


@pytest.mark.parametrize("name", OPCHECK_INPUTS)
def test_opcheck(name):
    dense = OPCHECK_INPUTS[name]()
    values, metadata = (part.detach() for part in pack_24(dense))
    library.opcheck(torch.ops.bitmask.pack_24.default, (dense, False, False))
    library.opcheck(torch.ops.bitmask.validate_24.default, (values, metadata))
    library.opcheck(torch.ops.bitmask.unpack_24.default, (values.requires_grad_(dense.requires_grad), metadata))
    library.opcheck(torch.ops.bitmask.prune_24.default, (dense.detach(), False))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_dynamic_shapes(fresh_dynamo, backend):
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def round_trip(dense):
        values, metadata = pack_24(dense, prune=True)
        validate_24(values, metadata)
        return unpack_24(values * 2, metadata)

    for rows, cols in [(4, 20), (5, 12), (70, 68)]:  # no multiples of eight: then gradients are other views
        dense = random_numbers(rows, cols).requires_grad_()
        doubled = round_trip(dense)
        assert torch.equal(doubled, 2 * unpack_24(*pack_24(dense, prune=True)))
        doubled.sum().backward()
        assert torch.equal(dense.grad, 2.0 * reference.unpack_bits(pack_24(dense, prune=True)[1], cols))
    assert counter.frame_count == 1


def test_compiled_validation_is_not_dropped(fresh_dynamo):
    """It returns nothing, so a compiler would take it for dead code."""
    values, metadata = pack_24(random_two_four((4, 20), torch.float32))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def check(values, metadata):
        validate_24(values, metadata)
        return values + 1

    check(values, metadata)
    with pytest.raises((ValueError, RuntimeError), match="metadata: row 0"):
        check(values, metadata ^ 1)


def test_fake_and_meta_tensors():
    values, metadata = pack_24(torch.empty(3, 20, device="meta", dtype=torch.int16))
    assert (values.shape, values.dtype, metadata.shape) == ((3, 10), torch.int16, (3, 3))
    assert unpack_24(values, metadata).shape == (3, 20)


# Bad input.

UNSUPPORTED = ["complex32", "complex64", "complex128", "float8_e8m0fnu", "float4_e2m1fn_x2", "quint8", "int4"]
BAD_DENSE = {
    "no tensor": (lambda: [[1.0, 0, 0, 0]], TypeError, "got list, expected a torch.Tensor"),
    "sparse": (lambda: torch.eye(4).to_sparse(), TypeError, "got a torch.sparse_coo tensor, expected a dense"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(4)]), TypeError, "got a nested tensor"),
    "compressed": (lambda: BitmaskTensor.from_dense(torch.eye(4)), TypeError, "got a BitmaskTensor"),
    "scalar": (lambda: torch.tensor(3.0), ValueError, r"got size \[\], expected at least one dimension"),
    "columns": (lambda: torch.eye(6), ValueError, r"got size \[6, 6\], expected a last size that is a multiple of 4"),
    "vector": (lambda: torch.ones(3), ValueError, r"got size \[3\], expected a last size that is a multiple of 4"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_DENSE.values(), ids=BAD_DENSE)
@pytest.mark.parametrize("function", [pack_24, prune_24])
def test_bad_dense(function, make, error, message):
    name = "dense" if function is pack_24 else "tensor"
    with pytest.raises(error, match=f"{name}: {message}"):
        function(make())


@pytest.mark.parametrize("dtype_name", UNSUPPORTED)
def test_dtypes_without_a_two_four_layout(dtype_name):
    dense = torch.empty(4, 4, dtype=getattr(torch, dtype_name))
    for function, name in ((pack_24, "dense"), (prune_24, "tensor")):
        with pytest.raises(TypeError, match=f"{name}: got (dtype torch.{dtype_name}, expected bool|a quantized)"):
            function(dense)
    with pytest.raises(TypeError, match="values: got"):
        unpack_24(dense, torch.empty(4, 1, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(4,), (5, 64), (7, 132), (2, 3, 20), (2, 70004)], ids=str)
def test_groups_of_more_than_two_are_refused(isa, dtype, shape):
    groups = math.prod(shape) // 4
    for place, count in itertools.product({0, groups // 2, groups - 1}, (3, 4)):
        dense = torch.zeros(shape, dtype=dtype)
        faulty = dense.view(torch.uint8).view(groups, 4, -1)[place::3]  # the message is about the first
        faulty[:, 4 - count :, 0] = 1
        row, col = divmod(4 * place, shape[-1])
        where = f"^dense: row {row}, columns {col} to {col + 3}: got {count} non-zeros, expected at most 2$"
        with pytest.raises(ValueError, match=where) as got:
            pack_24(dense)
        assert not isinstance(got.value, FormatError)
        validate_24(*pack_24(dense, prune=True))


@pytest.mark.parametrize(
    ("tensor", "transposable", "error", "message"),
    [
        (torch.ones(4, 8)[:, ::2], False, ValueError, r"tensor: got strides \[8, 2\], expected contiguous memory"),
        (torch.ones(1, 4).expand(3, 4), False, ValueError, r"tensor: got strides \[0, 1\], expected contiguous"),
        (torch.ones(6, 4), True, ValueError, r"tensor: got size \[6, 4\], expected \[..., rows, cols\], both"),
        (torch.ones(4), True, ValueError, r"tensor: got size \[4\], expected \[..., rows, cols\], both"),
        (torch.ones(4, 4).int(), True, TypeError, "tensor: got dtype torch.int32, expected float32, bfloat16"),
        (torch.ones(4, 4).to(torch.float8_e5m2), True, TypeError, "tensor: got dtype torch.float8_e5m2, expected"),
    ],
)
def test_what_cannot_be_pruned_in_place(tensor, transposable, error, message):
    before = tensor.clone()
    with pytest.raises(error, match=message):
        prune_24(tensor, transposable)
    with pytest.raises((ValueError, RuntimeError), match="tensor: got"):
        torch.ops.bitmask.prune_24(tensor, transposable)
    assert_bits_equal(tensor.clone(), before)


def good():
    """The parts of 1 2 0 0 | 0 0 3 4 | 5 0 6 0 and 0 7 8 0 | 9 0 0 1 | 0 2 0 3."""
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [7.0, 8.0, 9.0, 1.0, 2.0, 3.0]])
    return values, torch.tensor([[0xC3, 0x05], [0x96, 0x0A]], dtype=torch.uint8)


def flip(row, octet, bits):
    """A change of bits of the metadata."""

    def change(metadata):
        metadata[row, octet] ^= bits
        return metadata

    return change


BAD_PARTS = [
    (0, lambda t: t.tolist(), TypeError, "values: got list, expected a torch.Tensor"),
    (0, lambda t: t.to_sparse(), TypeError, "values: got a torch.sparse_coo tensor"),
    (0, BitmaskTensor.from_dense, TypeError, "values: got a BitmaskTensor"),
    (0, lambda t: t.to(torch.complex64), TypeError, "values: got dtype torch.complex64, expected bool, an integer"),
    (0, lambda t: t[0, 0], FormatError, r"values: got size \[\], expected \[..., cols / 2\]"),
    (0, lambda t: t[:, :5], FormatError, r"values: got size \[2, 5\], expected \[..., cols / 2\]"),
    (
        0,
        lambda t: t[:, :4],
        FormatError,
        r"metadata: got size \[2, 2\], expected \[2, 1\] .* for values of size \[2, 4\]",
    ),
    (0, lambda t: t[:1], FormatError, r"metadata: got size \[2, 2\], expected \[1, 2\]"),
    (0, lambda t: t.reshape(-1), FormatError, r"metadata: got size \[2, 2\], expected \[3\]"),
    (0, lambda t: t.to("meta"), ValueError, "metadata: got device cpu, expected meta, the device of values"),
    (
        0,
        lambda t: torch.empty(0, 2**62),
        FormatError,
        r"metadata: got size \[2, 2\], expected|expected fewer than 2\^63",
    ),
    (1, lambda t: None, TypeError, "metadata: got NoneType, expected a torch.Tensor"),
    (1, lambda t: t.to(torch.int8), TypeError, "metadata: got dtype torch.int8, expected torch.uint8"),
    (1, BitmaskTensor.from_dense, TypeError, "metadata: got a BitmaskTensor"),
    (1, lambda t: t[:, :1], FormatError, r"metadata: got size \[2, 1\], expected \[2, 2\]"),
    (1, lambda t: t.reshape(-1), FormatError, r"metadata: got size \[4\], expected \[2, 2\]"),
    (1, lambda t: t[0, 0], FormatError, r"metadata: got size \[\], expected \[2, 2\]"),
    (1, flip(0, 0, 0x04), FormatError, "metadata: row 0, columns 0 to 3: got 3 bits set, expected 2"),
    (1, flip(0, 0, 0x0C), FormatError, "metadata: row 0, columns 0 to 3: got 4 bits set, expected 2"),
    (1, flip(0, 0, 0x03), FormatError, "metadata: row 0, columns 0 to 3: got 0 bits set, expected 2"),
    (1, flip(1, 0, 0x80), FormatError, "metadata: row 1, columns 4 to 7: got 1 bits set, expected 2"),
    (1, flip(1, 1, 0x01), FormatError, "metadata: row 1, columns 8 to 11: got 3 bits set, expected 2"),
    (1, flip(1, 1, 0x10), FormatError, "metadata: row 1 has padding bits set past column 12, expected zeros"),
    (1, flip(0, 1, 0xC0), FormatError, "metadata: row 0 has padding bits set past column 12, expected zeros"),
    (1, flip(1, 0, 0x84), FormatError, "metadata: row 1, columns 0 to 3: got 1 bits set, expected 2"),
]


@pytest.mark.parametrize(
    ("index", "change", "error", "message"), BAD_PARTS, ids=[f"{b[0]}-{b[3][:45]}" for b in BAD_PARTS]
)
@pytest.mark.parametrize("function", [unpack_24, validate_24])
def test_bad_parts(isa, function, index, change, error, message):
    parts = list(good())
    function(*parts)
    parts[index] = change(parts[index])
    with pytest.raises(error, match=message) as got:
        function(*parts)
    assert isinstance(got.value, FormatError) == (error is FormatError)


@pytest.mark.parametrize("op", ["unpack_24", "validate_24"])
def test_bad_parts_straight_to_the_native_op(op):
    for index, change, error, _ in BAD_PARTS:
        parts = list(good())
        parts[index] = change(parts[index])
        if error is FormatError and not isinstance(parts[index], BitmaskTensor):
            with pytest.raises((ValueError, RuntimeError), match=r"(values|metadata): "):
                getattr(torch.ops.bitmask, op)(*parts)


@pytest.mark.parametrize("shape", [(300, 1000), (3, 200004)], ids=str)
def test_the_first_faulty_group_is_named_whatever_the_threads(isa, threads, shape):
    torch.set_num_threads(4)
    values, metadata = pack_24(random_two_four(shape, torch.float32))
    for row, octet in ((shape[0] - 1, 3), (1, shape[1] // 8 - 1), (1, 7)):
        metadata[row, octet] = 0
        for function in (unpack_24, validate_24):
            with pytest.raises(FormatError, match=f"row {row}, columns {8 * octet} to {8 * octet + 3}: got 0 bits"):
                function(values, metadata)


def test_storage_that_was_shrunk():
    values, metadata = good()
    metadata.untyped_storage().resize_(1)
    with pytest.raises(FormatError, match="metadata: got a storage of 1 bytes, expected at least 4"):
        unpack_24(values, metadata)
    dense = torch.zeros(4, 4)
    dense.untyped_storage().resize_(8)
    for function, name in ((pack_24, "dense"), (prune_24, "tensor")):
        with pytest.raises(ValueError, match=f"{name}: got a storage of 8 bytes, expected at least 64"):
            function(dense)


def metadata_is_valid(metadata, cols):
    """The rules of the layout, spelled out anew in plain Python."""
    for octets in metadata.tolist():
        word = int.from_bytes(bytes(octets), "little")
        if word >> cols or any((word >> col & 15).bit_count() != 2 for col in range(0, cols, 4)):
            return False
    return True


@pytest.mark.parametrize("cols", [4, 12, 64, 132, 2500])
def test_mutated_metadata_are_refused_or_unpack_as_the_reference_does(isa, cols):
    values, metadata = pack_24(random_two_four((5, cols), torch.int16))
    generator, refused = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        mutated = metadata.clone()
        place = int(torch.randint(0, mutated.numel(), (), generator=generator))
        mutated.view(-1)[place] = int(torch.randint(0, 256, (), generator=generator))
        if metadata_is_valid(mutated, cols):
            assert_bits_equal(unpack_24(values, mutated), reference.unpack_24(values, mutated))
        else:
            refused += 1
            for function in (unpack_24, validate_24):
                with pytest.raises(FormatError, match="metadata: row"):
                    function(values, mutated)
    assert 0 < refused < 200


# Another library's files.


@needs_releases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_parts_as_compressed_tensors(tmp_path, dtype):
    """Of numbers of different magnitudes in every group."""
    dense = torch.rand(24, 17, 4).argsort(dim=-1).add(1).reshape(24, 68).to(dtype)
    dense *= random_numbers(24, 68, density=1.0).sign().to(dtype)
    torch.save(dense, tmp_path / "dense.pt")
    run_release(
        LATE,
        f"""
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import sparse24_bitmask_compress
dense = torch.load({str(tmp_path / "dense.pt")!r})
torch.save(sparse24_bitmask_compress(dense), {str(tmp_path / "parts.pt")!r})
""",
    )
    assert_parts_equal(pack_24(dense, prune=True), torch.load(tmp_path / "parts.pt"))


# Other threads and processes.

WRITER = """
import threading, time, torch
from bitmask import FormatError
from bitmask.ops_two_four import linear_24, linear_24_backward_input, pack_24, unpack_24, validate_24

torch.set_num_threads(1)
dense = torch.ones(3000, 1024)
dense[:, ::2] = 0
values, metadata = pack_24(dense)
x, grad = torch.ones(40, 1024), torch.ones(2, 3000)
octets, place, proven = metadata.view(-1).numpy(), 200_000, int(metadata.view(-1)[200_000])
calls = [
    lambda: unpack_24(values, metadata),
    lambda: validate_24(values, metadata),
    lambda: linear_24(x[:1], values, metadata),
    lambda: linear_24(x, values, metadata),
    lambda: linear_24_backward_input(grad, values, metadata),
]
for call in calls:
    done, refused, accepted = False, 0, 0

    def write():
        while not done:
            octets[place] = 255
            time.sleep(0.0005)
            octets[place] = proven
            time.sleep(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        try:
            call()
            accepted += 1
        except FormatError as error:
            assert "metadata: row 1562" in str(error), error
            refused += 1
    done = True
    writer.join()
    print(accepted + refused > 0)
"""


def test_metadata_written_meanwhile_are_refused_or_harmless():
    """Where values lie does not depend on the metadata, so nothing is read or written out of bounds."""
    assert run_python(WRITER).stdout.splitlines() == ["True"] * 5


FORK = """
import torch
from bitmask.ops_two_four import pack_24, prune_24, unpack_24

torch.set_num_threads(2)
dense = torch.ones(3000, 1000)

def works():
    # NumPy compares without torch's own threads, which do not survive a fork.
    pruned = torch.from_numpy(dense.numpy().copy())
    prune_24(pruned)
    restored = unpack_24(*pack_24(dense, prune=True)).numpy()
    return (pruned.numpy() == restored).all() and (restored.reshape(-1, 4) == [1, 1, 0, 0]).all()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("use_before", [True, False])
def test_ops_work_in_a_forked_child(use_before):
    assert_works_after_fork(FORK, use_before)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**31 + 64,), (2**15 + 1, 2**16)], ids=str)
def test_more_than_2_to_the_31_elements(shape):
    if available_memory() < 8 << 30:
        pytest.skip("needs 8 GB of free memory")
    dense = torch.zeros(shape, dtype=torch.int8)
    flat = dense.view(-1)
    places = [0, 70000, 2**31 - 1, 2**31, flat.numel() - 1]
    for number, place in enumerate(places):
        flat[place] = 100 + number
    values, metadata = pack_24(dense)
    assert values.numel() == flat.numel() // 2
    assert values.sum(dtype=torch.int64).item() == sum(range(100, 105))
    del dense, flat
    restored = unpack_24(values, metadata).view(-1)
    assert [restored[place].item() for place in places] == [100, 101, 102, 103, 104]
    assert int(restored.count_nonzero()) == 5
    metadata.view(-1)[-1] = 0
    with pytest.raises(FormatError, match=f"columns {shape[-1] - 8} to {shape[-1] - 5}: got 0 bits"):
        validate_24(values, metadata)
