"""Bytes written down by hand: the layout that files of every version must keep.

In golden/layout.json `dense` (and `restored`, where a dropped -0.0 makes it another tensor) holds the elements as
numbers in hexadecimal; `values` and `bitmasks` hold bytes as they lie in memory, little-endian.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import assert_bits_equal, assert_parts_equal, tensor_of_words

from bitmask import BitmaskTensor, ops, reference

CASES = json.loads((Path(__file__).parent / "golden" / "layout.json").read_text())


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
