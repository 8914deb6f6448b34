"""A real pretrained model, pruned, dense against compressed: embeddings, latency and memory.

Its weights are so small that a cache may hold them: what is fast here is arithmetic, not memory.
"""

from collections.abc import Callable
from functools import partial

from benchmarks.cases import DTYPES, Selection
from benchmarks.models.measure import Subject, measure_each
from benchmarks.models.minilm import NAME, compare, encode_phase, make_minilm
from benchmarks.models.result import ModelResult
from benchmarks.models.suite import model_suite
from benchmarks.suites import Plan
from benchmarks.timer import Budget

_DEFAULT = Selection(dtypes=("fp32", "bf16"), sparsities=(0.5,), rows=(1, 32))
_BUDGET = Budget(min_rounds=15, max_rounds=101, slow_rounds=0, seconds=4.0)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=0, seconds=0.0)


def _run(plan: Plan, say: Callable[[str], None]) -> list[ModelResult]:
    selection = plan.selection.over(_DEFAULT)
    budget = _QUICK_BUDGET if plan.quick else _BUDGET
    phases = [encode_phase(rows, budget) for rows in selection.rows]

    def subject(dtype: str, sparsity: float) -> Subject:
        return Subject(
            name=NAME,
            dtype=dtype,
            sparsity=sparsity,
            make=partial(make_minilm, DTYPES[dtype]),
            body="",
            phases=phases,
            compare=compare,
        )

    return measure_each(selection, subject, plan.header.threads, say)


SUITE = model_suite("all-MiniLM-L6-v2, pruned: embeddings, latency and memory, dense against compressed", _run)
