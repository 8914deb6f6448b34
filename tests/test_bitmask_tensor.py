"""BitmaskTensor: what is its own, beside what test_compressed_tensor.py says of all compressed tensors."""

import pytest
import torch
from conftest import (
    allows_decompression,
    assert_bits_equal,
    assert_is_compressed,
    assert_parts_equal,
    parts_of,
    random_dense,
    random_numbers,
)

from bitmask import BitmaskTensor, FormatError, ops

pytestmark = pytest.mark.usefixtures("decompression_is_an_error")


@pytest.fixture
def dense():
    return random_numbers(6, 20)


@pytest.fixture
def compressed(dense):
    return BitmaskTensor.from_dense(dense)


# Construction and attributes.


@pytest.mark.parametrize("shape", [(), (0,), (5,), (5, 0), (0, 5), (3, 9), (2, 3, 4, 10)], ids=str)
def test_from_dense_and_back(dtype, shape):
    dense = random_dense(shape, dtype)
    compressed = BitmaskTensor.from_dense(dense, keep_negative_zero=True)
    assert_bits_equal(compressed.to_dense(), dense)
    assert (compressed.shape, compressed.dtype, compressed.device) == (dense.shape, dense.dtype, dense.device)
    assert_parts_equal(parts_of(compressed), ops.compress(dense, keep_negative_zero=True))


@pytest.mark.parametrize(("keep_negative_zero", "nnz"), [(False, 1), (True, 2)])
def test_keep_negative_zero(keep_negative_zero, nnz):
    dense = torch.tensor([-0.0, 1.0])
    compressed = BitmaskTensor.from_dense(dense, keep_negative_zero=keep_negative_zero)
    assert compressed.nnz == nnz
    assert torch.signbit(compressed.to_dense())[0].item() is keep_negative_zero


def test_attributes(compressed, dense):
    nnz = int((dense != 0).sum())
    assert compressed.nnz == nnz
    assert compressed.sparsity == pytest.approx(1 - nnz / 120)
    assert compressed.compressed_nbytes == nnz * 4 + 6 * 3 + 6 * 8
    assert compressed.nbytes == 480
    assert (compressed.ndim, compressed.numel(), compressed.stride()) == (2, 120, (20, 1))
    assert compressed.layout is torch.strided
    assert compressed.is_leaf
    assert not compressed.requires_grad
    assert not compressed.is_sparse
    assert len(compressed) == 6


def test_from_parts_does_not_copy(compressed, dense):
    again = BitmaskTensor.from_parts(*parts_of(compressed), [6, 20])
    assert_is_compressed(again, dense)
    assert [part.data_ptr() for part in parts_of(again)] == [part.data_ptr() for part in parts_of(compressed)]


def test_from_parts_shapes_flat_bitmasks(dense):
    values, bitmasks, row_offsets = ops.compress(dense)
    tensor = BitmaskTensor.from_parts(values, bitmasks, row_offsets, [2, 3, 20])
    assert tensor.bitmasks.shape == (2, 3, 3)
    assert_is_compressed(tensor, dense.reshape(2, 3, 20))


def test_from_parts_cuts_gradients(dense):
    values, bitmasks, row_offsets = ops.compress(dense.requires_grad_())
    assert values.requires_grad
    assert not BitmaskTensor.from_parts(values, bitmasks, row_offsets, [6, 20]).values.requires_grad


# Conversions and copies.


def test_scalars():
    assert BitmaskTensor.from_dense(torch.tensor(3.0)).tolist() == 3.0


@pytest.mark.parametrize("to", [torch.complex64, torch.complex128])
def test_to_complex(dense, compressed, to):
    assert_is_compressed(compressed.to(to), dense.to(to))


@allows_decompression
def test_conversion_from_a_dtype_without_zero():
    """Elements of float8_e8m0fnu that are not stored are 2^-127, not 0."""
    exponents = torch.tensor([0, 5, 0, 127], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    converted = BitmaskTensor.from_dense(exponents).to(torch.float32)
    assert torch.equal(torch.as_tensor(converted.to_dense()), exponents.to(torch.float32))


def test_pickles_name_what_earlier_versions_named(compressed):
    """So that they load, both ways."""
    rebuild, (*parts, shape, is_parameter) = compressed.__reduce_ex__(2)
    assert (rebuild.__module__, rebuild.__qualname__) == ("bitmask.bitmask_tensor", "_rebuild")
    assert_parts_equal(parts, parts_of(compressed))
    assert (shape, is_parameter) == ((6, 20), False)


def test_unpickling_proves_the_parts(compressed):
    rebuild, (values, bitmasks, row_offsets, *rest) = compressed.__reduce_ex__(2)
    with pytest.raises(FormatError, match=r"row_offsets\[0\]: got 1, expected 0"):
        rebuild(values, bitmasks, row_offsets + 1, *rest)


# Parts that someone changed.


def three_rows():
    return BitmaskTensor.from_parts(
        torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        torch.tensor([[5, 1], [0, 0], [3, 0]], dtype=torch.uint8),
        torch.tensor([0, 3, 3]),
        [3, 9],
    )


def test_changed_values_of_the_same_number_are_new_contents():
    tensor = three_rows()
    tensor.values = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    assert tensor[0].tolist() == [9, 0, 8, 0, 0, 0, 0, 0, 7]
    assert tensor[2:].tolist() == [[6, 5, 0, 0, 0, 0, 0, 0, 0]]


def test_replaced_part_at_the_same_address_is_proven_anew():
    """An address is no identity: the next tensor may be given that of the part it replaces."""
    for _ in range(20):
        tensor = three_rows()
        address = id(tensor.row_offsets)
        tensor.row_offsets = None
        candidates = [torch.tensor([1, 4, 4]) for _ in range(20)]
        tensor.row_offsets = next((t for t in candidates if id(t) == address), candidates[0])
        with pytest.raises(FormatError, match=r"row_offsets\[0\]: got 1, expected 0"):
            tensor[0]


def test_inference_mode(dense):
    """Torch does not count writes to inference tensors, so their parts are proven each time."""
    with torch.inference_mode():
        compressed = BitmaskTensor.from_dense(dense)
        assert_is_compressed(compressed[2:4], dense[2:4])
    assert_is_compressed(compressed[1], dense[1])
    with torch.inference_mode():
        compressed.row_offsets.add_(1)
    with pytest.raises(FormatError, match=r"row_offsets\[0\]: got 1, expected 0"):
        compressed[1]


@pytest.mark.parametrize("cut", [lambda t: t[2:4], lambda t: t[0], lambda t: t.split(2), list])
def test_rows_without_data_are_refused(compressed, cut):
    with pytest.raises(ValueError, match="tensor: got a meta tensor, expected one with data, which says where"):
        cut(compressed.to("meta"))
