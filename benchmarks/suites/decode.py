"""A whole language model, pruned, dense against compressed: tokens per second, memory, and whether both agree."""

from collections.abc import Callable
from functools import partial

from benchmarks.cases import DTYPES, Selection
from benchmarks.models.llama import BODY, compare, decode_phase, make_llama, name_of, prefill_phase
from benchmarks.models.measure import Subject, measure_each
from benchmarks.models.networks import require_transformers
from benchmarks.models.result import ModelResult
from benchmarks.models.suite import model_suite
from benchmarks.suites import Plan
from benchmarks.timer import Budget

_DEFAULT = Selection(dtypes=("bf16", "fp32"), sparsities=(0.5, 0.7, 0.9), rows=(1, 8))
_PROMPTS = (128, 512)
_TOKENS = 32  # that are decoded and timed, and as many again that are compared
_QUICK_PROMPTS = (8, 16)
_QUICK_TOKENS = 4
_PROMPT_BUDGET = Budget(min_rounds=3, max_rounds=5, slow_rounds=0, seconds=5.0)
_QUICK_BUDGET = Budget(min_rounds=2, max_rounds=2, slow_rounds=0, seconds=0.0)


def _run(plan: Plan, say: Callable[[str], None]) -> list[ModelResult]:
    require_transformers()
    selection = plan.selection.over(_DEFAULT)
    prompts, tokens = (_QUICK_PROMPTS, _QUICK_TOKENS) if plan.quick else (_PROMPTS, _TOKENS)
    each_token = Budget(min_rounds=tokens, max_rounds=tokens, slow_rounds=0, seconds=0.0)
    phases = [decode_phase(rows, prompts[0], each_token) for rows in selection.rows]
    phases += [prefill_phase(prompt, _QUICK_BUDGET if plan.quick else _PROMPT_BUDGET) for prompt in prompts]
    name = name_of(plan.quick)

    def subject(dtype: str, sparsity: float) -> Subject:
        return Subject(
            name=name,
            dtype=dtype,
            sparsity=sparsity,
            make=partial(make_llama, DTYPES[dtype], plan.quick),
            body=BODY,
            phases=phases,
            compare=partial(compare, context=prompts[0], steps=tokens),
        )

    return measure_each(selection, subject, plan.header.threads, say)


SUITE = model_suite("tokens per second and memory of a Llama of a billion parameters, dense against compressed", _run)
