"""BitmaskTensor, layers and models on a GPU: what moves, what is cast, what is compiled, and that nothing is dense."""

import contextlib
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_bits_equal, assert_parts_equal, needs_gpu, random_dense, random_numbers
from gpu_checks import assert_is_product
from torch import library, nn

from bitmask import BitmaskLinear, BitmaskTensor, compress_, compression_report, decompress_, ops

pytestmark = pytest.mark.filterwarnings("error::bitmask.DecompressWarning")

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parts_of(tensor):
    return tensor.values, tensor.bitmasks, tensor.row_offsets


def sparse_layer(n=65, k=131, seed=0):
    layer = nn.Linear(k, n)
    layer.weight.data = random_numbers(n, k, density=0.5, seed=seed)
    return layer


# Tensors.


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.complex64], ids=str)
def test_parts_move_there_and_back(device, dtype):
    dense = random_dense((65, 131), dtype)
    tensor = BitmaskTensor.from_dense(dense)
    there = tensor.to(device)
    assert isinstance(there, BitmaskTensor)
    assert there.device.type == device.type
    assert {part.device.type for part in parts_of(there)} == {device.type}
    assert_parts_equal(parts_of(there.cpu()), parts_of(tensor))
    assert_bits_equal(there.to_dense().cpu(), tensor.to_dense())


def test_from_dense_and_rows(device):
    dense = random_numbers(65, 131).to(device)
    tensor = BitmaskTensor.from_dense(dense)
    assert tensor.device == dense.device
    assert torch.equal(tensor[3:17].to_dense(), dense[3:17])
    assert torch.equal(tensor[40].to_dense(), dense[40])
    assert_parts_equal([part.cpu() for part in parts_of(tensor)], ops.compress(dense.cpu()))


def test_parts_survive_a_file(device):
    tensor = BitmaskTensor.from_dense(random_numbers(65, 131).to(device))
    file = io.BytesIO()
    torch.save(tensor, file)
    for place in (device, torch.device("cpu")):
        file.seek(0)
        back = torch.load(file, map_location=place)
        assert back.device.type == place.type
        assert_parts_equal([p.cpu() for p in parts_of(back)], [p.cpu() for p in parts_of(tensor)])


def test_dtype_and_device_change_together(device):
    dense = random_numbers(65, 131)
    tensor = BitmaskTensor.from_dense(dense).to(device, torch.bfloat16)
    assert tensor.dtype == tensor.values.dtype == torch.bfloat16
    assert torch.equal(tensor.to_dense().cpu(), dense.bfloat16())


@needs_gpu
def test_moving_makes_no_dense_copy():
    dense = random_numbers(4096, 4096, density=0.3)
    tensor = BitmaskTensor.from_dense(dense)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    there = tensor.cuda()
    back = there.cpu()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * tensor.compressed_nbytes < 0.5 * dense.nbytes
    assert_parts_equal(parts_of(back), parts_of(tensor))


@needs_gpu
def test_pinned_parts_move_without_waiting():
    tensor = BitmaskTensor.from_dense(random_numbers(65, 131)).pin_memory()
    assert tensor.is_pinned()
    there = tensor.to("cuda", non_blocking=True)
    assert_parts_equal([part.cpu() for part in parts_of(there)], parts_of(tensor))


# Layers and models.


@pytest.mark.parametrize("m", [1, 5, 40])
def test_layer(device, m):
    layer, x = sparse_layer(), random_numbers(m, 131, density=1.0)
    compressed = BitmaskLinear.from_dense(layer).to(device)
    assert {parameter.device.type for parameter in compressed.parameters()} == {device.type}
    assert_is_product(compressed(x.to(device)), x, layer.weight, layer.bias)
    assert_is_product(compressed.cpu()(x), x, layer.weight, layer.bias)
    assert_is_product(copy.deepcopy(compressed).to(device)(x.to(device)), x, layer.weight, layer.bias)


def test_layer_is_compressed_where_it_is(device):
    layer, x = sparse_layer().to(device), random_numbers(3, 131, density=1.0)
    compressed = BitmaskLinear.from_dense(layer)
    assert compressed.weight.device.type == device.type
    assert_is_product(compressed(x.to(device)), x, layer.weight, layer.bias)
    dense = compressed.to_dense()
    assert torch.equal(dense.weight, layer.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_is_loaded_on_the_device(device, assign):
    source, target = (BitmaskLinear.from_dense(sparse_layer(seed=seed)).to(device) for seed in (0, 1))
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.weight.device.type == device.type
    assert_parts_equal(parts_of(target.weight), parts_of(source.weight))


def test_models_are_compressed_where_they_are(device):
    model = nn.Sequential(sparse_layer(64, 128), nn.ReLU(), sparse_layer(32, 64)).to(device)
    twin = compress_(copy.deepcopy(model), progress=False)
    assert all(isinstance(layer.weight, BitmaskTensor) for layer in (twin[0], twin[2]))
    assert {row.compressed for row in compression_report(twin).rows} == {True}
    x = random_numbers(5, 128, density=1.0).to(device)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)
    back = decompress_(twin, progress=False)
    assert torch.equal(back[0].weight, model[0].weight)


def test_gradients_reach_x_and_bias(device):
    layer = sparse_layer().to(device)
    twin = BitmaskLinear.from_dense(layer)
    x, y = (random_numbers(7, 131, density=1.0).to(device).requires_grad_() for _ in range(2))
    layer(x).square().sum().backward()
    twin(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(twin.bias.grad, layer.bias.grad, rtol=1e-3, atol=1e-3)


# Autocast.


@pytest.mark.parametrize("region", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("m", [1, 40])
def test_autocast(device, region, dtype, m):
    dense, bias = random_numbers(30, 50, dtype=dtype).to(device), random_numbers(30, density=1.0).to(device)
    weight = BitmaskTensor.from_dense(dense)
    x, y = (random_numbers(m, 50, density=1.0).to(device).requires_grad_() for _ in range(2))
    with torch.autocast(device.type, dtype=region):
        expected, got = F.linear(x, dense, bias), F.linear(y, weight, bias)
        assert ops.linear(x, *parts_of(weight), 50).dtype == region
    assert got.dtype == expected.dtype == region
    torch.testing.assert_close(got, expected)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=2e-2, atol=2e-2)


@needs_gpu
def test_autocast_of_the_cpu_leaves_the_gpu_alone():
    weight = BitmaskTensor.from_dense(random_numbers(30, 50).cuda())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(torch.ones(2, 50, device="cuda"), weight).dtype == torch.float32


# Compilers.


def compilers_of(device):
    """What compiles: on the CPU without code generation, which is slow there and no concern of these tests."""
    if device.type == "cpu":
        return [{"backend": "aot_eager"}]
    return [{}, {"mode": "reduce-overhead"}, {"backend": "cudagraphs"}]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_compiled_layers(device, mode):
    layers = nn.Sequential(BitmaskLinear.from_dense(sparse_layer()), nn.ReLU(), sparse_layer(20, 65)).to(device)
    for how in compilers_of(device):
        torch._dynamo.reset()
        compiled = torch.compile(layers, fullgraph=True, **how)
        with mode():
            for seed in range(5):  # beyond warming up and recording
                x = random_numbers(4, 131, density=1.0, seed=seed).to(device)
                torch.testing.assert_close(compiled(x).clone(), layers(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_gradients(device):
    layer = BitmaskLinear.from_dense(sparse_layer()).to(device)
    for how in compilers_of(device):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, **how)
        for seed in range(4):
            x, y = (random_numbers(4, 131, density=1.0, seed=seed).to(device).requires_grad_() for _ in range(2))
            compiled(x).sum().backward()
            layer(y).sum().backward()
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_codec(device):
    """The number of values is data, which a compiler that captures graphs must leave to the call."""
    how = {"backend": "aot_eager"} if device.type == "cpu" else {}

    @torch.compile(fullgraph=True, **how)
    def back_and_forth(dense):
        return ops.decompress(*ops.compress(dense), dense.shape) * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for seed in range(3):
            dense = random_numbers(20, 70, seed=seed).to(device)
            assert torch.equal(back_and_forth(dense), dense * 2)


@pytest.mark.parametrize("m", [1, 40])
def test_opcheck(device, m):
    dense, x = random_numbers(12, 20).to(device), random_numbers(m, 20, density=1.0).to(device)
    parts = ops.compress(dense)
    library.opcheck(torch.ops.bitmask.linear.default, (x.requires_grad_(), *parts, 20))
    library.opcheck(torch.ops.bitmask.compress.default, (dense, False))
    library.opcheck(torch.ops.bitmask.decompress.default, (*parts, [12, 20]))
