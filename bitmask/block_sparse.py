"""BlockSparseLinear: `nn.Linear` with a trainable weight of which only some blocks exist, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bitmask import block_layout, block_patterns, ops_block
from bitmask.block_layout import PARTS, Index
from bitmask.block_linear import BlockLinear, copy_the_rest, describe
from bitmask.calls import check_block_shape
from bitmask.compressed_tensor import CompressedTensor
from bitmask.ops_block import TransposedIndex

_TRANSPOSED = TransposedIndex._fields


class BlockSparseLinear(BlockLinear):
    """`nn.Linear` whose weight is zero but for some blocks, which are stored, multiplied and trained alone.

    Parameters are `values` [blocks, rows and columns of a block] and `bias`, ordinary ones for optimizers and wrappers;
    buffers are `crow_indices` and `col_indices` (as in torch's BSR layout) and `dense_shape` (out_features,
    in_features). Blocks at the lower and right edges may reach past the weight: their elements there are zero and stay
    it.

    Numbers are drawn as by `nn.Linear`, from the inputs that each output really has; outputs without a block get a bias
    of zero. Loading a `state_dict` takes over its pattern, if it has as many blocks; `from_state_dict` always does.

    Where `fully_shard` has spread `values` over processes, the layer trains and its state can be saved; what needs all
    blocks in one place raises ValueError: `reset_parameters`, `weight`, `to_dense`, `to_bsr` and `update_pattern_`.

    Args:
        in_features, out_features: columns and rows of the weight.
        bias: whether there is a bias.
        density: share of the blocks that are kept, above 0 and at most 1 (0.5), without `pattern`: spread evenly over
            block rows and block columns by torch's generator of random numbers.
        block_shape: rows and columns of a block; multiples of 16 are fast.
        pattern: the blocks that are kept: bool [ceil(out_features / rows), ceil(in_features / columns)].
        device, dtype: of the parameters; dtype is float32, bfloat16, float16 or float64.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, or both `density` and `pattern`.

    >>> layer = BlockSparseLinear(64, 128, density=0.25)
    >>> layer
    BlockSparseLinear(in_features=64, out_features=128, bias=True, block_shape=(32, 32), blocks=2, density=0.2500,
    dtype=torch.float32)
    >>> layer(torch.ones(3, 64)).shape
    torch.Size([3, 128])
    """

    values: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        density: float | None = None,
        block_shape: Sequence[int] = (32, 32),
        pattern: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = block_layout.check_size("out_features", out_features)
        in_features = block_layout.check_size("in_features", in_features)
        shape = block_layout.check_shape("out_features, in_features", (out_features, in_features))
        block_shape = check_block_shape(block_shape)
        block_layout.check_dtype("dtype", dtype or torch.get_default_dtype())
        grid = block_layout.grid_of(shape, block_shape)
        density = _density_without(pattern, density)
        if pattern is None:
            pattern = block_patterns.spread_blocks(grid, block_patterns.count_blocks(density, grid[0] * grid[1]))
        else:
            block_patterns.check_pattern(pattern, grid)
        index = block_layout.index_of(pattern)
        values = torch.empty(len(index[1]), *block_shape, device=device, dtype=dtype)
        self._assemble(shape, values, torch.empty(shape[0], device=device, dtype=dtype) if bias else None, index)
        self.reset_parameters()

    def _assemble(self, shape: tuple[int, int], values: Tensor, bias: Tensor | None, index: Index) -> None:
        self.out_features, self.in_features = shape
        self.block_shape = (values.shape[1], values.shape[2])
        self.values = nn.Parameter(values)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        for name in (*PARTS[1:], *_TRANSPOSED):
            self.register_buffer(name, None, persistent=name in PARTS)
        self._set_index(*index)

    @torch.inference_mode(False)  # as in BlockLinear
    def _set_index(self, crow_indices: Tensor, col_indices: Tensor) -> None:
        """Take over a pattern, which is proven thereby."""
        transposed = ops_block.bsr_transpose(crow_indices.cpu(), col_indices.cpu(), self._grid[1])
        super()._set_index(crow_indices, col_indices)
        for name, tensor in zip(_TRANSPOSED, transposed, strict=True):
            setattr(self, name, tensor.to(self.values.device))

    def _check_whole(self) -> None:
        """Raise ValueError unless all values are here."""
        if hasattr(self.values, "__tensor_flatten__"):
            raise ValueError(f"values: got a {type(self.values).__name__}, sharded, expected a layer with all its data")

    def _check_own(self) -> None:
        """Raise ValueError unless values are a parameter: what is written to computed ones is lost."""
        if "values" not in self._parameters:
            raise ValueError("values: got ones that are computed from other parameters, expected a parameter")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new numbers as `nn.Linear` does, each output by the number of inputs that it has; the pattern stays."""
        self._check_whole()
        self._check_own()
        self._prove_index()
        inputs = block_layout.inputs_of(self._index, self.in_features, self.block_shape[1])
        bounds = torch.where(inputs > 0, inputs.double().rsqrt(), 0.0).to(self.values)
        self.values.uniform_(-1, 1)
        if not self.values.is_meta:
            self.values.mul_(bounds[block_layout.rows_of(self._index)][:, None, None])
            block_layout.zero_past_edges(self.values, self._index, self._shape)
        if self.bias is not None:
            self.bias.uniform_(-1, 1).mul_(bounds.repeat_interleave(self.block_shape[0])[: self.out_features])

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        density: float | None = None,
        block_shape: Sequence[int] = (32, 32),
        pattern: Tensor | None = None,
    ) -> BlockSparseLinear:
        """The blocks of an `nn.Linear` that have the largest Frobenius norms, or those of a pattern, values untouched.

        Shares nothing with the layer; what takes a gradient there does here. Hooks stay behind.

        Args:
            linear: of dtype float32, bfloat16, float16 or float64.
            density: share of the blocks to keep (0.5), without `pattern`.
            block_shape: rows and columns of a block.
            pattern: the blocks to keep: bool [ceil(out_features / rows), ceil(in_features / columns)].

        Raises:
            TypeError: not an `nn.Linear` with a dense weight, or an argument of the wrong kind.
            ValueError: an argument out of range, `density` and `pattern`, or a layer on device meta without a pattern.

        >>> dense = nn.Linear(4, 2, bias=False)
        >>> _ = dense.weight.data.copy_(torch.tensor([[1.0, 2.0, 0.1, 0.2], [0.3, 0.1, 3.0, 4.0]]))
        >>> layer = BlockSparseLinear.from_dense(dense, density=0.5, block_shape=(1, 2))
        >>> layer.pattern
        tensor([[ True, False],
                [False,  True]])
        >>> layer(torch.ones(4)).detach()
        tensor([3., 7.])
        """
        weight = _dense_weight(linear)
        block_shape = check_block_shape(block_shape)
        density = _density_without(pattern, density)
        if pattern is None:
            if weight.is_meta:
                raise ValueError("linear: got a layer on device meta, expected one with data, or a pattern")
            pattern = block_patterns.largest_blocks(block_patterns.block_norms(weight, block_shape), density)
        else:
            block_patterns.check_pattern(pattern, block_layout.grid_of(weight.shape, block_shape))
        index = block_layout.index_of(pattern)
        values = block_layout.take_blocks(weight.detach(), index, block_shape)
        layer = cls._of_parts((weight.shape[0], weight.shape[1]), values, None, index)
        layer.values.requires_grad_(weight.requires_grad)
        return copy_the_rest(linear, layer)

    @classmethod
    def from_bsr(cls, weight: Tensor, bias: Tensor | None = None) -> BlockSparseLinear:
        """A layer with copies of a weight in torch's BSR layout [out_features, in_features] and of a bias.

        Raises:
            TypeError: not a BSR tensor of dtype float32, bfloat16, float16 or float64, or a bias of another dtype.
            ValueError: a batch of matrices, or a bias of another size or device.
            FormatError: indices that contradict each other or the shape.

        >>> BlockSparseLinear.from_bsr(torch.eye(4).to_sparse_bsr((2, 2)))(torch.arange(4.0)).tolist()
        [0.0, 1.0, 2.0, 3.0]
        """
        if not isinstance(weight, Tensor) or weight.layout is not torch.sparse_bsr:
            kind = weight.layout if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight: got {kind}, expected a tensor of layout torch.sparse_bsr")
        if weight.ndim != 2:
            raise ValueError(f"weight: got size {list(weight.shape)}, expected a matrix")
        index = (weight.crow_indices().long(), weight.col_indices().long())
        parts = dict(zip(PARTS, (weight.values(), *index, torch.tensor(weight.shape, device="cpu")), strict=True))
        return cls._of_untrusted_parts(parts, bias)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any],
        prefix: str = "",
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> BlockSparseLinear:
        """The layer that `state_dict` describes, with copies of its tensors (FORMAT.md has what they are).

        Args:
            state_dict: of a BlockSparseLinear, or of a model that has one, of any pattern.
            prefix: what stands before the names of the layer's tensors, its dot included.
            in_features, out_features: what is known of the weight's size. Give them for a file of unknown origin:
                memory is reserved by `dense_shape`, whose in_features nothing else in the file bounds.

        Raises:
            FormatError: tensors that are missing, contradict each other, or are of another size than the expected one,
                or those of a SemiStructuredBlockLinear.
            TypeError, ValueError: a tensor or an argument of the wrong kind, dtype, device or out of range.
            RuntimeError: sizes for which there is no memory.

        >>> layer = BlockSparseLinear(64, 128, density=0.25)
        >>> model = nn.Sequential(layer, nn.ReLU())
        >>> torch.equal(BlockSparseLinear.from_state_dict(model.state_dict(), "0.").values, layer.values)
        True
        """
        parts = block_layout.parts_of(state_dict, PARTS, prefix)
        block_layout.refuse_two_four(state_dict, prefix)
        expected = block_layout.known_sizes(out_features, in_features)
        return cls._of_untrusted_parts(parts, state_dict.get(f"{prefix}bias"), prefix, expected)

    @classmethod
    def _of_untrusted_parts(
        cls, parts: Mapping[str, Any], bias: Any, prefix: str = "", expected: Sequence[int | None] = (None, None)
    ) -> BlockSparseLinear:
        shape = block_layout.check_parts(parts, prefix)
        block_layout.check_known_sizes(shape, expected, prefix)
        values = parts["values"]
        block_layout.prove_index((parts["crow_indices"], parts["col_indices"]), shape, values.shape[2], prefix)
        if bias is not None:
            block_layout.check_bias(bias, values, shape[0], prefix)
            bias = bias.detach().clone()
        index = (parts["crow_indices"].clone(), parts["col_indices"].clone())
        return cls._of_parts(shape, values.detach().clone(memory_format=torch.contiguous_format), bias, index)

    @classmethod
    def _of_parts(cls, shape: tuple[int, int], values: Tensor, bias: Tensor | None, index: Index) -> BlockSparseLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._assemble(shape, values, bias, index)
        return layer

    def _multiply(self, x: Tensor) -> Tensor:
        transposed = None  # checking it would cost as much as a small product does
        if x.requires_grad and torch.is_grad_enabled():
            transposed = TransposedIndex(*(getattr(self, name) for name in _TRANSPOSED))
        return ops_block.bsr_linear(
            x, self.values, self.crow_indices, self.col_indices, self.out_features, self.bias, transposed
        )

    def _blocks(self) -> Tensor:
        self._check_whole()
        return self.values

    def to_dense(self) -> nn.Linear:
        """The dense twin of this layer, of which it shares nothing; hooks stay behind."""
        layer = super().to_dense()
        layer.weight.requires_grad_(self.values.requires_grad)
        return layer

    def to_bsr(self) -> Tensor:
        """A copy of the weight in torch's BSR layout.

        Raises:
            ValueError: a weight that is no multiple of the blocks, which that layout does not know, or a sharded one.
        """
        self._check_whole()
        if any(size % block for size, block in zip(self._shape, self.block_shape, strict=True)):
            raise ValueError(f"block_shape: got {self.block_shape}, expected sizes that divide {self._shape}")
        self._prove_index()
        index = (self.crow_indices.clone(), self.col_indices.clone())
        values = self.values.detach().clone()
        return torch.sparse_bsr_tensor(*index, values, size=self._shape, device=values.device, check_invariants=False)

    @torch.inference_mode(False)  # whose tensors could not be trained with afterwards
    @torch.no_grad()
    def update_pattern_(
        self,
        pattern: Tensor | None = None,
        *,
        scores: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> BlockSparseLinear:
        """Drop and grow blocks in place: those that stay keep their values, new ones start at zero.

        `values` stays the same Parameter, so that optimizers go on. Its gradient moves with the blocks, and so does the
        state of `optimizer` if that is given, both zero for new blocks. State of an optimizer that is not given stays
        where it lies, for other blocks than before: give it, or make the optimizer anew. Outputs from before cannot be
        differentiated any more: autograd raises RuntimeError.

        With DistributedDataParallel, every process must give the same pattern or scores (broadcast random ones first),
        and the wrapper has to be made anew if the number of blocks changes.

        An averaged copy (AveragedModel, with `use_buffers=False`) has to be given the same pattern, by its own
        `update_pattern_`; another layer that shares `values` would multiply them by its old pattern: use one layer in
        both places instead.

        With SET [1], blocks are dropped by `block_norms` and grown at random; with RigL [2], they are grown by the
        gradient of the dense weight, which takes no more than the layer's input and its output's gradient: the last
        example.

        [1] Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018,
        arXiv:1707.04780. [2] Evci et al., Rigging the lottery: making all tickets winners, 2020, arXiv:1911.11134.

        Args:
            pattern: bool [block rows, block columns].
            scores: of a real floating-point dtype, of the same size, instead of a pattern: as many blocks as now, those
                with the largest scores.
            optimizer: whose state for `values` is to move along.

        Returns:
            This layer.

        Raises:
            TypeError, ValueError: not exactly one of `pattern` and `scores`, either of them of the wrong kind, dtype or
                size, an optimizer that does not have this layer's `values`, or a layer on device meta, sharded or whose
                `values` are computed (by weight normalization, say).

        >>> layer = BlockSparseLinear(64, 64, pattern=torch.tensor([[True, False], [False, True]]))
        >>> kept = layer.values[1]
        >>> layer.update_pattern_(torch.tensor([[False, True], [False, True]])).pattern
        tensor([[False,  True],
                [False,  True]])
        >>> torch.equal(layer.values[1], kept), bool(layer.values[0].any())
        (True, False)
        >>> from bitmask import block_norms, largest_blocks
        >>> x = torch.randn(8, 64)
        >>> y = layer(x)
        >>> y.retain_grad()
        >>> y.square().mean().backward()
        >>> gradient = y.grad.flatten(0, -2).T @ x.flatten(0, -2)  # of the dense weight
        >>> survivors = largest_blocks(block_norms(layer.weight, layer.block_shape), density=0.25)
        >>> scores = block_norms(gradient, layer.block_shape).masked_fill(survivors, torch.inf)
        >>> int(layer.update_pattern_(scores=scores).pattern.sum())
        2
        """
        if (pattern is None) == (scores is None):
            raise TypeError("pattern, scores: expected exactly one of them")
        if scores is not None:
            block_patterns.check_matrix("scores", scores)
            if tuple(scores.shape) != self._grid:
                raise ValueError(f"scores: got size {list(scores.shape)}, expected {list(self._grid)} (blocks)")
            pattern = block_patterns.largest(scores, len(self.values))
        assert pattern is not None
        block_patterns.check_pattern(pattern, self._grid)
        self._check_own()
        if self.values.is_meta or hasattr(self.values, "__tensor_flatten__"):
            raise ValueError("values: on device meta or sharded, expected a layer with all its data")
        state = {} if optimizer is None else _state_of(optimizer, self.values)
        places = torch.full(self._grid, -1, device="cpu")
        places[self.pattern.cpu()] = torch.arange(len(self.values), device="cpu")
        sources = places[pattern.cpu()].to(self.values.device)

        def moved(blocks: Tensor) -> Tensor:
            result = blocks.new_zeros(len(sources), *blocks.shape[1:])
            result[sources >= 0] = blocks[sources[sources >= 0]]
            return result

        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.ndim == 3 and len(tensor) == len(self.values):
                state[name] = moved(tensor)
        # Backward passes of what was calculated earlier raise then: their gradients are of other blocks.
        changed = [getattr(self, name) for name in (*PARTS[:3], *_TRANSPOSED)]
        torch.autograd.graph.increment_version([tensor for tensor in changed if not tensor.is_inference()])
        values, grad = moved(self.values), self.values.grad
        self.values.grad = None
        _replace_data(self.values, values)
        self.values.grad = None if grad is None else moved(grad)
        self._set_index(*block_layout.index_of(pattern))
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check everything first: what contradicts itself raises, what has other sizes is reported by torch."""
        block_layout.refuse_two_four(state_dict, prefix)
        own = (self.values, *self._index, torch.tensor([self.out_features, self.in_features], device="cpu"))
        parts = {name: state_dict.get(prefix + name, tensor) for name, tensor in zip(PARTS, own, strict=True)}
        shape = block_layout.check_parts(parts, prefix, sharded=hasattr(self.values, "__tensor_flatten__"))
        got, expected = describe(parts["values"].shape, shape), describe(self.values.shape, self._shape)
        if got != expected:
            error_msgs.append(
                f"{prefix}values: got {got}, expected {expected}; BlockSparseLinear.from_state_dict makes a layer of "
                "any sizes"
            )
            return
        block_layout.prove_index((parts["crow_indices"], parts["col_indices"]), shape, self.block_shape[1], prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _density_without(pattern: Tensor | None, density: float | None) -> float:
    """The density to use; raises ValueError where a pattern says already what is kept."""
    if density is not None and pattern is not None:
        raise ValueError(f"density: got {density} and a pattern, expected one of them")
    return 0.5 if density is None else density


def _dense_weight(linear: nn.Linear) -> Tensor:
    """The weight of a layer; raises TypeError unless there is a dense one."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: got {type(linear).__name__}, expected an nn.Linear")
    weight = linear.weight
    if isinstance(weight, CompressedTensor):
        raise TypeError(f"linear: got a {type(linear).__name__} whose weight is compressed, expected a dense one")
    if is_lazy(weight):
        raise TypeError("linear: got a lazy layer, expected one whose weight has a size")
    block_layout.check_dtype("linear.weight", weight.dtype)
    return weight


def _state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimizer remembers of a parameter."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    if not any(held is parameter for group in optimizer.param_groups for held in group["params"]):
        raise ValueError("optimizer: got one without this layer's values, expected the one that trains them")
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    return state


def _replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter other data, perhaps of another size; who shares the memory of the old data keeps those.

    Autograd keeps a node for the gradient, to which DistributedDataParallel and others attach hooks. The node knows the
    size, and would refuse gradients of another one where a graph of an earlier step is alive; only then is it lost, by
    a change of dtype, which makes autograd drop it.
    """
    if parameter.shape != data.shape:
        parameter.data = data.to(torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data
