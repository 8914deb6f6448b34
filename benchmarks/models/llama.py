"""A Llama of the shape of Llama 3.2 1B with random weights: only its speed is of interest."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.measure import Phase
from benchmarks.models.networks import parameter_count, require_transformers
from benchmarks.models.result import Agreement
from benchmarks.timer import Budget

BODY = "model"  # everything but the head, which is tied to the embedding and therefore stays dense

_Config = dict[str, Any]
_LLAMA_3_2_1B: _Config = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}
_TOY: _Config = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
_COMMON: _Config = {"tie_word_embeddings": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def make_llama(dtype: torch.dtype, toy: bool) -> Any:
    """The model, the same one each time."""
    require_transformers()
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(**(_TOY if toy else _LLAMA_3_2_1B), **_COMMON)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def name_of(toy: bool) -> str:
    """The model in words, with the parameters counted."""
    with torch.device("meta"):
        count = parameter_count(make_llama(torch.float32, toy).parameters())
    return f"Llama of {count / 1e9:.2f} billion parameters" if count > 1e9 else f"Llama of {count} parameters"


def decode_phase(rows: int, context: int, budget: Budget) -> Phase:
    """One token for each of `rows` sequences, after `context` tokens; it grows with each sample."""
    return Phase("decode", rows, rows, "tokens", partial(_start_decoding, rows, context), budget)


def prefill_phase(tokens: int, budget: Budget) -> Phase:
    """A prompt of `tokens` tokens, up to the first new one."""
    return Phase(f"prefill {tokens}", 1, tokens, "tokens", partial(_start_prefilling, tokens), budget)


def compare(dense: Any, twin: Any, context: int, steps: int) -> Agreement:
    """Both continue the dense model's greedy tokens after the same prompt."""
    tokens = _prompt(dense, 1, context)
    caches: list[Any] = [None, None]
    largest = difference = 0.0
    equal = 0
    for _ in range(steps):
        logits = []
        for place, model in enumerate((dense, twin)):
            found, caches[place] = _forward(model, tokens, caches[place])
            logits.append(found.float())
        largest = max(largest, float(logits[0].abs().max()))
        difference = max(difference, float((logits[0] - logits[1]).abs().max()))
        equal += int(torch.equal(logits[0].argmax(-1), logits[1].argmax(-1)))
        tokens = logits[0].argmax(-1)
    return Agreement(largest, difference, equal, steps)


def _prompt(model: Any, rows: int, tokens: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(2))


def _forward(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits [rows, 1, vocabulary] after the last token, and the cache of keys and values."""
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits, output.past_key_values


def _start_prefilling(tokens: int, model: Any) -> Callable[[], object]:
    prompt = _prompt(model, 1, tokens)
    return lambda: _forward(model, prompt, None)[0].argmax(-1)


def _start_decoding(rows: int, context: int, model: Any) -> Callable[[], object]:
    logits, cache = _forward(model, _prompt(model, rows, context), None)
    tokens = logits.argmax(-1)

    def step() -> Tensor:
        nonlocal tokens, cache
        logits, cache = _forward(model, tokens, cache)
        tokens = logits.argmax(-1)
        return tokens

    return step
