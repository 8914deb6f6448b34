"""Training block-sparse layers: as masked dense ones, with patterns that change, in two processes, compiled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import run_python
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bitmask import BlockSparseLinear, block_norms, largest_blocks, prune_blocks
from bitmask.block_patterns import spread_blocks

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
}


pytestmark = pytest.mark.usefixtures("seed")


class MaskedLinear(nn.Module):
    """The dense layer that a block-sparse one is equal to: its weight is masked in every product."""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.to_dense().weight
        self.bias = copy.deepcopy(layer.bias)
        mask = torch.kron(layer.pattern, torch.ones(layer.block_shape, dtype=torch.bool))
        self.mask = mask[: layer.out_features, : layer.in_features]

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


def network(dtype=torch.float64):
    """Blocks of both layers are cut off at edges."""
    sizes = {"density": 0.5, "block_shape": (8, 16), "dtype": dtype}
    return nn.Sequential(BlockSparseLinear(20, 50, **sizes), nn.Tanh(), BlockSparseLinear(50, 3, **sizes))


def task(count=256, dtype=torch.float64):
    x = torch.randn(count, 20, dtype=dtype)
    return x, torch.stack([x[:, :5].sum(1), x[:, 3:9].square().sum(1) / 3, x[:, 15].sin()], 1)


def train(model, optimizer, x, y, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_that_of_the_masked_dense_layer(name):
    model = network()
    masked = nn.Sequential(MaskedLinear(model[0]), nn.Tanh(), MaskedLinear(model[2]))
    x, y = task()
    optimizers = [OPTIMIZERS[name](each.parameters()) for each in (model, masked)]
    for _ in range(12):
        losses = [train(each, optimizer, x, y, 1) for each, optimizer in zip((model, masked), optimizers, strict=True)]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
        for layer, twin in zip(model[::2], masked[::2], strict=True):
            torch.testing.assert_close(layer.to_dense().weight.data, twin.weight.data * twin.mask, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(layer.bias, twin.bias, rtol=1e-7, atol=1e-9)
    assert losses[0][0] < F.mse_loss(torch.zeros_like(y), y) * 0.9, "something was learned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_converges(name, dtype):
    model = network(dtype)
    losses = train(model, OPTIMIZERS[name](model.parameters()), *task(dtype=dtype), 60)
    assert losses[-1] < losses[0] / 2


def test_past_the_edges_stays_zero():
    model = network()
    train(model, OPTIMIZERS["AdamW"](model.parameters()), *task(), 5)
    for layer in model[::2]:
        again = BlockSparseLinear.from_dense(layer.to_dense(), block_shape=layer.block_shape, pattern=layer.pattern)
        assert torch.equal(layer.values, again.values)


def test_pruning_then_training():
    x, y = task()
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    train(model, OPTIMIZERS["AdamW"](model.parameters()), x, y, 60)
    prune_blocks(model, 0.5, (8, 4))
    losses = train(model, OPTIMIZERS["AdamW"](model.parameters()), x, y, 30)
    assert losses[-1] < losses[0] / 2


def test_patterns_that_change_while_training():
    """SET: drop the blocks of smallest norm, grow as many at random."""
    model, (x, y) = network(), task()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    losses = []
    for _ in range(6):
        losses += train(model, optimizer, x, y, 10)
        for layer in model[::2]:
            norms = block_norms(layer.to_dense().weight, layer.block_shape)
            scores = torch.where(layer.pattern, norms, torch.rand_like(norms) * norms[layer.pattern].median())
            layer.update_pattern_(scores=scores, optimizer=optimizer)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("count", [1, 7, 9])
@pytest.mark.parametrize("output", ["layer", "frozen values", "bias alone", "weight", "penalty", "compiled"])
def test_gradients_of_an_old_pattern_are_refused(output, count):
    """They would be of other blocks: silently, where there are as many."""
    layer = BlockSparseLinear(20, 50, block_shape=(8, 16), pattern=spread_blocks((7, 2), 7))
    x = torch.randn(3, 20, requires_grad=output != "bias alone")
    layer.values.requires_grad_(output not in ("frozen values", "bias alone"))
    if output == "weight":
        y = F.linear(x, layer.weight)
    elif output == "penalty":
        y = layer.values**2
    else:
        y = (torch.compile(layer, backend="aot_eager") if output == "compiled" else layer)(x)
    layer.update_pattern_(spread_blocks((7, 2), count))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert layer.values.grad is None
    layer(x).sum().backward()
    assert not layer.values.requires_grad or layer.values.grad.shape == layer.values.shape
    torch._dynamo.reset()


def test_the_gradient_of_the_dense_weight():
    """What the documentation of update_pattern_ says of it; it is there for blocks that do not exist, too."""
    layer = BlockSparseLinear(20, 50, block_shape=(8, 16), dtype=torch.float64)
    dense, x = layer.to_dense(), torch.randn(3, 5, 20, dtype=torch.float64)
    y = layer(x)
    y.retain_grad()
    y.pow(3).sum().backward()
    dense(x).pow(3).sum().backward()
    gradient = y.grad.flatten(0, -2).T @ x.flatten(0, -2)
    torch.testing.assert_close(gradient, dense.weight.grad)
    norms = block_norms(gradient, layer.block_shape)
    assert norms[~layer.pattern].all()
    survivors = largest_blocks(block_norms(layer.weight, layer.block_shape), 0.25)
    layer.update_pattern_(scores=norms.masked_fill(survivors, torch.inf))
    assert layer.pattern[survivors].all()
    assert norms[layer.pattern & ~survivors].min() >= norms[~layer.pattern].max()
    mask = torch.kron(layer.pattern, torch.ones(8, 16))[:50, :20]
    assert torch.equal(layer.to_dense().weight, dense.weight * mask)


def test_gradient_accumulation_and_clipping():
    model, (x, y) = network(), task()
    F.mse_loss(model(x), y).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for part in range(4):
        (F.mse_loss(model(x[part::4]), y[part::4]) / 4).backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], whole)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(norm, torch.cat([gradient.flatten() for gradient in whole]).norm())


def test_checkpointed_activations():
    model, (x, y) = network(), task()
    F.mse_loss(model(x), y).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    F.mse_loss(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), y).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training(backend):
    torch._dynamo.reset()
    model = network(torch.float32)
    twin, (x, y) = copy.deepcopy(model), task(dtype=torch.float32)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses = train(compiled, OPTIMIZERS["AdamW"](model.parameters()), x, y, 5)
    assert counter.frame_count == 1
    torch.testing.assert_close(losses, train(twin, OPTIMIZERS["AdamW"](twin.parameters()), x, y, 5), rtol=1e-4, atol=0)
    model[0].update_pattern_(pattern := spread_blocks((7, 2), 9))
    twin[0].update_pattern_(pattern)
    for layer, other in zip(model[::2], twin[::2], strict=True):
        other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(compiled(x), twin(x))
    torch._dynamo.reset()


def test_compiled_under_autocast():
    torch._dynamo.reset()
    layer, x = BlockSparseLinear(64, 64), torch.randn(5, 64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    y = step(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32
    torch._dynamo.reset()


DISTRIBUTED = """
import os, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from bitmask import BlockSparseLinear

def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(BlockSparseLinear(64, 96), nn.Tanh(), BlockSparseLinear(96, 32, density=0.25)).double()

def train(model, part=slice(None)):
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    torch.manual_seed(7)
    x, y = torch.randn(16, 64).double(), torch.randn(16, 32).double()
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    return [*(p.grad for p in model.parameters()), *model.state_dict().values()]

def run(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
    expected, part = train(network(0)), slice(rank, None, 2)
    replicated = nn.parallel.DistributedDataParallel(network(rank))  # each has another pattern: that of rank 0 counts
    torch.testing.assert_close(train(replicated, part), expected)
    single = network(0)
    single.load_state_dict(replicated.module.state_dict())
    for model in (single, replicated.module):
        model[0].update_pattern_(~model[0].pattern)
    torch.testing.assert_close(train(replicated, part), train(single))
    sharded = network(0)
    for module in (sharded[0], sharded[2], sharded):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    got = [getattr(tensor, "full_tensor", lambda: tensor)() for tensor in train(sharded, part)]
    torch.testing.assert_close(got, expected)
    layer = sharded[0]
    update, add = lambda: layer.update_pattern_(layer.pattern), lambda: layer.weight + 1
    for refused in (update, layer.reset_parameters, layer.to_dense, layer.to_bsr, add):
        try:
            refused()
        except ValueError as error:
            assert str(error).startswith("values: ") and "sharded, expected a layer with all" in str(error), error
        else:
            raise AssertionError("what needs all blocks, of a sharded layer")
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo that still holds a tensor when the interpreter finalizes aborts the process

if __name__ == "__main__":
    mp.start_processes(run, (sys.argv[1] + "/store",), 2, start_method="spawn")
    print("same")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    code = (
        f"import runpy, sys; sys.argv[1:] = [{str(tmp_path)!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    assert run_python(code, timeout=300).stdout.split()[-1:] == ["same"], "after what gloo prints in some versions"
