"""The oracle itself, against plain Python, NumPy and hand-made examples."""

import numpy as np
import pytest
import torch
from conftest import (
    COMPLEX_PARTS,
    MANTISSA_BITS,
    assert_bits_equal,
    assert_parts_equal,
    element_size,
    octets_of,
    random_dense,
    special_words,
    tensor_of_words,
)

from bitmask import BitmaskTensor, NaiveBitmaskTensor, reference

SIGNED_ZERO_DTYPES = {*MANTISSA_BITS, torch.float8_e4m3fn}


def is_zero(word: int, dtype: torch.dtype) -> bool:
    """Whether a bit pattern equals zero as a number."""
    bits = 8 * element_size(dtype)
    if dtype in COMPLEX_PARTS:
        low, high = word % (1 << bits // 2), word >> bits // 2
        return is_zero(low, COMPLEX_PARTS[dtype]) and is_zero(high, COMPLEX_PARTS[dtype])
    return word == 0 or (dtype in SIGNED_ZERO_DTYPES and word == 1 << (bits - 1))


def compress_in_python(words: list[list[int]], dtype: torch.dtype) -> tuple[list[int], list[list[int]], list[int]]:
    """The layout built word by word from the rows of a matrix: the words kept, the bytes of each row, the offsets."""
    kept: list[int] = []
    bitmasks, offsets = [], []
    for row in words:
        offsets.append(len(kept))
        octets = [0] * -(-len(row) // 8)
        for column, word in enumerate(row):
            if not is_zero(word, dtype):
                kept.append(word)
                octets[column // 8] |= 1 << (column % 8)
        bitmasks.append(octets)
    return kept, bitmasks, offsets


def test_zero_rule_on_special_words(dtype):
    words = special_words(dtype)
    dense = tensor_of_words(words, dtype)
    assert reference.nonzero_mask(dense).tolist() == [not is_zero(word, dtype) for word in words]
    assert reference.nonzero_mask(dense, keep_negative_zero=True).tolist() == [word != 0 for word in words]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float16,
        torch.bfloat16,
    ],
    ids=str,
)
def test_zero_rule_is_comparison_with_zero_for_every_value_of_small_floats(dtype):
    words = range(1 << 8 * element_size(dtype))
    dense = torch.from_numpy(np.array(words, dtype=f"uint{8 * element_size(dtype)}").view(np.uint8)).view(dtype)
    assert torch.equal(reference.nonzero_mask(dense), dense.float() != 0)


def test_zero_rule_without_a_zero():
    """float8_e8m0fnu counts from 2^-127: its all-clear pattern is not a zero, but dropping it loses nothing."""
    dense = tensor_of_words(range(256), torch.float8_e8m0fnu)
    assert reference.nonzero_mask(dense).tolist() == [False] + [True] * 255
    assert_bits_equal(reference.decompress(*reference.compress(dense), dense.shape), dense)


def test_zero_rule_ignores_flushing_of_subnormals(flush_denormals):
    dense = tensor_of_words([1, 1 << 31 | 1, 0, 1 << 31], torch.float32)
    assert reference.nonzero_mask(dense).tolist() == [True, True, False, False]


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 20])
def test_compress_equals_plain_python(dtype, cols):
    pool = special_words(dtype)
    words = [[pool[(row * 7 + col * col) % len(pool)] for col in range(cols)] for row in range(4)]
    dense = tensor_of_words([word for row in words for word in row], dtype, [4, cols])
    kept, bitmasks, offsets = compress_in_python(words, dtype)
    values, got_bitmasks, got_offsets = reference.compress(dense)
    assert_bits_equal(values, tensor_of_words(kept, dtype) if kept else torch.empty(0, dtype=dtype))
    assert got_bitmasks.dtype == torch.uint8
    assert got_bitmasks.tolist() == bitmasks
    assert got_offsets.dtype == torch.int64
    assert got_offsets.tolist() == offsets


@pytest.mark.parametrize("shape", [(), (0,), (5,), (5, 0), (0, 5), (3, 9), (2, 0, 3), (2, 3, 4, 10)])
def test_decompress_inverts_compress(shape):
    dense = random_dense(shape, torch.float32)
    parts = reference.compress(dense, keep_negative_zero=True)
    assert_bits_equal(reference.decompress(*parts, shape), dense)


def test_dropped_negative_zero_comes_back_positive():
    dense = torch.tensor([-0.0, 2.0, 0.0])
    assert_bits_equal(reference.decompress(*reference.compress(dense), [3]), torch.tensor([0.0, 2.0, 0.0]))


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 64, 65])
def test_pack_bits_equals_numpy_and_unpacks(cols):
    mask = torch.rand(3, 2, cols, generator=torch.Generator().manual_seed(cols)) < 0.5
    packed = reference.pack_bits(mask)
    assert packed.tolist() == np.packbits(mask.numpy(), axis=-1, bitorder="little").tolist()
    assert torch.equal(reference.unpack_bits(packed, cols), mask)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), (1, 1)), ((0,), (1, 0)), ((5,), (1, 5)), ((3, 4), (3, 4)), ((2, 3, 4), (6, 4)), ((2, 0, 3), (0, 3))],
)
def test_rows_and_columns(shape, expected):
    assert reference.rows_and_columns(shape) == expected


@pytest.mark.parametrize("keep_negative_zero", [False, True])
def test_naive_tensor_has_the_face_of_bitmask_tensor(keep_negative_zero):
    dense = torch.tensor([[1.0, -0.0, 2.0], [0.0, float("nan"), 0.0]])
    naive = NaiveBitmaskTensor.from_dense(dense, keep_negative_zero=keep_negative_zero)
    native = BitmaskTensor.from_dense(dense, keep_negative_zero=keep_negative_zero)
    assert_parts_equal(
        (naive.values, naive.bitmasks, naive.row_offsets), (native.values, native.bitmasks, native.row_offsets)
    )
    assert (naive.shape, naive.dtype, naive.nnz) == (native.shape, native.dtype, native.nnz)
    assert naive.compressed_nbytes == native.compressed_nbytes
    assert_bits_equal(naive.to_dense(), native.to_dense())


def test_conjugate_views_are_read_as_the_numbers_they_show():
    dense = torch.tensor([1 + 2j, 0j, 3 - 4j])
    values, _, _ = reference.compress(dense.conj())
    assert octets_of(values).tolist() == octets_of(torch.tensor([1 - 2j, 3 + 4j])).tolist()
