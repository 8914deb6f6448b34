"""The gradient of x straight from compressed weights: torch.ops.bitmask.linear_backward_input."""

import pytest
import torch
from conftest import mutations, parts_are_valid, random_numbers
from torch import library

from bitmask import _C, ops, reference

DTYPES = sorted(ops.LINEAR_DTYPES, key=str)
linear_backward_input = torch.ops.bitmask.linear_backward_input


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def assert_is_gradient(got, grad, dense):
    """`got` is grad @ dense within the rounding of sums in float32 (float64) and of the result."""
    assert (got.shape, got.dtype) == ((*grad.shape[:-1], dense.shape[1]), grad.dtype)
    exact = grad.double() @ dense.double()
    magnitude = grad.double().abs() @ dense.double().abs()
    unit = 2.0**-53 if grad.dtype == torch.float64 else 2.0**-24
    info = torch.finfo(grad.dtype)
    bound = 2 * (dense.shape[0] + 3) * unit * magnitude + 0.51 * info.eps * exact.abs() + info.tiny * info.eps
    assert bool(((got.double() - exact).abs() <= bound).all())


def check(grad, dense):
    got = linear_backward_input(grad, *ops.compress(dense), dense.shape[1])
    assert_is_gradient(got, grad, dense)
    return got


@pytest.mark.parametrize("m", [0, 1, 2, 5, 12, 13, 130, 505])
def test_small_sizes(isa, dtype, m):
    for n in (0, 1, 7, 65, 130):
        grad = random_numbers(m, n, density=1.0, seed=m, dtype=dtype)
        for k in (0, 1, 7, 64, 65, 130):
            check(grad, random_numbers(n, k, seed=k + n, dtype=dtype))


@pytest.mark.parametrize(("n", "k"), [(513, 1100), (1100, 513), (130, 2500), (2500, 63)])
@pytest.mark.parametrize("m", [1, 13, 130])
def test_larger_sizes(isa, dtype, m, n, k):
    for density in (0.0, 0.1, 1.0):
        check(random_numbers(m, n, density=1.0, dtype=dtype), random_numbers(n, k, density=density, dtype=dtype))


def test_same_as_reference(dtype):
    dense, grad = random_numbers(40, 90, dtype=dtype), random_numbers(2, 3, 40, density=1.0, dtype=dtype)
    parts = ops.compress(dense)
    got = linear_backward_input(grad, *parts, 90)
    torch.testing.assert_close(got, reference.linear_backward_input(grad, *parts, 90))


def test_views_and_threads(isa, dtype, threads):
    dense = random_numbers(300, 1000, dtype=dtype)
    grad = random_numbers(300, 20, density=1.0, dtype=dtype).t()
    got = check(grad, dense)
    torch.set_num_threads(3)
    assert torch.equal(check(grad, dense), got), "the number of threads must not change a bit"


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_infinity_and_nan_spread_as_from_a_dense_weight(isa, dtype, special):
    dense, grad = random_numbers(40, 100, dtype=dtype), random_numbers(3, 40, density=1.0, dtype=dtype)
    grad[0, 17] = special
    got, expected = linear_backward_input(grad, *ops.compress(dense), 100), grad.double() @ dense.double()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())


@pytest.mark.parametrize("shape", [(3, 40), (40,), (2, 0, 40)], ids=str)
def test_opcheck(dtype, shape):
    parts = ops.compress(random_numbers(40, 90, dtype=dtype))
    grad = random_numbers(*shape, density=1.0, dtype=dtype).requires_grad_()
    library.opcheck(linear_backward_input.default, (grad, *parts, 90))


def test_gradgradcheck():
    parts = ops.compress(random_numbers(6, 9, dtype=torch.float64))
    x = random_numbers(4, 9, density=1.0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ops.linear(x, *parts, 9) ** 3, (x,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda args: args | {"grad": torch.ones(2, 19)}, r"grad: got size \[2, 19\], expected \[..., 20\]"),
        (lambda args: args | {"grad": torch.ones(())}, r"grad: got size \[\], expected \[..., 20\]"),
        (lambda args: args | {"grad": torch.ones(2, 20).double()}, "grad: got torch scalar type"),
        (lambda args: args | {"in_features": 29}, r"bitmasks: got size \[20, 5\], expected \[20, 4\]"),
        (lambda args: args | {"in_features": -1}, "got .* expected no negative size"),
        (lambda args: args | {"values": args["values"][:-1]}, "values: got"),
        (lambda args: args | {"values": args["values"].to(torch.int32)}, "values: got torch scalar type"),
        (lambda args: args | {"row_offsets": args["row_offsets"].flip(0)}, "row_offsets"),
    ],
)
def test_bad_input(change, message):
    values, bitmasks, row_offsets = ops.compress(random_numbers(20, 33))
    args = {"grad": torch.ones(2, 20), "values": values, "bitmasks": bitmasks, "row_offsets": row_offsets}
    with pytest.raises((ValueError, RuntimeError), match=f"{_C.INVALID}.*{message}"):
        linear_backward_input(**change(args | {"in_features": 33}))


@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize(("shape", "count"), [((5, 13), 300), ((70, 130), 100), ((3, 1100), 30)], ids=str)
def test_mutated_parts_are_refused_or_multiply_as_the_reference_does(isa, m, shape, count):
    parts = ops.compress(random_numbers(*shape))
    refused = 0
    for *bad_parts, (_, columns) in mutations(parts, shape, count):
        rows = len(bad_parts[2])
        grad = torch.ones(m, rows)
        if parts_are_valid(*bad_parts, [rows, columns]):
            got = linear_backward_input(grad, *bad_parts, columns)
            expected = reference.linear_backward_input(grad, *bad_parts, columns)
            torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
        else:
            refused += 1
            with pytest.raises((ValueError, RuntimeError), match=_C.INVALID):
                linear_backward_input(grad, *bad_parts, columns)
    assert 0 < refused < count
