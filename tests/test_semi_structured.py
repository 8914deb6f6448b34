"""SemiStructuredTensor: what is its own, beside what test_compressed_tensor.py says of all compressed tensors."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    allows_decompression,
    assert_bits_equal,
    assert_exports,
    assert_is_compressed,
    assert_parts_equal,
    parts_of,
    random_dense,
    random_numbers,
    two_four_numbers,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from bitmask import (
    BitmaskLinear,
    BitmaskTensor,
    DecompressWarning,
    FormatError,
    SemiStructuredTensor,
    pack_24,
    prune_24_,
)
from bitmask.ops_two_four import TWO_FOUR_DTYPES

pytestmark = [
    pytest.mark.usefixtures("decompression_is_an_error"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor"),
]


@pytest.fixture
def dense():
    return two_four_numbers(6, 20)


@pytest.fixture
def compressed(dense):
    return SemiStructuredTensor.from_dense(dense)


@pytest.fixture
def layer(compressed):
    module = nn.Linear(20, 6)
    module.weight = nn.Parameter(compressed, requires_grad=False)
    return module


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_of_four(dense):
    """The same bits, but for two columns of every four that are zero: the first and the last, by turns the others."""
    octets = dense.clone().view(torch.uint8).reshape(-1, 4, dense.itemsize)
    octets[::2, 0], octets[::2, 3] = 0, 0
    octets[1::2, 1], octets[1::2, 2] = 0, 0
    return octets.reshape(-1).view(dense.dtype).reshape(dense.shape)


# Construction and attributes.


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32], ids=str)
def test_devices(device, dtype):
    """Parts move there and back, and are made there."""
    dense = two_four_numbers(33, 20, dtype=dtype)
    compressed = SemiStructuredTensor.from_dense(dense)
    there = compressed.to(device)
    assert {part.device.type for part in parts_of(there)} == {device.type}
    assert_parts_equal(parts_of(there.cpu()), parts_of(compressed))
    assert_bits_equal(there.to_dense().cpu(), dense)
    assert_parts_equal(parts_of(SemiStructuredTensor.from_dense(dense.to(device)).cpu()), parts_of(compressed))


def test_products_on_devices(device):
    weight, x, bias = two_four_numbers(33, 20), random_numbers(5, 20), random_numbers(33)
    there = SemiStructuredTensor.from_dense(weight.to(device))
    rows = x.to(device).requires_grad_()
    y = F.linear(rows, there, bias.to(device))
    torch.testing.assert_close(y.detach().cpu(), F.linear(x, weight, bias))
    y.sum().backward()
    torch.testing.assert_close(rows.grad.cpu(), weight.sum(0).expand(5, 20))


def test_hand_over_on_devices(device):
    """Values are shared there, too."""
    compressed = SemiStructuredTensor.from_dense(two_four_numbers(64, 128, dtype=torch.float16).to(device))
    converted = compressed.to_torch()
    assert converted.packed.data_ptr() == compressed.values.data_ptr()
    back = SemiStructuredTensor.from_torch(converted)
    assert back.values.data_ptr() == compressed.values.data_ptr()
    assert_parts_equal(parts_of(back), parts_of(compressed))


@pytest.mark.parametrize("dtype", sorted(TWO_FOUR_DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(0,), (4,), (12,), (5, 0), (0, 8), (3, 12), (2, 3, 4, 20)], ids=str)
def test_from_dense_and_back(dtype, shape):
    dense = two_of_four(random_dense(shape, dtype, density=0.8))
    compressed = SemiStructuredTensor.from_dense(dense, keep_negative_zero=True)
    assert_bits_equal(compressed.to_dense(), dense)
    assert (compressed.shape, compressed.dtype, compressed.device) == (dense.shape, dense.dtype, dense.device)
    assert_parts_equal(parts_of(compressed), pack_24(dense, keep_negative_zero=True))


def test_from_dense_of_any_strides(dense):
    assert_is_compressed(SemiStructuredTensor.from_dense(dense.t().contiguous().t()), dense)
    assert_is_compressed(SemiStructuredTensor.from_dense(dense[::2, 4:12]), dense[::2, 4:12])


@pytest.mark.parametrize("keep_negative_zero", [False, True])
def test_keep_negative_zero(keep_negative_zero):
    """By default (0, 1, 0, 0) stores columns 1 and 2, as if all its zeros were positive."""
    dense = torch.tensor([-0.0, 1.0, 0.0, 0.0])
    compressed = SemiStructuredTensor.from_dense(dense, keep_negative_zero=keep_negative_zero)
    assert compressed.metadata.tolist() == [0b0011 if keep_negative_zero else 0b0110]
    assert torch.signbit(compressed.to_dense())[0].item() is keep_negative_zero


def test_kept_negative_zeros_count():
    dense = torch.tensor([-0.0, 1.0, 2.0, 0.0])
    assert torch.equal(SemiStructuredTensor.from_dense(dense).to_dense(), dense)
    with pytest.raises(ValueError, match="row 0, columns 0 to 3: got 3 non-zeros, expected at most 2"):
        SemiStructuredTensor.from_dense(dense, keep_negative_zero=True)


def test_prune():
    dense = random_numbers(6, 20, density=0.9)
    assert_is_compressed(SemiStructuredTensor.from_dense(dense, prune=True), prune_24_(dense.clone()))


def test_attributes(compressed):
    assert compressed.nnz == 60
    assert compressed.sparsity == 0.5
    assert compressed.compressed_nbytes == 60 * 4 + 6 * 3
    assert compressed.nbytes == 480
    assert (compressed.ndim, compressed.numel(), compressed.stride()) == (2, 120, (20, 1))
    assert (compressed.values.shape, compressed.metadata.shape) == ((6, 10), (6, 3))


def three_in_a_group():
    dense = torch.zeros(5, 12)
    dense[3, 4:8] = torch.tensor([0.5, 0.0, -2.0, 1.0])
    return dense


NOT_TWO_FOUR = "dense: row 3, columns 4 to 7: got 3 non-zeros, expected at most 2"


@pytest.mark.parametrize(
    ("dense", "error", "message"),
    [
        (three_in_a_group(), ValueError, NOT_TWO_FOUR),
        (torch.full((4,), torch.nan), ValueError, "row 0, columns 0 to 3: got 4 non-zeros"),
        (torch.zeros(3, 6), ValueError, r"dense: got size \[3, 6\], expected a last size that is a multiple of 4"),
        (torch.zeros(4, 3), ValueError, r"dense: got size \[4, 3\], expected a last size that is a multiple of 4"),
        (torch.zeros(()), ValueError, r"dense: got size \[\], expected at least one dimension"),
        (torch.zeros(2, 4, dtype=torch.complex64), TypeError, "dense: got dtype torch.complex64, expected"),
        (torch.zeros(4, dtype=torch.uint8).view(torch.float8_e8m0fnu), TypeError, "dense: got dtype torch.float8_e8m0"),
    ],
    ids=["three", "NaNs", "6 columns", "3 columns", "scalar", "complex", "no zero"],
)
def test_from_dense_refuses(dense, error, message):
    with pytest.raises(error, match=message):
        SemiStructuredTensor.from_dense(dense)


def test_from_dense_on_meta():
    """Sizes do not depend on what is stored."""
    compressed = SemiStructuredTensor.from_dense(torch.empty(6, 20, device="meta"))
    assert (compressed.device.type, compressed.shape, compressed.values.shape) == ("meta", (6, 20), (6, 10))


def test_from_parts_does_not_copy(compressed, dense):
    again = SemiStructuredTensor.from_parts(*parts_of(compressed))
    assert_is_compressed(again, dense)
    assert [part.data_ptr() for part in parts_of(again)] == [part.data_ptr() for part in parts_of(compressed)]


def test_from_parts_cuts_gradients(dense):
    values, metadata = pack_24(dense.requires_grad_())
    assert values.requires_grad
    assert not SemiStructuredTensor.from_parts(values, metadata).values.requires_grad


def test_parts_with_gaps_in_memory(compressed, dense):
    values, metadata = (torch.stack([part, part], dim=-1)[..., 0] for part in parts_of(compressed))
    tensor = SemiStructuredTensor.from_parts(values, metadata)
    assert_is_compressed(tensor, dense)
    assert_is_compressed(tensor[1:3], dense[1:3])
    assert_is_compressed(tensor.to_bitmask(), dense)


BITS = torch.tensor([[0b1100_0101, 0b0011], [0b0110_0110, 0b1001]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("values", "metadata", "error", "message"),
    [
        (torch.zeros(2, 6), BITS | 0x10, FormatError, "metadata: row 0, columns 4 to 7: got 3 bits set, expected 2"),
        (torch.zeros(2, 6), BITS | torch.tensor([0, 0x30], dtype=torch.uint8), FormatError, "metadata: row 0"),
        (torch.zeros(2, 5), BITS, FormatError, r"values: got size \[2, 5\], expected \[..., cols / 2\]"),
        (torch.zeros(2, 4), BITS, FormatError, r"metadata: got size \[2, 2\], expected \[2, 1\]"),
        (torch.zeros(12), BITS, FormatError, r"metadata: got size \[2, 2\], expected \[3\]"),
        (torch.zeros(()), BITS, FormatError, r"values: got size \[\], expected \[..., cols / 2\]"),
        (torch.zeros(2, 6), BITS.to(torch.int8), TypeError, "metadata: got dtype torch.int8, expected torch.uint8"),
        (torch.zeros(2, 6), BITS.to("meta"), ValueError, "metadata: got device meta, expected cpu"),
        (torch.zeros(2, 6), None, TypeError, "metadata: got NoneType, expected a torch.Tensor"),
        ([0.0], BITS, TypeError, "values: got list, expected a torch.Tensor"),
        (torch.zeros(2, 6, dtype=torch.complex64), BITS, TypeError, "values: got dtype torch.complex64, expected"),
        (torch.zeros(2, 6).to_sparse(), BITS, TypeError, "values: got a torch.sparse_coo tensor, expected a dense"),
    ],
)
def test_from_parts_refuses(values, metadata, error, message):
    with pytest.raises(error, match=message):
        SemiStructuredTensor.from_parts(values, metadata)


def test_constructing_checks_sizes():
    with pytest.raises(FormatError, match=r"values: got size \[\], expected"):
        SemiStructuredTensor(torch.zeros(()), BITS)


def test_unpickling_proves_the_parts(compressed):
    rebuild, (values, metadata, shape, is_parameter) = compressed.__reduce_ex__(2)
    with pytest.raises(FormatError, match="metadata: row 0"):
        rebuild(values, metadata + 1, shape, is_parameter)
    with pytest.raises(FormatError, match=r"values: got size \[6, 10\], expected \[5, 10\] for shape \[5, 20\]"):
        rebuild(values, metadata, (5, 20), is_parameter)


@pytest.mark.parametrize("shape", [None, 120, (), (6, "20"), (6, 20.0), (6, 21), (6, 16), (120,)], ids=str)
def test_unpickling_refuses_forged_shapes(compressed, shape):
    rebuild, (values, metadata, _, is_parameter) = compressed.__reduce_ex__(2)
    with pytest.raises(FormatError, match=r"^(shape|values): got"):
        rebuild(values, metadata, shape, is_parameter)


# To and from other layouts.


def test_from_sparse_says_the_way_from_two_four(compressed):
    with pytest.raises(TypeError, match=r"got a SemiStructuredTensor, expected a sparse one; use its to_bitmask\(\)"):
        BitmaskTensor.from_sparse(compressed)


@pytest.mark.parametrize("name", ["prune", "keep_negative_zero"])
@pytest.mark.parametrize("value", [None, "no", 1])
def test_flags_of_another_type(dense, name, value):
    with pytest.raises(TypeError, match=f"{name}: got {value!r}, expected True or False"):
        SemiStructuredTensor.from_dense(dense, **{name: value})


@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 4), (12,), (0, 8), (3, 0), (7, 44)], ids=str)
def test_to_bitmask_and_back_share_memory(shape):
    dense = two_four_numbers(*shape)
    compressed = SemiStructuredTensor.from_dense(dense)
    as_bitmask = compressed.to_bitmask()
    assert type(as_bitmask) is BitmaskTensor
    assert_is_compressed(as_bitmask, dense)
    back = SemiStructuredTensor.from_bitmask(as_bitmask)
    assert type(back) is SemiStructuredTensor
    assert_is_compressed(back, dense)
    for other in (as_bitmask, back):
        assert [part.data_ptr() for part in parts_of(other)[:2]] == [part.data_ptr() for part in parts_of(compressed)]


def test_stored_zeros_stay_stored():
    dense = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0]])
    as_bitmask = SemiStructuredTensor.from_dense(dense).to_bitmask()
    assert as_bitmask.values.tolist() == [0, 0, 7, 0]
    assert as_bitmask.bitmasks.tolist() == [[0b0110_1100]]


def test_rows_to_bitmask(compressed, dense):
    assert_is_compressed(compressed[2:5].to_bitmask(), dense[2:5])


def test_bitmask_with_the_rows_of_a_larger_one(dense):
    whole = SemiStructuredTensor.from_dense(dense).to_bitmask()
    assert_is_compressed(SemiStructuredTensor.from_bitmask(whole[2:5]), dense[2:5])


@pytest.mark.parametrize(("octet", "fault"), [(0b0000_1111, "8 to 11: got 4"), (0b0111_0011, "12 to 15: got 3")])
def test_to_bitmask_proves_every_four_columns(compressed, octet, fault):
    """A row may store as many elements as it should, and yet be no 2:4."""
    compressed.metadata[4, 1] = octet
    with pytest.raises(FormatError, match=f"metadata: row 4, columns {fault} bits set, expected 2"):
        compressed.to_bitmask()


@pytest.mark.parametrize(
    ("dense", "error", "message"),
    [
        (three_in_a_group(), ValueError, "bitmasks, taken for 2:4 metadata: row 0, columns 0 to 3: got 0 bits set"),
        (torch.ones(3, 8), ValueError, "row 0, columns 0 to 3: got 4 bits set, expected 2"),
        (torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), ValueError, "row 0, columns 0 to 3: got 3 bits"),
        (torch.ones(2, 6), ValueError, r"shape: got \[2, 6\], expected a last size that is a multiple of 4"),
        (torch.ones(()), ValueError, r"shape: got \[\], expected a last size that is a multiple of 4"),
        (torch.tensor([[1j, 1j, 0, 0]]), TypeError, "values: got dtype torch.complex64"),
    ],
    ids=["fewer", "more", "two on average", "6 columns", "scalar", "complex"],
)
def test_bitmask_that_is_not_two_four_is_refused(dense, error, message):
    with pytest.raises(error, match=message):
        SemiStructuredTensor.from_bitmask(BitmaskTensor.from_dense(dense))


def test_bitmask_with_faulty_parts_is_refused(compressed):
    as_bitmask = compressed.to_bitmask()
    as_bitmask.row_offsets += 1
    with pytest.raises(FormatError, match=r"row_offsets\[0\]: got 1, expected 0"):
        SemiStructuredTensor.from_bitmask(as_bitmask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float32])
def test_to_torch_and_back(dtype):
    pairs = torch.tensor([1, 0, 0, 1]) if dtype is torch.float32 else torch.tensor([1, 0, 1, 0])  # torch's are 1:2
    dense = (torch.randint(-9, 9, (64, 128)) * pairs.repeat(32)).to(dtype)
    compressed = SemiStructuredTensor.from_dense(dense)
    converted = compressed.to_torch()
    assert type(converted) is SparseSemiStructuredTensorCUTLASS
    assert torch.equal(converted.to_dense(), dense)
    back = SemiStructuredTensor.from_torch(converted)
    assert_is_compressed(back, dense)
    assert back.values.data_ptr() == converted.packed.data_ptr()
    assert (converted.packed.data_ptr() == compressed.values.data_ptr()) is (dtype != torch.float32)


@pytest.mark.parametrize(
    ("dense", "error", "message"),
    [
        (torch.zeros(64, 100, dtype=torch.float16), ValueError, "expected multiples of 32 rows and 64 columns"),
        (torch.zeros(2, 64, 128, dtype=torch.float16), ValueError, r"values: got size \[2, 64, 64\]"),
        (torch.zeros(64, 64, dtype=torch.float64), TypeError, "values: got dtype torch.float64"),
        (torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(64, 16), ValueError, "got 2 non-zeros, expected at most 1"),
    ],
    ids=["100 columns", "3-D", "float64", "2 in a pair"],
)
def test_to_torch_refuses(dense, error, message):
    with pytest.raises(error, match=message):
        SemiStructuredTensor.from_dense(dense).to_torch()


def test_from_torch_refuses():
    with pytest.raises(TypeError, match="tensor: got Tensor, expected a SparseSemiStructuredTensorCUTLASS"):
        SemiStructuredTensor.from_torch(torch.zeros(64, 64))
    converted = SemiStructuredTensor.from_dense(torch.zeros(64, 64, dtype=torch.float16)).to_torch()
    with pytest.raises(ValueError, match="tensor: got one without packed and meta"):
        SemiStructuredTensor.from_torch(converted.t())
    with pytest.raises(FormatError, match=r"packed: got size \[64, 32\], expected \[32, 64\] for shape \[32, 128\]"):
        SemiStructuredTensor.from_torch(
            SparseSemiStructuredTensorCUTLASS(torch.Size([32, 128]), converted.packed, converted.meta, None, None, None)
        )
    converted.meta.fill_(0)
    with pytest.raises(FormatError, match="meta: row 0, columns 0 to 3"):
        SemiStructuredTensor.from_torch(converted)


@allows_decompression
@pytest.mark.parametrize("to", [torch.complex64, torch.float8_e8m0fnu])
def test_conversion_to_a_dtype_without_layout_gives_a_dense_tensor(compressed, dense, to):
    converted = compressed.to(to)
    assert type(converted) is torch.Tensor
    assert_bits_equal(converted, dense.to(to))


# Writing.


def test_copy_of_what_is_not_two_four_is_refused_and_changes_nothing():
    dense = two_four_numbers(5, 12)
    compressed = SemiStructuredTensor.from_dense(dense)
    for source in (three_in_a_group(), BitmaskTensor.from_dense(three_in_a_group())):
        with pytest.raises(ValueError, match=NOT_TWO_FOUR):
            compressed.copy_(source)
    assert_is_compressed(compressed, dense)


def test_load_state_dict_names_the_weight_and_the_group():
    dense, layer = two_four_numbers(5, 12), nn.Linear(12, 5, bias=False)
    layer.weight = nn.Parameter(SemiStructuredTensor.from_dense(dense), requires_grad=False)
    with pytest.raises(RuntimeError, match=rf'parameter named "weight"(.|\n)*{NOT_TWO_FOUR}'):
        layer.load_state_dict({"weight": three_in_a_group()})
    assert_is_compressed(layer.weight, dense)


# Products.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sizes", [(), (1,), (3,), (40,), (2, 5)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(dtype, sizes, with_bias):
    dense = two_four_numbers(30, 44, dtype=dtype)
    x = random_numbers(*sizes, 44, density=1.0, seed=1, dtype=dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    bias = random_numbers(30, density=1.0, seed=2, dtype=dtype) if with_bias else None
    got, expected = F.linear(x, SemiStructuredTensor.from_dense(dense), bias), F.linear(y, dense, bias)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=2e-2, atol=2e-2)


def test_linear_with_rows_of_a_weight(compressed, dense):
    x = random_numbers(3, 20, density=1.0)
    torch.testing.assert_close(F.linear(x, compressed[2:5]), F.linear(x, dense[2:5]))


def test_gradient_of_the_bias(layer):
    layer(torch.ones(3, 20)).sum().backward()
    assert layer.bias.grad.tolist() == [3.0] * 6


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (torch.ones(3, 19), None, ValueError, r"x: got size \[3, 19\], expected \[..., 20\]"),
        (torch.ones(3, 20).double(), None, TypeError, "x: got dtype torch.float64, expected torch.float32"),
        (torch.ones(3, 20), torch.ones(5), ValueError, r"bias: got size \[5\], expected \[6\]"),
        (torch.ones(()), None, ValueError, r"x: got size \[\], expected \[..., 20\]"),
    ],
)
def test_linear_refuses(compressed, x, bias, error, message):
    with pytest.raises(error, match=message):
        F.linear(x, compressed, bias)


@pytest.mark.parametrize("m", [1, 64])
def test_linear_proves_the_metadata(compressed, m):
    compressed.metadata[4, 1] = 0b0111_0011
    with pytest.raises(FormatError, match="metadata: row 4, columns 12 to 15: got 3 bits set, expected 2"):
        F.linear(torch.ones(m, 20), compressed)


def test_products_without_a_kernel_run_on_a_dense_copy(compressed, dense):
    x = torch.ones(2, 20)
    whole = SemiStructuredTensor.from_dense(dense.to(torch.int32))
    for got, expected in (
        (lambda: F.linear(x.int(), whole), F.linear(x.int(), dense.to(torch.int32))),
        (lambda: F.linear(compressed, compressed), dense @ dense.t()),
        (lambda: F.linear(x, compressed[0]), x @ dense[0]),
        (lambda: x @ compressed.t(), x @ dense.t()),
    ):
        with pytest.warns(DecompressWarning, match="SemiStructuredTensor"):
            torch.testing.assert_close(got(), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_compiled_layer(layer, mode):
    model, counter = nn.Sequential(layer, nn.ReLU()), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with mode():
        for m in (2, 3, 17, 5):
            x = random_numbers(m, 20, density=1.0)
            assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_gradients(layer, dense):
    x = random_numbers(3, 20, density=1.0).requires_grad_()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 20))
    assert layer.bias.grad.tolist() == [3.0] * 6


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strict", [False, True])
def test_export(layer, strict):
    assert_exports(layer, torch.ops.bitmask.linear_24.default, random_numbers(8, 20, density=1.0), strict)


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast(region, dtype):
    dense = two_four_numbers(30, 52, dtype=dtype)
    weight, bias = SemiStructuredTensor.from_dense(dense), random_numbers(30, density=1.0)
    x = random_numbers(4, 52, density=1.0).requires_grad_()
    with torch.autocast("cpu", dtype=region):
        expected, got = F.linear(x, dense, bias), F.linear(x, weight, bias)
    assert got.dtype == expected.dtype == region
    torch.testing.assert_close(got, expected)


# In a BitmaskLinear, whose weight is in the bitmask layout.


def test_bitmask_linear_is_made_of_dense_layers(layer):
    with pytest.raises(TypeError, match="linear: got a Linear whose weight is compressed, expected a dense one"):
        BitmaskLinear.from_dense(layer)


@pytest.mark.parametrize("assign", [False, True])
def test_bitmask_linear_loads_a_two_four_weight(layer, dense, assign):
    taker = BitmaskLinear(20, 6)
    taker.load_state_dict(layer.state_dict(), assign=assign)
    assert type(taker.weight) is BitmaskTensor
    assert_is_compressed(taker.weight, dense)
    assert (taker.weight.values.data_ptr() == layer.weight.values.data_ptr()) is assign
