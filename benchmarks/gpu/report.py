"""A whole run on a GPU: written to JSON, read back, and set as Markdown."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Selection
from benchmarks.gpu import block_sparse, codec, decode, decode_blocks, linear, semi_structured
from benchmarks.gpu.header import GpuHeader
from benchmarks.gpu.plan import GpuPlan
from benchmarks.gpu.products import GpuProductResult
from benchmarks.report import Result

_FORMAT = 1
_DEVICE = "cuda"


@dataclass(frozen=True)
class GpuSuite:
    """`run` gets the results, for at most about `seconds`, `tables` sets them as Markdown."""

    summary: str
    seconds: float
    result: type[Result]
    run: Callable[[GpuPlan], Sequence[Any]]
    tables: Callable[[Sequence[Any]], Iterable[str]]


# In the order in which they run. tests/run_gpu.sh runs the first three in one phase and the others in another, for less
# than nine minutes each.
GPU_SUITES = {
    "codec": GpuSuite("compress and decompress", 60, codec.GpuCodecResult, codec.run, codec.tables),
    "linear": GpuSuite("multiply", 210, linear.GpuLinearResult, linear.run, linear.tables),
    "decode": GpuSuite("decode with whole models", 120, decode.DecodeResult, decode.run, decode.tables),
    "block_sparse": GpuSuite("block-sparse layers", 220, GpuProductResult, block_sparse.run, block_sparse.tables),
    "semi_structured": GpuSuite("2:4", 120, GpuProductResult, semi_structured.run, semi_structured.tables),
    "decode_blocks": GpuSuite(
        "decode with block-sparse models", 100, decode.DecodeResult, decode_blocks.run, decode_blocks.tables
    ),
}


@dataclass(frozen=True)
class GpuReport:
    """The results of each suite that ran."""

    header: GpuHeader
    results: Mapping[str, Sequence[Any]]

    def save(self, path: Path) -> None:
        """Write the run as JSON."""
        document = {
            "format": _FORMAT,
            "device": _DEVICE,
            "header": self.header.to_json(),
            "suites": {name: [result.to_json() for result in results] for name, results in self.results.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "GpuReport | None":
        """Read a run that `save` wrote; None where the file says nothing of a GPU, and may be of a CPU.

        `ValueError` where it is of an unknown format or suite.
        """
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or document.get("device") != _DEVICE:
            return None
        if document.get("format") != _FORMAT or not document["suites"].keys() <= GPU_SUITES.keys():
            raise ValueError(f"{path} is not a benchmark report of format {_FORMAT}")
        results = {
            name: [GPU_SUITES[name].result.from_json(each) for each in stored]
            for name, stored in document["suites"].items()
        }
        return cls(GpuHeader.from_json(document["header"]), results)

    def only(self, selection: Selection) -> "GpuReport":
        """The results that the selection admits, by what each of them has."""
        results = {name: [each for each in found if selection.admits(each)] for name, found in self.results.items()}
        return replace(self, results={name: found for name, found in results.items() if found})

    def markdown(self) -> str:
        """Everything, as it is set in the README."""
        tables = [table for name, results in self.results.items() for table in GPU_SUITES[name].tables(results)]
        return "\n\n".join([self.header.markdown(), *tables])
