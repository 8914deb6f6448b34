"""A model and its compressed twin, which shares everything with it but the weights of its linear layers."""

import copy
import importlib.util
from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn

from benchmarks.suites import UnavailableError
from bitmask import BitmaskTensor, compress_
from bitmask.block_linear import BlockLinear
from bitmask.prune import prune_by_magnitude


def require_transformers() -> None:
    """Raise `UnavailableError` where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UnavailableError('needs transformers: pip install -e ".[hf]"')


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers whose weight is their own, which leaves out a head tied to the embedding."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [layer for layer in layers if id(layer.weight) not in embeddings]


def prune(model: nn.Module, sparsity: float) -> None:
    """Set the smallest weights of each linear layer to zero."""
    for layer in linear_layers(model):
        layer.weight = nn.Parameter(prune_by_magnitude(layer.weight, sparsity), requires_grad=False)


def compressed_twin(model: nn.Module, body: str = "") -> nn.Module:
    """The model with the linear layers of its submodule `body` compressed (of all of it, if not given)."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    compress_(twin.get_submodule(body), progress=False)
    return twin


def linear_nbytes(model: nn.Module) -> int:
    """Bytes of the weights of the linear layers; of those that are block-sparse, with where the blocks lie."""
    blocks = [module for module in model.modules() if isinstance(module, BlockLinear)]
    parts = [part for layer in blocks for part in (layer.values, layer.crow_indices, layer.col_indices)]
    return sum(map(_nbytes, (layer.weight for layer in linear_layers(model)))) + sum(part.nbytes for part in parts)


def checkpoint_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters, each counted once: what a file of them takes, without its header."""
    return sum(map(_nbytes, model.parameters()))


def parameter_count(parameters: Iterable[Tensor]) -> int:
    """Number of elements, zeros included."""
    return sum(parameter.numel() for parameter in parameters)


def _nbytes(parameter: Tensor) -> int:
    return parameter.compressed_nbytes if isinstance(parameter, BitmaskTensor) else parameter.nbytes
