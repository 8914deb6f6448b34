"""BitmaskTensor to and from torch's sparse layouts, against torch's own conversions of the dense tensor."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import (
    ALL_DTYPES,
    WIDTH_DTYPES,
    assert_bits_equal,
    assert_parts_equal,
    assert_works_after_fork,
    mutations,
    parts_are_valid,
    random_dense,
    random_numbers,
    special_words,
    tensor_of_words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from bitmask import BitmaskTensor, FormatError, SemiStructuredTensor, calls, ops, ops_convert

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")

MATRIX_LAYOUTS = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr)
LAYOUTS = (torch.sparse_coo, *MATRIX_LAYOUTS)
ALL_LAYOUTS = (*LAYOUTS, torch.sparse_bsc)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
matrix_layouts = pytest.mark.parametrize("layout", MATRIX_LAYOUTS, ids=str)
all_layouts = pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=str)


@pytest.fixture(autouse=True)
def check_invariants():
    """Every sparse tensor that is made is checked by torch, unless a test says otherwise."""
    with torch.sparse.check_sparse_tensor_invariants(True):
        yield


def convert(tensor, layout, block=(2, 4)):
    """A BitmaskTensor in one of torch's layouts."""
    if layout is torch.sparse_bsr:
        return tensor.to_bsr(block)
    return {torch.sparse_coo: tensor.to_coo, torch.sparse_csr: tensor.to_csr, torch.sparse_csc: tensor.to_csc}[layout]()


def by_torch(dense, layout, block=(2, 4), dense_dim=0):
    """The same of a dense tensor, by torch; as integers, since it does not convert all dtypes."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(dense.element_size())
    words = dense if integers is None else dense.view(integers)
    if layout is torch.sparse_coo:
        sparse = words.to_sparse(words.ndim - dense_dim)
        return torch.sparse_coo_tensor(
            sparse.indices(), sparse.values().view(dense.dtype), dense.shape, is_coalesced=True
        )
    blocks = {"blocksize": block} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    sparse = words.to_sparse(layout=layout, dense_dim=dense_dim or None, **blocks)
    starts, positions, values = members(sparse)
    return torch.sparse_compressed_tensor(starts, positions, values.view(dense.dtype), dense.shape, layout=layout)


def members(sparse):
    """The tensors that a sparse tensor is made of, values last."""
    if sparse.layout is torch.sparse_coo:
        return sparse._indices(), sparse._values()
    if sparse.layout in (torch.sparse_csr, torch.sparse_bsr):
        return sparse.crow_indices(), sparse.col_indices(), sparse.values()
    return sparse.ccol_indices(), sparse.row_indices(), sparse.values()


def assert_sparse_equal(got, expected):
    assert (got.layout, got.shape, got.dtype) == (expected.layout, expected.shape, expected.dtype)
    assert got.layout is not torch.sparse_coo or got.is_coalesced()
    assert_parts_equal(members(got), members(expected))


def assert_tensors_equal(got, expected):
    """The same parts, bit by bit."""
    assert isinstance(got, BitmaskTensor)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert_parts_equal(got._parts(), expected._parts())


def tensor_of(shape, dtype=torch.float32, density=0.4, seed=0):
    return BitmaskTensor.from_dense(random_dense(shape, dtype, density, seed))


def batch_of(count, rows, cols, dtype=torch.float32):
    """A batch of matrices that store as many elements and blocks each, but not the same ones."""
    matrix = random_dense((rows, cols), dtype)
    return torch.stack([matrix.roll(8 * i, 1) for i in range(count)])


# What torch makes of the dense tensor.


@layouts
def test_equals_torchs_own_conversion(layout, dtype):
    for shape in [(6, 8), (30, 136), (2, 4), (70, 4)]:
        for density in (0, 0.1, 0.6, 1):
            tensor = tensor_of(shape, dtype, density)
            expected = by_torch(tensor.to_dense(), layout)
            got = convert(tensor, layout)
            assert_sparse_equal(got, expected)
            assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)


@layouts
@pytest.mark.parametrize("dtype", [d for d in ALL_DTYPES if not str(d).startswith(("torch.uint", "torch.float8"))])
def test_round_trip_by_torchs_own_to_dense(layout, dtype):
    dense = random_numbers(6, 8, dtype=torch.float64).mul(5).to(dtype)
    got = convert(BitmaskTensor.from_dense(dense), layout)
    assert_bits_equal(got.to_dense(), dense)


@layouts
@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
def test_every_isa(isa, layout, width_dtype):
    for shape, block in [((6, 8), (2, 4)), ((130, 200), (5, 25)), ((64, 128), (64, 64)), ((3, 1), (1, 1))]:
        tensor = tensor_of(shape, width_dtype)
        got = convert(tensor, layout, block)
        assert_sparse_equal(got, by_torch(tensor.to_dense(), layout, block))
        assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)


@all_layouts
def test_what_torch_made_comes_back(layout, dtype):
    for shape in [(6, 8), (70, 136)]:
        dense = BitmaskTensor.from_dense(random_dense(shape, dtype)).to_dense()
        assert_tensors_equal(BitmaskTensor.from_sparse(by_torch(dense, layout)), BitmaskTensor.from_dense(dense))


@layouts
@pytest.mark.parametrize(
    "shape", [(0, 8), (8, 0), (0, 0), (1, 70_000), (3, 131_080), (70_000, 4), (2100, 2304)], ids=str
)
def test_sizes(layout, shape):
    tensor = tensor_of(shape, torch.bfloat16, 0.1)
    block = (1, 4) if shape[0] % 2 else (2, 4)
    got = convert(tensor, layout, block)
    assert_sparse_equal(got, by_torch(tensor.to_dense(), layout, block))
    assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)


@layouts
def test_empty_rows_and_columns(layout):
    dense = torch.zeros(200, 400)
    dense[7, 13] = dense[7, 399] = dense[199, 0] = 1
    tensor = BitmaskTensor.from_dense(dense)
    got = convert(tensor, layout)
    assert_sparse_equal(got, by_torch(dense, layout))
    assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (3, 1), (2, 60), (12, 5), (12, 120), (1, 120), (4, 40)], ids=str)
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_block_shapes(block, density):
    tensor = tensor_of((12, 120), density=density)
    dense = tensor.to_dense()
    got = tensor.to_bsr(block)
    assert_sparse_equal(got, by_torch(dense, torch.sparse_bsr, block))
    assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)
    assert_tensors_equal(BitmaskTensor.from_sparse(by_torch(dense, torch.sparse_bsc, block)), tensor)


def test_blocks_wider_than_what_is_expanded_at_a_time():
    tensor = tensor_of((4, 6000), torch.int16, 0.01)
    for block in [(2, 3000), (2, 1500), (4, 6000), (1, 1000)]:
        assert_sparse_equal(tensor.to_bsr(block), by_torch(tensor.to_dense(), torch.sparse_bsr, block))


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (0,), (200,), (70_000,), (2, 3, 4), (2, 1, 3, 5), (2, 0, 3), (0, 3)], ids=str
)
@pytest.mark.parametrize("density", [0, 0.5, 1])
def test_coo_has_any_rank(shape, density):
    tensor = tensor_of(shape, density=density)
    got = tensor.to_coo()
    assert got.is_coalesced()
    if len(shape) == 0:
        assert got._indices().shape == (0, tensor.nnz)
        assert_bits_equal(got._values(), tensor.values)
    else:
        assert_sparse_equal(got, by_torch(tensor.to_dense(), torch.sparse_coo))
    assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)


@layouts
def test_special_values(layout, dtype):
    words = special_words(dtype)
    words += [0] * (-len(words) % 8)
    for keep_negative_zero in (False, True):
        dense = tensor_of_words(words, dtype, (2, len(words) // 2))
        tensor = BitmaskTensor.from_dense(dense, keep_negative_zero=keep_negative_zero)
        got = convert(tensor, layout, (1, 4))
        again = BitmaskTensor.from_sparse(got, keep_negative_zero=keep_negative_zero)
        assert_tensors_equal(again, tensor)
        assert_bits_equal(again.to_dense(), tensor.to_dense())


# Batches.


@matrix_layouts
@pytest.mark.parametrize("batch", [(1,), (3,), (2, 3), (1, 2, 1)], ids=str)
def test_batches(layout, batch):
    count = torch.Size(batch).numel()
    for rows, cols in [(6, 32), (70, 128)]:
        dense = batch_of(count, rows, cols).reshape(*batch, rows, cols)
        tensor = BitmaskTensor.from_dense(dense)
        got = convert(tensor, layout, (2, 8))
        assert_sparse_equal(got, by_torch(tensor.to_dense(), layout, (2, 8)))
        assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)


@matrix_layouts
@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 4, 0), (2, 3, 0, 4), (3, 4, 8)], ids=str)
def test_batches_of_matrices_without_stored_elements(layout, shape):
    tensor = BitmaskTensor.from_dense(torch.zeros(shape))
    got = convert(tensor, layout)
    assert_sparse_equal(got, by_torch(torch.zeros(shape), layout))
    assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc], ids=str)
def test_batches_that_torch_made(layout):
    dense = batch_of(4, 6, 32).reshape(2, 2, 6, 32)
    dense = BitmaskTensor.from_dense(dense).to_dense()
    got = BitmaskTensor.from_sparse(by_torch(dense, layout, (2, 8)))
    assert_tensors_equal(got, BitmaskTensor.from_dense(dense))


@matrix_layouts
def test_batches_that_store_other_numbers_of_elements_are_refused(layout):
    dense = torch.ones(3, 4, 8)
    dense[2, :2] = 0
    with pytest.raises(ValueError, match=r"in matrix 2 of the batch and .* in matrix 0, expected as many in each"):
        convert(BitmaskTensor.from_dense(dense), layout)


@matrix_layouts
@pytest.mark.parametrize("shape", [(), (5,), (0, 4, 8), (2, 0, 4, 8)], ids=str)
def test_what_is_no_matrix_is_refused(layout, shape):
    with pytest.raises(ValueError, match="expected a matrix or a batch of one or more"):
        convert(BitmaskTensor.from_dense(torch.zeros(shape)), layout)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ((0, 4), ValueError, "at least 1"),
        ((2, -1), ValueError, "at least 1"),
        ((4, 4), ValueError, r"expected sizes that divide those of a matrix, \[6, 8\]"),
        ((2, 3), ValueError, "expected sizes that divide"),
        ((2**40, 4), ValueError, r"at most 2\^28"),
        ((2,), TypeError, "expected two integers"),
        ((2, 4, 4), TypeError, "expected two integers"),
        ((2, 4.0), TypeError, "expected two integers"),
        (4, TypeError, "expected two integers"),
        (None, TypeError, "expected two integers"),
    ],
)
def test_block_shapes_that_are_refused(block, error, message):
    with pytest.raises(error, match=message):
        tensor_of((6, 8)).to_bsr(block)


def test_sides_of_blocks_are_any_integers():
    tensor = tensor_of((6, 8))
    for block in ((np.int64(2), np.int32(4)), np.array([2, 4]), torch.Size([2, 4])):
        assert_sparse_equal(tensor.to_bsr(block), tensor.to_bsr((2, 4)))


def test_blocks_of_meta_tensors_are_refused():
    """Unlike elements, they are not counted yet."""
    tensor = tensor_of((6, 8)).to("meta")
    with torch.sparse.check_sparse_tensor_invariants(False):
        assert tensor.to_csr().shape == (6, 8)
    with pytest.raises(ValueError, match="tensor: got a meta tensor, expected one with data"):
        tensor.to_bsr((2, 4))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_compiled_functions_convert_between_their_graphs(layout):
    tensor = tensor_of((6, 8))
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def there_and_back(x, tensor):
        sparse = convert(tensor, layout, (2, 4))
        return x + 1, sparse, BitmaskTensor.from_sparse(sparse)

    x, sparse, back = there_and_back(torch.zeros(3), tensor)
    assert x.tolist() == [1.0] * 3
    assert_sparse_equal(sparse, convert(tensor, layout, (2, 4)))
    assert_tensors_equal(back, tensor)
    torch._dynamo.reset()


@pytest.mark.parametrize("value", [None, "no", 1])
def test_flags_of_another_type(value):
    sparse = torch.eye(4).to_sparse_csr()
    for call in (
        lambda: BitmaskTensor.from_sparse(sparse, keep_negative_zero=value),
        lambda: BitmaskTensor.from_dense(torch.eye(4), keep_negative_zero=value),
        lambda: ops.compress_into(
            torch.eye(4), torch.zeros(4), torch.zeros(4, 1).byte(), torch.zeros(4).long(), keep_negative_zero=value
        ),
    ):
        with pytest.raises(TypeError, match=f"keep_negative_zero: got {value!r}, expected True or False"):
            call()


# Zeros that are stored.


def test_stored_zeros_stay_in_what_is_made_and_are_dropped_from_what_is_taken():
    values, bits = torch.tensor([1.0, 0.0, -0.0, 2.0]), torch.tensor([[0b11], [0b11]], dtype=torch.uint8)
    tensor = BitmaskTensor.from_parts(values, bits, torch.tensor([0, 2]), [2, 2])
    for sparse in (tensor.to_coo(), tensor.to_csr(), tensor.to_csc()):
        assert sparse._nnz() == 4
        assert_tensors_equal(BitmaskTensor.from_sparse(sparse), BitmaskTensor.from_dense(tensor.to_dense()))
        kept = BitmaskTensor.from_sparse(sparse, keep_negative_zero=True)
        assert_bits_equal(kept.to_dense(), tensor.to_dense())
        assert kept.nnz == 3


@all_layouts
@pytest.mark.parametrize("width_dtype", WIDTH_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (70, 160), (3000, 64)], ids=str)
def test_stored_zeros_are_dropped(layout, width_dtype, shape):
    numbers = (random_numbers(*shape, density=0.5, dtype=torch.float64) * 100).to(width_dtype)
    sparse = by_torch(numbers, layout)
    members(sparse)[-1].reshape(-1)[::3] = 0
    assert_tensors_equal(BitmaskTensor.from_sparse(sparse), BitmaskTensor.from_dense(sparse.to_dense()))


# COO tensors that are not coalesced, dense dimensions, int32 indices.


def test_uncoalesced_tensors_are_coalesced():
    indices = torch.tensor([[1, 0, 1, 1], [2, 0, 2, 0]])
    sparse = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 5.0, -1.0, 7.0]), (2, 3))
    assert not sparse.is_coalesced()
    assert_tensors_equal(BitmaskTensor.from_sparse(sparse), BitmaskTensor.from_dense(sparse.to_dense()))
    assert BitmaskTensor.from_sparse(sparse).nnz == 2  # 1 - 1 is a zero, which is dropped


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (2, 3, 4, 9), (3, 0, 2), (3, 2, 0)], ids=str)
def test_dense_dimensions_of_coo(shape, dtype):
    dense = BitmaskTensor.from_dense(random_dense(shape, dtype, 0.3)).to_dense()
    expected = BitmaskTensor.from_dense(dense)
    for dense_dim in range(len(shape)):
        assert_tensors_equal(
            BitmaskTensor.from_sparse(by_torch(dense, torch.sparse_coo, dense_dim=dense_dim)), expected
        )


def test_no_sparse_dimension():
    for values in (torch.ones(0, 3), torch.tensor([[1.0, 0.0, 2.0]])):
        sparse = torch.sparse_coo_tensor(
            torch.zeros(0, len(values), dtype=torch.int64), values, (3,), is_coalesced=True
        )
        expected = values[0] if len(values) else torch.zeros(3)
        assert_tensors_equal(BitmaskTensor.from_sparse(sparse), BitmaskTensor.from_dense(expected))


@pytest.mark.parametrize("layout", ALL_LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("dense_shape", [(5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_dense_dimensions_of_other_layouts(layout, dense_shape, batch):
    mask = random_dense((6, 32), torch.bool, 0.4)
    masks = torch.stack([mask.roll(8 * i, 1) for i in range(3)]) if batch else mask
    dense = random_numbers(*masks.shape, *dense_shape, density=1) * masks.reshape(*masks.shape, *[1] * len(dense_shape))
    blocks = {"blocksize": (2, 8)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    sparse = dense.to_sparse(layout=layout, dense_dim=len(dense_shape), **blocks)
    assert_tensors_equal(BitmaskTensor.from_sparse(sparse), BitmaskTensor.from_dense(dense))


@pytest.mark.parametrize("layout", ALL_LAYOUTS[1:], ids=str)
def test_int32_indices(layout):
    dense = random_numbers(6, 8)
    starts, positions, values = members(by_torch(dense, layout))
    sparse = torch.sparse_compressed_tensor(starts.int(), positions.int(), values, dense.shape, layout=layout)
    assert sparse.values().dtype == dense.dtype
    assert members(sparse)[0].dtype == torch.int32
    assert_tensors_equal(BitmaskTensor.from_sparse(sparse), BitmaskTensor.from_dense(dense))


def test_lists_with_gaps_in_memory():
    dense = random_numbers(6, 8)
    expected = BitmaskTensor.from_dense(dense)
    crow, col, values = members(dense.to_sparse_csr())
    spread = [torch.stack([part, part], dim=-1)[..., 0] for part in (values, crow, col)]
    assert not spread[0].is_contiguous()
    assert_parts_equal(ops_convert.from_csr(*spread, dense.shape), expected._parts())
    transposed = dense.to_sparse_coo()._indices().t().contiguous().t()
    assert torch.equal(ops_convert.coo_to_crow(transposed, dense.shape), crow)


def test_gradients_do_not_flow():
    sparse = random_numbers(4, 4).to_sparse_csr().requires_grad_()
    assert not BitmaskTensor.from_sparse(sparse).requires_grad
    conjugate = torch.conj(torch.tensor([1 + 2j]))
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), conjugate, (2,), is_coalesced=True)
    assert BitmaskTensor.from_sparse(sparse).values.tolist() == [1 - 2j]


# Memory of one's own.


@layouts
def test_nothing_is_shared(layout):
    tensor = tensor_of((6, 8))
    before = [part.clone() for part in tensor._parts()]
    sparse = convert(tensor, layout)
    for part in members(sparse):
        part.zero_()
    assert_parts_equal(tensor._parts(), before)
    sparse = convert(tensor, layout)
    again = BitmaskTensor.from_sparse(sparse)
    for part in members(sparse):
        part.zero_()
    assert_parts_equal(again._parts(), before)


# Sparse tensors that contradict themselves.


def hostile(layout, size=(4, 8), **changes):
    """A sparse tensor [4, 8] of ones on a diagonal of 2 x 2 blocks or of elements, some of its members replaced."""
    lines = {torch.sparse_csc: 8, torch.sparse_bsr: 2, torch.sparse_bsc: 4}.get(layout, 4)
    count = 2 if layout in (torch.sparse_bsr, torch.sparse_bsc) else 4
    starts = torch.arange(lines + 1).clamp(max=count)
    lists = {
        "starts": starts,
        "positions": torch.arange(count),
        "values": torch.ones(count, 2, 2) if "bs" in str(layout) else torch.ones(count),
        **changes,
    }
    return torch.sparse_compressed_tensor(*lists.values(), size, layout=layout, check_invariants=False)


FAULTS = {
    "first start": (lambda s, p, v: s.__setitem__(0, 1), r"(crow|ccol)_indices\[0\]: got 1, expected 0"),
    "negative start": (lambda s, p, v: s.__setitem__(1, -1), r"(crow|ccol)_indices\[1\]: got -1, expected 0 to"),
    "descending starts": (lambda s, p, v: s.__setitem__(2, 0), r"(crow|ccol)_indices\[2\]: got 0, expected 1 to"),
    "start too large": (lambda s, p, v: s.__setitem__(1, 99), r"(crow|ccol)_indices\[1\]: got 99, expected 0 to"),
    "start far too large": (
        lambda s, p, v: s.__setitem__(1, 2**62),
        r"(crow|ccol)_indices\[1\]: got 4611686018427387904",
    ),
    "last start": (
        lambda s, p, v: s.__setitem__(slice(2, None), 1),
        r"(crow|ccol)_indices\[.*\]: got 1, expected [24]",
    ),
    "negative position": (lambda s, p, v: p.__setitem__(1, -1), r"(col|row)_indices\[1\]: got -1, expected at least 0"),
    "position too large": (lambda s, p, v: p.__setitem__(1, 8), r"(col|row)_indices\[1\]: got 8, expected at least 0"),
    "position far too large": (lambda s, p, v: p.__setitem__(1, 2**63 - 1), r"(col|row)_indices\[1\]: got 92233"),
}


@pytest.mark.parametrize("layout", ALL_LAYOUTS[1:], ids=str)
@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_faulty_indices_are_refused(isa, layout, change, message):
    with torch.sparse.check_sparse_tensor_invariants(False):
        sparse = hostile(layout)
        assert BitmaskTensor.from_sparse(sparse).nnz in (4, 8)
        change(*members(sparse))
        with pytest.raises(FormatError, match=message) as raised:
            BitmaskTensor.from_sparse(sparse)
        by_column = layout in (torch.sparse_csc, torch.sparse_bsc)
        assert str(raised.value).startswith(("ccol_indices", "row_indices")) == by_column


@pytest.mark.parametrize("layout", ALL_LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("positions", [[1, 1], [1, 0]], ids=["repeated", "descending"])
def test_repeated_and_descending_positions_are_refused(isa, layout, positions):
    with torch.sparse.check_sparse_tensor_invariants(False):
        sparse = hostile(layout)
        starts, indices, _ = members(sparse)
        starts[1] = 2
        starts[2] = 2
        indices[:2] = torch.tensor(positions)
        where = "column" if layout in (torch.sparse_csc, torch.sparse_bsc) else "(row|line)"
        with pytest.raises(
            FormatError, match=rf"_indices\[1\]: got {positions[1]}, expected more than 1, .* in {where} 0"
        ):
            BitmaskTensor.from_sparse(sparse)


@pytest.mark.parametrize("layout", ALL_LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("member", [0, 1, 2], ids=["starts", "positions", "values"])
def test_members_of_the_wrong_size_are_refused(layout, member):
    with torch.sparse.check_sparse_tensor_invariants(False):
        for size in (1, 3, 9, 20):
            sparse = hostile(layout)
            lists = list(members(sparse))
            behind = lists[member].shape[1:]
            if size == lists[member].shape[0]:
                continue
            lists[member] = torch.zeros(size, *behind, dtype=lists[member].dtype)
            sparse = torch.sparse_compressed_tensor(*lists, (4, 8), layout=layout, check_invariants=False)
            with pytest.raises(FormatError, match=r"got size \["):
                BitmaskTensor.from_sparse(sparse)


def test_blocks_that_do_not_divide_are_refused():
    with torch.sparse.check_sparse_tensor_invariants(False):
        for shape in [(2, 3, 2), (2, 2, 3), (2, 0, 2), (2, 2, 0)]:
            for layout in (torch.sparse_bsr, torch.sparse_bsc):
                with pytest.raises(FormatError, match=r"values: got"):
                    BitmaskTensor.from_sparse(hostile(layout, values=torch.ones(shape)))


COO_FAULTS = {
    "negative row": ([[0, -1], [0, 1]], r"indices\[:, 1\]: got \[-1, 1\], expected at least 0, less than \[4, 8\]"),
    "row too large": ([[0, 4], [0, 1]], r"indices\[:, 1\]: got \[4, 1\]"),
    "row far too large": ([[0, 2**63 - 1], [0, 1]], r"indices\[:, 1\]: got \[9223372036854775807, 1\]"),
    "descending rows": ([[1, 0], [0, 1]], r"indices\[:, 1\]: got \[0, 1\], .* more than \[1, 0\]"),
    "negative column": ([[0, 1], [0, -1]], r"indices\[1, 1\]: got -1, expected at least 0 and less than 8"),
    "column too large": ([[0, 1], [0, 8]], r"indices\[1, 1\]: got 8, expected at least 0 and less than 8"),
    "repeated": ([[1, 1], [3, 3]], r"indices\[1, 1\]: got 3, expected more than 3, .* in flattened row 1"),
    "descending columns": ([[1, 1], [3, 2]], r"indices\[1, 1\]: got 2, expected more than 3"),
}


@pytest.mark.parametrize(("indices", "message"), COO_FAULTS.values(), ids=COO_FAULTS)
def test_faulty_coo_indices_are_refused(isa, indices, message):
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1], [0, 1]]), torch.ones(2), (4, 8), is_coalesced=True)
    sparse._indices().copy_(torch.tensor(indices))
    with pytest.raises(FormatError, match=message):
        BitmaskTensor.from_sparse(sparse)


def test_coo_indices_out_of_range_are_not_coalesced():
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1], [0, 1]]), torch.ones(2), (4, 8))
    for index, message in [((1, 1, 8), r"indices\[1\]: got 8"), ((0, 0, -1), r"indices\[0\]: got -1")]:
        copy = sparse.clone()
        copy._indices()[index[0], index[1]] = index[2]
        assert not copy.is_coalesced()
        with pytest.raises(FormatError, match=message):
            BitmaskTensor.from_sparse(copy)


@pytest.mark.parametrize("layout", ALL_LAYOUTS[1:], ids=str)
def test_faulty_indices_of_tensors_with_dense_dimensions_are_refused(layout):
    dense = torch.ones(4, 8, 3)
    blocks = {"blocksize": (2, 2)} if "bs" in str(layout) else {}
    for member, place, entry in [(0, 1, -1), (0, 1, 99), (1, 0, -1), (1, 0, 8), (1, 1, 0)]:
        sparse = dense.to_sparse(layout=layout, dense_dim=1, **blocks)
        members(sparse)[member][place] = entry
        with pytest.raises(FormatError, match=r"_indices\["):
            BitmaskTensor.from_sparse(sparse)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2, 3), (2, 3), is_coalesced=True)
    for indices in ([[0, 0]], [[1, 0]], [[0, 2]], [[-1, 0]]):
        sparse._indices().copy_(torch.tensor(indices))
        with pytest.raises(FormatError, match="indices"):
            BitmaskTensor.from_sparse(sparse)


@pytest.mark.parametrize("semi_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_semi_structured_tensors(semi_dtype):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randint(-9, 10, (32, 128), generator=generator)
    dense[:, 0::2] = 0  # one of each pair, as torch has it in float32
    dense[:, 1::8] = 0
    dense = dense.to(semi_dtype)
    sparse = SemiStructuredTensor.from_dense(dense).to_torch()
    assert_tensors_equal(BitmaskTensor.from_sparse(sparse), BitmaskTensor.from_dense(dense))


def test_other_tensors_are_refused():
    for wrong, message in [
        (torch.ones(2, 2), "got a torch.strided tensor, expected a sparse one"),
        (tensor_of((2, 2)), "got a BitmaskTensor"),
        ([1, 2], "got list"),
        (None, "got NoneType"),
    ]:
        with pytest.raises(TypeError, match=message):
            BitmaskTensor.from_sparse(wrong)
    indices, values = torch.zeros(2, 0, device="meta", dtype=torch.int64), torch.zeros(0, device="meta")
    elsewhere = torch.sparse_coo_tensor(indices, values, (2, 2))
    with pytest.raises(NotImplementedError, match="expected cpu"):
        BitmaskTensor.from_sparse(elsewhere)


@pytest.mark.parametrize("shape", [(2**40, 2**22), (2**22, 2**40), (2**61, 1), (1, 2**62)], ids=str)
def test_sizes_for_which_there_is_no_memory(shape):
    sparse = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), shape, is_coalesced=True)
    with pytest.raises(RuntimeError, match="cannot allocate"):
        BitmaskTensor.from_sparse(sparse)
    with pytest.raises(FormatError, match=r"fewer than 2\^63"):
        ops_convert.coo_to_crow(torch.zeros(2, 1, dtype=torch.int64), [2**40, 2**40])


# Parts that contradict each other.


@layouts
def test_faulty_parts_are_refused_or_harmless(layout):
    shape = [6, 8]
    parts = tensor_of(shape)._parts()
    assert parts_are_valid(*parts, shape)
    refused = 0
    for values, bitmasks, offsets, changed in mutations(parts, shape, 300):
        if changed != shape or values.ndim != 1:
            continue
        tensor = BitmaskTensor(values, bitmasks, offsets, shape)
        if parts_are_valid(values, bitmasks, offsets, shape):
            assert_sparse_equal(convert(tensor, layout), by_torch_of_parts(tensor, layout))
            continue
        refused += 1
        with pytest.raises(FormatError):
            convert(tensor, layout)
    assert refused > 50


def by_torch_of_parts(tensor, layout):
    """Of parts that may store zeros: their places are those of ones."""
    marks = ops.decompress(torch.ones_like(tensor.values), *tensor._parts()[1:], tensor.shape)
    places = by_torch(marks, layout)
    return by_torch_with(places, tensor.to_dense(), layout)


def by_torch_with(places, dense, layout):
    """The elements of `dense` in the places of a sparse tensor."""
    if layout is torch.sparse_coo:
        indices = places._indices()
        return torch.sparse_coo_tensor(indices, dense[tuple(indices)], dense.shape, is_coalesced=True)
    starts, positions, values = members(places)
    lines = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    if layout is torch.sparse_bsr:
        block_rows, block_cols = values.shape[-2:]
        tiles = dense.unfold(0, block_rows, block_rows).unfold(1, block_cols, block_cols)
        values = tiles[lines, positions]
    else:
        values = dense[lines, positions] if layout is torch.sparse_csr else dense[positions, lines]
    return torch.sparse_compressed_tensor(starts, positions, values.contiguous(), dense.shape, layout=layout)


# Many threads, forks.


@layouts
def test_threads_do_not_change_the_result(layout, threads):
    tensor = tensor_of((2500, 1200), torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(convert(tensor, layout))
        assert_tensors_equal(BitmaskTensor.from_sparse(results[-1]), tensor)
    assert_sparse_equal(results[1], results[0])
    assert_sparse_equal(results[2], results[0])


def test_called_from_many_threads():
    tensor = tensor_of((300, 200))
    expected = [convert(tensor, layout) for layout in LAYOUTS]

    def work(index):
        sparse = convert(tensor, LAYOUTS[index % len(LAYOUTS)])
        assert_tensors_equal(BitmaskTensor.from_sparse(sparse), tensor)
        return sparse

    with ThreadPoolExecutor(8) as pool:
        for index, got in enumerate(pool.map(work, range(40))):
            assert_sparse_equal(got, expected[index % len(LAYOUTS)])


@layouts
def test_parts_that_another_thread_writes_to_give_whole_tensors_or_errors(layout):
    """Wrong elements, at most: torch's check of invariants finds nothing."""
    tensor = tensor_of((512, 512), torch.int8, 0.5)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            tensor.bitmasks.bitwise_xor_(3)
            tensor.bitmasks.bitwise_xor_(3)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            try:
                convert(tensor, layout)
            except FormatError:
                continue
    finally:
        stop.set()
        writer.join()


def test_indices_that_another_thread_writes_to_give_valid_parts_or_errors():
    sparse = random_numbers(512, 512).to_sparse_csr()
    columns = sparse.col_indices()
    stop = threading.Event()

    def write():
        while not stop.is_set():
            columns.bitwise_xor_(1 << 40)
            columns.bitwise_xor_(1 << 40)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            try:
                BitmaskTensor.from_sparse(sparse).to_dense()
            except FormatError:
                continue
    finally:
        stop.set()
        writer.join()


WORKS = """
import torch, bitmask
tensor = bitmask.BitmaskTensor.from_dense((torch.rand(600, 400) < 0.4).float())
def works():
    made = [tensor.to_coo(), tensor.to_csr(), tensor.to_csc(), tensor.to_bsr((4, 4))]
    taken = [bitmask.BitmaskTensor.from_sparse(sparse) for sparse in made]
    return all(back.tolist() == tensor.tolist() for back in taken)  # torch's own ops may use OpenMP, which hangs
"""


@pytest.mark.parametrize("use_before", [False, True])
def test_works_after_fork(use_before):
    assert_works_after_fork(WORKS, use_before)


# The ops.


def test_opcheck():
    tensor = tensor_of((6, 8))
    parts = tensor._parts()
    call = torch.ops.bitmask
    for op in (call.to_coo, call.to_csr, call.to_csc, call.transpose):
        library.opcheck(op.default, (*parts, [6, 8]))
    library.opcheck(call.to_bsr.default, (*parts, [6, 8], [2, 4]))
    crow, col, values = call.to_csr(*parts, [6, 8])
    library.opcheck(call.from_csr.default, (values, crow, col, [6, 8], False))
    crow, col, values = call.to_bsr(*parts, [6, 8], [2, 4])
    library.opcheck(call.from_bsr.default, (values, crow, col, [6, 8], True))
    indices, _ = call.to_coo(*parts, [6, 8])
    library.opcheck(call.coo_to_crow.default, (indices, [6, 8]))


def test_ops_refuse_what_is_wrong():
    parts = tensor_of((6, 8))._parts()
    with pytest.raises(ValueError, match="at least two dimensions"):
        ops_convert.to_csc(*tensor_of((8,))._parts(), [8])
    with pytest.raises(ValueError, match="at least two dimensions"):
        ops_convert.transpose(*tensor_of((8,))._parts(), [8])
    with pytest.raises(FormatError, match="block_shape: got blocks of"):
        calls.call(torch.ops.bitmask.to_bsr, *parts, [6, 8], [4, 4], invalid=FormatError)
    with pytest.raises(TypeError, match=r"crow_indices: got dtype torch.int32, expected torch.int64"):
        ops_convert.from_csr(torch.ones(1), torch.zeros(2).int(), torch.zeros(1).long(), [1, 1])
    with pytest.raises(TypeError, match="values: got list"):
        ops_convert.from_csr([1], torch.zeros(2).long(), torch.zeros(1).long(), [1, 1])
    with pytest.raises(FormatError, match=r"indices: got size \[1\], expected \[2, entries\]"):
        ops_convert.coo_to_crow(torch.zeros(1).long(), [2, 2])


def test_transposed_parts_are_those_of_the_transposed_tensor(isa, dtype):
    for shape in [(6, 8), (70, 200), (2, 33, 70), (1, 1), (0, 3), (2, 3, 0)]:
        dense = random_dense(shape, dtype)
        parts = ops_convert.transpose(*ops.compress(dense, True), shape)
        assert_parts_equal(parts, ops.compress(dense.transpose(-1, -2).contiguous(), True))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(0, 5), st.integers(0, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
    st.floats(0, 1),
    st.sampled_from(WIDTH_DTYPES),
    st.integers(0, 2**30),
)
def test_round_trips(blocks, block, density, width_dtype, seed):
    shape = (blocks[0] * block[0], blocks[1] * block[1])
    tensor = tensor_of(shape, width_dtype, density, seed)
    for layout in LAYOUTS:
        got = convert(tensor, layout, block)
        assert_sparse_equal(got, by_torch(tensor.to_dense(), layout, block))
        assert_tensors_equal(BitmaskTensor.from_sparse(got), tensor)
