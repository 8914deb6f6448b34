"""What the benchmarks are made of: reports that are read back, checks that bite, and the suites' quick runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bitmask
from benchmarks.block_sparse.checks import blocks_are_right, product_is_right
from benchmarks.block_sparse.contenders import Contest
from benchmarks.block_sparse.plot import break_even, verdict
from benchmarks.block_sparse.result import (
    FORWARD,
    FORWARD_24,
    GRAD_INPUT,
    GRAD_WEIGHT,
    PRODUCTS,
    STEP,
    BlockSparseResult,
)
from benchmarks.block_sparse.weights import BlockWeight, Operands
from benchmarks.cases import Selection, Workload, dense_input
from benchmarks.codec.measure import WrongRoundTripError
from benchmarks.formats.contenders import LAYOUTS, format_products, pattern_input
from benchmarks.formats.measure import measure_conversions
from benchmarks.formats.plot import speedups
from benchmarks.formats.result import BLOCKS, SCATTERED, TWO_FOUR, ConversionResult, FormatProductResult
from benchmarks.gpu.report import GpuReport
from benchmarks.linear.contenders import Layers
from benchmarks.linear.measure import Reference
from benchmarks.linear.plot import crossover
from benchmarks.linear.result import BITMASK, LinearResult
from benchmarks.models.result import Agreement, ModelResult, Sizes
from benchmarks.plot import have_matplotlib
from benchmarks.report import Report, reader_of
from benchmarks.semi_structured.contenders import (
    checking_codec,
    is_pruned,
    pruning_codec,
    pruning_peers,
    two_four_input,
)
from benchmarks.suites import find_suites
from benchmarks.timer import Budget, Summary
from bitmask.prune import prune_24_

ROOT = Path(__file__).parent.parent


def linear_result(rows, speedup):
    return LinearResult(
        contender=BITMASK,
        dtype="bf16",
        sparsity=0.5,
        threads=1,
        summary=Summary.of([2.0]),
        shape=(8, 16),
        rows=rows,
        layers=2,
        dense_nbytes=256,
        compressed_nbytes=128,
        weight_nbytes=128,
        dense_ms=2.0 * speedup,
        saturated_ms=3.0,
        read_bandwidth=None,
    )


def block_result(density, speedup, part=FORWARD):
    return BlockSparseResult(
        contender=BITMASK,
        dtype="fp32",
        sparsity=1 - density,
        threads=1,
        summary=Summary.of([2.0]),
        part=part,
        shape=(32, 64),
        rows=4,
        block=16,
        kept_elements=int(32 * 64 * density),
        layers=2,
        dense_ms=2.0 * speedup,
    )


def test_figures():
    result = linear_result(1, 2.0)
    assert (result.speedup, result.saturated_speedup, result.ceiling, result.ceiling_share) == (2.0, 1.5, 2.0, 0.75)


@pytest.mark.parametrize(
    ("speedups", "expected"), [((2.0, 0.5), 2.0), ((2.0, 1.5), None), ((0.5, 0.4), None), ((1.0, 0.5), 1.0)]
)
def test_crossover(speedups, expected):
    found = crossover([linear_result(rows, speedup) for rows, speedup in zip((1, 4), speedups, strict=True)])
    assert found == expected


def test_block_figures():
    result = block_result(0.25, 3.0)
    assert (result.density, result.speedup, result.ideal, result.ideal_share) == (0.25, 3.0, 4.0, 0.75)
    assert result.gflop_per_s == 2 * 4 * 512 / 2e6
    assert block_result(0.25, 3.0, STEP).gflop_per_s == 3 * result.gflop_per_s


@pytest.mark.parametrize(
    ("speedups", "expected", "said"),
    [
        ((2.0, 0.5), 0.5, "even at 50%"),
        ((2.0, 1.5), None, "faster throughout"),
        ((0.5, 0.4), None, "slower throughout"),
        ((0.5, 2.0), None, "no break-even"),
    ],
)
def test_break_even(speedups, expected, said):
    results = [block_result(density, speedup) for density, speedup in zip((0.25, 1.0), speedups, strict=True)]
    assert break_even(results[::-1]) == expected
    assert verdict(results) == said


def test_results_are_read_back():
    agreement = Agreement(1.0, 0.5, equal_tokens=3, compared_tokens=4)
    model = ModelResult(
        contender=BITMASK,
        dtype="fp32",
        sparsity=0.5,
        threads=1,
        summary=Summary.of([1.0, 2.0]),
        model="toy",
        phase="decode",
        rows=1,
        items=1,
        unit="tokens",
        dense_ms=3.0,
        sizes=Sizes(10, 20, None),
        agreement=agreement,
    )
    for result in (model, linear_result(1, 2.0), block_result(0.5, 2.0)):
        assert type(result).from_json(json.loads(json.dumps(result.to_json()))) == result


def test_selection():
    result = linear_result(4, 1.0)
    assert Selection().admits(result)
    assert Selection(shapes=((8, 16),), dtypes=("bf16",), sparsities=(0.5,), rows=(4,)).admits(result)
    assert not Selection(rows=(1,)).admits(result)
    assert Selection(blocks=(16,)).admits(block_result(0.5, 1.0))
    assert not Selection(blocks=(32,)).admits(block_result(0.5, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_notices_one_dropped_element(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 512).to(dtype), torch.randn(64, 512).to(dtype)
    y = (x.double() @ weight.double().T).to(dtype)
    reference = Reference(x, weight)
    assert reference.accepts(y, lossy=False)
    faulty = weight.clone()
    faulty[5, 7] = 0
    assert not reference.accepts((x.double() @ faulty.double().T).to(dtype), lossy=False)


def block_contest(part):
    """A weight [40, 70] whose blocks of 16 reach past both of its edges."""
    torch.manual_seed(0)
    dense = torch.randn(40, 70)
    return Contest(part, dense, [BlockWeight.cut_from(dense, 16, 0.5)], Operands.of((40, 70), "fp32", 5), 1)


@pytest.mark.parametrize("part", PRODUCTS)
def test_block_contenders_agree_with_the_masked_weight(part):
    contest = block_contest(part)
    (weight,) = contest.weights
    assert torch.equal(weight.masked() != 0, weight.elements_mask)
    ways = contest.ways()
    assert [way.weight for way in ways] == [None, weight.two_four if part == FORWARD_24 else weight]
    assert all(contest.is_right(way.weight, way.work(way.layers[0])) for way in ways)


@pytest.mark.parametrize("part", [FORWARD, FORWARD_24, GRAD_INPUT, GRAD_WEIGHT])
def test_block_checks_notice_blocks_at_other_places(part):
    contest = block_contest(part)
    *_, way = contest.ways()
    faulty = replace(way.weight, mask=way.weight.mask.roll(1, dims=1))
    assert not contest.is_right(faulty, way.work(way.layers[0]))


def test_block_checks_notice_what_is_not_2_of_4():
    contest = block_contest(FORWARD_24)
    (weight,) = contest.weights
    *_, way = contest.ways()
    assert torch.equal(weight.two_four.mask, weight.mask)
    assert not contest.is_right(weight, way.work(way.layers[0]))


def test_block_checks_notice_one_wrong_element():
    (weight,), (x, grad) = block_contest(GRAD_WEIGHT).weights, Operands.of((40, 70), "fp32", 5)
    values = BlockWeight.cut_from(grad.T @ x, 16, 0.5).values
    assert blocks_are_right(x, grad, weight, values)
    assert not weight.values[-1, 8:].any(), "rows past the edge"
    for place in ((0, 3, 3), (-1, 15, 0)):
        faulty = values.clone()
        faulty[place] += 0.1
        assert not blocks_are_right(x, grad, weight, faulty)
    y = x @ weight.dense.T
    assert product_is_right(x, weight.dense, y)
    y[1, 2] += 0.1
    assert not product_is_right(x, weight.dense, y)


WORKLOAD = Workload((64, 96), "fp16", 0.5)


def test_two_four_inputs():
    """Exactly two in every four, in every layer."""
    first = two_four_input(WORKLOAD)
    layers = Layers.like(WORKLOAD, first, 2**14)
    assert len(layers.dense) > 1
    for dense in layers.dense:
        assert bool(((dense.view(-1, 4) != 0).sum(dim=1) == 2).all())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pruning_is_checked(dtype):
    """Ties may be broken either way; nothing else may differ."""
    full = dense_input(Workload((64, 96), dtype, 0.0))
    pruned = prune_24_(full.clone())
    assert is_pruned(full, pruned)
    tied, one, other = (torch.tensor([row], dtype=full.dtype) for row in ([1, -1, 1, 2], [1, 0, 0, 2], [0, -1, 0, 2]))
    assert is_pruned(tied, one)
    assert is_pruned(tied, other)
    assert not is_pruned(tied, tied)
    assert not is_pruned(tied, torch.tensor([[1, -1, 0, 0]], dtype=full.dtype))
    assert not is_pruned(tied, torch.tensor([[0, 1, 0, 2]], dtype=full.dtype))
    for place in ((5, 7), (63, 95)):
        faulty = pruned.clone()
        faulty[place] = 0.5 if faulty[place] == 0 else 0
        assert not is_pruned(full, faulty)


def test_two_four_codecs():
    dense = dense_input(Workload((64, 96), "bf16", 0.0))
    isa = bitmask.get_isa()
    assert checking_codec(isa).round_trips(two_four_input(WORKLOAD))
    assert pruning_codec(isa).round_trips(dense)
    with pytest.raises(ValueError, match="row 0, columns 0 to 3: got 4 non-zeros"):
        checking_codec(isa).compress(dense)
    torch_layout = next(codec for codec in pruning_peers() if codec.name.startswith("topk"))
    assert torch_layout.round_trips(dense)


@pytest.mark.parametrize("pattern", [SCATTERED, BLOCKS, TWO_FOUR])
def test_patterns(pattern):
    dense = pattern_input(WORKLOAD, pattern)
    assert (dense.shape, dense.dtype) == ((64, 96), torch.float16)
    assert 0.4 < (dense == 0).float().mean() < 0.6
    assert not (dense.view(torch.int16) == -(2**15)).any(), "a negative zero"
    occupied = (dense.view(2, 32, 3, 32) != 0).any(dim=3).any(dim=1)
    assert int(occupied.sum()) == (3 if pattern == BLOCKS else 6)


@pytest.mark.parametrize("pattern", [SCATTERED, BLOCKS, TWO_FOUR])
def test_products_of_formats(pattern):
    """Every contender multiplies by the weight that it stands for."""
    workload = Workload((64, 96), "fp32", 0.5)
    layers = Layers.like(workload, pattern_input(workload, pattern), 2**14)
    x = torch.randn(3, 96)
    names = []
    for product in format_products(layers, pattern, 3, 2**14):
        assert len(product.weights) == len(layers.dense)
        assert Reference(x, layers.dense[0]).accepts(product.multiply(x, product.weights[0]), lossy=False)
        names.append(product.name)
    others = {SCATTERED: {"torch COO"}, BLOCKS: {"BSR"}, TWO_FOUR: {"2:4"}}
    assert {"F.linear", "bitmask"} | others[pattern] <= set(names)


def test_conversions_are_proven(monkeypatch):
    workload = Workload((64, 96), "fp32", 0.5)
    budget = Budget(min_rounds=1, max_rounds=1, slow_rounds=1, seconds=0.0)
    found = measure_conversions(workload, BLOCKS, 1, budget, 2**14)
    assert [(result.conversion, result.contender) for result in found] == [
        ("to BSR", "bitmask"),
        ("to BSR", "torch"),
        ("from BSR", "bitmask"),
        ("from BSR", "torch"),
    ]
    assert {result.nbytes for result in found} == {3 * (32 * 32 * 4 + 8) + 3 * 8}
    (layout,) = LAYOUTS[BLOCKS]
    wrong = replace(layout, from_bitmask=lambda packed: (2 * packed.to_dense()).to_sparse_bsr((32, 32)))
    monkeypatch.setitem(LAYOUTS, BLOCKS, (wrong,))
    with pytest.raises(WrongRoundTripError, match="BSR of 64x96 fp32"):
        measure_conversions(workload, BLOCKS, 1, budget, 2**14)


def format_result(contender, pattern, sparsity, speedup):
    return FormatProductResult(
        **vars(replace(linear_result(1, speedup), contender=contender, sparsity=sparsity)), pattern=pattern
    )


def test_speedups_of_formats():
    """The bitmask's are those with scattered zeros, dense contenders have none."""
    results = [
        format_result("bitmask", SCATTERED, 0.9, 3.0),
        format_result("bitmask", SCATTERED, 0.5, 2.0),
        format_result("bitmask", BLOCKS, 0.5, 9.0),
        format_result("BSR", BLOCKS, 0.5, 4.0),
        format_result("F.linear", SCATTERED, 0.5, 1.0),
        format_result("dense, saturated", SCATTERED, 0.5, 1.0),
    ]
    assert speedups(results) == {"bitmask": [(0.5, 2.0), (0.9, 3.0)], "BSR": [(0.5, 4.0)]}
    assert results[0].size_ratio == 0.5


def test_results_of_several_kinds_are_read_back():
    conversion = ConversionResult("bitmask", "fp32", 0.5, Summary.of([1.0]), 2, "to CSR", SCATTERED, (8, 16), 99, 3.0)
    results = [conversion, format_result("bitmask", SCATTERED, 0.5, 2.0)]
    read = reader_of(ConversionResult, FormatProductResult)
    assert [read(json.loads(json.dumps(result.to_json()))) for result in results] == results
    assert conversion.speedup == 3.0
    with pytest.raises(ValueError, match="unpack"):
        read({"contender": "bitmask"})


@pytest.mark.skipif(not have_matplotlib(), reason="needs matplotlib")
@pytest.mark.parametrize("suite", ["semi_structured", "formats"])
def test_plots(tmp_path, suite):
    stored, drawn = tmp_path / "results.json", tmp_path / "plot.png"
    done = run("--quick", "--suite", suite, "--dtypes", "fp32", "--json", str(stored), "--plot", str(drawn))
    assert done.returncode == 0, done.stderr
    assert drawn.stat().st_size > 1000
    done = run("--table", str(stored), "--sparsities", "0.5", "--rows", "1", "--plot", str(drawn))
    assert done.returncode == 2
    assert "a plot needs results at two" in done.stderr


@pytest.mark.skipif(not have_matplotlib(), reason="needs matplotlib")
def test_a_suite_without_a_plot_is_refused_before_it_runs(tmp_path):
    done = run("--quick", "--suite", "pretrained", "--plot", str(tmp_path / "plot.png"))
    assert done.returncode == 2
    assert "the suite pretrained has no plot" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_where_nothing_can_be_written_is_refused_before_it_runs(tmp_path, option):
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "file" / "x", "is no directory that can be written to"),
        (tmp_path, "is a directory"),
    ):
        done = run("--quick", option, str(path))
        assert done.returncode == 2
        assert message in done.stderr
        assert not done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.stem)
def test_stored_reports_have_tables(path):
    of_a_gpu = GpuReport.load(path)
    if of_a_gpu is not None:
        assert "| " in of_a_gpu.markdown()
        return
    suites = find_suites()
    report = Report.load(path, {name: suite.read for name, suite in suites.items()})
    assert "| " in suites[report.suite].tables(report)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "benchmark.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("suite", "options", "title"),
    [
        ("linear", ["--sparsities", "0.5"], "**m = 1, fp32"),
        ("block_sparse", ["--shapes", "40x130", "--blocks", "16"], "**40x130 fp32, blocks of 16"),
        ("semi_structured", ["--rows", "1,3"], "**40x132 fp32, "),
        ("formats", ["--rows", "1"], "**64x96 fp32: bytes, of dense**"),
    ],
)
def test_quick_suites_and_their_tables(tmp_path, suite, options, title):
    path = str(tmp_path / "results.json")
    for arguments in (["--quick", "--suite", suite, "--dtypes", "fp32", *options, "--json", path], ["--table", path]):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    assert title in done.stdout


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("semi_structured", ["--dtypes", "int8"], "no products in int8"),
        ("semi_structured", ["--sparsities", "0.7"], "--sparsities takes 0.5 alone"),
        ("semi_structured", ["--shapes", "8x6"], "columns are a multiple of 4, unlike those of 8x6"),
        ("formats", ["--dtypes", "fp8"], "no products in fp8"),
        ("formats", ["--shapes", "40x64"], "multiples of 32, unlike 40x64"),
    ],
)
def test_suites_refuse_what_they_cannot_run(suite, options, message):
    done = run("--quick", "--suite", suite, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_block_sparse_refuses_other_dtypes():
    done = run("--quick", "--suite", "block_sparse", "--dtypes", "int8")
    assert done.returncode == 2
    assert "no products in int8" in done.stderr
