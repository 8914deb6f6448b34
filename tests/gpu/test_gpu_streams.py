"""Work in flight: streams, several GPUs, CUDA graphs, and memory that runs out. Nothing here makes sense on a CPU."""

import pytest
import torch
from conftest import assert_bits_equal, assert_parts_equal, needs_gpu, random_numbers
from gpu_checks import assert_is_product, captured, parts_on

from bitmask import ops

pytestmark = needs_gpu

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def weight(dtype=torch.float32, seed=0):
    return random_numbers(130, 520, density=0.5, seed=seed, dtype=dtype)


def rows(m, dtype=torch.float32, seed=0):
    return random_numbers(m, 520, density=1.0, seed=seed, dtype=dtype)


# Streams.


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_ops_run_on_the_current_stream(m):
    """What is before them on the same stream is done before, although it takes long, and other streams do not wait."""
    dense, x = weight(), rows(m)
    parts, on_gpu = parts_on(CUDA, dense), x.cuda()
    late = torch.zeros_like(on_gpu)
    late_dense = torch.zeros_like(dense, device=CUDA)
    there = dense.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(on_gpu)
        late_dense.copy_(there)
        y = ops.linear(late, *parts, 520)
        compressed = ops.compress(late_dense)
        back = ops.decompress(*compressed, dense.shape)
        torch.cuda.current_stream().synchronize()
    assert_is_product(y, x, dense)
    assert_parts_equal(compressed, parts)
    assert_bits_equal(back, there)


def test_streams_side_by_side():
    """Scratch memory belongs to the stream that took it."""
    dense, streams = weight(), [torch.cuda.Stream() for _ in range(4)]
    parts, inputs = parts_on(CUDA, dense), [rows(m).cuda() for m in (1, 8, 33, 200)]
    expected = [ops.linear(x, *parts, 520) for x in inputs]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.linear(x, *parts, 520))
                results.append(ops.decompress(*parts, dense.shape))
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        assert_bits_equal(result, dense.cuda() if index % 2 else expected[index // 2 % 4])


@needs_two_gpus
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_another_gpu_than_the_current_one(m):
    dense, x = weight(), rows(m)
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        parts = ops.compress(dense.to(other))
        y = ops.linear(x.to(other), *parts, 520)
        assert y.device == other
        assert_is_product(y, x, dense)
        assert_bits_equal(ops.decompress(*parts, dense.shape), dense.to(other))
        assert torch.cuda.current_device() == 0


# CUDA graphs.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 16, 64, 300])
def test_a_captured_product_reads_what_is_there_at_its_replay(dtype, m):
    x, parts = rows(m, dtype).cuda(), parts_on(CUDA, weight(dtype))
    room = [torch.empty(130 * 520, dtype=dtype, device=CUDA)[: len(parts[0])].copy_(parts[0]), *parts[1:]]
    graph, y = captured(lambda: ops.linear(x, *room, 520))
    for seed in range(3):
        fresh = rows(m, dtype, seed)
        x.copy_(fresh)
        room[0].mul_(-1)
        y.fill_(float("nan"))
        graph.replay()
        assert_is_product(y, fresh, weight(dtype) * (-1) ** (seed + 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_captured_codec(dtype):
    """The weight changes, the number of its values too."""
    dense = weight(dtype).cuda()
    values = torch.empty(dense.numel(), dtype=dtype, device=CUDA)
    bitmasks = torch.empty(130, 65, dtype=torch.uint8, device=CUDA)
    row_offsets = torch.empty(130, dtype=torch.int64, device=CUDA)
    graph, nnz = captured(lambda: ops.compress_into(dense, values, bitmasks, row_offsets))
    for seed in range(3):
        fresh = random_numbers(130, 520, density=0.2 + 0.3 * seed, seed=seed, dtype=dtype)
        dense.copy_(fresh)
        for buffer in (values, bitmasks, row_offsets, nnz):
            buffer.fill_(77)
        graph.replay()
        expected = ops.compress(fresh)
        count = int(nnz)
        assert_parts_equal([values[:count].cpu(), bitmasks.cpu(), row_offsets.cpu()], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_decompress_shows_faults_as_nan(dtype):
    values, bitmasks, row_offsets = parts_on(CUDA, weight(dtype))
    graph, dense = captured(lambda: ops.decompress(values, bitmasks, row_offsets, [130, 520]))
    for sign in (-1, 1):
        values.mul_(-1)
        dense.fill_(7)
        graph.replay()
        assert torch.equal(dense.cpu(), weight(dtype) * sign)
    row_offsets[70] += 1
    graph.replay()
    assert dense.isnan().all()
    row_offsets[70] -= 1
    graph.replay()
    assert torch.equal(dense.cpu(), weight(dtype))


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_a_captured_product_shows_faults_as_nan(m):
    x, (values, bitmasks, row_offsets) = rows(m).cuda(), parts_on(CUDA, weight())
    graph, y = captured(lambda: ops.linear(x, values, bitmasks, row_offsets, 520))
    for hostile in (2**62, -1):
        before = int(row_offsets[70])
        row_offsets[70] = hostile
        graph.replay()
        assert y[:, 70].isnan().all()
        row_offsets[70] = before
    graph.replay()
    assert_is_product(y, rows(m), weight())


@pytest.mark.parametrize("op", ["compress", "validate"])
def test_what_waits_for_the_gpu_cannot_be_captured_and_says_so(op):
    dense = weight().cuda()
    parts = ops.compress(dense)
    work = {"compress": lambda: ops.compress(dense), "validate": lambda: ops.validate(*parts, dense.shape)}[op]
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        work()
    assert_bits_equal(ops.decompress(*parts, [130, 520]), dense)


# Memory.


@pytest.mark.parametrize("op", ["compress", "decompress", "linear"])
def test_running_out_of_memory_is_an_error_after_which_all_works(op):
    dense = torch.zeros(2**14, 2**15, dtype=torch.bfloat16, device=CUDA)  # 1 GiB
    dense[:, ::2] = 1
    parts = ops.compress(dense)
    if op != "compress":
        dense = None
    x = torch.ones(2**15, 2**15, dtype=torch.bfloat16, device=CUDA) if op == "linear" else None
    work = {
        "compress": lambda: ops.compress(dense),
        "decompress": lambda: ops.decompress(*parts, [2**14, 2**15]),
        "linear": lambda: ops.linear(x, *parts, 2**15),
    }[op]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            work()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    small = weight()
    assert_is_product(ops.linear(rows(5).cuda(), *ops.compress(small.cuda()), 520), rows(5), small)
    assert work() is not None


def test_no_memory_is_kept():
    dense, x = weight().cuda(), rows(40).cuda()

    def work():
        parts = ops.compress(dense)
        ops.decompress(*parts, dense.shape)
        ops.validate(*parts, dense.shape)
        ops.linear(x, *parts, 520)

    work()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        work()
    assert torch.cuda.memory_allocated() == before
