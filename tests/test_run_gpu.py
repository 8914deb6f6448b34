"""tests/run_gpu.sh with stand-ins for the programs of a GPU machine: what it runs, and that it notices what fails."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASKS = re.compile(r"def test_\w+\([^)]*\bdevice\b")  # for the fixture
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROGRAMS = {
    # What it compiles does nothing; what it was to plant is seen by the stand-in for the sanitizer alone.
    "nvcc": 'while [ "$1" != -o ]; do shift; done; printf "#!/bin/sh\\n" > "$2"; chmod +x "$2"',
    "compute-sanitizer": 'echo "$@" >> "$CALLS"; case "$*" in *$BLIND*) exit 0 ;; *planted\\ clean) exit 0 ;; '
    '*planted\\ *) exit 9 ;; esac; case "$*" in *$FAULTY*) exit 9 ;; esac',
    "cuobjdump": 'echo "STT_FUNC STB_GLOBAL STO_ENTRY _ZN7bitmask4cuda5countE"; echo "STT_FUNC STO_ENTRY $KERNEL"',
    "python3": 'echo "python $@" >> "$CALLS"; echo done',
}


@pytest.fixture
def run(tmp_path):
    """Runs the script with arguments; returns what it did, and the commands it gave."""
    for name, body in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    calls = tmp_path / "calls"

    def call(*arguments, **environment):
        calls.write_text("")
        defaults = {"BLIND": "none", "FAULTY": "none", "KERNEL": "_ZN7bitmask3addE", "CALLS": str(calls)}
        done = subprocess.run(
            ["tests/run_gpu.sh", "--out", str(tmp_path / "out"), *arguments],
            cwd=ROOT,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", **defaults, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done, calls.read_text()

    return call


def test_all_phases(run, tmp_path):
    done, calls = run()
    assert done.returncode == 0, done.stdout
    summary = done.stdout.split("== summary")[1].splitlines()[1:]
    assert [line.split()[:2] for line in summary] == [
        [phase, "ok"] for phase in ("build", "tests", "tests-blocks", "smoke", *TOOLS, "benchmark", "benchmark-blocks")
    ]
    for tool in TOOLS:
        assert f"--tool {tool}" in calls
    assert calls.count("small_shapes.py") == len(TOOLS)
    assert calls.count("small_shapes.py --cublas") == 1
    assert "python benchmark.py --device cuda --suite codec,linear,decode --json" in calls
    assert "python benchmark.py --device cuda --suite block_sparse,semi_structured,decode_blocks --json" in calls
    logs = {path.name for path in (tmp_path / "out").iterdir()}
    assert logs == {
        f"{name}.log"
        for name in ("build", "tests", "tests-blocks", "smoke", "sanitizers", "benchmark", "benchmark-blocks")
    }


def test_every_test_that_asks_for_a_device_runs_on_a_gpu(run):
    asking = [path for path in (ROOT / "tests").glob("test_*.py") if ASKS.search(path.read_text())]
    assert len(asking) >= 2
    _, calls = run("tests", "tests-blocks")
    (chosen,) = (line for line in calls.splitlines() if line.endswith("-k gpu or cuda"))
    assert {f"tests/{path.name}" for path in asking} <= set(chosen.split())


def test_chosen_phases(run):
    done, calls = run("--quick", "benchmark")
    assert done.returncode == 0
    assert calls.count("\n") == 1
    assert "--quick" in calls
    assert run("unheard-of")[0].returncode == 2


@pytest.mark.parametrize("tool", TOOLS)
def test_a_sanitizer_that_finds_nothing_planted_is_no_proof(run, tool):
    done, _ = run("sanitizers", BLIND=tool)
    assert done.returncode == 1
    assert f"{tool:<17}FAILED" in done.stdout
    assert done.stdout.count("FAILED") == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_sanitizer_finds_in_the_kernels_fails(run, tool):
    done, _ = run("sanitizers", FAULTY=f"{tool}*small_shapes")
    assert done.returncode == 1
    assert f"{tool:<17}FAILED" in done.stdout
    assert done.stdout.count("FAILED") == 1


def test_a_kernel_that_the_sanitizers_would_not_see_fails_the_build(run):
    done, _ = run("build", KERNEL="_Z7unnamedv")
    assert done.returncode == 1
    assert "_Z7unnamedv" in done.stdout
