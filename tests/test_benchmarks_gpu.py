"""The GPU benchmarks on a stand-in for a GPU: the same cells, checks, reports and tables, with torch's CPU ops."""

import gc
import json
import re
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

import benchmark
from benchmarks.cases import Selection
from benchmarks.gpu import block_sparse, codec, decode, decode_blocks, linear, semi_structured
from benchmarks.gpu.contest import Entrant, WrongResultError, contest, poison
from benchmarks.gpu.decoder import TOY, State, make_decoder
from benchmarks.gpu.dense import dense_entrants
from benchmarks.gpu.device import CudaDevice, Hardware, Recording, reason_against
from benchmarks.gpu.header import GpuHeader
from benchmarks.gpu.plan import GpuPlan, microseconds
from benchmarks.gpu.report import GPU_SUITES, GpuReport
from benchmarks.gpu.rivals import RivalsError, load_rivals
from benchmarks.gpu.run import GpuOrder, run_on
from benchmarks.models.networks import linear_layers
from benchmarks.timer import Budget, Summary

ROOT = Path(__file__).parent.parent
ONCE = Budget(min_rounds=1, max_rounds=1, slow_rounds=1, seconds=0.0)


class StandIn:
    """A device whose recordings call the work again and, as graphs do, leave what it returns where it was at first."""

    where = torch.device("cpu")
    blas_libraries = ("one", "other")

    def __init__(self):
        self.timed = 0

    def hardware(self):
        return Hardware("Stand-In X100 80GB", "9.0", 132, 2**20, 2**30, "1.2.3", "13.0", "clocks.sm 1 MHz")

    def milliseconds(self, work):
        work()
        self.timed += 1
        return 2.0

    def record(self, work):
        result = work()

        def replay():
            for old, new in zip(tree_leaves(result), tree_leaves(work()), strict=True):
                old.copy_(new)

        return Recording(replay, result)

    def peak_nbytes(self, work):
        work()
        return 1000

    def blas(self, name):
        assert name in self.blas_libraries
        return nullcontext()

    def precision(self, tf32):
        return nullcontext()

    def release(self):
        pass


def header(quick=True):
    hardware = StandIn().hardware()
    return GpuHeader(hardware, 3000.0, 800.0, 7, quick, "0.1", "2.11", "3.12", "Linux", "abc", "2026-01-02T03:04:05")


def plan(said, selection=None, rivals=None, seconds=1000.0):
    return GpuPlan(
        StandIn(), header(), selection or Selection(), time.monotonic() + seconds, said.append, rivals=rivals
    )


# The contest.


def entrant(name="it", wrong=False, **kinds):
    x = torch.ones(3)
    calls = [lambda: x * (2.0 if wrong else 1.0), lambda: x * 5.0]
    return Entrant(name, calls, lambda found: torch.equal(found, x), **kinds)


@pytest.mark.parametrize("captured", [True, False])
def test_contest_times_a_pass_over_all_inputs(captured):
    device, said = StandIn(), []
    timings = contest(device, [entrant("a", captured=captured), entrant("b")], ONCE, "cell", said.append)
    assert {name: timing.summary.median_ms for name, timing in timings.items()} == {"a": 1.0, "b": 1.0}
    assert timings["a"].captured is captured
    assert device.timed == 4  # a warm-up and a round for each
    assert said == []


@pytest.mark.parametrize("captured", [True, False])
def test_contest_refuses_a_wrong_result(captured):
    with pytest.raises(WrongResultError, match="it is wrong for cell"):
        contest(StandIn(), [entrant(wrong=True, captured=captured)], ONCE, "cell", print)


def test_contest_leaves_out_and_names_a_wrong_peer():
    said = []
    timings = contest(StandIn(), [entrant(), entrant("rival", wrong=True, peer=True)], ONCE, "cell", said.append)
    assert list(timings) == ["it"]
    assert said == ["rival left out of cell: WrongResultError('rival is wrong for cell')"]


def test_contest_notices_what_a_replay_does_not_write():
    class Forgetful(StandIn):
        def record(self, work):
            return Recording(lambda: None, work())

    with pytest.raises(WrongResultError):
        contest(Forgetful(), [entrant()], ONCE, "cell", print)


def test_a_peer_that_cannot_be_captured_is_called():
    class Uncapturable(StandIn):
        def record(self, work):
            raise RuntimeError("operation not permitted when stream is capturing")

    timings = contest(Uncapturable(), [entrant(peer=True)], ONCE, "cell", print)
    assert timings["it"].captured is False
    with pytest.raises(RuntimeError, match="capturing"):
        contest(Uncapturable(), [entrant()], ONCE, "cell", print)


def test_poison_reaches_every_tensor_and_every_byte():
    whole = torch.ones(4, 6)
    numbers, view = torch.ones(5, dtype=torch.int64), whole.T[2:]
    poison((numbers, [view]))
    assert (numbers == -1).all()
    assert whole.isnan().all()


class StandInForCuda:
    """torch.cuda, as far as CudaDevice calls it; writes down what was called, in order."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append(name)

    def current_device(self):
        return 0

    def Event(self, enable_timing):
        assert enable_timing
        return SimpleNamespace(record=self.note("record"), synchronize=self.note("wait"), elapsed_time=lambda end: 1.5)

    def Stream(self):
        return "stream"

    def stream(self, stream):
        assert stream == "stream"
        return nullcontext()

    def CUDAGraph(self):
        names = ("capture_begin", "capture_end", "replay")
        return SimpleNamespace(**{name: self.note(name) for name in names})

    def get_device_properties(self, device):
        return SimpleNamespace(
            name="G", major=9, minor=0, multi_processor_count=2, L2_cache_size=3, total_memory=4, uuid="5"
        )

    def note(self, name):
        return lambda: self.calls.append(name)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch, "cuda", StandInForCuda())
    return torch.cuda


def test_time_is_taken_by_events_around_the_work(cuda):
    assert CudaDevice().milliseconds(cuda.note("work")) == 1.5
    assert cuda.calls == ["synchronize", "_sleep", "record", "work", "record", "wait"]


def test_work_is_captured_after_it_ran_once(cuda):
    recording = CudaDevice().record(cuda.note("work"))
    recording.replay()
    once = ["synchronize", "work", "synchronize"]
    assert cuda.calls == [*once, "capture_begin", "work", "capture_end", "replay"]


def test_a_capture_ends_when_the_work_fails(cuda):
    def work():
        if "capture_begin" in cuda.calls:
            raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while"):
        CudaDevice().record(work)
    assert cuda.calls[-1] == "capture_end"


def test_hardware_without_nvidia_smi(cuda, monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = CudaDevice().hardware()
    assert (found.name, found.capability, found.cache_nbytes, found.driver) == ("G", "9.0", 3, "unknown")


def test_hardware_as_nvidia_smi_tells(cuda, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.1, 345 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 700.00 W\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = CudaDevice().hardware()
    assert found.driver == "580.1"
    assert found.clocks.startswith("clocks.sm 345 MHz, clocks.mem 3201 MHz")


# The suites.


def test_codec_cells():
    said = []
    results = codec.run(plan(said))
    kinds = {(result.contender, result.operation, result.captured) for result in results}
    assert {
        ("copy", "copy", True),
        ("bitmask", "compress", False),
        ("bitmask", "compress_into", True),
        ("bitmask", "decompress", True),
        ("torch masked_select", "compress", False),
        ("torch masked_select", "decompress", False),
        ("torch CSR", "compress", False),
    } <= kinds
    first = next(result for result in results if result.operation == "compress_into")
    assert first.dense_nbytes == 96 * 130 * 2
    assert first.moved_nbytes == first.dense_nbytes + first.compressed_nbytes
    assert first.bandwidth_share == pytest.approx(first.moved_nbytes / first.summary.median_ms / 1e6 / 3000)
    assert any("us [" in line and "of bandwidth" in line for line in said)


def test_codec_notices_a_wrong_bit(monkeypatch):
    right = codec.ops.compress

    def wrong(dense):
        values, bitmasks, row_offsets = right(dense)
        return values, bitmasks ^ (torch.arange(bitmasks.numel()).view_as(bitmasks) == 5).byte(), row_offsets

    calls = iter([right])  # what is expected is right, what is found is not
    monkeypatch.setattr(codec.ops, "compress", lambda dense: next(calls, wrong)(dense))
    monkeypatch.setattr(codec.ops, "decompress", lambda values, bitmasks, row_offsets, shape: None)
    with pytest.raises(WrongResultError, match="compress is wrong for 96x130 bf16"):
        codec.run(plan([]))


def test_linear_cells():
    said = []
    results = linear.run(plan(said, Selection(rows=(1, 3), shapes=((40, 130),))))
    assert {(r.contender, r.dtype, r.rows) for r in results} == {
        (contender, dtype, rows) for contender in ("dense", "bitmask") for dtype in ("bf16", "fp32") for rows in (1, 3)
    }
    dense, packed = results[:2]
    assert dense.way
    assert dense.way.endswith((", one", ", other"))
    assert packed.speedup == 1.0
    assert dense.weight_nbytes == 40 * 130 * 2 > packed.weight_nbytes
    assert packed.moved_nbytes == packed.weight_nbytes + 170 * 2
    assert packed.layers * packed.weight_nbytes >= 2**16  # more than the cache of a quick run


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_linear_notices_one_lost_column(monkeypatch, dtype):
    right = linear.ops.linear
    monkeypatch.setattr(linear.ops, "linear", lambda x, *parts: right(x * (torch.arange(x.shape[1]) != 7), *parts))
    with pytest.raises(WrongResultError, match="bitmask is wrong for 96x64"):
        linear.run(plan([], Selection(dtypes=(dtype,), rows=(3,))))


class Uneven(StandIn):
    """One of the libraries is twice as fast."""

    def blas(self, name):
        self.chosen = name
        return nullcontext()

    def milliseconds(self, work):
        self.chosen = None
        super().milliseconds(work)
        return 1.0 if self.chosen == "other" else 2.0


def test_dense_is_the_fastest_way():
    selection = Selection(rows=(1,), dtypes=("fp32",), shapes=((40, 130),))
    dense, packed = linear.run(replace(plan([], selection), device=Uneven()))
    assert dense.way.endswith(", other")
    assert packed.speedup == 0.5


@pytest.mark.parametrize(("rows", "ways"), [(1, 5), (3, 4)])
def test_ways_to_multiply(rows, ways):
    x, weight = torch.randn(rows, 16), torch.randn(8, 16)
    entrants = dense_entrants(StandIn(), x, [weight], lambda y: True)
    assert len({each.name for each in entrants}) == 2 * ways
    for each in entrants:
        torch.testing.assert_close(each.calls[0](), x @ weight.T)


def test_rivals_are_timed_and_judged(tmp_path):
    path = tmp_path / "rivals.py"
    path.write_text(
        "CAPTURED = False\n"
        "def contenders(weight, m):\n"
        "    right = {'right': lambda x: x @ weight.T}\n"
        "    return {**right, 'wrong': lambda x: x @ weight.T + 1} if m == 3 else {}\n"
    )
    said = []
    results = linear.run(plan(said, Selection(dtypes=("fp32",), shapes=((40, 130),)), rivals=load_rivals(path)))
    assert [r.rows for r in results if r.contender == "right"] == [3]
    assert any(line.startswith("wrong left out of 40x130 fp32, 50% zeros, m = 3: WrongResultError") for line in said)
    tables = list(linear.tables(results))
    assert "right (with launches) |" in tables[-1]
    assert tables[-1].startswith("**Beside rivals, W 40x130 fp32**")


def test_rivals_that_fail_are_named_and_left_out(tmp_path):
    path = tmp_path / "rivals.py"
    path.write_text("def contenders(weight, m):\n    raise KeyError('unpacked')\n")
    said = []
    results = linear.run(plan(said, Selection(dtypes=("fp32",), shapes=((40, 130),)), rivals=load_rivals(path)))
    assert {result.contender for result in results} == {"dense", "bitmask"}
    assert said.count("rivals left out: KeyError('unpacked')") == 2


def test_rivals_must_be_there(tmp_path):
    with pytest.raises(RivalsError, match="is not a Python file"):
        load_rivals(tmp_path / "none.py")
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(RivalsError, match="does not define contenders"):
        load_rivals(path)


def test_decode_cells():
    said = []
    with torch.inference_mode():
        results = decode.run(plan(said))
    assert [(r.contender, r.rows) for r in results] == [("dense", 1), ("bitmask", 1), ("dense", 8), ("bitmask", 8)]
    dense, packed = results[:2]
    assert packed.linear_nbytes < dense.linear_nbytes
    assert packed.checkpoint_nbytes < dense.checkpoint_nbytes
    assert 0 <= packed.difference < 0.02
    assert packed.per_second == 500.0


def test_decode_notices_a_wrong_product(monkeypatch):
    right = decode.compressed_twin

    def wrong(model, body):
        twin = right(model, body)
        layer = twin.get_submodule(body)[1].down
        layer.weight = torch.nn.Parameter(
            decode.BitmaskTensor.from_dense(-layer.weight.to_dense()), requires_grad=False
        )
        return twin

    monkeypatch.setattr(decode, "compressed_twin", wrong)
    with pytest.raises(WrongResultError, match="logits are off"), torch.inference_mode():
        decode.run(plan([]))


def test_decode_notices_a_weight_that_stayed_dense(monkeypatch):
    monkeypatch.setattr(decode, "compressed_twin", lambda model, body: model)
    with pytest.raises(WrongResultError, match="did not get compressed"), torch.inference_mode():
        decode.run(plan([]))


@pytest.mark.parametrize("suite", [decode, decode_blocks])
def test_the_dense_decoder_is_gone_when_its_twin_is_sized(monkeypatch, suite):
    held, alive = [], []
    make, sizes = decode.make_decoder, decode._sizes

    def watched(*args):
        model = make(*args)
        held.extend(weakref.ref(each) for each in (model, *(layer.weight for layer in linear_layers(model.blocks))))
        return model

    def counted(*args):
        gc.collect()
        alive.append(sum(each() is not None for each in held))
        return sizes(*args)

    monkeypatch.setattr(decode, "make_decoder", watched)
    monkeypatch.setattr(decode, "_sizes", counted)
    with torch.inference_mode():
        suite.run(plan([], Selection(sparsities=(0.5,))))
    assert alive == [len(held), 0]
    assert len(held) > 1


def test_the_decoder_attends_to_what_was_said():
    """Step by step with the memory of keys and values is the whole sequence at once, causally."""
    model = make_decoder(TOY, 12, torch.float64, 0.5, torch.device("cpu"), seed=1)
    state = State(TOY, 2, 0, 12, model.embedding.weight, seed=2)
    tokens = torch.randint(TOY.vocabulary, (2, 9), generator=torch.Generator().manual_seed(3))
    logits = []
    for place in range(tokens.shape[1]):
        state.tokens.copy_(tokens[:, place])
        logits.append(model(state))
        state.advance(tokens[:, place])
    assert int(state.position) == 9
    expected = _at_once(model, tokens)
    torch.testing.assert_close(torch.stack(logits, 1), expected, atol=1e-6, rtol=1e-6)
    zeros = torch.cat([p.flatten() for p in model.blocks.parameters() if p.ndim == 2]) == 0
    assert 0.48 < zeros.double().mean() < 0.52


def _at_once(model, tokens):
    """The same model over whole sequences, written anew."""
    hidden = model.embedding(tokens)
    batch, length = tokens.shape
    half, group = TOY.head_size // 2, TOY.heads // TOY.key_value_heads
    angles = torch.arange(length)[:, None].double() * 500_000.0 ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(heads):
        turned = torch.complex(heads[..., :half], heads[..., half:]) * turn[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    for block in model.blocks:
        normed = block.attention_norm(hidden)
        split = block.query_key_value(normed).view(batch, length, -1, TOY.head_size)
        queries, keys, values = split.split([TOY.heads, TOY.key_value_heads, TOY.key_value_heads], 2)
        keys, values = (each.repeat_interleave(group, 2).transpose(1, 2) for each in (rotate(keys), values))
        attended = torch.nn.functional.scaled_dot_product_attention(
            rotate(queries).transpose(1, 2), keys, values, is_causal=True
        )
        hidden = hidden + block.output(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = block.gate_up(block.perceptron_norm(hidden)).chunk(2, -1)
        hidden = hidden + block.down(torch.nn.functional.silu(gate) * up)
    return model.head(model.norm(hidden))


def test_block_sparse_cells():
    said = []
    results = block_sparse.run(plan(said, Selection(dtypes=("fp32",), shapes=((96, 64),))))
    assert {(r.contender, r.part, r.rows, r.tf32) for r in results} == {
        (contender, part, rows, tf32)
        for contender in ("dense", "bitmask")
        for part in ("forward", "dX", "dW")
        for rows in (1, 3)
        for tf32 in (False, True)
    } | {("torch BSR", "forward", rows, tf32) for rows in (1, 3) for tf32 in (False, True)}
    dense, packed = results[:2]
    assert dense.way.endswith((", one", ", other"))
    assert (packed.block, packed.density, packed.speedup, packed.target_ms) == (16, 0.5, 1.0, dense.dense_ms / 2)
    assert packed.weight_nbytes == 12 * 16 * 16 * 4 + (7 + 12) * 8
    text = "\n".join(block_sparse.tables(results))
    for part in ("**dW, W 96x64 tf32, blocks of 16**", "50%: us", "**Beside others: forward, W 96x64 fp32**"):
        assert part in text


@pytest.mark.parametrize(
    ("name", "part"),
    [("bsr_linear", "forward"), ("bsr_linear_backward_input", "dX"), ("bsr_linear_backward_values", "dW")],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_block_sparse_notices_one_lost_column(monkeypatch, name, part, dtype):
    right = getattr(block_sparse, name)

    def wrong(rows, *rest):
        return right(rows * (torch.arange(rows.shape[1]) != 7), *rest)

    monkeypatch.setattr(block_sparse, name, wrong)
    with pytest.raises(WrongResultError, match=f"bitmask is wrong for {part}, 96x64"):
        block_sparse.run(plan([], Selection(dtypes=(dtype,), shapes=((96, 64),), sparsities=(0.0,))))


class Tf32(StandIn):
    """Notes what precision is asked for, as torch's setting does."""

    tf32 = False

    @contextmanager
    def precision(self, tf32):
        self.tf32 = tf32
        yield
        self.tf32 = False


def rounded(tensor):
    """Cut to what tf32 holds."""
    return (tensor.view(torch.int32) & -(2**13)).view(torch.float32)


PRODUCTS = {"forward": "bsr_linear", "dX": "bsr_linear_backward_input", "dW": "bsr_linear_backward_values"}
WIDE = Selection(dtypes=("fp32",), shapes=((512, 512),), sparsities=(0.0,), rows=(64,))


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(("part", "name"), PRODUCTS.items())
def test_tf32_may_round_where_it_was_asked_for(monkeypatch, part, name, always):
    monkeypatch.setattr(block_sparse, "_PARTS", {part: block_sparse._PARTS[part]})
    device, right = Tf32(), getattr(block_sparse, name)

    def cut(rows, other, *rest):
        if always or device.tf32:
            rows, other = rounded(rows), rounded(other)
        return right(rows, other, *rest)

    monkeypatch.setattr(block_sparse, name, cut)
    with pytest.raises(WrongResultError, match="fp32") if always else nullcontext():
        block_sparse.run(replace(plan([], WIDE), device=device))


@pytest.mark.parametrize(("part", "name"), PRODUCTS.items())
def test_one_lost_tile_is_noticed_in_tf32(monkeypatch, part, name):
    """16 x 16 sums each lack 16 of their products; in norm that is less than 2% of the whole."""
    monkeypatch.setattr(block_sparse, "_PARTS", {part: block_sparse._PARTS[part]})
    device, right = Tf32(), getattr(block_sparse, name)

    def wrong(rows, other, *rest):
        found = right(rows, other, *rest)
        if device.tf32:
            less = rows.clone()
            less[:16, :16] = 0
            if part == "dW":
                found[0] = right(less, other, *rest)[0]
            else:
                found[:16, :16] = right(less, other, *rest)[:16, :16]
        return found

    monkeypatch.setattr(block_sparse, name, wrong)
    with pytest.raises(WrongResultError, match=f"bitmask is wrong for {part}, 512x512 tf32"):
        block_sparse.run(replace(plan([], WIDE), device=device))


def test_torch_csr_is_told_places_in_32_bits_at_a_tenth_of_the_blocks(monkeypatch):
    """Of 29 blocks 3 are kept, which is a bit more."""
    indices, multiply = set(), block_sparse._by_csr

    def noted(weight, x):
        indices.update({weight.crow_indices().dtype, weight.col_indices().dtype})
        return multiply(weight, x)

    monkeypatch.setattr(block_sparse, "_by_csr", noted)
    results = block_sparse.run(plan([], Selection(dtypes=("fp32",), shapes=((16, 464),), sparsities=(0.9,), rows=(3,))))
    (found,) = {result.density for result in results if result.contender == "torch CSR"}
    assert 0.1 < found < 0.105
    assert indices == {torch.int32}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_block_sparse_weights_are_cold(monkeypatch, dtype, sparsity):
    """Of up to 512 rows, for which it matters where W comes from."""
    held = {}

    def noted(plan, layers, m, part):
        held[m] = sum(each.values.nbytes for each in layers.blocks)
        return []

    monkeypatch.setattr(block_sparse, "_cell", noted)
    ordered = plan([], Selection(dtypes=(dtype,), shapes=((96, 64),), sparsities=(sparsity,), rows=(1, 512, 4096)))
    block_sparse.run(ordered)
    assert held[1] == held[512] >= ordered.uncached_nbytes
    assert held[4096] <= held[512]


def test_semi_structured_cells():
    said = []
    results = semi_structured.run(plan(said, Selection(dtypes=("bf16",), shapes=((64, 128),))))
    assert {(r.contender, r.part, r.rows, r.block) for r in results} >= {
        *((name, "pack", 0, 0) for name in ("dense", "pack", "prune and pack", "unpack")),
        *((name, "forward", rows, 0) for name in ("dense", "bitmask") for rows in (1, 3)),
        *((name, "forward", rows, 16) for name in ("dense", "bitmask", "bitmask, dense blocks") for rows in (1, 3)),
    }
    assert {r.density for r in results} == {0.5, 0.125, 0.78125}
    assert any(line.startswith("torch cuSPARSELt 2:4 left out") for line in said)
    text = "\n".join(semi_structured.tables(results))
    for part in (
        "**forward, W 64x128 bf16**",
        "blocks of 16**",
        "**Beside others: pack, W 64x128 bf16**",
        "dense (copy)",
    ):
        assert part in text


@pytest.mark.parametrize("name", ["linear_24", "bsr_linear_24"])
def test_semi_structured_notices_one_lost_column(monkeypatch, name):
    right = getattr(semi_structured, name)
    monkeypatch.setattr(
        semi_structured, name, lambda x, *parts: right(x * (torch.arange(x.shape[1]) >= x.shape[1] // 2), *parts)
    )
    with pytest.raises(WrongResultError, match="bitmask is wrong for forward"):
        semi_structured.run(plan([], Selection(dtypes=("bf16",), rows=(3,))))


def test_decode_blocks_cells():
    said = []
    with torch.inference_mode():
        results = decode_blocks.run(plan(said, Selection(sparsities=(0.5,))))
    assert [(r.contender, r.rows) for r in results] == [("dense", 1), ("bitmask", 1), ("dense", 8), ("bitmask", 8)]
    dense, packed = results[:2]
    assert packed.linear_nbytes < dense.linear_nbytes
    assert 0 <= packed.difference < 0.02
    assert "block-sparse tokens/s" in next(iter(decode_blocks.tables(results)))


def test_decode_blocks_notices_a_wrong_product(monkeypatch):
    right = decode_blocks.block_sparse_twin

    def wrong(*args):
        twin = right(*args)
        for module in twin.modules():
            if isinstance(module, decode_blocks.BlockSparseLinear):
                module.values.data.neg_()
        return twin

    monkeypatch.setattr(decode_blocks, "block_sparse_twin", wrong)
    with pytest.raises(WrongResultError, match="logits are off"), torch.inference_mode():
        decode_blocks.run(plan([], Selection(sparsities=(0.5,))))


# The whole run.


def test_a_run_is_written_read_back_and_set_as_tables(tmp_path):
    path, said = tmp_path / "run.json", []
    report = run_on(StandIn(), GpuOrder((), Selection(), True, path, None), said.append)
    assert list(report.results) == list(GPU_SUITES)
    back = GpuReport.load(path)
    assert (back.header, back.results) == (report.header, report.results)
    assert back.markdown() == report.markdown()
    text = back.markdown()
    for part in ("Stand-In X100 80GB", "Quick sizes", "**Compress and decompress, 96x130**", "W 96x64 bf16**", "toy"):
        assert part in text
    assert any(line.startswith("GPU ") for line in said)
    done = subprocess.run(
        [sys.executable, "benchmark.py", "--table", str(path), "--dtypes", "fp32"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fp32" in done.stdout
    assert "| bf16" not in done.stdout


def test_the_command_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    monkeypatch.setattr(benchmark, "reason_against", lambda: None)
    monkeypatch.setattr(benchmark, "CudaDevice", StandIn)
    arguments = ["--device", "cuda", "--quick", "--suite", "linear", "--rows", "3", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "== linear" in printed
    assert printed.endswith(GpuReport.load(path).markdown() + "\n")
    assert {result.rows for result in GpuReport.load(path).results["linear"]} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--isa", "scalar"], "--device cuda knows no --isa"),
        (["--suite", "everyday"], "--device cuda has the suites codec, linear, decode, block_sparse"),
        (["--rivals", "none.py"], "--rivals: none.py is not a Python file"),
    ],
)
def test_what_the_command_line_refuses(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(benchmark, "reason_against", lambda: None)
    monkeypatch.setattr(benchmark, "CudaDevice", StandIn)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda", "--quick", *arguments])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_quick_run_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.run._RESULTS", tmp_path)
    run_on(StandIn(), GpuOrder(("codec",), Selection(), True, None, None), lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_real_run_is_named_after_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.run._RESULTS", tmp_path)
    monkeypatch.setattr(GpuHeader, "of_this_run", lambda device, quick: header(quick=False))
    selection = Selection(shapes=((16, 24),), dtypes=("fp32",), sparsities=(0.5,))
    run_on(StandIn(), GpuOrder(("codec",), selection, False, None, None), lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["stand-in-x100-80gb-codec.json"]


def test_what_there_is_no_time_for_is_named():
    said = []
    assert linear.run(plan(said, seconds=-1.0)) == []
    assert said[0] == "left out, the time for this suite is up: 96x64 bf16, 50% zeros"


def test_the_suites_of_a_phase_take_less_than_eight_minutes():
    script = (ROOT / "tests" / "run_gpu.sh").read_text()
    phases = [names.split(",") for names in re.findall(r"\{ benchmark (\S+); \}", script)]
    assert [name for names in phases for name in names] == list(GPU_SUITES)
    for names in phases:
        assert sum(GPU_SUITES[name].seconds for name in names) <= 440


def test_unknown_reports_are_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"device": "cuda", "format": 1, "header": {}, "suites": {"unheard-of": []}}))
    with pytest.raises(ValueError, match="not a benchmark report"):
        GpuReport.load(path)


@pytest.mark.parametrize(("milliseconds", "text"), [(0.00123, "1.2"), (0.0999, "99.9"), (0.1234, "123")])
def test_microseconds(milliseconds, text):
    assert microseconds(milliseconds) == text


def test_summary_of_one_call():
    assert Summary.of([2.0, 4.0, 6.0]).per(2) == Summary(3, 1.0, 1.5, 2.0, 2.5, 3.0)


@pytest.mark.skipif(reason_against() is None, reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    done = subprocess.run(
        [sys.executable, "benchmark.py", "--device", "cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"benchmark.py: --device cuda: {reason_against()}\n"
    assert done.stdout == ""
