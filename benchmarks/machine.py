"""What a timing depends on: the hardware, the versions and the settings of this run."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import bitmask
from benchmarks.timer import copy_bandwidth

_ROOT = Path(__file__).resolve().parent.parent
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST_UNCACHED_NBYTES = 128 * 2**20


@dataclass(frozen=True)
class Header:
    """Hardware, versions and settings; `copy_bandwidth` is in GB/s (read + write) by number of threads."""

    cpu: str
    cores: int
    cache_nbytes: int
    memory_nbytes: int
    isa: str
    available_isas: tuple[str, ...]
    copy_bandwidth: dict[int, float]
    transparent_huge_pages: str
    torch_huge_pages: bool
    fresh_memory: bool
    threads: tuple[int, ...]
    bitmask_version: str
    build: dict[str, Any]
    torch_version: str
    python_version: str
    system: str
    commit: str
    date: str

    @classmethod
    def of_this_run(cls, threads: tuple[int, ...], fresh_memory: bool) -> "Header":
        """Look around, and measure the copy bandwidth for each number of threads."""
        cache_nbytes = _last_level_cache_nbytes()
        return cls(
            cpu=_cpu_model(),
            cores=_usable_cores(),
            cache_nbytes=cache_nbytes,
            memory_nbytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            isa=bitmask.get_isa(),
            available_isas=tuple(bitmask.available_isas()),
            copy_bandwidth={count: copy_bandwidth(count, uncached_nbytes(cache_nbytes)) for count in threads},
            transparent_huge_pages=_transparent_huge_pages(),
            torch_huge_pages=os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            fresh_memory=fresh_memory,
            threads=threads,
            bitmask_version=bitmask.__version__,
            build=dict(bitmask.build_info()),
            torch_version=torch.__version__,
            python_version=platform.python_version(),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            commit=git_commit(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Header":
        """Read back what `dataclasses.asdict` gave (JSON turns numbers that are keys into text)."""
        bandwidth = {int(count): value for count, value in stored["copy_bandwidth"].items()}
        return cls(**{**stored, "copy_bandwidth": bandwidth})

    def hardware(self) -> str:
        """The machine on one line, for a caption."""
        cache = f", {self.cache_nbytes / 2**20:.0f} MiB last-level cache" if self.cache_nbytes else ""
        return f"{self.cpu}, {self.cores} cores{cache}, {self.memory_nbytes / 2**30:.0f} GiB memory"

    def software(self) -> str:
        """The versions on one line."""
        return (
            f"bitmask {self.bitmask_version} ({self.commit}), torch {self.torch_version}, Python {self.python_version}"
        )

    def huge_pages(self) -> str:
        """The two settings that decide about huge pages, on one line."""
        by_torch = "asked for" if self.torch_huge_pages else "not asked for"
        return f"transparent huge pages: {self.transparent_huge_pages}, {by_torch} by torch"

    def only_some_get_huge_pages(self) -> bool:
        """Whether those who ask for huge pages get them, and a copy does not ask."""
        return self.transparent_huge_pages == "madvise" and not self.torch_huge_pages

    def bandwidth(self) -> str:
        """The copy bandwidth on one line."""
        return ", ".join(f"{value:.1f} GB/s on {thread_count(count)}" for count, value in self.copy_bandwidth.items())

    def lines(self) -> list[str]:
        """The header that precedes a report."""
        memory = "mapped afresh for each result" if self.fresh_memory else "as malloc recycles it"
        fields = {
            "CPU": self.hardware(),
            "ISA": f"{self.isa} (available: {', '.join(self.available_isas)})",
            "Copy bandwidth": f"{self.bandwidth()} (read + write)",
            "Memory": f"{memory}; {self.huge_pages()}",
            "Threads": ", ".join(map(str, self.threads)),
            "Software": self.software(),
            "System": self.system,
            "Date": self.date,
        }
        return [f"{name:<16}{value}" for name, value in fields.items()]


def uncached_nbytes(cache_nbytes: int) -> int:
    """How many bytes must go by until what was used before them is gone from a cache of `cache_nbytes`."""
    return max(4 * cache_nbytes, _LEAST_UNCACHED_NBYTES)


def git_commit() -> str:
    """What was checked out, or, where git cannot tell, what BITMASK_COMMIT says."""
    commit = _git("rev-parse", "--short", "HEAD")
    if commit is None:
        return os.environ.get("BITMASK_COMMIT", "no commit")
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def thread_count(threads: int) -> str:
    """The number in words: `1 thread`, `2 threads`."""
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _last_level_cache_nbytes() -> int:
    """Bytes of the largest cache of the first core, 0 where the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def _transparent_huge_pages() -> str:
    try:
        found = re.search(r"\[(\w+)\]", _THP.read_text())
    except OSError:
        return "unknown"
    return found.group(1) if found else "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
