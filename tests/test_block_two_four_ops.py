"""Products with a block-sparse weight whose blocks are 2:4: against float64; gradients; compilers; bad input."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from block_weights import Blocks, check_gradient_of_x, check_product, operands, random_blocks
from conftest import ISAS, VIEWS_OF_ROWS, assert_bits_equal, assert_works_after_fork, random_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import bitmask
from bitmask import BitmaskTensor, FormatError, ops_block, reference
from bitmask.calls import LINEAR_DTYPES
from bitmask.ops_block import bsr_linear
from bitmask.ops_block_two_four import bsr_linear_24
from bitmask.ops_two_four import pack_24, prune_24, unpack_24

DTYPES = sorted(LINEAR_DTYPES, key=str)
BATCHES = [0, 1, 2, 4, 5, 9, 16, 17, 33, 100, 250]

# out_features, in_features, block shape: whole blocks, cut ones, blocks larger than the weight, of one group, with
# padded metadata, of odd heights; and lines that are unpacked alone, or in parts.
SHAPES = [
    (64, 128, (32, 32)),
    (50, 70, (16, 32)),
    (7, 35, (32, 64)),
    (33, 66, (1, 4)),
    (29, 100, (5, 12)),
    (130, 300, (64, 128)),
    (0, 8, (4, 4)),
    (8, 0, (4, 4)),
]
LARGE_LINES = [(270, 8300, (260, 4096)), (20, 100_000, (24, 1 << 16)), (1100, 700, (1024, 512))]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def two_four_blocks(n, k, block_shape, density=0.5, seed=0, dtype=torch.float32):
    """Random kept blocks that are 2:4, with NaN stored past the edges of the weight, and their parts."""
    blocks = random_blocks(n, k, block_shape, density, seed, dtype).with_padding(0)
    prune_24(blocks.values)
    values, metadata = pack_24(blocks.values)
    groups = blocks.inside.reshape(*blocks.inside.shape[:-1], block_shape[1] // 4, 4)
    stored = reference.stored_columns(metadata, block_shape[1])
    values.masked_fill_(~groups.gather(-1, stored).reshape(values.shape), math.nan)
    return blocks, (values, metadata, *blocks.index, n)


def check(n, k, block_shape, m, dtype=torch.float32, density=0.5, seed=0, biased=True):
    blocks, parts = two_four_blocks(n, k, block_shape, density, seed, dtype)
    x, _, bias = operands(blocks, m, seed)
    check_product(bsr_linear_24(x, *parts, bias if biased else None), blocks, x, bias if biased else None)


# Against float64.


@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize(("n", "k", "block_shape"), SHAPES, ids=str)
def test_all_sizes(isa, dtype, n, k, block_shape, m):
    check(n, k, block_shape, m, dtype, seed=m, biased=m % 2 == 0)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize(("n", "k", "block_shape"), LARGE_LINES, ids=str)
def test_lines_that_are_larger_than_a_window(isa, dtype, n, k, block_shape, m):
    check(n, k, block_shape, m, dtype, density=1.0)


@pytest.mark.parametrize("m", [1, 40])
def test_many_lines_in_several_windows(isa, dtype, m):
    check(4000, 260, (8, 64), m, dtype)


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("m", [1, 20])
def test_densities(isa, dtype, density, m):
    check(96, 160, (16, 32), m, dtype, density)


@pytest.mark.parametrize("m", [1000, 2065])
def test_many_rows(isa, dtype, m):
    check(90, 72, (32, 16), m, dtype)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 100),
    k=st.integers(0, 150),
    rows=st.integers(1, 40),
    groups=st.integers(1, 12),
    m=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES),
    isa_name=st.sampled_from(ISAS),
    density=st.sampled_from([0.2, 0.7, 1.0]),
    biased=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_random_layers(n, k, rows, groups, m, dtype, isa_name, density, biased, seed):
    bitmask.set_isa(isa_name)
    try:
        check(n, k, (rows, 4 * groups), m, dtype, density, seed, biased)
    finally:
        bitmask.set_isa(None)


@pytest.mark.parametrize("m", [1, 30])
def test_same_bits_as_from_dense_blocks(isa, dtype, m):
    """Unpacked blocks go through the same kernels."""
    blocks, parts = two_four_blocks(130, 300, (64, 32), dtype=dtype)
    x, _, bias = operands(blocks, m)
    assert_bits_equal(bsr_linear_24(x, *parts, bias), bsr_linear(x, blocks.values, *blocks.index, 130, bias))


def test_same_as_reference(dtype):
    blocks, parts = two_four_blocks(50, 70, (16, 32), dtype=dtype)
    x, _, bias = operands(blocks, 6)
    torch.testing.assert_close(bsr_linear_24(x, *parts, bias), reference.bsr_linear_24(x, *parts, bias))


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_infinity_and_nan_reach_what_a_kept_block_multiplies(isa, dtype, m, special):
    """As from dense blocks: a dropped weight in a kept block makes NaN of an infinity, an absent block nothing."""
    blocks, parts = two_four_blocks(64, 96, (16, 32), dtype=dtype)
    x, _, _ = operands(blocks, m)
    x[-1, 40] = special
    y = bsr_linear_24(x, *parts)
    meets = blocks.kept[:, 40]
    expected = F.linear(x.double(), blocks.dense.double())
    assert 0 < meets.sum() < 64
    assert y[:-1].isfinite().all()
    assert y[-1, ~meets].isfinite().all()
    assert torch.equal(y[-1, meets].isnan(), expected[-1, meets].isnan())


@pytest.mark.parametrize("name", VIEWS_OF_ROWS)
def test_views_of_x(isa, dtype, name):
    x = VIEWS_OF_ROWS[name](random_numbers(80, 140, density=1.0, dtype=dtype))
    blocks, parts = two_four_blocks(30, x.shape[-1], (8, 16), dtype=dtype)
    bias = random_numbers(60, density=1.0, dtype=dtype)[::2]
    check_product(bsr_linear_24(x, *parts, bias), blocks, x, bias)


@pytest.mark.parametrize("m", [1, 40])
def test_parts_that_are_unaligned_views(isa, dtype, m):
    blocks, parts = two_four_blocks(30, 100, (8, 20), dtype=dtype)
    inside = []
    for part in parts[:-1]:
        buffer = torch.zeros(part.numel() + 8, dtype=part.dtype)
        buffer[3 : 3 + part.numel()] = part.reshape(-1)
        inside.append(buffer[3 : 3 + part.numel()].view(part.shape))
    x, _, _ = operands(blocks, m)
    check_product(bsr_linear_24(x, *inside, 30), blocks, x)
    strided = [torch.stack([part, part], dim=-1)[..., 0] for part in inside]
    check_product(bsr_linear_24(x, *strided, 30), blocks, x)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("m", [1, 5, 200])
def test_number_of_threads_does_not_change_a_bit(isa, dtype, m):
    blocks, parts = two_four_blocks(700, 600, (32, 64), dtype=dtype)
    x, _, bias = operands(blocks, m)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(bsr_linear_24(x, *parts, bias))
    for result in results[1:]:
        assert_bits_equal(result, results[0])


# Gradients, compilers, autocast.


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 4)], ids=str)
def test_gradcheck(lead):
    _, parts = two_four_blocks(9, 13, (4, 8), dtype=torch.float64)
    x = random_numbers(*lead, 13, density=1.0, dtype=torch.float64).requires_grad_()
    bias = random_numbers(9, density=1.0, dtype=torch.float64).requires_grad_()

    def layer(x, bias):
        return bsr_linear_24(x, *parts, bias)

    assert torch.autograd.gradcheck(layer, (x, bias))
    assert torch.autograd.gradgradcheck(layer, (x, bias))


@pytest.mark.parametrize("wanted", ["x", "bias", "both"])
def test_gradients(dtype, wanted):
    blocks, parts = two_four_blocks(50, 70, (16, 32), dtype=dtype)
    x, grad, bias = operands(blocks, 9)
    x.requires_grad_(wanted != "bias")
    bias.requires_grad_(wanted != "x")
    bsr_linear_24(x, *parts, bias).backward(grad)
    if wanted != "bias":
        check_gradient_of_x(x.grad, blocks, grad)
    if wanted != "x":
        torch.testing.assert_close(bias.grad, grad.sum(0))


def test_no_dense_copy_is_kept_for_the_backward_pass():
    _, parts = two_four_blocks(300, 400, (32, 32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bsr_linear_24(torch.ones(2, 400, requires_grad=True), *parts)
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in parts[:-1])


def test_gradients_are_not_rounded_to_tf32_where_the_product_is_not(monkeypatch):
    allowed = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.bitmask.bsr_linear_backward_input.default:
                allowed.append(args[6:] not in ((), (False,)))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(ops_block, "_allows_tf32", lambda multiplied: True)
    blocks, parts = two_four_blocks(64, 128, (32, 32))
    x = torch.randn(3, 128, requires_grad=True)
    for product in (lambda: bsr_linear(x, blocks.values, *blocks.index, 64), lambda: bsr_linear_24(x, *parts)):
        with Record():
            product().sum().backward()
    assert allowed == [True, False]


def test_values_that_require_a_gradient_are_refused():
    _, (values, *rest) = two_four_blocks(9, 13, (4, 8))
    values.requires_grad_()
    with pytest.raises(TypeError, match="compressed weight is frozen; train the dense one"):
        bsr_linear_24(torch.ones(13), values, *rest)
    with torch.no_grad():
        bsr_linear_24(torch.ones(13), values, *rest)


@pytest.mark.parametrize("lead", [(), (3,), (0,), (2, 9)], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(lead, gradient):
    _, parts = two_four_blocks(9, 13, (4, 8))
    x, bias = (random_numbers(*size, density=1.0).requires_grad_(gradient) for size in ((*lead, 13), (9,)))
    library.opcheck(torch.ops.bitmask.bsr_linear_24.default, (x, *parts, bias))
    library.opcheck(torch.ops.bitmask.bsr_linear_24.default, (x, *parts))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph_for_any_number_of_rows(backend):
    torch._dynamo.reset()
    _, parts = two_four_blocks(9, 13, (4, 8))
    bias = random_numbers(9, density=1.0)

    def layer(x):
        return bsr_linear_24(x, *parts, bias).relu()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 17, 70):
        x, y = (random_numbers(m, 13, density=1.0).requires_grad_() for _ in range(2))
        got, expected = compiled(x), layer(y)
        assert torch.equal(got, expected)
        got.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, y.grad)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(region, dtype):
    blocks, parts = two_four_blocks(30, 52, (8, 16), dtype=dtype)
    bias = random_numbers(30, density=1.0)
    x, y = (random_numbers(4, 52, density=1.0).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=region):
        expected, got = F.linear(x, blocks.dense, bias), bsr_linear_24(y, *parts, bias)
    assert got.dtype == expected.dtype == region
    torch.testing.assert_close(got, expected)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone():
    _, parts = two_four_blocks(9, 13, (4, 8), dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bsr_linear_24(torch.ones(2, 13).double(), *parts).dtype == torch.float64
        with pytest.raises(TypeError, match=r"x: got dtype torch.float32, expected torch.float64"):
            bsr_linear_24(torch.ones(2, 13), *parts)


# Bad input.


def good(m=2):
    """Arguments that hold: three blocks of 4 x 12, in two block rows of which the second reaches past the weight."""
    values, metadata = pack_24(random_numbers(3, 4, 12, density=1.0), prune=True)
    index = {"crow_indices": torch.tensor([0, 1, 3]), "col_indices": torch.tensor([1, 0, 1])}
    parts = {"x": torch.ones(m, 20), "values": values, "metadata": metadata, **index}
    return parts | {"out_features": 7, "bias": torch.zeros(7)}


def put(place, number):
    def change(tensor):
        tensor[place] = number
        return tensor

    return change


def flip(place, bits):
    def change(metadata):
        metadata[place] ^= bits
        return metadata

    return change


BAD = [
    ("x", lambda x: x.tolist(), TypeError, "x: got list, expected a torch.Tensor"),
    ("x", lambda x: x.to_sparse(), TypeError, "x: got a torch.sparse_coo tensor, expected a dense"),
    ("x", lambda x: x.double(), TypeError, "x: got dtype torch.float64, expected torch.float32, the dtype of values"),
    ("x", lambda x: x.to("meta"), ValueError, "x: got device meta, expected cpu, the device of values"),
    ("x", lambda x: x[0, 0], ValueError, r"x: got size \[\], expected \[..., in_features"),
    ("x", lambda x: x[:, :12], FormatError, r"col_indices\[0\]: got 1, expected at least 0 and less than 1"),
    ("bias", lambda b: b.half(), TypeError, "bias: got dtype torch.float16, expected torch.float32"),
    ("bias", lambda b: b[:2], ValueError, r"bias: got size \[2\], expected \[7\] \(out_features"),
    ("out_features", lambda n: 9, FormatError, r"crow_indices: got size \[3\], expected \[4"),
    ("out_features", lambda n: -1, ValueError, "out_features: got -1, expected 0 or more"),
    ("out_features", lambda n: "7", TypeError, "out_features: got '7', expected an integer"),
    ("values", lambda t: None, TypeError, "values: got NoneType, expected a torch.Tensor"),
    ("values", BitmaskTensor.from_dense, TypeError, "values: got a BitmaskTensor"),
    ("values", lambda t: t.int(), TypeError, "values: got dtype torch.int32, expected float32, bfloat16"),
    ("values", lambda t: t.half(), TypeError, "x: got dtype torch.float32, expected torch.float16"),
    ("values", lambda t: t[0], FormatError, r"(values|metadata): got size \["),
    ("values", lambda t: t[..., :5], FormatError, r"values: got size \[3, 4, 5\], expected \[..., cols / 2\]"),
    ("values", lambda t: t[..., :4], FormatError, r"metadata: got size \[3, 4, 2\], expected \[3, 4, 1\]"),
    ("values", lambda t: t[:2], FormatError, r"metadata: got size \[3, 4, 2\], expected \[2, 4, 2\]"),
    ("metadata", lambda t: t.to(torch.int8), TypeError, "metadata: got dtype torch.int8, expected torch.uint8"),
    ("metadata", lambda t: t.reshape(-1), FormatError, r"metadata: got size \[24\], expected \[3, 4, 2\]"),
    ("metadata", lambda t: t.to("meta"), ValueError, "metadata: got device meta, expected cpu"),
    ("metadata", lambda t: t * 0, FormatError, "metadata: block 0, row 0, columns 0 to 3: got 0 bits set, expected 2"),
    ("metadata", put((1, 2, 0), 0x37), FormatError, "metadata: block 1, row 2, columns 0 to 3: got 3 bits set"),
    ("metadata", put((2, 3, 1), 0), FormatError, "metadata: block 2, row 3, columns 8 to 11: got 0 bits"),
    ("metadata", flip((2, 0, 1), 0x30), FormatError, "metadata: block 2, row 0 has padding bits set past column 12"),
    ("metadata", flip((1, 0, 0), 0xFF), None, ""),
    ("crow_indices", lambda t: t.int(), TypeError, "crow_indices: got dtype torch.int32, expected torch.int64"),
    ("crow_indices", lambda t: t[:2], FormatError, r"crow_indices: got size \[2\], expected \[3"),
    ("crow_indices", put(0, 1), FormatError, r"crow_indices\[0\]: got 1, expected 0"),
    ("crow_indices", put(1, 2**62), FormatError, r"crow_indices\[1\]: got"),
    ("col_indices", lambda t: t[:2], FormatError, r"col_indices: got size \[2\], expected \[3\]"),
    ("col_indices", put(2, 0), FormatError, r"col_indices\[2\]: got 0, expected more than 0"),
    ("col_indices", put(0, -1), FormatError, r"col_indices\[0\]: got -1"),
    ("col_indices", put(0, 2**62), FormatError, r"col_indices\[0\]: got"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
@pytest.mark.parametrize("m", [1, 100])
def test_bad_input(isa, name, change, error, message, m):
    arguments = good(m)
    arguments[name] = change(arguments[name])
    if error is None:  # the complement of a four is as good
        bsr_linear_24(**arguments)
        return
    with pytest.raises(error, match=message) as got:
        bsr_linear_24(**arguments)
    assert isinstance(got.value, FormatError) == (error is FormatError)


def test_native_op_by_itself_refuses_the_same():
    for name, change, error, _ in BAD:
        arguments = good()
        arguments[name] = change(arguments[name])
        if error is not None and all(type(argument) in (torch.Tensor, int) for argument in arguments.values()):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                torch.ops.bitmask.bsr_linear_24(*arguments.values())


@pytest.mark.parametrize("width", [2, 6, 10])
def test_blocks_whose_columns_are_no_whole_groups(width):
    values, metadata = torch.ones(1, 4, width // 2), torch.ones(1, 4, -(-width // 8), dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"values: got size .*, two for each group of four columns"):
        bsr_linear_24(torch.ones(20), values, metadata, torch.tensor([0, 1]), torch.tensor([0]), 4)


@pytest.mark.parametrize("m", [1, 9, 100])
@pytest.mark.parametrize(("n", "k", "block_shape"), [LARGE_LINES[0], (300, 400, (16, 64))], ids=str)
def test_the_first_faulty_row_of_all_is_named(isa, dtype, n, k, block_shape, m):
    """Also of several, also past the edges of the weight, also where a line is unpacked in parts."""
    _, (values, metadata, *rest) = two_four_blocks(n, k, block_shape, 1.0, dtype=dtype)
    x = torch.ones(m, k, dtype=dtype)
    last = block_shape[0] - 1
    metadata[-1, last, 7] = 0
    with pytest.raises(
        FormatError, match=f"metadata: block {len(values) - 1}, row {last}, columns 56 to 59: got 0 bits"
    ):
        bsr_linear_24(x, values, metadata, *rest)
    metadata[1, 3, 0] = 0xFF
    metadata[1, last, 0] = 0
    with pytest.raises(FormatError, match="metadata: block 1, row 3, columns 0 to 3: got 4 bits"):
        bsr_linear_24(x, values, metadata, *rest)


@pytest.mark.parametrize("m", [1, 40])
def test_mutated_metadata_are_refused_or_multiply_as_the_reference_does(isa, m):
    blocks, (values, metadata, *rest) = two_four_blocks(40, 52, (8, 20))
    values.nan_to_num_()
    x, _, _ = operands(blocks, m)
    generator, refused = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        mutated = metadata.clone()
        place = int(torch.randint(0, mutated.numel(), (), generator=generator))
        mutated.view(-1)[place] ^= int(torch.randint(1, 256, (), generator=generator))
        try:
            dense = unpack_24(values, mutated)
        except FormatError:
            refused += 1
            with pytest.raises(FormatError, match="metadata: block"):
                bsr_linear_24(x, values, mutated, *rest)
        else:
            check_product(bsr_linear_24(x, values, mutated, *rest), Blocks(dense, *blocks.index, blocks.shape), x)
    assert 0 < refused < 60


def test_sizes_at_which_nothing_may_be_allocated():
    values, metadata = torch.ones(0, 4, 2**28), torch.ones(0, 4, 2**26, dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"values: got \[0, 4, 268435456\], expected block rows and block columns"):
        bsr_linear_24(torch.ones(1, 8), values, metadata, torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), 4)
    _, (values, metadata, *rest) = two_four_blocks(9, 13, (4, 8))
    with pytest.raises((FormatError, ValueError)):
        bsr_linear_24(torch.ones(1, 13), values, metadata, *rest[:-1], 2**63 - 2)


FORK = """
import torch
from bitmask.ops_block_two_four import bsr_linear_24
from bitmask.ops_two_four import pack_24

torch.set_num_threads(2)
values, metadata = pack_24(torch.ones(60, 60, 160), prune=True)
crow_indices, col_indices = torch.arange(0, 61, 3)[:16], torch.arange(3).repeat(15)
values, metadata = values[:45], metadata[:45]
x = torch.ones(100, 480)

def works():
    # NumPy compares without torch's own threads, which do not survive a fork.
    y = [bsr_linear_24(x[:m], values, metadata, crow_indices, col_indices, 900).numpy() for m in (1, 100)]
    return all((t == 240).all() for t in y)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("use_before", [True, False])
def test_products_work_in_a_forked_child(use_before):
    assert_works_after_fork(FORK, use_before)
