"""Products on a GPU: against float64, around the places where another kernel takes over, and with hostile weights."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_bits_equal, mutate, needs_gpu, parts_are_valid, random_numbers
from gpu_checks import assert_is_product, parts_on

from bitmask import FormatError, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around every number of rows at which another kernel, or another of its tiles, may be chosen.
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 255, 257, 513]
SIZES = [(1, 1), (3, 5), (8, 16), (16, 64), (65, 131), (40, 300), (129, 1029), (300, 64), (2, 5001)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def check(device, x, dense, bias=None):
    there = None if bias is None else bias.to(device)
    y = ops.linear(x.to(device), *parts_on(device, dense), dense.shape[1], there)
    assert y.device.type == device.type
    assert_is_product(y, x, dense, bias)


@pytest.mark.parametrize("m", ROWS)
def test_rows_of_x(device, dtype, m):
    for n, k in SIZES:
        dense = random_numbers(n, k, density=0.5, seed=n, dtype=dtype)
        x = random_numbers(m, k, density=1.0, seed=m, dtype=dtype)
        check(device, x, dense)
        check(device, x, dense, random_numbers(n, density=1.0, seed=k, dtype=dtype))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("m", [1, 4, 16, 64, 200])
def test_densities(device, dtype, density, m):
    dense = random_numbers(200, 520, density=density, dtype=dtype)
    dense[40:90] = 0
    dense[100] = 1
    check(device, random_numbers(m, 520, density=1.0, dtype=dtype), dense)


@pytest.mark.parametrize("m", [1, 8, 33, 128])
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 1000), (512, 14336)], ids=str)
def test_sizes_of_models(device, dtype, m, shape):
    n, k = shape
    check(device, random_numbers(m, k, density=1.0, dtype=dtype), random_numbers(n, k, density=0.5, dtype=dtype))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0), (200, 5, 0)])
def test_sizes_of_zero(device, dtype, m, n, k):
    check(device, torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype), torch.ones(n, dtype=dtype))


VIEWS = {
    "transposed": lambda x: x[:70, :40].T.contiguous().T[:12, :40],
    "every second column": lambda x: x[:9, ::2],
    "every second row": lambda x: x[::2, :70],
    "expanded row": lambda x: x[:1, :70].expand(7, 70),
    "expanded scalar": lambda x: x[3, 4].expand(40, 70),
    "unaligned": lambda x: x.reshape(-1)[1:71],
    "unaligned rows": lambda x: x.reshape(-1)[3 : 3 + 40 * 71].view(40, 71),
    "3-D": lambda x: x[:30, :70].reshape(2, 15, 70),
    "permuted": lambda x: x[:30, :70].reshape(5, 6, 70).permute(1, 0, 2),
    "4-D without rows": lambda x: x[:30, :70].reshape(5, 1, 6, 70)[:, :0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_x(device, dtype, name):
    whole = random_numbers(80, 140, density=1.0, dtype=dtype)
    x = VIEWS[name](whole)
    dense, bias = random_numbers(30, x.shape[-1], seed=1, dtype=dtype), random_numbers(60, density=1.0, dtype=dtype)
    y = ops.linear(VIEWS[name](whole.to(device)), *parts_on(device, dense), x.shape[-1], bias.to(device)[::2])
    assert_is_product(y, x, dense, bias[::2])


@pytest.mark.parametrize("m", [1, 6, 40, 130])
@pytest.mark.parametrize("offset", [1, 3])
def test_parts_that_are_unaligned_views(device, dtype, m, offset):
    dense, x = random_numbers(65, 131, dtype=dtype), random_numbers(m, 131, density=1.0, dtype=dtype)
    parts = []
    for part in parts_on(device, dense):
        room = part.new_zeros(part.numel() + offset)
        room[offset:] = part.flatten()
        parts.append(room[offset:].view(part.shape))
    assert_is_product(ops.linear(x.to(device), *parts, 131), x, dense)


@pytest.mark.parametrize("m", [1, 4, 5, 20, 65, 140])
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["x", "weight"])
def test_infinity_and_nan_spread_as_from_a_dense_weight(device, dtype, m, special, place):
    """A zero that is not stored still makes NaN of an infinity."""
    dense, x = random_numbers(40, 100, dtype=dtype), random_numbers(m, 100, density=1.0, dtype=dtype)
    (x if place == "x" else dense)[0, 70] = special
    y = ops.linear(x.to(device), *parts_on(device, dense), 100).cpu()
    expected = F.linear(x.double(), dense.double())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


@pytest.mark.parametrize("m", [1, 6, 40, 130])
def test_sums_that_overflow_float16_become_infinite(device, m):
    parts = parts_on(device, torch.full((3, 100), 300.0, dtype=torch.float16))
    x = torch.full((m, 100), 300.0, dtype=torch.float16, device=device)
    assert ops.linear(x, *parts, 100).isposinf().all()


@pytest.mark.parametrize("m", [1, 3, 16, 70, 200])
def test_gradients(device, dtype, m):
    dense = random_numbers(65, 131, dtype=dtype)
    x = random_numbers(m, 131, density=1.0, dtype=dtype).to(device).requires_grad_()
    bias = random_numbers(65, density=1.0, dtype=dtype).to(device).requires_grad_()
    given = random_numbers(m, 65, density=1.0, seed=1, dtype=dtype)
    ops.linear(x, *parts_on(device, dense), 131, bias).backward(given.to(device))
    assert_is_product(x.grad, given, dense.T)
    assert_is_product(bias.grad[None], torch.ones(1, m, dtype=dtype), given.T)


def test_a_weight_that_requires_a_gradient_is_refused(device):
    values, bitmasks, row_offsets = parts_on(device, random_numbers(6, 20))
    with pytest.raises(TypeError, match="frozen"):
        ops.linear(torch.ones(2, 20, device=device), values.requires_grad_(), bitmasks, row_offsets, 20)


@pytest.mark.parametrize("m", [1, 4, 8, 33, 64, 200])
def test_repeats_are_equal_in_every_bit(device, dtype, m):
    parts = parts_on(device, random_numbers(300, 2000, density=0.5, dtype=dtype))
    x = random_numbers(m, 2000, density=1.0, dtype=dtype).to(device)
    first = ops.linear(x, *parts, 2000)
    for _ in range(20):
        assert_bits_equal(ops.linear(x, *parts, 2000), first)


# Hostile weights. A CPU refuses them; a GPU, for which nobody waits, shows them as NaN.


def assert_shows_the_fault(x, parts, columns, row):
    """Row `row` of the weight is faulty, and maybe others."""
    if x.is_cuda:
        y = ops.linear(x, *parts, columns)
        assert y[:, row].isnan().all()
        torch.cuda.synchronize()
    else:
        with pytest.raises(FormatError):
            ops.linear(x, *parts, columns)


@pytest.mark.parametrize("m", [1, 4, 9, 33, 64, 300])
@pytest.mark.parametrize("start", [-(2**63), -1, 2**31, 2**62, 2**63 - 1])
@pytest.mark.parametrize("row", [0, 150, 299])
def test_hostile_offsets(device, dtype, m, start, row):
    dense, x = random_numbers(300, 200, dtype=dtype), random_numbers(m, 200, density=1.0, dtype=dtype)
    values, bitmasks, row_offsets = parts_on(device, dense)
    hostile = row_offsets.clone()
    hostile[row] = start
    assert_shows_the_fault(x.to(device), (values, bitmasks, hostile), 200, row)
    assert_is_product(ops.linear(x.to(device), values, bitmasks, row_offsets, 200), x, dense)


@pytest.mark.parametrize("m", [1, 4, 9, 33, 64, 300])
@pytest.mark.parametrize("kept", [0, 1, 1000])
def test_bits_without_values(device, dtype, m, kept):
    values, bitmasks, row_offsets = parts_on(device, torch.ones(100, 300, dtype=dtype))
    x = torch.ones(m, 300, dtype=dtype, device=device)
    assert_shows_the_fault(x, (values[:kept].clone(), bitmasks, row_offsets), 300, 99)


@pytest.mark.parametrize("m", [1, 9, 64, 300])
def test_a_bit_beyond_the_last_column(device, dtype, m):
    values, bitmasks, row_offsets = parts_on(device, random_numbers(50, 77, dtype=dtype))
    bitmasks[20, -1] |= 0x80
    assert_shows_the_fault(torch.ones(m, 77, dtype=dtype, device=device), (values, bitmasks, row_offsets), 77, 20)


@pytest.mark.parametrize("m", [1, 4, 30, 100])
@pytest.mark.parametrize(("shape", "count"), [((5, 13), 200), ((70, 130), 60), ((3, 2500), 20)], ids=str)
def test_mutated_parts(device, m, shape, count):
    """Faulty ones never go unnoticed, and never reach beyond the buffers; harmless changes are multiplied."""
    parts = ops.compress(random_numbers(*shape))
    generator = torch.Generator().manual_seed(count)
    faulty = 0
    for _ in range(count):
        changed = mutate(*parts, shape, lambda limit: int(torch.randint(limit, (), generator=generator)))
        *bad_parts, (_, columns) = changed
        x, there = torch.ones(m, columns), [part.to(device) for part in bad_parts]
        if parts_are_valid(*bad_parts, [len(bad_parts[2]), columns]):
            got, expected = ops.linear(x.to(device), *there, columns), ops.linear(x, *bad_parts, columns)
            torch.testing.assert_close(got.cpu(), expected, equal_nan=True, rtol=1e-4, atol=1e-4)
            continue
        faulty += 1
        try:
            y = ops.linear(x.to(device), *there, columns)
        except FormatError:
            continue
        assert y.is_cuda
        assert y.isnan().any(dim=0).any(), "a faulty row is shown"
    assert 0 < faulty < count


@needs_gpu
@pytest.mark.parametrize("what", ["x", "values", "bitmasks", "row_offsets", "bias"])
def test_tensors_on_different_devices(what):
    dense = random_numbers(6, 20)
    names = ("values", "bitmasks", "row_offsets")
    given = dict(zip(names, parts_on(torch.device("cuda"), dense), strict=True))
    given |= {"x": torch.ones(2, 20, device="cuda"), "bias": torch.ones(6, device="cuda"), "in_features": 20}
    given[what] = given[what].cpu()
    with pytest.raises(ValueError, match="device"):
        ops.linear(**given)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_a_weight_of_more_than_2_to_the_31_elements(m):
    n, k = 2**17 + 3, 2**14 + 8
    row = random_numbers(1, k, density=0.5, dtype=torch.bfloat16)
    parts = ops.compress(row.cuda().expand(n, k))
    x = random_numbers(m, k, density=1.0, dtype=torch.bfloat16)
    y = ops.linear(x.cuda(), *parts, k)
    assert_is_product(y[:, -3:], x, row.expand(3, k))
    assert bool((y == y[:, :1]).all())
