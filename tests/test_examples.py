"""examples/ as a user runs them, in small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, ROOT / "examples/train_block_sparse.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_all_variants_learn():
    done = run("--steps", 120, "--width", 256, "--batch", 128)
    assert done.returncode == 0, done.stderr
    by_frequency = float(re.search(r"by frequency alone (\d\.\d+)", done.stdout)[1])
    rows = re.findall(r"^(dense|\d+% (?:from scratch|of trained)) +(\d+) +(.*)$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in rows] == [
        "dense",
        *(f"{density}% from scratch" for density in (50, 25, 10)),
        *(f"{density}% of trained" for density in (100, 50, 25, 10)),
    ]
    found = {name: [float(figure) for figure in figures.replace("%", "").split()[:3]] for name, _, figures in rows}
    before, loss, accuracy = found["dense"]
    assert before > 4
    assert loss < by_frequency - 0.3
    assert accuracy > 30
    for density in (50, 25, 10):
        before, loss, _ = found[f"{density}% from scratch"]
        assert before > 4
        assert loss < by_frequency - 0.2
    for density in (100, 50, 25, 10):
        before, loss, _ = found[f"{density}% of trained"]
        assert loss < before
        assert loss < by_frequency - 0.3
    parameters = {name: int(figures.split()[-1].replace(",", "")) for name, _, figures in rows}
    assert parameters["10% from scratch"] == parameters["10% of trained"] < parameters["dense"] / 4


@pytest.mark.parametrize("arguments", [("--width", 40), ("--steps", 0)])
def test_bad_command_lines_say_why(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "--width is a multiple of 32" in done.stderr
