"""torch's CUTLASS layout of 2:4 tensors, both ways, against torch's own conversions and by hand."""

import pytest
import torch
from conftest import assert_bits_equal, random_dense, random_numbers
from torch.sparse import SparseSemiStructuredTensorCUTLASS, _semi_structured_conversions

from bitmask import BitmaskTensor, FormatError
from bitmask.cutlass_layout import from_cutlass, to_cutlass
from bitmask.ops_two_four import pack_24, unpack_24

from_dense = _semi_structured_conversions.sparse_semi_structured_from_dense_cutlass
to_dense = _semi_structured_conversions.sparse_semi_structured_to_dense_cutlass

# The least sizes of each dtype.
LEAST = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128), torch.float32: (32, 32)}


@pytest.fixture(params=LEAST, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[(1, 1), (1, 3), (3, 1), (4, 2), (5, 5)], ids=str)
def shape(request, dtype):
    return tuple(least * times for least, times in zip(LEAST[dtype], request.param, strict=True))


def random_weight(shape, dtype, density=0.8, seed=0):
    """2:4 numbers, for float32 1:2; some groups have fewer non-zeros."""
    if dtype == torch.float32:
        weight = random_numbers(*shape, density=density, seed=seed)
        first = torch.rand(shape[0], shape[1] // 2, generator=torch.Generator().manual_seed(seed)) < 0.5
        weight = (
            weight.bfloat16().float()
        )  # torch moves it as halves, of which it changes those that are signalling NaNs
        return torch.where(torch.stack([first, ~first], dim=-1).reshape(shape), weight, 0.0)
    numbers = random_numbers(*shape, density=density, seed=seed).mul(20).round().to(dtype)
    return unpack_24(*pack_24(numbers, prune=True))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_same_bits_as_torch(dtype, shape, density):
    weight = random_weight(shape, dtype, density)
    packed, meta = to_cutlass(*pack_24(weight))
    expected_packed, expected_meta = from_dense(weight)
    assert_bits_equal(packed, expected_packed)
    assert_bits_equal(meta, expected_meta)


def test_torch_reads_it(dtype, shape):
    weight = random_weight(shape, dtype)
    packed, meta = to_cutlass(*pack_24(weight))
    assert torch.equal(to_dense(packed, meta), weight)
    tensor = SparseSemiStructuredTensorCUTLASS(
        weight.shape,
        packed=packed,
        meta=meta,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )
    assert torch.equal(tensor.to_dense(), weight)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_what_torch_makes_is_read(dtype, shape, density):
    weight = random_weight(shape, dtype, density)
    values, metadata = from_cutlass(*from_dense(weight))
    assert torch.equal(unpack_24(values, metadata), weight)
    if dtype != torch.float32:
        for got, expected in zip((values, metadata), pack_24(weight), strict=True):
            assert_bits_equal(got, expected)


def test_any_bits_come_back(dtype):
    """Values are not looked at but in float32, where NaNs keep their payloads."""
    shape = tuple(3 * least for least in LEAST[dtype])
    if dtype == torch.float32:
        weight = random_weight(shape, dtype)
        weight[weight != 0] = random_dense((int((weight != 0).sum()),), dtype, density=1.0)
        weight = torch.where(weight == 0, 0.0, weight)  # no -0.0, which is dropped
    else:
        weight = unpack_24(*pack_24(random_dense(shape, dtype, density=1.0), prune=True))
    values, metadata = from_cutlass(*to_cutlass(*pack_24(weight)))
    assert_bits_equal(unpack_24(values, metadata), weight)


def test_values_are_not_copied(dtype):
    weight = random_weight(LEAST[dtype], dtype, density=1.0)
    values, metadata = pack_24(weight)
    packed, meta = to_cutlass(values, metadata)
    if dtype != torch.float32:
        assert packed.data_ptr() == values.data_ptr()
    assert from_cutlass(packed, meta)[0].data_ptr() == packed.data_ptr()


def test_strided_parts(dtype):
    weight = random_weight(tuple(2 * least for least in LEAST[dtype]), dtype)
    strided = [torch.stack([part, part], dim=-1)[..., 0] for part in pack_24(weight)]
    parts = to_cutlass(*strided)
    for got, expected in zip(parts, from_dense(weight), strict=True):
        assert_bits_equal(got, expected)
    strided = [torch.stack([part, part], dim=-1)[..., 0] for part in parts]
    assert torch.equal(unpack_24(*from_cutlass(*strided)), weight)


# By hand: the examples of FORMAT.md.


def test_codes_of_one_row():
    """0 1 | 0 2 | 1 2 | 0 3 | 1 3 | 2 3 and then 0 1: codes 4 8 9 c d e 4..., the first in the lowest bits."""
    weight = torch.zeros(32, 64, dtype=torch.float16)
    for group, columns in enumerate([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)] + [(0, 1)] * 10):
        for column in columns:
            weight[0, 4 * group + column] = 1
    _, meta = to_cutlass(*pack_24(weight))
    memory = meta.view(-1).tolist()
    # Row 0 is on top of column pairs: its first two are in the first four of memory, the other two 64 later.
    assert [word & 0xFFFF for word in memory[0:4]] == [0xC984, 0xEEEE, 0x44ED, 0xEEEE]
    assert [word & 0xFFFF for word in memory[64:68]] == [0x4444, 0xEEEE, 0x4444, 0xEEEE]


@pytest.mark.parametrize(
    ("dtype", "places"),
    [
        (torch.float16, {(0, 0): 0, (8, 0): 1, (0, 1): 2, (8, 1): 3, (16, 0): 4, (1, 0): 8, (0, 2): 64, (31, 3): 127}),
        (torch.int8, {(0, 0): 0, (8, 0): 1, (0, 1): 2, (8, 1): 3, (1, 0): 4, (7, 0): 28, (0, 2): 32, (15, 3): 63}),
        (torch.float32, {(0, 0): 0, (8, 0): 1, (0, 1): 2, (8, 1): 3, (16, 0): 4, (1, 0): 8, (0, 2): 64, (31, 3): 127}),
    ],
)
def test_where_meta_lie(dtype, places):
    """Of the least sizes: the place in memory of the word for some rows and columns of words."""
    rows, cols = LEAST[dtype]
    for (row, word), place in places.items():
        weight = torch.zeros(rows, cols, dtype=dtype)
        weight[row, word * cols // 4] = 1  # what makes this word another than all the others
        _, meta = to_cutlass(*pack_24(weight))
        memory = meta.view(-1)
        assert (memory != memory.mode().values).nonzero().tolist() == [[place]]


def test_float32_takes_the_second_of_two_zeros():
    weight = torch.zeros(32, 32)
    weight[0, :8] = torch.tensor([0, 0, 5.0, 0, 0, 6.0, 0, 0])
    values, metadata = pack_24(weight)
    assert values[0, :4].tolist() == [5, 0, 6, 0]
    packed, meta = to_cutlass(values, metadata)
    assert packed[0, :4].tolist() == [0, 5, 6, 0]
    assert meta.view(-1)[0].item() & 0xFFFF == 0xEE4E
    assert torch.equal(unpack_24(*from_cutlass(packed, meta)), weight)


def test_stored_zeros_of_float32_do_not_count():
    """Parts that store two of a pair, one of them zero, be it -0.0."""
    values = torch.zeros(32, 16)
    values[3, :4] = torch.tensor([7.0, -0.0, -0.0, 8.0])
    metadata = torch.full((32, 4), 0b00110011, dtype=torch.uint8)
    packed, meta = to_cutlass(values, metadata)
    assert packed[3, :4].tolist() == [7, 0, 8, 0]
    assert torch.equal(to_dense(packed, meta), unpack_24(values, metadata).abs())


# Bad input.


def good(dtype):
    return pack_24(random_weight(LEAST[dtype], dtype))


@pytest.mark.parametrize(
    ("dtype", "rows", "cols"),
    [
        (torch.float16, 16, 64),
        (torch.float16, 32, 32),
        (torch.bfloat16, 33, 64),
        (torch.bfloat16, 32, 68),
        (torch.int8, 8, 128),
        (torch.int8, 16, 64),
        (torch.float32, 16, 32),
        (torch.float32, 32, 16),
        (torch.float16, 0, 64),
        (torch.float16, 32, 0),
    ],
)
def test_sizes_that_the_layout_has_not(dtype, rows, cols):
    least_rows, least_cols = LEAST[dtype]
    expected = f"expected multiples of {least_rows} rows and {least_cols} columns for {dtype}"
    got = rf"got size \[{rows}, {cols // 2}\], {rows} rows of {cols} columns, {expected}"
    values, metadata = pack_24(torch.zeros(rows, cols, dtype=dtype))
    with pytest.raises(ValueError, match=f"values: {got}"):
        to_cutlass(values, metadata)
    with pytest.raises(ValueError, match=f"packed: {got}"):
        from_cutlass(values, torch.zeros(rows, cols // 16, dtype=torch.int16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtypes_that_the_layout_has_not(dtype):
    values = torch.zeros(32, 32, dtype=dtype)
    with pytest.raises(TypeError, match=f"values: got dtype {dtype}, expected float16, bfloat16, float32 or int8"):
        to_cutlass(values, torch.zeros(32, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=f"packed: got dtype {dtype}, expected float16, bfloat16, float32 or int8"):
        from_cutlass(values, torch.zeros(32, 4, dtype=torch.int16))


def test_other_numbers_of_dimensions(dtype):
    values, metadata = good(dtype)
    with pytest.raises(ValueError, match=r"values: got size \[1, .*\], expected \[rows, cols / 2\]"):
        to_cutlass(values[None], metadata[None])
    packed, meta = to_cutlass(values, metadata)
    with pytest.raises(ValueError, match=r"packed: got size .*, expected \[rows, cols / 2\]"):
        from_cutlass(packed[0], meta)


def test_what_is_no_dense_tensor(dtype):
    values, metadata = good(dtype)
    packed, meta = to_cutlass(values, metadata)
    for function, names, parts in (
        (to_cutlass, ("values", "metadata"), (values, metadata)),
        (from_cutlass, ("packed", "meta"), (packed, meta)),
    ):
        for index, name in enumerate(names):
            for other, got in ((None, "NoneType"), (BitmaskTensor.from_dense(parts[index]), "a BitmaskTensor")):
                changed = list(parts)
                changed[index] = other
                with pytest.raises(TypeError, match=f"{name}: got {got}"):
                    function(*changed)


def test_faulty_metadata_of_ours(dtype):
    values, metadata = good(dtype)
    metadata[5, 1] = 0xFF
    with pytest.raises(FormatError, match="metadata: row 5, columns 8 to 11: got 4 bits set, expected 2"):
        to_cutlass(values, metadata)


def test_float32_pairs_that_hold_two():
    weight = random_weight((32, 64), torch.float32)
    weight[7, 4:8] = torch.tensor([0, 0, 1.0, 2.0])
    weight[9, :4] = torch.tensor([1.0, 2.0, 0, 0])
    with pytest.raises(ValueError, match=r"values: row 7, columns 6 to 7: got 2 non-zeros, expected at most 1") as got:
        to_cutlass(*pack_24(weight))
    assert not isinstance(got.value, FormatError)


def test_meta_of_the_wrong_dtype_or_size(dtype):
    packed, meta = to_cutlass(*good(dtype))
    other = torch.int16 if meta.dtype == torch.int32 else torch.int32
    for wrong, message in (
        (meta.view(other), f"meta: got dtype {other}, expected {meta.dtype} for {dtype}"),
        (meta.to(torch.int64), f"meta: got dtype torch.int64, expected {meta.dtype}"),
        (meta[:8], r"meta: got size \[8, \d+\], expected \[\d+, \d+\] for packed of size"),
        (meta[:, :1], r"meta: got size \[\d+, 1\], expected"),
        (meta.reshape(-1), r"meta: got size \[\d+\], expected"),
        (meta[None], r"meta: got size \[1, \d+, \d+\], expected"),
    ):
        with pytest.raises(FormatError, match=message):
            from_cutlass(packed, wrong)


@pytest.mark.parametrize("code", [0b0000, 0b0101, 0b1010, 0b1111, 0b0001, 0b0110, 0b1011, 0b0010])
@pytest.mark.parametrize("group", [0, 1, 6])
def test_codes_that_are_none(code, group):
    """Two equal indices, or descending ones."""
    packed, meta = to_cutlass(*good(torch.int8))
    meta.view(-1)[0] = (int(meta.view(-1)[0]) & ~(15 << 4 * group)) | code << 4 * group
    where = f"row 0, columns {4 * group} to {4 * group + 3}: got indices {code & 3} and {code >> 2}"
    with pytest.raises(FormatError, match=f"meta: {where}, expected one of 0 and 1, 0 and 2, 1 and 2"):
        from_cutlass(packed, meta)


@pytest.mark.parametrize("code", [0b1000, 0b1001, 0b1100, 0b1101, 0b0000])
@pytest.mark.parametrize("pair", [0, 2])
def test_codes_that_are_none_in_float32(code, pair):
    """Halves of both elements of a pair."""
    packed, meta = to_cutlass(*good(torch.float32))
    meta.view(-1)[0] = 0x4444 & ~(15 << 4 * pair) | code << 4 * pair
    where = f"row 0, columns {2 * pair} to {2 * pair + 1}: got indices {code & 3} and {code >> 2}"
    with pytest.raises(FormatError, match=f"meta: {where}, expected one of 0 and 1, 2 and 3"):
        from_cutlass(packed, meta)


def test_the_first_faulty_code_is_named():
    packed, meta = to_cutlass(*pack_24(random_weight((64, 128), torch.float16)))
    meta[20:] = -1  # indices 3 and 3; the rows of memory are not those of the tensor
    with pytest.raises(FormatError, match="meta: row 0, columns 64 to 67: got indices 3 and 3"):
        from_cutlass(packed, meta)
