"""A decoder of the shape of Llama 3 in plain torch, with random weights: only its speed is of interest.

It keeps keys and values in memory of fixed size, and counts its own position on the device, so that one step can be
captured in a CUDA graph and replayed for every token. Projections that read the same input are one layer, as servers
of such models have them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

BODY = "blocks"  # where the weights are that are pruned and compressed: all but embedding and head

_ROTATION_BASE = 500_000.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; a tied head is the embedding."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool


LLAMA_1B = Shape("Llama 3.2 1B", 2048, 8192, 16, 32, 8, 64, 128256, tied=True)
LLAMA_8B = Shape("Llama 3.1 8B", 4096, 14336, 32, 32, 8, 128, 128256, tied=False)
TOY = Shape("toy", 64, 160, 2, 4, 2, 16, 256, tied=True)


class State:
    """A batch of sequences: the tokens to come next, their position, and what attention remembers."""

    def __init__(self, shape: Shape, batch: int, context: int, length: int, like: Tensor, seed: int) -> None:
        """`context` tokens are taken to be there, with random keys and values; there is room for `length`."""
        generator = torch.Generator(like.device).manual_seed(seed)
        sizes = (shape.layers, batch, shape.key_value_heads, length, shape.head_size)
        self.keys, self.values = (
            torch.randn(sizes, generator=generator, device=like.device).to(like.dtype) for _ in range(2)
        )
        self.tokens = torch.randint(shape.vocabulary, (batch,), generator=generator, device=like.device)
        self.position = torch.full((1,), context, device=like.device)

    def advance(self, tokens: Tensor) -> None:
        """Take the tokens as the next ones. At the end of the room, the last place is used again and again."""
        self.tokens.copy_(tokens)
        self.position.add_(1).clamp_(max=self.keys.shape[3] - 1)


class Decoder(nn.Module):
    """Logits [batch, vocabulary] of the next token."""

    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        half = shape.head_size // 2
        frequencies = _ROTATION_BASE ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        self.cosines = nn.Buffer(torch.cat([angles.cos(), angles.cos()], 1).float())
        self.sines = nn.Buffer(torch.cat([-angles.sin(), angles.sin()], 1).float())
        self.places = nn.Buffer(torch.arange(length))

    def forward(self, state: State) -> Tensor:
        """One step; the state gets the new keys and values, but does not advance."""
        hidden = self.embedding(state.tokens)
        rotation = tuple(table[state.position].to(hidden.dtype) for table in (self.cosines, self.sines))
        unseen = torch.where(self.places > state.position, -math.inf, 0.0).to(hidden.dtype)
        for block, keys, values in zip(self.blocks, state.keys, state.values, strict=True):
            hidden = block(hidden, keys, values, state.position, rotation, unseen)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """Attention and a gated multilayer perceptron, each with a residual connection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = (shape.heads, shape.key_value_heads, shape.key_value_heads)
        self.head_size = shape.head_size
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.query_key_value = nn.Linear(shape.hidden, sum(self.heads) * shape.head_size, bias=False)
        self.output = nn.Linear(shape.heads * shape.head_size, shape.hidden, bias=False)
        self.perceptron_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(
        self, hidden: Tensor, keys: Tensor, values: Tensor, position: Tensor, rotation: tuple[Tensor, ...], mask: Tensor
    ) -> Tensor:
        """Hidden [batch, hidden] to the same; keys and values [batch, heads, length, head size] get this token's."""
        hidden = hidden + self._attend(self.attention_norm(hidden), keys, values, position, rotation, mask)
        gate, up = self.gate_up(self.perceptron_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(functional.silu(gate) * up)  # type: ignore[no-any-return]

    def _attend(
        self, hidden: Tensor, keys: Tensor, values: Tensor, position: Tensor, rotation: tuple[Tensor, ...], mask: Tensor
    ) -> Tensor:
        batch, (queries, stored, _) = len(hidden), self.heads
        mixed = self.query_key_value(hidden).view(batch, sum(self.heads), self.head_size)
        turned = _rotate(mixed[:, : queries + stored], *rotation)
        keys.index_copy_(2, position, turned[:, queries:, None])
        values.index_copy_(2, position, mixed[:, queries + stored :, None])
        # Query heads that share keys and values are taken for rows of one head.
        grouped = turned[:, :queries].reshape(batch, stored, queries // stored, self.head_size)
        found = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask.expand(1, 1, 1, -1))
        return self.output(found.reshape(batch, queries * self.head_size))  # type: ignore[no-any-return]


def _rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return torch.addcmul(heads * cosines, heads.roll(heads.shape[-1] // 2, dims=-1), sines)


def make_decoder(
    shape: Shape, length: int, dtype: torch.dtype, sparsity: float, device: torch.device, seed: int
) -> Decoder:
    """With room for `length` tokens, and the smallest weights of the body set to zero.

    Weights are uniform, so that the threshold follows from the share of zeros and nothing has to be sorted.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), device:
            torch.manual_seed(seed)
            model = Decoder(shape, length)
    finally:
        torch.set_default_dtype(before)
    for layer in model.get_submodule(BODY).modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.data
            weight.masked_fill_(weight.abs() < sparsity / math.sqrt(layer.in_features), 0)
    return model.to(device).requires_grad_(False).eval()
