"""Block-sparse products on a GPU: against float64, around the places where kernels change, with hostile indices."""

import copy

import pytest
import torch
from block_weights import (
    assert_is_product,
    check_gradient_of_values,
    check_gradient_of_x,
    check_product,
    operands,
    random_blocks,
)
from conftest import assert_bits_equal, needs_gpu, random_numbers
from gpu_checks import captured
from torch import nn

from bitmask import BlockSparseLinear, FormatError, native
from bitmask.ops_block import (
    TransposedIndex,
    bsr_linear,
    bsr_linear_backward_input,
    bsr_linear_backward_values,
    bsr_transpose,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around every number of rows at which another kernel, or another of its tiles, may be chosen.
ROWS = [0, 1, 2, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 513]
TF32_ERROR = 1e-5  # relative, in norm: float32 stays below it, tf32 above
# out_features, in_features, block shape: blocks that tensor cores take, large and narrow ones, cut ones, single
# elements.
SIZES = [
    (64, 128, (16, 16)),
    (96, 160, (32, 32)),
    (130, 200, (64, 64)),
    (256, 384, (128, 128)),
    (300, 260, (128, 64)),
    (70, 300, (16, 64)),
    (200, 70, (64, 16)),
    (515, 520, (256, 256)),
    (40, 72, (8, 8)),
    (37, 53, (5, 7)),
    (33, 65, (48, 24)),
    (20, 30, (1, 1)),
    (7, 35, (32, 64)),
]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def blocks_on(device, blocks):
    """The same, there; and its transposed index."""
    parts = [part.to(device) for part in (blocks.values, blocks.crow_indices, blocks.col_indices)]
    there = blocks._replace(values=parts[0], crow_indices=parts[1], col_indices=parts[2])
    return there, TransposedIndex(*(part.to(device) for part in blocks.transposed))


def products_on(device, blocks, x, grad, bias=None):
    """y, dX and dW."""
    there, transposed = blocks_on(device, blocks)
    n, k = blocks.shape
    return (
        bsr_linear(x.to(device), there.values, *there.index, n, None if bias is None else bias.to(device)),
        bsr_linear_backward_input(grad.to(device), there.values, transposed, k),
        bsr_linear_backward_values(grad.to(device), x.to(device), *there.index, blocks.block_shape),
    )


def check(device, blocks, m, seed=0, biased=False):
    x, grad, bias = operands(blocks, m, seed)
    y, grad_x, values = products_on(device, blocks, x, grad, bias if biased else None)
    assert y.device.type == grad_x.device.type == values.device.type == device.type
    check_product(y, blocks, x, bias if biased else None)
    check_gradient_of_x(grad_x, blocks, grad)
    check_gradient_of_values(values, blocks, grad, x)


@pytest.mark.parametrize("m", ROWS)
def test_rows_of_x(device, dtype, m):
    for n, k, block_shape in SIZES:
        check(device, random_blocks(n, k, block_shape, seed=m, dtype=dtype), m, m, biased=m % 2 == 0)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("m", [1, 16, 200])
def test_densities(device, dtype, density, m):
    for block_shape in [(32, 32), (64, 64), (128, 128)]:
        check(device, random_blocks(384, 512, block_shape, density, dtype=dtype), m)


@pytest.mark.parametrize("m", [1, 16, 512])
@pytest.mark.parametrize("side", [32, 64, 128])
def test_sizes_of_models(device, dtype, m, side):
    check(device, random_blocks(1024, 4096, (side, side), 0.1, dtype=dtype), m, biased=True)


def test_lines_of_very_different_lengths(device, dtype):
    """One line with all blocks, many with one or none: what is dealt out must come together again."""
    blocks = random_blocks(512, 2048, (32, 32), 1.0, dtype=dtype)
    kept = torch.zeros(16, 64, dtype=torch.bool)
    kept[3], kept[:, 5], kept[8:10] = True, True, False
    crow = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    lopsided = blocks._replace(
        values=blocks.values[kept.flatten()], crow_indices=crow, col_indices=kept.nonzero()[:, 1].clone()
    )
    for m in (1, 40, 300):
        check(device, lopsided, m)


@pytest.mark.parametrize(("n", "k"), [(0, 64), (64, 0), (0, 0)])
def test_sizes_of_zero(device, dtype, n, k):
    for m in (0, 1, 40):
        check(device, random_blocks(n, k, (32, 32), dtype=dtype), m)


@pytest.mark.parametrize("m", [1, 20, 300])
def test_infinity_and_nan_reach_what_a_kept_block_multiplies(device, dtype, m):
    blocks = random_blocks(128, 192, (32, 32), dtype=dtype)
    x, grad, _ = operands(blocks, m)
    x[-1, 70] = float("inf")
    y, _, _ = products_on(device, blocks, x, grad)
    meets = blocks.kept[:, 70]
    assert 0 < meets.sum() < 128
    assert y[:-1].isfinite().all()
    assert torch.equal(y[-1].cpu().isfinite(), ~meets)


def test_strides_and_unaligned_memory(device, dtype):
    blocks = random_blocks(96, 160, (32, 32), dtype=dtype)
    there, transposed = blocks_on(device, blocks)
    room = there.values.new_zeros(there.values.numel() + 1)
    room[1:] = there.values.flatten()
    values = room[1:].view(there.values.shape)
    wide = random_numbers(90, 321, density=1.0, dtype=dtype)
    for view in (
        lambda t: t[:, 1:161],
        lambda t: t[:40, ::2][:, :160],
        lambda t: t[:80, :160].view(2, 2, 20, 160)[:, 0],
    ):
        x = view(wide)
        check_product(bsr_linear(view(wide.to(device)), values, *there.index, 96), blocks, x)
    grad = wide.t()[:96].t()
    found = bsr_linear_backward_input(wide.to(device).t()[:96].t(), values, transposed, 160)
    check_gradient_of_x(found, blocks, grad)


@pytest.mark.parametrize("m", [1, 16, 129])
def test_repeats_are_equal_in_every_bit(device, dtype, m):
    blocks = random_blocks(512, 1024, (64, 64), 0.3, dtype=dtype)
    x, grad, bias = operands(blocks, m)
    first = products_on(device, blocks, x, grad, bias)
    for _ in range(10):
        for found, expected in zip(products_on(device, blocks, x, grad, bias), first, strict=True):
            assert_bits_equal(found, expected)


# Hostile indices. A CPU refuses them; a GPU, for which nobody waits, shows them as NaN.

FAULTS = {
    "negative start": (0, 2, -5, {1, 2}),
    "start far out": (0, 2, 2**62, {1, 2}),
    "least start": (0, 1, -(2**63), {0, 1}),
    "first start": (0, 0, 1, {0}),
    "column out of range": (1, 0, 8, {0}),
    "negative column": (1, 0, -1, {0}),
    "column far out": (1, 0, 2**62, {0}),
    "column twice": (1, 1, 0, {0}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("m", [1, 16, 200])
@pytest.mark.parametrize("side", [16, 64, 128])
def test_hostile_indices(device, dtype, fault, m, side):
    blocks = random_blocks(4 * side, 8 * side, (side, side), 1.0, dtype=dtype)
    x, grad, _ = operands(blocks, m)
    there, _ = blocks_on(device, blocks)
    part, place, entry, faulty = FAULTS[fault]
    index = [there.crow_indices.clone(), there.col_indices.clone()]
    index[part][place] = entry
    call = lambda: bsr_linear(x.to(device), there.values, *index, 4 * side)  # noqa: E731
    sample = lambda: bsr_linear_backward_values(grad.to(device), x.to(device), *index, (side, side))  # noqa: E731
    if device.type == "cpu":
        for work in (call, sample):
            with pytest.raises(FormatError):
                work()
        return
    lines = call().view(m, 4, side)
    for line in range(4):
        assert lines[:, line].isnan().all() or line not in faulty
    sound = [line for line in range(4) if line not in faulty]
    expected = blocks.dense.view(4, side, 8 * side)[sound].reshape(-1, 8 * side)
    assert_is_product(lines[:, sound].reshape(m, -1), x, expected.t())
    assert sample().isnan().all()
    with pytest.raises(FormatError):
        bsr_transpose(*index, 8)
    torch.cuda.synchronize()
    check_product(bsr_linear(x.to(device), there.values, *there.index, 4 * side), blocks, x)


@pytest.mark.parametrize("part", TransposedIndex._fields)
@pytest.mark.parametrize("entry", [-1, 2**62, -(2**63), 2**31])
@pytest.mark.parametrize("m", [1, 200])
def test_hostile_transposed_indices(device, dtype, part, entry, m):
    blocks = random_blocks(192, 256, (32, 32), 1.0, dtype=dtype)
    _, grad, _ = operands(blocks, m)
    there, transposed = blocks_on(device, blocks)
    getattr(transposed, part)[2] = entry
    if device.type == "cpu":
        with pytest.raises(FormatError):
            bsr_linear_backward_input(grad, there.values, transposed, 256)
        return
    assert bsr_linear_backward_input(grad.to(device), there.values, transposed, 256).isnan().any()
    torch.cuda.synchronize()


# Layers.


def layers(dtype=torch.float32, device="cpu"):
    """A block-sparse layer there, and its dense twin on the CPU in float64."""
    torch.manual_seed(0)
    layer = BlockSparseLinear(256, 192, density=0.4, block_shape=(32, 32), dtype=dtype)
    return copy.deepcopy(layer).to(device), layer.double().to_dense()


@pytest.mark.parametrize("m", [1, 40, 300])
def test_gradients_of_a_layer(device, dtype, m):
    layer, dense = layers(dtype, device)
    dense = dense.to(dtype).double()
    x = random_numbers(m, 256, density=1.0, dtype=dtype)
    here, there = x.double().requires_grad_(), x.to(device).requires_grad_()
    y, expected = layer(there), dense(here)
    given = random_numbers(m, 192, density=1.0, seed=1, dtype=dtype)
    y.backward(given.to(device))
    expected.backward(given.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for found, right in ((y, expected), (there.grad, here.grad), (layer.bias.grad, dense.bias.grad)):
        assert (found.detach().cpu().double() - right).norm() <= tolerance * right.norm()
    kept = layer.pattern.cpu().repeat_interleave(32, 0).repeat_interleave(32, 1)
    twin = copy.deepcopy(layer)
    twin.values.data.copy_(layer.values.grad)
    right = dense.weight.grad * kept
    assert (twin.to_dense().weight.cpu().double() - right).norm() <= tolerance * right.norm()


def test_gradcheck(device):
    layer = BlockSparseLinear(9, 7, density=0.5, block_shape=(2, 4), dtype=torch.float64).to(device)
    x = torch.randn(3, 9, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (x, *(each.detach().clone().requires_grad_() for each in (layer.values, layer.bias)))

    def product(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler_train(device, region):
    layer, _ = layers(device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=region == torch.float16)
    x, wanted = torch.randn(64, 256, device=device), torch.randn(64, 192, device=device)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=region):
            y = layer(x)
        assert y.dtype == region
        loss = (y.float() - wanted).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert layer.values.grad.dtype == torch.float32


def test_compiled_layers_train_in_one_graph(device):
    torch._dynamo.reset()
    layer, _ = layers(device=device)
    model = nn.Sequential(layer, nn.ReLU())
    x = torch.randn(5, 256, device=device)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    found = layer.values.grad.clone()
    layer.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(found, layer.values.grad)
    torch._dynamo.reset()


def test_layers_move_and_keep_their_pattern(device):
    layer, _ = layers(device=device)
    x = torch.randn(3, 256)
    expected = copy.deepcopy(layer).cpu()(x)
    torch.testing.assert_close(layer(x.to(device)).cpu(), expected)
    state = {name: part.cpu() for name, part in layer.state_dict().items()}
    again = BlockSparseLinear.from_state_dict(state).to(device)
    torch.testing.assert_close(again(x.to(device)).cpu(), expected)
    pattern = ~layer.pattern
    layer.update_pattern_(pattern)
    assert torch.equal(layer.pattern, pattern)
    layer(x.to(device)).sum().backward()
    assert layer.values.grad.isfinite().all()


@pytest.mark.parametrize("m", [16, 300])
def test_tf32_only_where_it_is_asked_for(device, m):
    blocks = random_blocks(256, 512, (64, 64))
    x, grad, _ = operands(blocks, m)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for precision in ("tf32", "ieee"):
        try:
            matmul.fp32_precision = precision
            y, grad_x, values = products_on(device, blocks, x, grad)
        finally:
            matmul.fp32_precision = before
        tf32 = precision == "tf32" and device.type == "cuda"
        errors = [
            check_product(y, blocks, x, tf32=tf32),
            check_gradient_of_x(grad_x, blocks, grad, tf32=tf32),
            check_gradient_of_values(values, blocks, grad, x, tf32=tf32),
        ]
        assert m < 300 or all((error > TF32_ERROR) == tf32 for error in errors)  # few rows may be multiplied exactly


@needs_gpu
@pytest.mark.skipif(
    native.cuda_missing is not None or "sm_90a" not in native.build_info()["cuda_architectures"],
    reason="built without the kernels for sm_90a",
)
def test_hopper_has_kernels_of_its_own():
    """Their results are those of the others: whether they are chosen shows in their names alone."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another GPU")
    cuda = torch.device("cuda")
    blocks = random_blocks(256, 512, (64, 64), dtype=torch.bfloat16)
    x, grad, _ = operands(blocks, 512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        products_on(cuda, blocks, x, grad)
        torch.cuda.synchronize()
    ours = [event.key for event in profile.key_averages() if "Tile<" in event.key]
    assert any("multiply<" in name for name in ours)
    assert any("sample<" in name for name in ours)


# Graphs, streams, memory.


@needs_gpu
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_captured_products_read_what_is_there_at_their_replay(dtype, m):
    cuda = torch.device("cuda")
    blocks = random_blocks(256, 512, (64, 64), dtype=dtype)
    x, grad, _ = (tensor.to(cuda) for tensor in operands(blocks, m))
    there, transposed = blocks_on(cuda, blocks)
    x.requires_grad_()

    def work():
        y = bsr_linear(x, there.values, *there.index, 256)
        return (
            y.detach(),
            bsr_linear_backward_input(grad, there.values, transposed, 512),
            bsr_linear_backward_values(grad, x.detach(), *there.index, (64, 64)),
            *torch.autograd.grad(y, x, grad),  # transposes the index
        )

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
        check_gradient_of_x(results[3], blocks, fresh_grad)
        check_gradient_of_values(results[2], blocks, fresh_grad, fresh_x)
    there.col_indices[0] = 99
    graph.replay()
    assert results[0][:, :64].isnan().all()


@needs_gpu
def test_streams_beside_each_other():
    cuda = torch.device("cuda")
    blocks = random_blocks(512, 1024, (64, 64), dtype=torch.bfloat16)
    there, _ = blocks_on(cuda, blocks)
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [operands(blocks, m)[0].to(cuda) for m in (1, 16, 64, 300)]
    expected = [bsr_linear(x, there.values, *there.index, 512) for x in inputs]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(bsr_linear(x, there.values, *there.index, 512))
    torch.cuda.synchronize()
    for place, result in enumerate(results):
        assert_bits_equal(result, expected[place % 4])


@needs_gpu
def test_no_memory_is_kept():
    cuda = torch.device("cuda")
    blocks = random_blocks(256, 512, (64, 64), dtype=torch.bfloat16)
    x, grad, _ = operands(blocks, 40)
    products_on(cuda, blocks, x, grad)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        products_on(cuda, blocks, x, grad)
    assert torch.cuda.memory_allocated() == before
