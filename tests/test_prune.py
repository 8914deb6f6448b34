"""bitmask.prune: exact counts, the smallest magnitudes first; 2:4 in place, whatever the strides."""

import pytest
import torch
from conftest import assert_bits_equal, random_dense, random_numbers
from torch import nn

from bitmask import BitmaskTensor, reference
from bitmask.prune import prune_24_, prune_by_magnitude

REAL_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_zeroes_the_smallest_magnitudes(dtype, sparsity):
    # Magnitudes from 1 to 2 in few mantissa bits: many ties, none zero.
    weight = (torch.rand(37, 53) + 1).mul(torch.rand(37, 53).sub(0.5).sign()).to(dtype)
    pruned = prune_by_magnitude(weight, sparsity)
    kept = pruned.double() != 0
    assert pruned.dtype == dtype
    assert int((~kept).sum()) == int(sparsity * weight.numel())
    assert torch.equal(pruned.double()[kept], weight.double()[kept])
    if kept.any() and not kept.all():
        assert weight.double()[~kept].abs().max() <= weight.double()[kept].abs().min()


def test_ties_go_in_order():
    assert prune_by_magnitude(torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.5).tolist() == [0.0, 0.0, 1.0, -1.0]


def test_nan_goes_last():
    pruned = prune_by_magnitude(torch.tensor([float("nan"), float("inf"), 1.0, float("nan")]), 0.5)
    assert pruned[1:3].tolist() == [0.0, 0.0]
    assert pruned.isnan().tolist() == [True, False, False, True]
    assert prune_by_magnitude(torch.full((4,), float("nan")), 0.5).isnan().tolist() == [False, False, True, True]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_any_shape(shape):
    assert prune_by_magnitude(torch.ones(shape), 1.0).tolist() == torch.zeros(shape).tolist()


def test_does_not_touch_its_input():
    weight = torch.ones(4, 6).t().requires_grad_()
    pruned = prune_by_magnitude(weight, 0.5)
    assert torch.equal(weight, torch.ones(6, 4))
    assert not pruned.requires_grad


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_refuses_other_fractions(sparsity):
    with pytest.raises(ValueError, match="sparsity: got"):
        prune_by_magnitude(torch.ones(3), sparsity)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e8m0fnu], ids=str)
def test_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match=r"tensor: got dtype .*, expected a floating-point dtype"):
        prune_by_magnitude(torch.ones(3).to(dtype), 0.5)


def test_refuses_dtypes_of_less_than_a_byte():
    with pytest.raises(TypeError, match="float4_e2m1fn_x2, expected a floating-point dtype"):
        prune_by_magnitude(torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), 0.5)


def test_refuses_compressed_tensors():
    with pytest.raises(TypeError, match="got a BitmaskTensor"):
        prune_by_magnitude(BitmaskTensor.from_dense(torch.ones(3)), 0.5)


# 2:4.

VIEWS = {
    "contiguous": lambda base: base,
    "transposed": lambda base: base.transpose(0, 2),
    "permuted": lambda base: base.permute(1, 0, 2),
    "every second row": lambda base: base[:, ::2],
    "every second column": lambda base: base[..., ::2],
    "part of the columns": lambda base: base[..., 4:12],
    "one column of each": lambda base: base[..., :8].unflatten(-1, (2, 4))[:, :, 1],
    "sizes of one": lambda base: base[:1, :, :8],
    "no elements": lambda base: base[..., 4:4],
    "vector": lambda base: base[3, 5],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("transposable", [False, True])
def test_prune_24_in_place_whatever_the_strides(name, transposable):
    base = random_numbers(8, 12, 16, density=1.0)
    view, before = VIEWS[name](base), base.clone()
    if transposable and (view.ndim < 2 or view.shape[-2] % 4 != 0):
        with pytest.raises(ValueError, match=r"tensor: got size .*, expected \[..., rows, cols\]"):
            prune_24_(view, transposable=True)
        return
    expected = VIEWS[name](before).contiguous()
    (reference.prune_24_transposable if transposable else reference.prune_24)(expected)
    assert prune_24_(view, transposable=transposable) is view
    assert_bits_equal(view.contiguous(), expected)
    VIEWS[name](before).copy_(expected)
    assert_bits_equal(base, before)  # nothing beside the view was written to


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fnuz, torch.uint64, torch.bool], ids=str)
def test_prune_24_of_a_view_of_any_dtype(dtype):
    base = random_dense((16, 12), dtype, density=0.9)
    expected = base.t().contiguous()
    reference.prune_24(expected)
    assert_bits_equal(prune_24_(base.t()).contiguous(), expected)


@pytest.mark.parametrize("make", [lambda t: t, torch.t], ids=["contiguous", "transposed"])
def test_prune_24_of_parameters(make):
    """As torch.nn.init does it: autograd takes no part, but notices."""
    layer = nn.Linear(16, 8)
    y = layer(torch.ones(3, 16, requires_grad=True)).sum()
    weight = make(layer.weight)
    version = layer.weight._version
    assert prune_24_(weight) is weight
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    assert layer.weight._version > version
    assert int((weight != 0).sum()) == 64
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("transposable", [False, True])
def test_prune_24_of_what_is_negated_when_it_is_read(transposable):
    base = random_numbers(8, 16, density=1.0)
    expected = base.clone()
    prune_24_(expected, transposable=transposable)
    view = torch._neg_view(base)
    assert prune_24_(view, transposable=transposable) is view
    assert torch.equal(base, expected)
    assert torch.equal(view, -expected)


@pytest.mark.parametrize("value", [None, "no", 1])
def test_prune_24_refuses_a_flag_of_another_type(value):
    with pytest.raises(TypeError, match=f"transposable: got {value!r}, expected True or False"):
        prune_24_(torch.ones(4, 4), transposable=value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, 4).expand(3, 4),
        torch.ones(4, 1).expand(4, 8),
        torch.ones(20).as_strided((4, 8), (2, 1)),
        torch.ones(20).unfold(0, 4, 2),
    ],
)
def test_prune_24_refuses_elements_that_share_memory(tensor):
    with pytest.raises(ValueError, match=r"tensor: got strides \[.*\], expected memory for each element by itself"):
        prune_24_(tensor)
    assert bool((tensor == 1).all())


@pytest.mark.parametrize(
    ("tensor", "transposable", "error", "message"),
    [
        ([1.0], False, TypeError, "tensor: got list, expected a torch.Tensor"),
        (None, False, TypeError, "tensor: got NoneType, expected a torch.Tensor"),
        (torch.eye(4).to_sparse(), False, TypeError, "tensor: got a torch.sparse_coo tensor"),
        (BitmaskTensor.from_dense(torch.eye(4)), False, TypeError, "tensor: got a BitmaskTensor"),
        (torch.ones(4).to(torch.complex64), False, TypeError, "tensor: got dtype torch.complex64, expected bool, an"),
        (torch.ones(4).to(torch.float8_e8m0fnu), False, TypeError, "tensor: got dtype torch.float8_e8m0fnu"),
        (torch.ones(8, 6), False, ValueError, r"tensor: got size \[8, 6\], expected a last size that is a multiple of"),
        (
            torch.ones(6, 8).t(),
            False,
            ValueError,
            r"tensor: got size \[8, 6\], expected a last size that is a multiple",
        ),
        (torch.ones(4, 4).int(), True, TypeError, "tensor: got dtype torch.int32, expected float32"),
        (torch.ones(8, 6).t(), True, ValueError, r"tensor: got size \[6, 8\], expected \[..., rows, cols\], both"),
        (torch.tensor(1.0), False, ValueError, r"tensor: got size \[\], expected at least one dimension"),
    ],
)
def test_prune_24_refuses_what_has_no_such_layout(tensor, transposable, error, message):
    with pytest.raises(error, match=message):
        prune_24_(tensor, transposable=transposable)
