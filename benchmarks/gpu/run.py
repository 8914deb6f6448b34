"""A run on a GPU from beginning to end; what was found is written after every suite."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Selection
from benchmarks.gpu.device import Device
from benchmarks.gpu.header import GpuHeader
from benchmarks.gpu.plan import GpuPlan
from benchmarks.gpu.report import GPU_SUITES, GpuReport

_RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass(frozen=True)
class GpuOrder:
    """What was asked for: no suites means all of them."""

    suites: Sequence[str]
    selection: Selection
    quick: bool
    path: Path | None
    rivals: Path | None


def run_on(device: Device, order: GpuOrder, say: Callable[[str], None]) -> GpuReport:
    """Run the suites, and save the report where asked for; else in results/, under the name of the GPU.

    Of a quick run, whose figures mean nothing, no file is kept unless it is asked for.
    """
    with torch.inference_mode():
        header = GpuHeader.of_this_run(device, order.quick)
        for line in header.lines():
            say(line)
        path = order.path or (None if order.quick else _default_path(header, order.suites))
        results: dict[str, Sequence[Any]] = {}
        report = GpuReport(header, results)
        gc.freeze()  # what was imported is not looked through again whenever memory is given back
        for name in order.suites or GPU_SUITES:
            suite = GPU_SUITES[name]
            say(f"\n== {name}: {suite.summary}")
            start = time.monotonic()
            plan = GpuPlan(device, header, order.selection, start + suite.seconds, say, order.rivals)
            results[name] = suite.run(plan)
            say(f"\n{name} took {time.monotonic() - start:.0f} s")
            if path is not None:
                report.save(path)
                say(f"written: {path}")
    return report


def _default_path(header: GpuHeader, suites: Sequence[str]) -> Path:
    return _RESULTS / ("-".join([header.slug(), *suites]) + ".json")
