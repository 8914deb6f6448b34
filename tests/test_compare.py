"""Comparing formats: bytes by counting are those of really made tensors, and what is said about them."""

import math

import pytest
import torch

import bitmask
from bitmask import BitmaskTensor, SemiStructuredTensor
from bitmask.compare import FormatComparison, FormatRow, compare_formats
from bitmask.crossovers import crossing_sparsity, crossing_words, format_crossovers
from bitmask.format_timing import Format, formats, product_times
from bitmask.format_timing import with_short_indices as short_csr
from bitmask.prune import prune_24_


def sparse(shape, dtype=torch.float32, sparsity=0.7):
    torch.manual_seed(0)
    return torch.randn(shape).masked_fill(torch.rand(shape) < sparsity, 0).to(dtype)


def parts_of(tensor):
    """The tensors that one in a sparse layout of torch's consists of."""
    if tensor.layout is torch.sparse_coo:
        return tensor._values(), tensor._indices()
    if tensor.layout is torch.sparse_csc:
        return tensor.values(), tensor.ccol_indices(), tensor.row_indices()
    return tensor.values(), tensor.crow_indices(), tensor.col_indices()


def made(matrix, block_shape):
    """Bytes of every format but 2:4, as torch and this library make it."""
    layouts = {
        "COO": matrix.to_sparse(),
        "CSR": matrix.to_sparse_csr(),
        "CSC": matrix.to_sparse_csc(),
        "BSR": matrix.to_sparse_bsr(block_shape),
    }
    nbytes = {name: sum(part.nbytes for part in parts_of(tensor)) for name, tensor in layouts.items()}
    nbytes |= {"dense": matrix.nbytes, "bitmask": BitmaskTensor.from_dense(matrix).compressed_nbytes}
    return nbytes


def with_short_indices(tensor):
    """The same in CSR, CSC or BSR with int32 indices."""
    values, *indices = parts_of(tensor)
    short = [each.int() for each in indices]
    return torch.sparse_compressed_tensor(*short, values, tensor.shape, layout=tensor.layout, check_invariants=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize(
    ("shape", "block_shape"),
    [
        ((64, 96), (32, 32)),
        ((6, 35), (2, 5)),
        ((1, 4), (1, 1)),
        ((128, 4), (64, 2)),
        ((0, 8), (4, 4)),
        ((8, 0), (4, 4)),
    ],
)
def test_bytes_are_those_of_made_tensors(shape, block_shape, dtype):
    matrix = sparse(shape, dtype)
    found = compare_formats(matrix, block_shape=block_shape)
    assert {row.name: row.nbytes for row in found.formats if row.name != "2:4"} == made(matrix, block_shape)
    assert (found.shape, found.dtype, found.block_shape, found.rows) == (shape, dtype, block_shape, ())
    assert all(row.convert_ms is None and row.product_ms == {} for row in found.formats)


@pytest.mark.parametrize("density", [0.002, 0.02, 0.5])
def test_blocks_are_counted_over_parts_of_a_matrix(monkeypatch, density):
    monkeypatch.setattr("bitmask.format_bytes._UNPACKED_ELEMENTS", 1000)
    matrix = sparse((96, 160), sparsity=1 - density)
    for block_shape in ((2, 4), (32, 32), (96, 160), (48, 1)):
        expected = made(matrix, block_shape)["BSR"]
        assert compare_formats(matrix, block_shape=block_shape)["BSR"].nbytes == expected


def test_bytes_of_short_indices():
    matrix = sparse((64, 96))
    found = compare_formats(matrix, block_shape=(8, 16))
    layouts = {"CSR": matrix.to_sparse_csr(), "CSC": matrix.to_sparse_csc(), "BSR": matrix.to_sparse_bsr((8, 16))}
    for row in found.formats:
        expected = None
        if row.name in layouts:
            expected = sum(part.nbytes for part in parts_of(with_short_indices(layouts[row.name])))
        assert row.short_nbytes == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(8, 16), (5, 12), (3, 4)])
def test_bytes_of_two_four(shape, dtype):
    matrix = SemiStructuredTensor.from_dense(sparse(shape, sparsity=0).to(dtype), prune=True)
    row = compare_formats(matrix.to_dense())["2:4"]
    assert (row.nbytes, row.note) == (matrix.compressed_nbytes, "")
    assert row.ratio == row.nbytes / matrix.nbytes


@pytest.mark.parametrize(
    ("tensor", "note"),
    [
        (torch.ones(2, 8), "4 of 4 groups of four have more than two non-zeros"),
        (torch.tensor([[1, 1, 0, 0, 1, 0, 1, 1]]), "1 of 2 groups of four have more than two non-zeros"),
        (torch.eye(6), "its 6 columns are not a multiple of 4"),
        (torch.zeros(4, 4, dtype=torch.complex64), "not stored in complex64"),
    ],
    ids=["all", "one", "columns", "dtype"],
)
def test_why_not_two_four(tensor, note):
    row = compare_formats(tensor)["2:4"]
    assert (row.nbytes, row.short_nbytes, row.ratio, row.note) == (None, None, None, note)
    assert note in str(compare_formats(tensor))


def test_blocks_past_the_edges():
    """Counted whole, as BlockSparseLinear keeps them."""
    row = compare_formats(torch.ones(33, 70))["BSR"]
    assert row.nbytes == 6 * (32 * 32 * 4 + 8) + 3 * 8
    assert "past the edges" in row.note
    assert compare_formats(torch.eye(4), block_shape=(2**28, 2**28))["BSR"].nbytes == 4 * 2**56 + 3 * 8


def test_zero_rule():
    """As the bitmask has it: -0.0 is zero, NaN is not."""
    found = compare_formats(torch.tensor([[-0.0, math.nan, 0.0, 5e-324]], dtype=torch.float64))
    assert found.sparsity == 0.5
    assert found["COO"].nbytes == 2 * (8 + 16)


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        (torch.ones(2, 3, 4), (6, 4)),
        (torch.ones(5), (1, 5)),
        (torch.tensor(1.0), (1, 1)),
        (torch.ones(2, 0, 4), (0, 4)),
        (torch.ones(6, 4).T, (4, 6)),
        (torch.nn.Parameter(torch.ones(2, 4)), (2, 4)),
    ],
    ids=["3-D", "1-D", "0-D", "empty", "transposed", "parameter"],
)
def test_any_shape(tensor, shape):
    found = compare_formats(tensor)
    assert found.shape == shape
    assert found["dense"].nbytes == tensor.nbytes
    assert str(found)


@pytest.mark.parametrize(
    ("tensor", "name", "reason"),
    [
        (torch.ones(64, 64), "dense", "with 0.0% zeros, every other format adds more"),
        (torch.ones(64, 64).tril(), "bitmask", "an int64 column index costs 8 bytes for each value of 4"),
        (torch.ones(64, 64).bfloat16().tril(), "bitmask", "8 bytes for each value of 2"),
        (torch.tensor([[1.0, 0.0, 0.0, 1.0]]).repeat(8, 16), "2:4", "by one bit and needs no offsets"),
        (torch.block_diag(torch.ones(32, 32), torch.zeros(64, 64)), "BSR", "serves the 1024 elements of a block"),
        (torch.eye(2048)[:, :1024].contiguous(), "COO", "with no more values than rows, a second index"),
        (torch.eye(128).repeat(1, 16), "CSR", "so few values are left"),
        (torch.eye(128).repeat(16, 1), "CSC", "an index for each value and an offset for each column are less than"),
        (torch.eye(5)[:1].repeat(4096, 1), "CSC", "the bits and row offsets of a bitmask"),
    ],
    ids=["dense", "bitmask fp32", "bitmask bf16", "2:4", "BSR", "COO", "CSR", "CSC", "one full column"],
)
def test_smallest(tensor, name, reason):
    found = compare_formats(tensor)
    assert found.smallest.name == name
    assert reason in str(found)
    assert found.smallest.nbytes == min(row.nbytes for row in found.formats if row.nbytes is not None)


@pytest.mark.parametrize("sparsity", [0.7, 0.98])
def test_smaller_with_short_indices(sparsity):
    """Said where int32 indices change which format is the smallest one."""
    matrix = sparse((256, 256), sparsity=sparsity)
    found = compare_formats(matrix)
    assert found.smallest.name == "bitmask"
    nbytes = min(found["CSR"].short_nbytes, found["CSC"].short_nbytes)
    verdict = f" With int32 indices CSR is smaller: {nbytes:,} bytes."
    assert (verdict in str(found)) == (nbytes < found.smallest.nbytes) == (sparsity == 0.98)


def test_compiled_functions_compare_between_their_graphs():
    torch._dynamo.reset()
    matrix = torch.eye(8)
    found = torch.compile(lambda: compare_formats(matrix), backend="eager")()
    assert str(found) == str(compare_formats(matrix))
    torch._dynamo.reset()


def test_public_names():
    assert {"FormatComparison", "FormatCrossovers", "CompressedTensor"} <= {*bitmask.__all__}
    assert isinstance(format_crossovers((4, 4)), bitmask.FormatCrossovers)


def test_rows_by_name_and_in_order():
    found = compare_formats(torch.eye(4))
    assert "CSR" in found
    assert "ELL" not in found
    assert [row.name for row in found] == ["dense", "COO", "CSR", "CSC", "BSR", "2:4", "bitmask"]


def test_text():
    lines = str(compare_formats(torch.ones(64, 64).tril())).splitlines()
    assert lines[0] == "64x64 float32, 49.2% zeros"
    assert lines[2].split() == ["format", "bytes", "of", "dense", "int32", "indices"]
    assert lines[3].split() == ["dense", "16,384", "100.0%", "-"]
    assert lines[5].split() == ["CSR", "25,480", "155.5%", "16,900"]
    assert lines[8].split()[:4] == ["2:4", "-", "-", "-"]
    assert lines[-1].startswith("Smallest: bitmask: it marks an element by one bit")


def test_times():
    matrix = prune_24_(sparse((64, 96), sparsity=0))
    found = compare_formats(matrix, time=True, rows=[3, 1, 3])
    assert found.rows == (3, 1)
    assert set(found["dense"].product_ms) == {1, 3}
    assert found["dense"].convert_ms is None
    for name in ("COO", "CSR", "CSC", "BSR", "2:4", "bitmask"):
        assert found[name].convert_ms > 0
    for name in ("BSR", "2:4", "bitmask"):
        assert set(found[name].product_ms) == {1, 3}
    assert [row.nbytes for row in found.formats] == [row.nbytes for row in compare_formats(matrix).formats]
    text = str(found)
    assert "m = 3 ms" in text
    assert "Fastest at m = 1: " in text
    with pytest.raises(ValueError, match=r"rows: got 2, expected one of those measured, \[3, 1\]"):
        found.fastest(2)
    with pytest.raises(KeyError):
        found["ELL"]


def test_times_leave_out_what_does_not_fit():
    found = compare_formats(sparse((33, 70)), time=True, rows=(2,))
    assert (found["2:4"].convert_ms, found["2:4"].product_ms) == (None, {})
    assert (found["BSR"].convert_ms, found["BSR"].product_ms) == (None, {})
    assert found["bitmask"].product_ms.keys() == {2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_times_of_every_dtype_of_products(dtype):
    found = compare_formats(sparse((64, 64), dtype), time=True, rows=(1,))
    for name in ("dense", "bitmask", "BSR"):
        assert set(found[name].product_ms) == {1}, found[name].note
    for row in found.formats:
        assert row.product_ms or row.note


def test_wrong_products_are_left_out():
    """A contender that is off by more than rounding, one that cannot multiply, and one that can."""

    def refuse(x, weight):
        raise NotImplementedError("no kernel")

    linear = torch.nn.functional.linear
    chosen = {
        "dense": Format(lambda dense: dense, linear),
        "off": Format(lambda dense: 1.01 * dense, linear),
        "none": Format(lambda dense: dense, refuse),
    }
    found = product_times(sparse((16, 64)), chosen, [1, 2])
    assert [set(times) for times in found.milliseconds.values()] == [{"dense"}, {"dense"}]
    assert found.problems == {
        "off": "its product is 1.0% off in float32, and left out",
        "none": "torch has no product with it in float32",
    }


@pytest.mark.parametrize(
    ("error", "known"), [(RuntimeError("requires compiling PyTorch with MKL"), True), (RuntimeError("a fault"), False)]
)
def test_only_products_that_torch_has_not_are_left_out(error, known):
    def fail(x, weight):
        raise error

    chosen = {"dense": Format(lambda dense: dense, torch.nn.functional.linear), "other": Format(torch.clone, fail)}
    if known:
        assert product_times(torch.eye(4), chosen, [1]).problems == {"other": "torch has no product with it in float32"}
        return
    with pytest.raises(RuntimeError, match="a fault"):
        product_times(torch.eye(4), chosen, [1])


@pytest.mark.parametrize("name", ["CSR", "CSC"])
def test_times_are_those_of_short_indices(name):
    """Which torch multiplies faster by, so that no format is called the fastest that is not."""
    matrix = sparse((64, 96))
    weight = formats((32, 32))[name].make(matrix)
    assert {part.dtype for part in parts_of(weight)[1:]} == {torch.int32}
    assert torch.equal(weight.to_dense(), matrix)


def test_indices_that_int32_does_not_hold_stay():
    starts = torch.zeros(2, dtype=torch.int64)
    for columns, dtype in ((2**31, torch.int64), (2**31 - 1, torch.int32)):
        empty = torch.sparse_csr_tensor(starts, starts[:0], torch.empty(0), (1, columns), check_invariants=True)
        assert short_csr(empty).crow_indices().dtype is dtype


def comparison(*times, name="bitmask", nbytes=56, short_nbytes=None, sparsity=0.5, rows=1):
    """Of dense and another format, of made-up times."""
    table = [
        FormatRow("dense", 100, None, 1.0, None, {rows: times[0]}, ""),
        FormatRow(name, nbytes, short_nbytes, nbytes / 100, 1.0, {rows: times[1]}, ""),
    ]
    return FormatComparison((5, 5), torch.float32, sparsity, (32, 32), (rows,), tuple(table))


def test_fastest():
    found = comparison(2.0, 1.0)
    assert found.fastest(1).name == "bitmask"
    assert "Fastest at m = 1: bitmask, 2.00 times as fast as dense: it reads 56.0% of the bytes." in str(found)
    assert "Fastest at m = 1: dense: finding where values belong" in str(comparison(1.0, 2.0))


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"name": "BSR", "nbytes": 101, "sparsity": 0.0}, "it reads no fewer bytes, its kernel is what is faster"),
        ({"name": "BSR", "nbytes": 40}, "it reads 40.0% of the bytes"),
        ({"name": "CSR", "nbytes": 120, "short_nbytes": 80}, "it reads 80.0% of the bytes"),
        ({"name": "CSC", "nbytes": 150, "short_nbytes": 110}, "it skips the elements that are zero, though"),
        ({"name": "COO", "nbytes": 200, "sparsity": 0.0}, "it reads no fewer bytes, its kernel is what is faster"),
        ({"name": "2:4", "nbytes": 53}, "it reads 53.0% of the bytes"),
        ({"name": "2:4", "nbytes": 53, "rows": 128}, "it multiplies by half of the elements"),
    ],
)
def test_why_fastest(found, reason):
    text = str(comparison(2.0, 1.0, **found))
    assert f"{found['name']}, 2.00 times as fast as dense: {reason}" in text


@pytest.mark.parametrize(
    ("tensor", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "tensor: got list, expected a torch.Tensor"),
        (torch.eye(4).to_sparse(), {}, TypeError, "tensor: got a torch.sparse_coo tensor"),
        (BitmaskTensor.from_dense(torch.eye(4)), {}, TypeError, "tensor: got a BitmaskTensor"),
        (torch.empty(4, dtype=torch.bits8), {}, TypeError, "tensor: got dtype torch.bits8"),
        (torch.eye(4, device="meta"), {}, ValueError, "tensor: got a meta tensor, expected one with data"),
        (torch.eye(4).int(), {"time": True}, TypeError, "tensor: got dtype torch.int32, expected float32"),
        (torch.ones(0, 4), {"time": True}, ValueError, r"tensor: got size \[0, 4\], expected elements"),
        (torch.eye(4), {"rows": ()}, ValueError, r"rows: got \(\), expected numbers of rows of at least 1"),
        (torch.eye(4), {"rows": (1, 0)}, ValueError, r"rows: got \(1, 0\)"),
        (torch.eye(4), {"rows": 1}, TypeError, "rows: got 1, expected a sequence of integers"),
        (torch.eye(4), {"rows": ("1",)}, TypeError, "rows: got"),
        (torch.eye(4), {"rows": (1.5,)}, TypeError, "rows: got"),
        (torch.eye(4), {"block_shape": (0, 4)}, ValueError, "block_shape: got"),
        (torch.eye(4), {"block_shape": (4,)}, TypeError, "block_shape: got"),
        (torch.eye(4), {"block_shape": 4}, TypeError, "block_shape: got 4"),
    ],
)
def test_bad_arguments(tensor, options, error, message):
    with pytest.raises(error, match=message):
        compare_formats(tensor, **options)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], None),
        ([(0.5, 0.9)], None),
        ([(0.5, 1.0)], 0.5),
        ([(0.9, 2.0), (0.5, 1.5)], 0.5),
        ([(0.0, 0.5), (0.75, 2.0)], 0.5),
        ([(0.5, 2.0), (0.7, 0.5), (0.9, 1.0)], 0.9),
        ([(0.5, 2.0), (0.9, 0.5)], None),
        ([(0.5, 0.5), (1.0, 2.0)], 1.0),
    ],
)
def test_crossing_sparsity(points, expected):
    assert crossing_sparsity(points) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ((), "never"),
        (((0.5, 0.5), (0.9, 0.9)), "never"),
        (((0.5, 0.5), (0.75, 1.0)), "75.0%"),
        (((0.9, 3.0), (0.5, 1.5)), "at most 50.0%"),
        (((0.5, 1.5),), "50.0%"),
    ],
)
def test_crossing_in_words(points, expected):
    assert crossing_words(points) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_counted_crossovers_are_where_bytes_are_equal(dtype):
    """A matrix a little sparser than said takes fewer bytes than dense (than a bitmask), one a little denser more."""
    shape = (256, 512)
    found = format_crossovers(shape, dtype, block_shape=(8, 8))
    for other, shares in (("dense", found.smaller_than_dense), ("bitmask", found.smaller_than_bitmask)):
        for name in ("COO", "CSR", "CSC", *(["bitmask"] if other == "dense" else [])):
            for step, fewer in ((0.002, True), (-0.002, False)):
                matrix = torch.zeros(shape[0] * shape[1], dtype=dtype)
                kept = round((1 - shares[name] - step) * matrix.numel())
                matrix[torch.randperm(matrix.numel())[:kept]] = 1
                bytes_of = compare_formats(matrix.view(shape), block_shape=(8, 8))
                assert (bytes_of[name].nbytes < bytes_of[other].nbytes) == fewer


def test_crossovers_of_two_four_and_none():
    found = format_crossovers((64, 64), torch.int8)
    assert found.smaller_than_dense["2:4"] == 0.5
    assert found.smaller_than_bitmask["2:4"] == 0.5
    assert found.speedups == {}
    one = format_crossovers((1, 1), torch.int8)
    assert one.smaller_than_dense["CSR"] is None
    assert "never" in str(one)


def test_measured_crossovers():
    found = format_crossovers((64, 64), time=True, rows=(1, 2), sparsities=(0.9, 0.5))
    assert set(found.speedups) == {1, 2}
    for speedups in found.speedups.values():
        assert {"bitmask", "BSR", "2:4"} <= set(speedups)
        assert [share for share, _ in speedups["bitmask"]] == [0.5, 0.9]
        assert [share for share, _ in speedups["2:4"]] == [0.5]
        assert all(ratio > 0 for points in speedups.values() for _, ratio in points)
    assert set(found.faster_than_dense(1)) == set(found.speedups[1])
    lines = str(found).splitlines()
    assert "faster, m = 2" in lines[2]
    assert [line.split()[0] for line in lines[3:9]] == ["COO", "CSR", "CSC", "BSR", "2:4", "bitmask"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4096, 5), torch.float32), ((64, 64), torch.complex64), ((64, 64), torch.float8_e8m0fnu)],
    ids=str,
)
def test_crossovers_of_what_has_no_two_four(shape, dtype):
    found = format_crossovers(shape, dtype)
    assert found.smaller_than_dense["2:4"] is found.smaller_than_bitmask["2:4"] is None
    assert format_crossovers((4096, 8)).smaller_than_dense["2:4"] == 0.5


def test_crossovers_say_where_blocks_do_not_divide():
    note = "reach past the edges"
    assert note not in str(format_crossovers((64, 96)))
    assert all(note in str(format_crossovers(shape)) for shape in ((65, 96), (64, 95)))


def test_measured_crossovers_of_odd_sizes():
    found = format_crossovers((33, 70), time=True, rows=(1,), sparsities=(0.5,))
    assert not {"BSR", "2:4"} & set(found.speedups[1])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((4,), {}, TypeError, "shape: got 4, expected two integers"),
        (((4, 4, 4),), {}, TypeError, "shape: got"),
        (((4, 0),), {}, ValueError, r"shape: got \(4, 0\), expected sizes of at least 1"),
        (((4, 4), "float32"), {}, TypeError, "dtype: got float32"),
        (((4, 4), torch.int8), {"time": True}, TypeError, "dtype: got torch.int8, expected"),
        (((4, 4),), {"sparsities": ()}, ValueError, r"sparsities: got \(\)"),
        (((4, 4),), {"sparsities": (1.5,)}, ValueError, r"sparsities: got \(1.5,\), expected shares of zeros"),
        (((4, 4),), {"sparsities": (math.nan,)}, ValueError, "sparsities: got"),
        (((4, 4),), {"sparsities": 0.5}, TypeError, "sparsities: got 0.5"),
        (((4, 4),), {"rows": (0,)}, ValueError, "rows: got"),
        (((4, 4),), {"block_shape": (0, 1)}, ValueError, "block_shape: got"),
    ],
)
def test_crossovers_refuse(arguments, options, error, message):
    with pytest.raises(error, match=message):
        format_crossovers(*arguments, **options)
