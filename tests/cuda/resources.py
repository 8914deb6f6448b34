"""What each CUDA kernel takes of a multiprocessor, as ptxas prints it, held against the table in resources.json.

    python tests/cuda/resources.py [--update] [FILE.cu ...]       default: every csrc/cuda/*.cu

Fails where a kernel spills registers, keeps a stack frame, has its wgmma instructions serialized, or takes more
registers or static shared memory than the table says, and where the table and the kernels are not the same ones.
Dynamic shared memory is no business of ptxas: launchers ask for it. --update writes the table anew; spills, stack
frames and serialized instructions still fail. nvcc is that of CUDA_HOME, else of /usr/local/cuda, else of PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")

# Of what ptxas -v prints for each kernel, in this order.
COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")

# kernel -> architecture -> resource -> number
Table = dict[str, dict[str, dict[str, int]]]


def find_nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    found = next((place for place in [*places, "nvcc"] if shutil.which(place)), None)
    if found is None:
        raise SystemExit("resources.py: no nvcc: set CUDA_HOME to a CUDA toolkit")
    return found


def compile_verbosely(nvcc: str, source: Path, architecture: str) -> str:
    """What ptxas has to say of one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O3", f"-arch={architecture}", f"-I{ROOT / 'csrc' / 'cuda'}", "-Xptxas", "-v"]
        command = [nvcc, *flags, "-cubin", str(source), "-o", str(Path(folder, "kernels.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"resources.py: {' '.join(command)}\n{done.stdout}{done.stderr}")
    text = done.stdout + done.stderr
    if lines := [line for line in text.splitlines() if "serialized" in line]:  # wgmma, where ptxas takes sums for used
        raise SystemExit(f"resources.py: {source.name}: {lines[0]}")
    return text


def parse(text: str) -> Table:
    """The numbers in what ptxas printed, by mangled name."""
    table: Table = {}
    numbers: dict[str, int] = {}
    for line in text.splitlines():
        if kernel := COMPILING.search(line):
            numbers = table.setdefault(kernel[1], {}).setdefault(kernel[2], {})
        elif frame := FRAME.search(line):
            numbers["stack"], numbers["spills"] = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := USED.search(line):
            shared = SHARED.search(line)
            numbers["registers"], numbers["static_shared"] = int(used[1]), int(shared[1]) if shared else 0
    return table


def demangle(table: Table) -> Table:
    """Kernels by the names in the source, without what every one has: namespaces, parameters, unnamed namespaces."""
    names = subprocess.run(["c++filt", *table], capture_output=True, text=True, check=True).stdout.splitlines()
    shown = [re.sub(r"^void |\(anonymous namespace\)::|bitmask::cuda::", "", name) for name in names]
    shown = [re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)$", "", name) for name in shown]
    if len(set(shown)) < len(shown):
        raise SystemExit(f"resources.py: kernels that differ only in what is left out of their names: {sorted(shown)}")
    return dict(sorted(zip(shown, table.values(), strict=True)))


def measure(sources: list[Path]) -> dict[str, Table]:
    """File name -> table of its kernels on every architecture."""
    nvcc = find_nvcc()
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(lambda job: compile_verbosely(nvcc, *job), jobs))
    per_file: dict[str, list[str]] = {}
    for (source, _), text in zip(jobs, texts, strict=True):
        per_file.setdefault(source.name, []).append(text)
    return {name: demangle(parse("\n".join(texts))) for name, texts in per_file.items()}


def problems(measured: Table, allowed: Table) -> list[str]:
    """What is wrong with the kernels of one file."""
    found = [f"{name}: not a kernel any more (--update)" for name in allowed.keys() - measured.keys()]
    for name, architectures in measured.items():
        for architecture, numbers in architectures.items():
            where = f"{name} on {architecture}"
            if numbers["spills"] > 0 or numbers["stack"] > 0:
                found.append(f"{where}: {numbers['spills']} bytes of spills, {numbers['stack']} bytes of stack frame")
            limits = allowed.get(name, {}).get(architecture)
            if limits is None:
                found.append(f"{where}: not in {TABLE.name} (--update)")
                continue
            for resource in ("registers", "static_shared"):
                if numbers[resource] > limits[resource]:
                    found.append(f"{where}: {numbers[resource]} {resource}, at most {limits[resource]} (--update)")
    return sorted(found)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write what is measured to {TABLE.name}")
    parser.add_argument("sources", nargs="*", type=Path, help="default: every csrc/cuda/*.cu")
    chosen = parser.parse_args(arguments)
    everything = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = chosen.sources or everything
    measured = measure(sources)
    table: dict[str, Table] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if chosen.update:
        names = {source.name for source in everything}
        table = {name: kernels for name, kernels in (table | measured).items() if name in names}
        text = json.dumps(table, indent=1, sort_keys=True)
        # The numbers of a kernel on one line.
        TABLE.write_text(re.sub(r"\{[^{}]*\}", lambda numbers: " ".join(numbers[0].split()), text) + "\n")
    found = [f"{name}: {problem}" for name in measured for problem in problems(measured[name], table.get(name, {}))]
    if not chosen.sources:
        found += [f"{name}: not a file any more (--update)" for name in table.keys() - measured.keys()]
    kernels = sum(len(kernels) for kernels in measured.values())
    print("\n".join(found) or f"{kernels} kernels within {TABLE.name} on {', '.join(ARCHITECTURES)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
