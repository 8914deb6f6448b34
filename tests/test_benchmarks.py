"""What the benchmarks are made of: reports that are read back, checks that bite, and the suites' quick runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_figures():
    result = linear_result(1, 2.0)
    assert (result.speedup, result.saturated_speedup, result.ceiling, result.ceiling_share) == (2.0, 1.5, 2.0, 0.75)


@pytest.mark.parametrize(
    ("speedups", "expected"), [((2.0, 0.5), 2.0), ((2.0, 1.5), None), ((0.5, 0.4), None), ((1.0, 0.5), 1.0)]
)
def test_crossover(speedups, expected):
    found = crossover([linear_result(rows, speedup) for rows, speedup in zip((1, 4), speedups, strict=True)])
    assert found == expected


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
    for result in (model, linear_result(1, 2.0)):
        assert type(result).from_json(json.loads(json.dumps(result.to_json()))) == result


def test_selection():
    result = linear_result(4, 1.0)
    assert Selection().admits(result)
    assert Selection(shapes=((8, 16),), dtypes=("bf16",), sparsities=(0.5,), rows=(4,)).admits(result)
    assert not Selection(rows=(1,)).admits(result)


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


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.stem)
def test_stored_reports_have_tables(path):
    of_a_gpu = GpuReport.load(path)
    if of_a_gpu is not None:
        assert "| " in of_a_gpu.markdown()
        return
    suites = find_suites()
    report = Report.load(path, {name: suite.result for name, suite in suites.items()})
    assert "| " in suites[report.suite].tables(report)


def test_quick_linear_and_its_table(tmp_path):
    path = tmp_path / "linear.json"
    arguments = ["--quick", "--suite", "linear", "--dtypes", "fp32", "--sparsities", "0.5", "--json", str(path)]
    for command in (arguments, ["--table", str(path)]):
        done = subprocess.run(
            [sys.executable, "benchmark.py", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "**m = 1, fp32" in done.stdout
