"""What the benchmarks are made of: reports that are read back, checks that bite, and the suites' quick runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.block_sparse.checks import blocks_are_right, product_is_right
from benchmarks.block_sparse.contenders import Contest
from benchmarks.block_sparse.plot import break_even, verdict
from benchmarks.block_sparse.result import FORWARD, GRAD_INPUT, GRAD_WEIGHT, PRODUCTS, STEP, BlockSparseResult
from benchmarks.block_sparse.weights import BlockWeight, Operands
from benchmarks.cases import Selection
from benchmarks.gpu.report import GpuReport
from benchmarks.linear.measure import Reference
from benchmarks.linear.plot import crossover
from benchmarks.linear.result import BITMASK, LinearResult
from benchmarks.models.result import Agreement, ModelResult, Sizes
from benchmarks.report import Report
from benchmarks.suites import find_suites
from benchmarks.timer import Summary

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
    assert [way.weight for way in ways] == [None, weight]
    assert all(contest.is_right(way.weight, way.work(way.layers[0])) for way in ways)


@pytest.mark.parametrize("part", [FORWARD, GRAD_INPUT, GRAD_WEIGHT])
def test_block_checks_notice_blocks_at_other_places(part):
    contest = block_contest(part)
    (weight,) = contest.weights
    *_, way = contest.ways()
    faulty = replace(weight, mask=weight.mask.roll(1, dims=1))
    assert not contest.is_right(faulty, way.work(way.layers[0]))


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
    ],
)
def test_quick_suites_and_their_tables(tmp_path, suite, options, title):
    path = str(tmp_path / "results.json")
    for arguments in (["--quick", "--suite", suite, "--dtypes", "fp32", *options, "--json", path], ["--table", path]):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    assert title in done.stdout


def test_block_sparse_refuses_other_dtypes():
    done = run("--quick", "--suite", "block_sparse", "--dtypes", "int8")
    assert done.returncode == 2
    assert "no products in int8" in done.stderr
