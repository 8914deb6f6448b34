"""bitmask.prune: exact counts, the smallest magnitudes first."""

import pytest
import torch

from bitmask import BitmaskTensor
from bitmask.prune import prune_by_magnitude

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
    with pytest.raises(TypeError, match=r"tensor: got dtype .*, expected a real floating-point dtype"):
        prune_by_magnitude(torch.ones(3).to(dtype), 0.5)


def test_refuses_compressed_tensors():
    with pytest.raises(TypeError, match="got a BitmaskTensor"):
        prune_by_magnitude(BitmaskTensor.from_dense(torch.ones(3)), 0.5)
