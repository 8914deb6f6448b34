"""Whole models: compress_, decompress_ and compression_report."""

import copy
import gc
import io
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_python
from torch import nn
from torch.nn.utils import parametrizations, prune

import bitmask
from bitmask import (
    BitmaskLinear,
    BitmaskTensor,
    SemiStructuredTensor,
    compress_,
    compression_report,
    decompress_,
    prune_24_,
)
from bitmask.compressed_tensor import CompressedTensor
from bitmask.prune import prune_by_magnitude

pytestmark = pytest.mark.filterwarnings("error::bitmask.DecompressWarning")


def sparsify(model, sparsity=0.6):
    """Prune every matrix of the model, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(prune_by_magnitude(parameter, sparsity))
    return model


def prune_layers_24(model):
    """Prune the linear layers of the model to 2:4, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune_24_(module.weight)
    return model


def compressed_names(model, kind=BitmaskTensor):
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, kind)]


def reasons(model, format="bitmask"):
    return {row.layers[0]: row.reason for row in compression_report(model, format).rows}


class Block(nn.Module):
    """A pre-norm transformer block of single linear layers."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads = heads
        self.norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.second_norm(x))))


class LanguageModel(nn.Module):
    def __init__(self, tied=True, words=100, width=64):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return sparsify(LanguageModel())


@pytest.fixture
def pair():
    """Two sparse layers with something in between."""
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)))


# compress_.


def test_a_language_model(model):
    tokens = torch.arange(30).reshape(2, 15)
    names, before = list(model.state_dict()), copy.deepcopy(model)
    assert compress_(model, progress=False) is model
    assert compressed_names(model) == [
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ["q", "k", "v", "out", "up", "down"]
    ]
    assert list(model.state_dict()) == names
    assert type(model.blocks[0].q) is nn.Linear
    torch.testing.assert_close(model(tokens), before(tokens))
    with torch.inference_mode():
        assert torch.equal(model(tokens).argmax(-1), before(tokens).argmax(-1))


def test_gradients_reach_what_is_not_compressed(model):
    tokens, before = torch.arange(10)[None], copy.deepcopy(model)
    for each in (compress_(model, progress=False), before):
        each(tokens).pow(2).mean().backward()
    torch.testing.assert_close(model.embedding.weight.grad, before.embedding.weight.grad)
    torch.testing.assert_close(model.blocks[0].norm.weight.grad, before.blocks[0].norm.weight.grad)
    assert model.blocks[0].q.weight.grad is None


def test_compiled_model(model):
    torch._dynamo.reset()
    tokens = torch.arange(10)[None]
    compiled = torch.compile(compress_(model, progress=False), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
def test_torch_transformer_encoder(training):
    """In eval mode its fast path would reach past the layers; a compressed weight must keep it off."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        model = sparsify(nn.TransformerEncoder(layer, 2)).train(training)
    x, before = torch.randn(2, 7, 64), copy.deepcopy(model)
    compress_(model, progress=False)
    assert compressed_names(model) == [f"layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)]
    assert reasons(model)["layers.0.self_attn.out_proj"] == "nn.MultiheadAttention uses it without calling the layer"
    torch.testing.assert_close(model(x), before(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)
        mask = torch.zeros(2, 7, dtype=torch.bool)
        mask[1, 4:] = True
        got, expected = (each(x, src_key_padding_mask=mask) for each in (model, before))
        torch.testing.assert_close(got[~mask], expected[~mask], rtol=1e-4, atol=1e-5)


def test_a_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = sparsify(transformers.LlamaForCausalLM(config)).eval()
    tokens = torch.arange(3, 12)[None]

    def generate():
        return model.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)

    with torch.no_grad():
        logits = model(tokens).logits
    expected = generate()
    compress_(model, progress=False)
    assert len(compressed_names(model)) == 15
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits)
    assert torch.equal(generate(), expected)
    decompress_(model, progress=False)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits)


def test_hooks_and_modules_stay(pair):
    modules, calls = list(pair.modules()), []
    pair[0].register_forward_hook(lambda *args: calls.append(len(args)))
    compress_(pair, progress=False)
    pair(torch.ones(64))
    assert [a is b for a, b in zip(pair.modules(), modules, strict=True)] == [True] * 4
    assert calls == [3]


def test_a_model_that_is_one_layer():
    layer = sparsify(nn.Linear(64, 64))
    assert isinstance(compress_(layer, progress=False).weight, BitmaskTensor)
    assert compression_report(layer).rows[0].layers == ("",)


def test_nothing_to_compress():
    model = nn.Sequential(nn.ReLU(), nn.Conv1d(2, 2, 1))
    assert compress_(model, progress=False) is model
    assert compression_report(model).rows == []
    assert "total" in str(compression_report(model))


def test_compressing_twice_changes_nothing(pair):
    weight = compress_(pair, progress=False)[0].weight
    assert compress_(pair, progress=False)[0].weight is weight


def test_bitmask_linear_is_left_alone(pair):
    layer = BitmaskLinear.from_dense(pair[0])
    weight = layer.weight
    model = nn.Sequential(layer, nn.ReLU())
    assert compress_(model, progress=False)[0].weight is weight
    assert decompress_(model, progress=False)[0].weight is weight
    assert compression_report(model).rows[0].compressed


def test_filter(pair):
    asked = []

    def only_last(name, module):
        asked.append((name, module))
        return name == "2"

    compress_(pair, filter_fn=only_last, progress=False)
    assert asked == [("0", pair[0]), ("2", pair[2])]
    assert compressed_names(pair) == ["2.weight"]
    assert reasons(pair) == {"0": "not compressed yet, or compress_ was told not to", "2": ""}


def test_minimum_sparsity(pair):
    pair[0].weight.data = prune_by_magnitude(pair[0].weight, 0.8)
    compress_(pair, min_sparsity=0.7, progress=False)
    assert compressed_names(pair) == ["0.weight"]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_minimum_sparsity_out_of_range(pair, wrong):
    with pytest.raises(ValueError, match=r"min_sparsity: got .*, expected 0 to 1"):
        compress_(pair, min_sparsity=wrong)


@pytest.mark.parametrize("use", [compress_, decompress_, compression_report])
def test_something_else_than_a_module(use):
    with pytest.raises(TypeError, match=r"model: got list, expected an nn.Module"):
        use([nn.Linear(2, 2)])


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(pair, capsys, progress):
    compress_(pair, progress=progress)
    assert ("Compressing" in capsys.readouterr().err) == progress


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak of this process alone")
def test_no_second_dense_copy_is_kept():
    """Asked of /proc: what getrusage calls the peak is inherited from the process that runs the tests."""
    code = """
import re, torch, bitmask
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(4096, 4096, bias=False) for _ in range(8)])
for layer in model:
    layer.weight.data.view(-1)[::8] = 1
    layer.weight.data.view(-1, 8)[:, 1:] = 0
before = peak()
bitmask.compress_(model, progress=False)
print((peak() - before) / model[0].weight.nbytes)
"""
    assert float(run_python(code).stdout) < 0.7


def test_dense_weights_are_freed_one_by_one(pair):
    compress_(pair, progress=False)
    gc.collect()
    dense = [t for t in gc.get_objects() if type(t) is nn.Parameter and t.shape in ((48, 64), (32, 48))]
    assert dense == []


def test_state_dict_of_a_compressed_model(pair):
    file = io.BytesIO()
    torch.save(compress_(copy.deepcopy(pair), progress=False).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))
    other.load_state_dict(state)
    assert torch.equal(other[0].weight, pair[0].weight)
    other.requires_grad_(False).load_state_dict(state, assign=True)
    assert compressed_names(other) == ["0.weight", "2.weight"]


# The 2:4 format.


def test_a_two_four_language_model():
    torch.manual_seed(0)
    model = prune_layers_24(LanguageModel())
    tokens, before, names = torch.arange(30).reshape(2, 15), copy.deepcopy(model), list(model.state_dict())
    assert compress_(model, progress=False, format="2:4") is model
    assert compressed_names(model, SemiStructuredTensor) == [
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ["q", "k", "v", "out", "up", "down"]
    ]
    assert compressed_names(model) == []
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(tokens), before(tokens))
    assert reasons(model, "2:4")["head"] == "it is also embedding.weight (Embedding)"
    decompress_(model, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_compiled_two_four_model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    tokens, model = torch.arange(10)[None], compress_(prune_layers_24(LanguageModel()), progress=False, format="2:4")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))
    torch._dynamo.reset()


def test_what_is_not_two_four_stays_dense():
    model = nn.Sequential(*prune_layers_24(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 30))), nn.Linear(30, 8))
    with torch.no_grad():
        model[0].weight[5, 8:12] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    compress_(model, progress=False, format="2:4")
    assert compressed_names(model, CompressedTensor) == ["1.weight"]
    assert reasons(model, "2:4") == {
        "0": "it is not 2:4: row 5, columns 8 to 11: got 3 non-zeros, expected at most 2",
        "1": "",
        "2": "its 30 in_features are no multiple of 4",
    }
    report = compression_report(model, "2:4")
    assert "row 5, columns 8 to 11" in str(report)
    sizes = [4 * 64 * 48, model[1].weight.compressed_nbytes, 4 * 30 * 8]
    assert [row.nbytes for row in report.rows] == [row.compressed_nbytes for row in report.rows] == sizes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.to("meta"), "no kernel for a weight of float32 on meta"),
        (lambda layer: layer.requires_grad_(False).to(torch.float8_e5m2), "no kernel for a weight of float8_e5m2"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(8))), "1-dimensional weight"),
    ],
    ids=["meta", "float8", "1-D"],
)
def test_two_four_weights_without_kernels(change, reason):
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    change(model[0])
    compress_(model, progress=False, format="2:4")
    assert compressed_names(model, CompressedTensor) == []
    assert reason in reasons(model, "2:4")["0"]


def test_report_before_and_after_two_four(pair):
    prune_layers_24(pair)
    before = compression_report(pair, "2:4")
    compress_(pair, progress=False, format="2:4")
    for after in (compression_report(pair), compression_report(pair, "2:4")):
        assert [row.compressed_nbytes for row in after.rows] == [row.compressed_nbytes for row in before.rows]
        assert [row.sparsity for row in after.rows] == [0.5, 0.5]
        assert after.nbytes == sum(pair[i].weight.compressed_nbytes for i in (0, 2))
        assert all(row.compressed for row in after.rows)


def test_formats_side_by_side(pair):
    """What is compressed in one format is left alone by the other."""
    before = copy.deepcopy(prune_layers_24(pair))
    compress_(pair, filter_fn=lambda name, module: name == "0", progress=False, format="2:4")
    compress_(pair, progress=False)
    assert (compressed_names(pair, SemiStructuredTensor), compressed_names(pair)) == (["0.weight"], ["2.weight"])
    assert [type(compress_(pair, progress=False, format="2:4")[i].weight) for i in (0, 2)] == [
        SemiStructuredTensor,
        BitmaskTensor,
    ]
    assert [row.compressed for row in compression_report(pair).rows] == [True, True]
    x = torch.randn(3, 64)
    torch.testing.assert_close(pair(x), before(x))
    assert compressed_names(decompress_(pair, progress=False), CompressedTensor) == []
    assert torch.equal(pair[0].weight, before[0].weight)


def test_tied_two_four_layers_share_one_weight():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    compress_(prune_layers_24(model), progress=False, format="2:4")
    assert isinstance(model["a"].weight, SemiStructuredTensor)
    assert model["a"].weight is model["b"].weight


def test_minimum_sparsity_of_two_four_weights(pair):
    prune_layers_24(pair)
    pair[0].weight.data = prune_by_magnitude(pair[0].weight, 0.8)
    compress_(pair, min_sparsity=0.7, progress=False, format="2:4")
    assert compressed_names(pair, SemiStructuredTensor) == ["0.weight"]


def test_state_dict_of_a_two_four_model(pair):
    file = io.BytesIO()
    prune_layers_24(pair)
    torch.save(compress_(copy.deepcopy(pair), progress=False, format="2:4").state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)).requires_grad_(False)
    other.load_state_dict(state)
    assert torch.equal(other[0].weight, pair[0].weight)
    other.load_state_dict(state, assign=True)
    assert compressed_names(other, SemiStructuredTensor) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("wrong", ["24", "", None, 24, ["2:4"]])
@pytest.mark.parametrize("use", [lambda m, f: compress_(m, progress=False, format=f), compression_report])
def test_unknown_formats(pair, use, wrong):
    with pytest.raises(ValueError, match=r"format: got .*, expected one of 'bitmask', '2:4'"):
        use(pair, wrong)
    assert compressed_names(pair, CompressedTensor) == []


# What stays dense, and why.


class OwnForward(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t()


def forward_on_the_instance():
    layer = nn.Linear(64, 64)
    layer.forward = lambda x: F.linear(x, layer.weight)
    return layer


def tied_to(other):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), other)
    other.register_parameter("mine", model[0].weight)
    return model


class Quantized(nn.Parameter):
    pass


def quantized():
    layer = nn.Linear(64, 64)
    layer.weight = Quantized(layer.weight.detach())
    return layer


STAY_DENSE = {
    "embedding": (LanguageModel, "head", r"it is also embedding.weight \(Embedding\)"),
    "own forward": (lambda: nn.Sequential(OwnForward(64, 64)), "0", r"0 \(OwnForward\) has a forward of its own"),
    "instance": (lambda: nn.Sequential(forward_on_the_instance()), "0", r"0 \(Linear\) has a forward of its own"),
    "other slot": (lambda: tied_to(nn.ReLU()), "0", r"it is also 1.mine \(ReLU\)"),
    "other slot of a layer": (lambda: tied_to(nn.Linear(64, 64)), "0", r"it is also 1.mine \(Linear\)"),
    "pruned": (lambda: nn.Sequential(prune.random_unstructured(nn.Linear(64, 64), "weight", 0.8)), "0", "computed"),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64))), "0", "computed"),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(64, 64))), "0", "computed"),
    "meta": (lambda: nn.Sequential(nn.Linear(64, 64, device="meta")), "0", "no kernel for a weight of float32 on meta"),
    "complex": (
        lambda: nn.Sequential(nn.Linear(64, 64, dtype=torch.complex64)),
        "0",
        "no kernel for a weight of complex64 on cpu",
    ),
    "float8": (
        lambda: nn.Sequential(nn.Linear(64, 64).requires_grad_(False).to(torch.float8_e4m3fn)),
        "0",
        "no kernel for a weight of float8_e4m3fn on cpu",
    ),
    "subclass": (lambda: nn.Sequential(quantized()), "0", "no kernel for a Quantized weight of float32 on cpu"),
    "dense": (lambda: nn.Sequential(nn.Linear(64, 64)), "0", "it would not shrink"),
    "no elements": (lambda: nn.Sequential(nn.Linear(64, 0)), "0", "it would not shrink"),
    "attention": (
        lambda: nn.MultiheadAttention(64, 4),
        "out_proj",
        "nn.MultiheadAttention uses it without calling the layer",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", STAY_DENSE)
def test_what_stays_dense_is_reported(name):
    make, layer, reason = STAY_DENSE[name]
    model = make()
    before = [id(parameter) for parameter in model.get_submodule(layer).parameters()]
    if name not in ("dense", "no elements", "meta", "complex", "float8"):
        sparsify(model)
    compress_(model, progress=False)
    assert [id(parameter) for parameter in model.get_submodule(layer).parameters()] == before
    [row] = [row for row in compression_report(model).rows if row.layers[0] == layer]
    assert not row.compressed
    assert row.nbytes == row.dense_nbytes
    assert re.search(reason, row.reason)
    assert layer in str(compression_report(model))
    assert decompress_(model, progress=False) is model


def test_lazy_layers_are_skipped():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.Sequential(nn.LazyLinear(4))
    assert compression_report(compress_(model, progress=False)).rows == []


def test_pruning_made_permanent_can_be_compressed():
    layer = prune.random_unstructured(nn.Linear(64, 64), "weight", 0.8)
    model = nn.Sequential(prune.remove(layer, "weight"))
    assert compressed_names(compress_(model, progress=False)) == ["0.weight"]


# Ties.


def test_tied_linear_layers_share_one_compressed_weight(pair):
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64, bias=False), "c": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    sparsify(model)
    dense, asked = model["a"].weight, []
    compress_(model, filter_fn=lambda name, module: asked.append(name) or True, progress=False)
    assert asked == ["a", "b", "c"]
    assert isinstance(model["a"].weight, BitmaskTensor)
    assert model["a"].weight is model["b"].weight
    assert model["c"].weight is not model["a"].weight
    rows = compression_report(model).rows
    assert [row.layers for row in rows] == [("a", "b"), ("c",)]
    assert "a = b" in str(compression_report(model))
    decompress_(model, progress=False)
    assert model["a"].weight is model["b"].weight
    assert torch.equal(model["a"].weight, dense)


def test_a_tie_is_compressed_only_if_the_filter_takes_all_of_it():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    compress_(sparsify(model), filter_fn=lambda name, module: name == "a", progress=False)
    assert compressed_names(model) == []


def test_a_layer_used_twice_is_one_layer():
    layer = nn.Linear(64, 64)
    model = sparsify(nn.Sequential(layer, nn.ReLU(), layer))
    compress_(model, progress=False)
    assert [row.layers for row in compression_report(model).rows] == [("0",)]
    assert model[0] is model[2]


# decompress_.


@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy], ids=["itself", "a deep copy"])
def test_there_and_back(pair, through):
    pair[2].requires_grad_(False)
    before = copy.deepcopy(pair)
    after = decompress_(through(compress_(pair, progress=False)), progress=False)
    assert [(n, p.requires_grad, type(p)) for n, p in after.named_parameters()] == [
        (n, p.requires_grad, type(p)) for n, p in before.named_parameters()
    ]
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))
    assert vars(after[0]).keys() == vars(before[0]).keys()


def test_decompressing_weights_that_were_made_by_hand(pair):
    """What took no gradient as far as anyone knows takes none afterwards."""
    pair[0].weight = nn.Parameter(BitmaskTensor.from_dense(pair[0].weight), requires_grad=False)
    decompress_(pair, progress=False)
    assert [(name, p.requires_grad) for name, p in pair.named_parameters()] == [
        ("0.weight", False),
        ("0.bias", True),
        ("2.weight", True),
    ]


def test_decompressing_a_dense_model_changes_nothing(pair):
    parameters = list(pair.parameters())
    decompress_(pair, progress=False)
    assert all(a is b for a, b in zip(pair.parameters(), parameters, strict=True))


# The report.


def test_report_before_and_after(pair):
    before = compression_report(pair)
    compress_(pair, progress=False)
    after = compression_report(pair)
    sizes = [
        (row.layers, row.shape, row.dtype, row.sparsity, row.dense_nbytes, row.compressed_nbytes) for row in after.rows
    ]
    assert sizes == [
        (row.layers, row.shape, row.dtype, row.sparsity, row.dense_nbytes, row.compressed_nbytes) for row in before.rows
    ]
    assert [row.compressed for row in (*before.rows, *after.rows)] == [False, False, True, True]
    assert before.nbytes == before.dense_nbytes == after.dense_nbytes == 4 * (64 * 48 + 48 * 32)
    assert after.nbytes == sum(pair[i].weight.compressed_nbytes for i in (0, 2))


def test_report_is_an_aligned_table(model):
    compress_(model, progress=False)
    lines = str(compression_report(model)).splitlines()
    assert len(lines) == 1 + 13 + 1
    assert re.split(r"\s\s+", lines[0]) == [
        "layer",
        "shape",
        "dtype",
        "sparsity",
        "dense MB",
        "compressed MB",
        "kept dense, because",
    ]
    assert lines[-1].startswith("total")
    assert {line.index("float32") + len("float32") for line in lines[1:-1]} == {lines[0].index("dtype") + len("dtype")}
    [kept] = [line for line in lines if "it is also" in line]
    assert kept.startswith("head ")
    assert kept.index("it is also") == lines[0].index("kept dense")


def test_public_names():
    assert {"BitmaskLinear", "compress_", "compression_report", "decompress_", "CompressionReport"} <= set(
        bitmask.__all__
    )


def test_odd_weights_stay_as_they_are_and_are_reported():
    model = nn.ModuleDict({name: nn.Linear(4, 3) for name in ("none", "scalar", "vector", "gone")})
    model["none"].weight = None
    model["scalar"].weight = nn.Parameter(torch.tensor(0.0))
    model["vector"].weight = nn.Parameter(torch.zeros(4000))
    del model["gone"].weight
    compress_(model, progress=False)
    assert type(model["vector"].weight) is type(model["scalar"].weight) is nn.Parameter
    rows = {row.layers: row.reason for row in compression_report(model).rows}
    assert rows.keys() == {("scalar",), ("vector",)}
    assert "1-dimensional" in rows[("vector",)]


def test_decompressing_keeps_a_tie_made_after_compressing():
    model = nn.ModuleDict({"out": nn.Linear(64, 64), "embedding": nn.Embedding(64, 64)})
    nn.init.sparse_(model["out"].weight, 0.9)
    compress_(model, progress=False)
    model["embedding"].weight = model["out"].weight
    decompress_(model, progress=False)
    assert model["embedding"].weight is model["out"].weight
    assert type(model["out"].weight) is nn.Parameter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5,), "filter_fn: got 0.5, expected a function"),
        ((None, "0.5"), "min_sparsity: got '0.5', expected a number"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        compress_(nn.Linear(3, 3), *arguments)
