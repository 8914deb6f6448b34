"""BlockSparseModelPatcher: which layers of a model are replaced, and what is said of the others."""

import copy
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from bitmask import BlockSparseLinear, BlockSparseModelPatcher, native, ops_block, prune_blocks
from bitmask.block_patcher import _place_against
from bitmask.block_patterns import spread_blocks

pytestmark = pytest.mark.filterwarnings("error", "ignore:.*nested tensor")


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True), 2)


def patcher_of(**patterns):
    patcher = BlockSparseModelPatcher()
    for regex, options in patterns.items():
        patcher.add_pattern(regex, options)
    return patcher


def replaced(model):
    return [name for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)]


def dense_twin(model):
    """The same model with each block-sparse layer as a dense one."""
    twin = copy.deepcopy(model)
    for name in replaced(twin):
        parent, _, slot = name.rpartition(".")
        setattr(twin.get_submodule(parent), slot, twin.get_submodule(name).to_dense())
    return twin


# What is replaced.


def test_layers_whose_whole_names_match_are_replaced():
    model = encoder()
    before = copy.deepcopy(model)
    report = patcher_of(**{r"layers\.[0-9]\.linear1": {"density": 0.5}}).patch_model(model)
    assert replaced(model) == ["layers.0.linear1", "layers.1.linear1"]
    for name in replaced(model):
        layer, dense = model.get_submodule(name), before.get_submodule(name)
        expected = BlockSparseLinear.from_dense(dense, 0.5)
        assert torch.equal(layer.pattern, expected.pattern)
        assert torch.equal(layer.values, expected.values)
        assert torch.equal(layer.bias, dense.bias)
    assert [(row.name, row.density, row.regex) for row in report.rows if row.regex] == [
        ("layers.0.linear1", 0.5, r"layers\.[0-9]\.linear1"),
        ("layers.1.linear1", 0.5, r"layers\.[0-9]\.linear1"),
    ]
    prefix = patcher_of(**{r"layers\.0": {}})
    with pytest.raises(ValueError, match=r"regex: got 'layers\\\\.0', by which no layer would be replaced"):
        prefix.patch_model(before)


def test_options_are_those_of_from_dense():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    pattern = spread_blocks((4, 2), 3)
    patcher_of(**{"0": {"block_shape": (16, 32), "pattern": pattern}, "1": {"density": 0.25}}).patch_model(model)
    assert torch.equal(model[0].pattern, pattern)
    assert model[0].block_shape == (16, 32)
    assert model[1].density == 0.25


def test_the_first_pattern_that_matches_counts():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    report = patcher_of(**{"0": {"density": 0.25}, "[01]": {"density": 0.75}}).patch_model(model)
    assert [layer.density for layer in model] == [0.25, 0.75]
    assert [row.regex for row in report.rows] == ["0", "[01]"]
    with pytest.raises(ValueError, match="regex: got '0', by which no layer"):
        patcher_of(**{"[01]": {}, "0": {}}).patch_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))


@pytest.mark.parametrize("training", [True, False])
def test_torch_transformer_encoder(training):
    """In eval mode its fused inference would multiply by dense weights: layers must be called all the same."""
    model = encoder().train(training)
    with pytest.warns(UserWarning, match=r"layers that match but stay dense: layers.0.self_attn.out_proj: nn.Multi"):
        patcher_of(**{".*": {"density": 0.5}}).patch_model(model)
    assert replaced(model) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    twin, calls = dense_twin(model), []
    forward, x = BlockSparseLinear.forward, torch.randn(2, 7, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockSparseLinear, "forward", lambda self, x: calls.append(self) or forward(self, x))
        torch.testing.assert_close(model(x), twin(x))
        with torch.no_grad():
            torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
            mask = torch.zeros(2, 7, dtype=torch.bool)
            mask[1, 4:] = True
            got, expected = (each(x, src_key_padding_mask=mask) for each in (model, twin))
            torch.testing.assert_close(got[~mask], expected[~mask], rtol=1e-4, atol=1e-5)
    assert len(calls) == 12


@pytest.mark.parametrize("patched", [0, 1])
def test_encoder_of_which_one_layer_is_replaced(patched):
    """If the first one is dense, torch hands nested tensors to all of them."""
    model = encoder().eval()
    patcher_of(**{rf"layers\.{patched}\.linear.": {"density": 0.5}}).patch_model(model)
    mask, x = torch.zeros(2, 7, dtype=torch.bool), torch.randn(2, 7, 64)
    mask[1, 4:] = True
    with torch.no_grad():
        got, expected = (each(x, src_key_padding_mask=mask) for each in (model, dense_twin(model)))
    torch.testing.assert_close(got[~mask], expected[~mask], rtol=1e-4, atol=1e-5)


def test_gradients_through_an_encoder():
    model = encoder()
    patcher_of(**{r".*linear\d": {"density": 0.5}}).patch_model(model)
    twin, x = dense_twin(model), torch.randn(2, 7, 64)
    for each in (model, twin):
        each(x).square().mean().backward()
    for name, parameter in twin.named_parameters():
        if name.rpartition(".")[0] not in replaced(model):
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    for name in replaced(model):
        layer, dense = model.get_submodule(name), twin.get_submodule(name)
        dense.weight.data = dense.weight.grad
        expected = BlockSparseLinear.from_dense(dense, pattern=layer.pattern).values
        torch.testing.assert_close(layer.values.grad, expected.data)


def tiny(name, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(vocab_size=90, max_position_embeddings=40, **sizes, **options)
    return config, transformers


@pytest.mark.parametrize(("name", "head"), [("Roberta", "Model"), ("Bert", "ForSequenceClassification")])
def test_models_of_transformers(name, head, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    config, transformers = tiny(name)
    model = getattr(transformers, f"{name}{head}")(config).eval()
    prefix = "" if head == "Model" else "bert."
    patterns = {
        re.escape(prefix) + r"encoder\.layer\.[0-9]+\.intermediate\.dense": {"density": 0.5},
        re.escape(prefix) + r"encoder\.layer\.[0-9]+\.attention\.self\.(query|key)": {"density": 0.5},
    }
    report = patcher_of(**patterns).patch_model(model)
    assert sum(row.density < 1 for row in report.rows) == 6
    tokens = torch.arange(4, 34).reshape(2, 15)
    twin = dense_twin(model)
    outputs, expected = model(tokens), twin(tokens)
    torch.testing.assert_close(outputs[0], expected[0], rtol=1e-4, atol=1e-5)
    for output in (outputs, expected):
        output[0].square().mean().backward()
    name = f"{prefix}encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, twin.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    assert model.get_parameter(f"{prefix}encoder.layer.0.intermediate.dense.values").grad.any()

    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    torch.manual_seed(1)
    other = type(model)(config).eval()
    patcher_of(**patterns).patch_model(other)
    assert not torch.equal(other(tokens)[0], outputs[0])
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(tokens)[0], outputs[0])


def test_save_pretrained(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    config, transformers = tiny("Roberta")
    model = transformers.RobertaModel(config)
    patcher_of(**{r"encoder\.layer\.[0-9]+\.output\.dense": {"density": 0.5}}).patch_model(model)
    model.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    layer = BlockSparseLinear.from_state_dict(state, "encoder.layer.1.output.dense.")
    assert torch.equal(layer.values, model.encoder.layer[1].output.dense.values)
    assert torch.equal(layer.pattern, model.encoder.layer[1].output.dense.pattern)


def test_a_tied_output_layer_stays_dense():
    config, transformers = tiny("Roberta")
    model = transformers.RobertaForMaskedLM(config)
    with pytest.raises(ValueError, match=r"lm_head\\\\\.decoder.*by which no layer(.|\n)*it is also .*word_embeddings"):
        patcher_of(**{r"lm_head\.decoder": {}}).patch_model(model)
    assert replaced(model) == []


def test_conv1d_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = nn.ModuleDict({"c_fc": transformers.pytorch_utils.Conv1D(128, 64), "fc": nn.Linear(64, 64)})
    patcher = patcher_of(**{"fc": {}})
    report = patcher.get_patchable_layers(model)
    assert [(row.name, row.shape) for row in report.rows] == [("c_fc", (128, 64)), ("fc", (64, 64))]
    assert report.rows[0].reason.startswith("transformers' Conv1D is no nn.Linear")
    assert "not of transformers' Conv1D" in repr(patcher)
    with pytest.raises(ValueError, match=r"regex: got 'c_fc'(.|\n)*transformers' Conv1D is no nn.Linear"):
        patcher_of(c_fc={}).patch_model(model)


# What is reported.


def test_reports():
    model = encoder()
    patcher = patcher_of(**{r"layers\.0\.linear.": {"density": 0.5}})
    report = patcher.get_patchable_layers(model)
    assert replaced(model) == []
    assert [row.name for row in report.rows] == [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.out_proj", "linear1", "linear2")
    ]
    assert [row.regex is not None for row in report.rows] == [False, True, True, False, False, False]
    assert [row.shape for row in report.rows[:3]] == [(64, 64), (128, 64), (64, 128)]
    lines = str(patcher.patch_model(model)).splitlines()
    assert lines[0].split() == ["layer", "shape", "density", "pattern", "stays", "dense,", "because"]
    assert lines[2].split() == ["layers.0.linear1", "128", "x", "64", "0.5000", r"layers\.0\.linear."]
    assert lines[1].endswith("nn.MultiheadAttention uses it without calling the layer")
    assert len(patcher.get_patchable_layers(model).rows) == 4, "what is replaced is no nn.Linear any more"
    assert BlockSparseModelPatcher().get_patchable_layers(nn.ReLU()).rows == []


def test_a_model_that_is_one_layer():
    report = BlockSparseModelPatcher().get_patchable_layers(nn.Linear(64, 64))
    assert report.rows[0].reason == "it is the model: BlockSparseLinear.from_dense"
    with pytest.raises(ValueError, match=r"BlockSparseLinear\.from_dense"):
        patcher_of(**{"": {}}).patch_model(nn.Linear(64, 64))


def test_reprs():
    assert repr(BlockSparseModelPatcher()).endswith("no pattern yet")
    assert repr(patcher_of(**{"a.*": {"density": 0.5}})).endswith("'a.*': {'density': 0.5}")


# What is refused.


@pytest.mark.parametrize(
    ("regex", "options", "error", "message"),
    [
        (r"a(", {}, ValueError, r"regex: got 'a\(', which is none"),
        (None, {}, TypeError, "regex: got NoneType, expected a string"),
        (re.compile("a"), {}, TypeError, "regex: got Pattern"),
        ("there", {}, ValueError, "regex: got 'there' again"),
        ("a", {"density": 0}, ValueError, "density: got 0"),
        ("a", {"density": "0.5"}, TypeError, "density: got '0.5'"),
        ("a", {"block_shape": (0, 1)}, ValueError, "block_shape: got"),
        ("a", {"pattern": torch.ones(2, 2)}, TypeError, "pattern: got dtype"),
        ("a", {"pattern": torch.ones(2) > 0}, ValueError, "pattern: got 1 dimensions"),
        ("a", {"density": 0.5, "pattern": torch.ones(2, 2) > 0}, ValueError, "options: got density and pattern"),
        ("a", {"dnesity": 0.5}, ValueError, "options: got 'dnesity', expected density, block_shape, pattern"),
        (
            "a",
            {"density": 0.5, "pattern": torch.ones(2, 2) > 0},
            ValueError,
            "options: got density and pattern, expected at most one",
        ),
        ("a", 0.5, TypeError, "options: got float, expected a dict"),
    ],
    ids=str,
)
def test_wrong_patterns(regex, options, error, message):
    patcher = patcher_of(there={})
    with pytest.raises(error, match=message):
        patcher.add_pattern(regex, options)
    assert repr(patcher) == repr(patcher_of(there={}))


def test_nothing_is_replaced_if_anything_is_wrong():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    pattern = torch.ones(2, 2, dtype=torch.bool)
    for patterns, message in [
        ({}, "regex: got no pattern"),
        ({"0": {}, "2": {}}, "regex: got '2', by which no layer would be replaced"),
        ({"[01]": {"pattern": pattern}}, r"1: pattern: got size \[2, 2\], expected \[4, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            patcher_of(**patterns).patch_model(model)
        assert replaced(model) == []
    for use in (patcher_of(a={}).patch_model, BlockSparseModelPatcher().get_patchable_layers):
        with pytest.raises(TypeError, match=r"model: got list, expected an nn.Module"):
            use([nn.Linear(2, 2)])


def test_options_are_copied():
    options = {"density": 0.5}
    patcher = patcher_of(**{"0": options})
    options["density"] = 7
    model = nn.Sequential(nn.Linear(64, 64))
    patcher.patch_model(model)
    assert model[0].density == 0.5


def test_layers_with_a_forward_of_their_own_stay_dense():
    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight) + 1

    model = nn.Sequential(Own(64, 64), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match=r"0: 0 \(Own\) has a forward of its own"):
        patcher_of(**{".": {}}).patch_model(model)
    assert replaced(model) == ["1"]


def test_modules_that_name_parameters_in_their_way():
    class Own(nn.Sequential):
        def named_parameters(self, prefix="", recurse=True):
            return super().named_parameters(prefix, recurse)

    model = Own(nn.Linear(64, 64))
    patcher_of(**{".*": {}}).patch_model(model)
    assert replaced(model) == ["0"]


def test_layers_whose_bias_is_tied_or_computed_stay_dense():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.LayerNorm(64))
    model[1].bias = model[0].bias
    model[2].bias = model[6].bias
    nn.utils.parametrize.register_parametrization(model[3], "bias", nn.Softplus())
    prune.l1_unstructured(model[4], "bias", 0.5)
    reasons = [
        *["0.bias and 1.bias are one parameter"] * 2,
        "2.bias and 6.bias are one parameter",
        *["its bias is no parameter, but computed from others or a buffer"] * 2,
    ]
    message = "; ".join(f"{i}: {reason}" for i, reason in enumerate(reasons))
    with pytest.warns(UserWarning, match=f"layers that match but stay dense: {re.escape(message)}$"):
        report = patcher_of(**{".*": {}}).patch_model(model)
    assert [row.reason for row in report.rows] == [*reasons, ""]
    assert replaced(model) == ["5"]
    with pytest.warns(UserWarning, match=f"layers that are not pruned: {re.escape(message)}$"):
        prune_blocks(model, 0.25)
    assert replaced(model) == ["5"]
    with pytest.raises(TypeError, match="cannot be replaced: its bias is no parameter"):
        prune_blocks(model[4], 0.5)


def test_layers_under_two_names_and_without_a_bias_are_replaced():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(64, 64, bias=False)})
    patcher_of(**{".*": {}}).patch_model(model)
    assert replaced(model) == ["a", "c"]
    model["c"].bias = model["a"].bias
    prune_blocks(model, 0.25)
    assert model["c"].bias is model["a"].bias, "pruned in place"


def test_lazy_layers_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(4))
    assert BlockSparseModelPatcher().get_patchable_layers(model).rows == []


def test_a_layer_matches_by_any_of_its_names():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": layer})
    report = patcher_of(b={}).patch_model(model)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], BlockSparseLinear)
    assert [row.names for row in report.rows] == [("a", "b")]
    assert "a = b" in str(report)


def test_layers_on_other_devices():
    """On meta there are no norms, but a pattern needs none."""
    model = nn.Sequential(nn.Linear(64, 64, device="meta"), nn.Linear(64, 64, device="meta"))
    pattern = torch.eye(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"regex: got '1'(.|\n)*it is on device meta: load it first"):
        patcher_of(**{"0": {"pattern": pattern}, "1": {}}).patch_model(model)
    report = patcher_of(**{"0": {"pattern": pattern}}).patch_model(model)
    assert torch.equal(model[0].pattern, pattern)
    assert [row.reason for row in report.rows] == ["", "it is on device meta: load it first"]
    elsewhere = SimpleNamespace(weight=SimpleNamespace(is_meta=False, device=torch.device("xpu")))
    assert _place_against(elsewhere, True) == "it is on device xpu: block-sparse layers run on cpu and cuda only"


def test_layers_on_gpus_need_kernels_there(monkeypatch):
    layer = SimpleNamespace(weight=SimpleNamespace(is_meta=False, device=torch.device("cuda")))
    monkeypatch.setattr(ops_block, "DEVICES", frozenset({"cpu", "cuda"}))
    assert not _place_against(layer, True)
    monkeypatch.setattr(ops_block, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(native, "cuda_missing", "built without CUDA")
    assert _place_against(layer, True) == (
        "it is on device cuda, for which there are no kernels here: built without CUDA"
    )


def test_warnings_name_the_layer():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.warns(UserWarning, match="one is kept") as caught:
        patcher_of(**{".": {"density": 0.1}}).patch_model(model)
    text = "density: 0.1 of 1 blocks is less than half a block; one is kept"
    assert [str(each.message) for each in caught] == [f"0: {text}", f"1: {text}"]
    assert {each.filename for each in caught} == {__file__}
