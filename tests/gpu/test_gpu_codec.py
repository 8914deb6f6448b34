"""Compress, compress_into, decompress and validate on a GPU against the CPU, bit for bit, whatever the parts hold."""

import pytest
import torch
from conftest import (
    ALL_DTYPES,
    WIDTH_DTYPES,
    assert_bits_equal,
    assert_parts_equal,
    mutate,
    needs_gpu,
    parts_are_valid,
    random_dense,
    special_words,
    tensor_of_words,
)
from gpu_checks import parts_on

from bitmask import FormatError, ops

SHAPES = [
    *((), (0,), (1,), (5,), (0, 3), (3, 0), (1, 1), (2, 3, 5), (7, 13), (64, 64), (65, 131), (9, 8, 7, 6)),
    *((1, 5000), (5000, 1), (33, 1025), (300, 257), (3, 70_001)),
]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_every_dtype_and_shape(device, dtype, keep):
    for seed, shape in enumerate(SHAPES):
        dense = random_dense(shape, dtype, seed=seed)
        expected = ops.compress(dense, keep)
        parts = ops.compress(dense.to(device), keep)
        assert_parts_equal([part.cpu() for part in parts], expected)
        back = ops.decompress(*parts, shape)
        assert back.device.type == device.type
        assert_bits_equal(back.cpu(), ops.decompress(*expected, shape))
        assert ops.validate(*parts, shape) == list(shape)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_patterns_at_the_edges(device, dtype, keep):
    dense = tensor_of_words(special_words(dtype) * 3, dtype)
    parts = ops.compress(dense.to(device), keep)
    assert_parts_equal([part.cpu() for part in parts], ops.compress(dense, keep))


@pytest.mark.parametrize("dtype", WIDTH_DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.99, 1.0])
def test_densities(device, dtype, density):
    dense = random_dense((130, 1030), dtype, density)
    parts = ops.compress(dense.to(device))
    assert_parts_equal([part.cpu() for part in parts], ops.compress(dense))
    assert_bits_equal(ops.decompress(*parts, dense.shape).cpu(), ops.decompress(*ops.compress(dense), dense.shape))


@pytest.mark.parametrize("shape", [(4096, 4096), (1001, 9999), (2, 3_000_001)], ids=str)
def test_many_blocks(device, shape):
    dense = random_dense((1, shape[1]), torch.int16).expand(shape).clone()
    dense[::7] = 0
    parts = ops.compress(dense.to(device))
    assert_parts_equal([part.cpu() for part in parts], ops.compress(dense))
    assert torch.equal(ops.decompress(*parts, shape).cpu(), dense)


VIEWS = [
    lambda t: t.T,
    lambda t: t[::2, 3:],
    lambda t: t[5],
    lambda t: t[1:, 1:].T,
    lambda t: t[:1].expand(9, 90),
]


@pytest.mark.parametrize("dtype", WIDTH_DTYPES, ids=str)
def test_views_of_dense(device, dtype):
    whole = random_dense((70, 90), dtype)
    for view in (
        lambda t: t.T,
        lambda t: t[::2, 3:],
        lambda t: t[5],
        lambda t: t[1:, 1:].T,
        lambda t: t[:1].expand(9, 90),
    ):
        parts = ops.compress(view(whole.to(device)))
        assert_parts_equal([part.cpu() for part in parts], ops.compress(view(whole)))


@pytest.mark.parametrize("dtype", WIDTH_DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_parts_that_are_unaligned_views(device, dtype, offset):
    """Parts may begin anywhere: what a vector load needs is not given."""
    dense = random_dense((65, 131), dtype)
    parts = []
    for part in parts_on(device, dense):
        room = part.new_zeros(part.numel() + offset)
        room[offset:] = part.flatten()
        parts.append(room[offset:].view(part.shape))
    assert_bits_equal(ops.decompress(*parts, dense.shape).cpu(), ops.decompress(*ops.compress(dense), dense.shape))


# compress_into.


def buffers_for(dense, capacity):
    bitmasks = torch.full(ops.bitmask_sizes(dense.shape), 0xAA, dtype=torch.uint8, device=dense.device)
    row_offsets = torch.full((dense.shape[:-1].numel(),), -7, device=dense.device)
    values = torch.full((capacity,), 0x55, dtype=torch.uint8, device=dense.device)
    return values.repeat_interleave(dense.element_size()).view(dense.dtype), bitmasks, row_offsets


@pytest.mark.parametrize("dtype", WIDTH_DTYPES, ids=str)
@pytest.mark.parametrize("spare", [100, 0, -1, -500, None])
def test_compress_into(device, dtype, spare):
    """Room that is too small is filled and not exceeded; nnz says how much it takes."""
    dense = random_dense((65, 131), dtype)
    expected, *others = ops.compress(dense)
    capacity = 0 if spare is None else len(expected) + spare
    there = dense.to(device)
    room, bitmasks, row_offsets = buffers_for(there, capacity + 64)
    untouched = room[capacity:].clone()
    nnz = torch.ops.bitmask.compress_into(there, False, room[:capacity], bitmasks, row_offsets)
    assert nnz.device.type == device.type
    assert int(nnz) == len(expected)
    filled = min(capacity, len(expected))
    assert_parts_equal([room[:filled].cpu(), bitmasks.cpu(), row_offsets.cpu()], [expected[:filled], *others])
    assert_bits_equal(room[capacity:], untouched)


@pytest.mark.parametrize(
    "change",
    [
        lambda values, bitmasks, row_offsets: (values.double(), bitmasks, row_offsets),
        lambda values, bitmasks, row_offsets: (values, bitmasks[:-1], row_offsets),
        lambda values, bitmasks, row_offsets: (values, bitmasks, row_offsets[:-1]),
        lambda values, bitmasks, row_offsets: (values, bitmasks, row_offsets.int()),
        lambda values, bitmasks, row_offsets: (values[::2], bitmasks, row_offsets),
    ],
    ids=["dtype", "bitmasks", "row_offsets", "32-bit offsets", "gaps"],
)
def test_compress_into_refuses_other_buffers(device, change):
    dense = random_dense((6, 20), torch.float32).to(device)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        torch.ops.bitmask.compress_into(dense, False, *change(*buffers_for(dense, 120)))


# Hostile parts.


@pytest.mark.parametrize(("shape", "count"), [((5, 13), 300), ((70, 130), 60), ((3, 2500), 30)], ids=str)
def test_mutated_parts_are_refused_as_on_the_cpu(device, shape, count):
    parts = ops.compress(random_dense(shape, torch.float32))
    generator = torch.Generator().manual_seed(count)
    refused = 0
    for _ in range(count):
        *changed, new_shape = mutate(*parts, shape, lambda limit: int(torch.randint(limit, (), generator=generator)))
        there = [part.to(device) for part in changed]
        if parts_are_valid(*changed, new_shape):
            assert_bits_equal(ops.decompress(*there, new_shape).cpu(), ops.decompress(*changed, new_shape))
            continue
        refused += 1
        with pytest.raises(FormatError) as on_cpu:
            ops.decompress(*changed, new_shape)
        for op in (ops.decompress, ops.validate):
            with pytest.raises(FormatError) as found:
                op(*there, new_shape)
            assert str(found.value) == str(on_cpu.value)
    assert 0 < refused < count


@pytest.mark.parametrize("start", [-(2**63), -(2**62), -1, 1, 2**31, 2**62, 2**63 - 1])
@pytest.mark.parametrize("row", [0, 1, 150, 299])
def test_hostile_offsets(device, start, row):
    dense = random_dense((300, 1000), torch.bfloat16)
    values, bitmasks, row_offsets = parts_on(device, dense)
    hostile = row_offsets.clone()
    hostile[row] = start
    for op in (ops.decompress, ops.validate):
        with pytest.raises(FormatError, match="row_offsets"):
            op(values, bitmasks, hostile, dense.shape)
    back = ops.decompress(values, bitmasks, row_offsets, dense.shape)
    assert_bits_equal(back.cpu(), ops.decompress(*ops.compress(dense), dense.shape))


@pytest.mark.parametrize("values", [0, 1])
def test_bits_without_values(device, values):
    bitmasks = torch.full((200, 100), 255, dtype=torch.uint8, device=device)
    row_offsets = torch.arange(200, device=device) * 800
    with pytest.raises(FormatError):
        ops.decompress(torch.ones(values, device=device), bitmasks, row_offsets, [200, 800])
    assert int(torch.ones(5, device=device).sum()) == 5, "the device still works"


def test_repeats_are_equal_in_every_bit(device):
    dense = random_dense((513, 4099), torch.bfloat16).to(device)
    first = ops.compress(dense)
    for _ in range(20):
        parts = ops.compress(dense)
        assert_parts_equal(parts, first)
        assert_bits_equal(ops.decompress(*parts, dense.shape), ops.decompress(*first, dense.shape))


@needs_gpu
def test_parts_on_different_devices():
    dense = random_dense((6, 20), torch.float32)
    parts = parts_on(torch.device("cuda"), dense)
    for place in range(3):
        mixed = [part.cpu() if index == place else part for index, part in enumerate(parts)]
        for op in (ops.decompress, ops.validate):
            with pytest.raises(ValueError, match="device"):
                op(*mixed, dense.shape)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**16 + 1, 2**15 + 8), (3, 2**30 + 5)], ids=str)
def test_more_than_2_to_the_31_elements(shape):
    generator = torch.Generator("cuda").manual_seed(0)
    dense = torch.randint(0, 4, shape, dtype=torch.uint8, device="cuda", generator=generator)
    values, bitmasks, row_offsets = ops.compress(dense)
    counts = torch.stack([row.count_nonzero() for row in dense])
    assert len(values) == int(counts.sum())
    assert torch.equal(row_offsets, counts.cumsum(0) - counts)
    assert torch.equal(values[-1000:], dense.view(-1)[-4000:][dense.view(-1)[-4000:] != 0][-1000:])
    assert torch.equal(ops.decompress(values, bitmasks, row_offsets, shape), dense)
