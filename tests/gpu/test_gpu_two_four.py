"""2:4 on a GPU: packed as the CPU does it, products against float64, hostile metadata, torch's own 2:4 as a witness."""

import block_weights
import pytest
import torch
import torch.nn.functional as F
from block_weights import check_gradient_of_x, check_product, operands, random_blocks
from conftest import ALL_DTYPES, assert_bits_equal, assert_parts_equal, needs_gpu, random_dense, random_numbers
from gpu_checks import assert_is_product, captured

from bitmask import BlockSparseLinear, FormatError, SemiStructuredBlockLinear, SemiStructuredTensor
from bitmask.ops_block_two_four import bsr_linear_24
from bitmask.ops_two_four import (
    TWO_FOUR_DTYPES,
    linear_24,
    linear_24_backward_input,
    pack_24,
    prune_24,
    unpack_24,
    validate_24,
)

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CODEC_DTYPES = [dtype for dtype in ALL_DTYPES if dtype in TWO_FOUR_DTYPES]
# Around every number of rows at which another kernel, or another of its tiles, may be chosen.
ROWS = [0, 1, 2, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 513]
SIZES = [(1, 4), (3, 8), (16, 64), (65, 132), (40, 300), (129, 1028), (300, 64), (256, 512), (2, 5004)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def weight_of(*shape, density=1.0, seed=0, dtype=torch.float32):
    """2:4, with fewer non-zeros than two in some groups if the density is below 1."""
    weight = random_numbers(*shape, density=density, seed=seed, dtype=dtype)
    prune_24(weight)
    return weight


def parts_on(device, weight):
    """What the CPU packs, moved."""
    return tuple(part.to(device) for part in pack_24(weight))


# The codec: bit by bit what the CPU makes of the same.


@pytest.mark.parametrize("kind", CODEC_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (65, 132), (7, 1028), (3, 5, 64), (0, 8), (4, 0)], ids=str)
@pytest.mark.parametrize("keep_negative_zero", [False, True])
def test_pruned_and_packed_as_by_the_cpu(device, kind, shape, keep_negative_zero):
    dense = random_dense(shape, kind, density=0.8)
    expected = pack_24(dense, prune=True, keep_negative_zero=keep_negative_zero)
    found = pack_24(dense.to(device), prune=True, keep_negative_zero=keep_negative_zero)
    assert_parts_equal([part.cpu() for part in found], expected)
    back = unpack_24(*found)
    assert_bits_equal(back.cpu(), unpack_24(*expected))
    validate_24(*found)
    assert_parts_equal([part.cpu() for part in pack_24(back, keep_negative_zero=keep_negative_zero)], expected)
    pruned = dense.to(device)
    prune_24(pruned)
    there = dense.clone()
    prune_24(there)
    assert_bits_equal(pruned.cpu(), there)


def test_pruned_in_rows_and_columns_as_by_the_cpu(device, dtype):
    dense = random_numbers(64, 132, density=0.9, dtype=dtype)
    found = dense.to(device)
    prune_24(found, transposable=True)
    prune_24(dense, transposable=True)
    assert_bits_equal(found.cpu(), dense)


@pytest.mark.parametrize("row", [0, 150, 299])
def test_a_crowded_group_is_refused_and_named(device, dtype, row):
    dense = weight_of(300, 132, dtype=dtype)
    dense[row, 64:68] = torch.tensor([1, 1, 1, 0])
    with pytest.raises(ValueError, match=f"dense: row {row}, columns 64 to 67: got 3 non-zeros"):
        pack_24(dense.to(device))


@pytest.mark.parametrize("row", [0, 150, 299])
def test_faulty_metadata_are_refused_and_named(device, dtype, row):
    values, metadata = parts_on(device, weight_of(300, 132, dtype=dtype))
    metadata[row, 8] = 0b0111
    for work in (unpack_24, validate_24):
        with pytest.raises(FormatError, match=f"metadata: row {row}, columns 64 to 67: got 3 bits set"):
            work(values, metadata)


# Products.


def check(device, x, weight, bias=None):
    there = None if bias is None else bias.to(device)
    assert_is_product(linear_24(x.to(device), *parts_on(device, weight), there), x, weight, bias)


@pytest.mark.parametrize("m", ROWS)
def test_rows_of_x(device, dtype, m):
    for n, k in SIZES:
        weight = weight_of(n, k, density=0.8, seed=n, dtype=dtype)
        x = random_numbers(m, k, density=1.0, seed=m, dtype=dtype)
        check(device, x, weight)
        check(device, x, weight, random_numbers(n, density=1.0, seed=k, dtype=dtype))


@pytest.mark.parametrize("m", [1, 16, 129, 512])
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 1024), (512, 14336)], ids=str)
def test_sizes_of_models(device, dtype, m, shape):
    check(device, random_numbers(m, shape[1], density=1.0, dtype=dtype), weight_of(*shape, dtype=dtype))


@pytest.mark.parametrize("m", [1, 3, 16, 70, 300])
def test_gradients(device, dtype, m):
    weight = weight_of(65, 132, dtype=dtype)
    x = random_numbers(m, 132, density=1.0, dtype=dtype).to(device).requires_grad_()
    bias = random_numbers(65, density=1.0, dtype=dtype).to(device).requires_grad_()
    given = random_numbers(m, 65, density=1.0, seed=1, dtype=dtype)
    linear_24(x, *parts_on(device, weight), bias).backward(given.to(device))
    assert_is_product(x.grad, given, weight.t())
    assert_is_product(bias.grad[None], torch.ones(1, m, dtype=dtype), given.t())
    assert_is_product(linear_24_backward_input(given.to(device), *parts_on(device, weight)), given, weight.t())


@pytest.mark.parametrize("m", [1, 16, 300])
def test_repeats_are_equal_in_every_bit(device, dtype, m):
    parts = parts_on(device, weight_of(300, 2000, dtype=dtype))
    x = random_numbers(m, 2000, density=1.0, dtype=dtype).to(device)
    first = linear_24(x, *parts)
    for _ in range(10):
        assert_bits_equal(linear_24(x, *parts), first)


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("octet", [0x00, 0xFF, 0x37, 0x11])
@pytest.mark.parametrize("row", [0, 150, 299])
def test_hostile_metadata(device, dtype, m, octet, row):
    """A GPU, for which nobody waits, shows the row as NaN; the others are right."""
    weight = weight_of(300, 200, dtype=dtype)
    values, metadata = parts_on(device, weight)
    metadata[row, 13] = octet
    x = random_numbers(m, 200, density=1.0, dtype=dtype)
    if device.type == "cpu":
        with pytest.raises(FormatError, match=f"metadata: row {row}"):
            linear_24(x, values, metadata)
        return
    y = linear_24(x.to(device), values, metadata)
    assert y[:, row].isnan().all()
    others = [each for each in range(300) if each != row]
    sound = y[:, others]
    assert sound.isnan().all() or bool(sound.isfinite().all())
    if sound.isfinite().all():
        assert_is_product(sound, x, weight[others])
    torch.cuda.synchronize()
    check(device, x, weight)


# torch's own 2:4 tensors: another reading of the same metadata, multiplied by other kernels.


@needs_gpu
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [8, 64, 128])
def test_what_torch_makes_of_our_parts(kind, m):
    weight = SemiStructuredTensor.from_dense(weight_of(256, 512, dtype=kind))
    x = random_numbers(m, 512, density=1.0, dtype=kind).to(CUDA)
    theirs = weight.to_torch().to(CUDA)
    assert_bits_equal(theirs.to_dense().cpu(), weight.to_dense())
    y = F.linear(x, theirs)
    assert_is_product(y, x, weight.to_dense())
    ours = linear_24(x, *parts_on(CUDA, weight.to_dense()))
    assert_is_product(ours, x, weight.to_dense())
    dense = weight.to_dense().to(CUDA)
    packed = torch.sparse.to_sparse_semi_structured(dense)
    assert_is_product(F.linear(x, packed), x, weight.to_dense())
    if isinstance(packed, torch.sparse.SparseSemiStructuredTensorCUTLASS):
        assert_bits_equal(SemiStructuredTensor.from_torch(packed).to_dense(), dense)


@needs_gpu
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tensors_there_become_torchs_and_come_back(kind):
    dense = weight_of(256, 512, dtype=kind)
    if kind == torch.float32:
        dense[:, 1::2] = 0  # torch's layout has one of every two there
    weight = SemiStructuredTensor.from_dense(dense.to(CUDA))
    theirs = weight.to_torch()
    assert theirs.device.type == "cuda"
    assert_bits_equal(theirs.to_dense().cpu(), dense)
    assert_bits_equal(SemiStructuredTensor.from_torch(theirs).to_dense().cpu(), dense)


# Blocks that are 2:4.


def two_four_blocks(n, k, block_shape, density=0.5, seed=0, dtype=torch.float32):
    blocks = random_blocks(n, k, block_shape, density, seed, dtype).with_padding(0)
    prune_24(blocks.values)
    return blocks, (*pack_24(blocks.values), *blocks.index)


@pytest.mark.parametrize("m", ROWS)
def test_blocks(device, dtype, m):
    for n, k, block_shape in [
        (64, 128, (16, 16)),
        (130, 200, (64, 64)),
        (256, 384, (128, 128)),
        (70, 300, (32, 64)),
        (40, 72, (8, 8)),
        (37, 53, (5, 12)),
        (7, 35, (32, 64)),
    ]:
        blocks, parts = two_four_blocks(n, k, block_shape, seed=m, dtype=dtype)
        x, _, bias = operands(blocks, m)
        there = [part.to(device) for part in parts]
        check_product(bsr_linear_24(x.to(device), *there, n, bias.to(device)), blocks, x, bias)


@pytest.mark.parametrize("m", [1, 16, 300])
@pytest.mark.parametrize("fault", ["metadata", "crow_indices", "col_indices"])
def test_hostile_blocks(device, dtype, m, fault):
    blocks, (values, metadata, crow_indices, col_indices) = two_four_blocks(256, 512, (64, 64), 1.0, dtype=dtype)
    x, _, _ = operands(blocks, m)
    parts = {"metadata": metadata, "crow_indices": crow_indices, "col_indices": col_indices}
    place, entry = {"metadata": ((9, 5, 3), 0x37), "crow_indices": (1, 2**62), "col_indices": (9, -1)}[fault]
    sound = {name: part.to(device) for name, part in parts.items()}
    parts[fault] = parts[fault].clone()
    parts[fault][place] = entry
    there = [values.to(device), *(part.to(device) for part in parts.values())]
    if device.type == "cpu":
        with pytest.raises(FormatError):
            bsr_linear_24(x, *there, 256)
        return
    line = 0 if fault == "crow_indices" else 1
    assert bsr_linear_24(x.to(device), *there, 256)[:, line * 64 + 5].isnan().all()
    torch.cuda.synchronize()
    check_product(bsr_linear_24(x.to(device), there[0], *sound.values(), 256), blocks, x)


def test_layers(device, dtype):
    torch.manual_seed(0)
    source = BlockSparseLinear(256, 192, density=0.4, block_shape=(32, 32), dtype=dtype)
    here = SemiStructuredBlockLinear.from_block_sparse(source, prune=True)
    there = SemiStructuredBlockLinear.from_block_sparse(source.to(device), prune=True)
    for name in ("values", "metadata", "crow_indices", "col_indices"):
        assert_bits_equal(getattr(there, name).cpu(), getattr(here, name))
    x = random_numbers(9, 256, density=1.0, dtype=dtype)
    dense = here.to_dense().weight
    block_weights.assert_is_product(there(x.to(device)), x, dense.t(), here.bias)
    moved = SemiStructuredBlockLinear.from_state_dict(here.state_dict()).to(device)
    assert_bits_equal(moved(x.to(device)), there(x.to(device)))
    given = x.to(device).requires_grad_()
    there(given).sum().backward()
    block_weights.assert_is_product(given.grad, torch.ones(9, 192, dtype=dtype), dense)
    with torch.autocast(device.type, torch.bfloat16):
        assert there(x.to(device)).dtype == (dtype if dtype == torch.float64 else torch.bfloat16)


def test_compiled(device):
    torch._dynamo.reset()
    parts = parts_on(device, weight_of(64, 128))
    x = random_numbers(5, 128, density=1.0).to(device)

    def layer(x):
        return linear_24(x, *parts).relu()

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
    torch._dynamo.reset()


@needs_gpu
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_captured_products_read_what_is_there_at_their_replay(dtype, m):
    weight = weight_of(256, 512, dtype=dtype)
    values, metadata = parts_on(CUDA, weight)
    x = random_numbers(m, 512, density=1.0, dtype=dtype).to(CUDA)
    graph, y = captured(lambda: linear_24(x, values, metadata))
    for seed in range(3):
        fresh = random_numbers(m, 512, density=1.0, seed=seed, dtype=dtype)
        x.copy_(fresh)
        values.mul_(-1)
        y.fill_(float("nan"))
        graph.replay()
        assert_is_product(y, fresh, weight * (-1) ** (seed + 1))
    metadata[70, 3] = 0
    graph.replay()
    assert y[:, 70].isnan().all()


@needs_gpu
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_captured_blocks_and_their_gradient(dtype, m):
    blocks, parts = two_four_blocks(256, 512, (64, 64), dtype=dtype)
    there = [part.to(CUDA) for part in parts]
    x, grad, _ = (tensor.to(CUDA) for tensor in operands(blocks, m))
    x.requires_grad_()

    def work():
        y = bsr_linear_24(x, *there, 256)
        return y.detach(), *torch.autograd.grad(y, x, grad)

    graph, results = captured(work)
    for seed in range(3):
        fresh_x, fresh_grad, _ = operands(blocks, m, seed + 5)
        x.detach().copy_(fresh_x)
        grad.copy_(fresh_grad)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        check_product(results[0], blocks, fresh_x)
        check_gradient_of_x(results[1], blocks, fresh_grad)
