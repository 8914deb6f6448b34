"""Bytes written down by hand: the layout that files of every version must keep.

In golden/layout.json and two_four.json `dense` (and `restored`, where it is another tensor: a -0.0 was dropped, or
elements were pruned) holds the elements as numbers in hexadecimal; `values`, `bitmasks` and `metadata` hold bytes as
they lie in memory, little-endian. In golden/cutlass.json, which torch's conversion has made, tensors are zero but for
[row, column, number]; `meta` are bytes again.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import assert_bits_equal, assert_parts_equal, tensor_of_words

from bitmask import BitmaskTensor, ops, ops_two_four, reference
from bitmask.cutlass_layout import from_cutlass, to_cutlass


def cases_of(name):
    return json.loads((Path(__file__).parent / "golden" / name).read_text())


CASES = cases_of("layout.json")


@pytest.fixture(params=CASES, ids=lambda case: case["name"])
def case(request):
    return request.param


def tensor_of_bytes(text, dtype, shape):
    octets = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
    return octets.view(dtype).reshape(shape)


def dense_of(case, field="dense"):
    words = [int(word, 16) for word in case.get(field, case["dense"]).split()]
    return tensor_of_words(words, getattr(torch, case["dtype"]), case["shape"])


def parts_of(case):
    shape = case["shape"] or [1]
    return (
        tensor_of_bytes(case["values"], getattr(torch, case["dtype"]), [-1]),
        tensor_of_bytes(case["bitmasks"], torch.uint8, [*shape[:-1], math.ceil(shape[-1] / 8)]),
        torch.tensor(case["row_offsets"], dtype=torch.int64),
    )


def test_compress(isa, case):
    assert_parts_equal(ops.compress(dense_of(case), case.get("keep_negative_zero", False)), parts_of(case))


def test_decompress(isa, case):
    assert_bits_equal(ops.decompress(*parts_of(case), case["shape"]), dense_of(case, "restored"))


def test_reference(case):
    parts = reference.compress(dense_of(case), case.get("keep_negative_zero", False))
    assert_parts_equal(parts, parts_of(case))
    assert_bits_equal(reference.decompress(*parts, case["shape"]), dense_of(case, "restored"))


def test_bitmask_tensor(case):
    tensor = BitmaskTensor.from_parts(*parts_of(case), case["shape"])
    assert_bits_equal(tensor.to_dense(), dense_of(case, "restored"))
    assert tensor.nnz == len(bytes.fromhex(case["values"])) // tensor.element_size()


# 2:4.


@pytest.fixture(params=cases_of("two_four.json"), ids=lambda case: case["name"])
def two_four(request):
    return request.param


def parts_of_two_four(case):
    *leading, cols = case["shape"]
    return (
        tensor_of_bytes(case["values"], getattr(torch, case["dtype"]), [*leading, cols // 2]),
        tensor_of_bytes(case["metadata"], torch.uint8, [*leading, math.ceil(cols / 8)]),
    )


def test_pack_24(isa, two_four):
    dense, options = dense_of(two_four), [two_four.get(name, False) for name in ("prune", "keep_negative_zero")]
    parts = parts_of_two_four(two_four)
    assert_parts_equal(ops_two_four.pack_24(dense, *options), parts)
    assert_parts_equal(reference.pack_24(dense, *options), parts)


def test_unpack_24(isa, two_four):
    parts, dense = parts_of_two_four(two_four), dense_of(two_four, "restored")
    ops_two_four.validate_24(*parts)
    assert_bits_equal(ops_two_four.unpack_24(*parts), dense)
    assert_bits_equal(reference.unpack_24(*parts), dense)


def tensor_of_entries(entries, dtype, shape):
    tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
    for row, col, number in entries:
        tensor[row, col] = number
    return tensor


@pytest.mark.parametrize("case", cases_of("cutlass.json"), ids=lambda case: case["name"])
def test_cutlass_layout(case):
    rows, cols = case["shape"]
    dense = tensor_of_entries(case["dense"], case["dtype"], case["shape"])
    packed = tensor_of_entries(case["packed"], case["dtype"], [rows, cols // 2])
    meta = tensor_of_bytes("".join(case["meta"]), torch.int32 if case["dtype"] == "int8" else torch.int16, [rows, -1])
    assert_parts_equal(to_cutlass(*ops_two_four.pack_24(dense)), (packed, meta))
    assert_bits_equal(ops_two_four.unpack_24(*from_cutlass(packed, meta)), dense)
