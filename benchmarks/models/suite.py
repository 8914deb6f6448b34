"""What the suites of whole models have in common."""

from collections.abc import Callable

from benchmarks.models.result import ModelResult, tables
from benchmarks.suites import Plan, Suite


def model_suite(summary: str, run: Callable[[Plan, Callable[[str], None]], list[ModelResult]]) -> Suite[ModelResult]:
    """A suite of `ModelResult`s, on all threads, with memory as malloc recycles it."""
    return Suite(
        summary=summary,
        read=ModelResult.from_json,
        default_threads=lambda every: (every,),
        peers=dict,
        run=run,
        tables=tables,
        fresh_memory=False,
    )
