"""One cell: every contender proven right on its first layer, then all of them timed in turn."""

from collections.abc import Callable

from benchmarks.block_sparse.contenders import Contest, Way
from benchmarks.block_sparse.result import DENSE, TORCH_BSR, BlockSparseResult
from benchmarks.linear.measure import WrongProductError
from benchmarks.timer import Budget, Contender, interleave, torch_threads


def measure(
    contest: Contest, dtype: str, threads: int, budget: Budget, say: Callable[[str], None]
) -> list[BlockSparseResult]:
    """Time every contender.

    Torch's BSR with a wrong result is left out and named; this library and the dense way raise `WrongProductError`.
    """
    n, k = contest.dense.shape
    rows = len(contest.operands.x)
    with torch_threads(threads):
        ways = [way for way in contest.ways() if _is_right(contest, way, say)]
        contenders = [Contender(way.in_turn(), slow=way.contender == TORCH_BSR) for way in ways]
        summaries = interleave(contenders, 1, budget)
    (dense_ms,) = (found.median_ms for way, found in zip(ways, summaries, strict=True) if way.contender == DENSE)
    return [
        BlockSparseResult(
            contender=way.contender,
            dtype=dtype,
            sparsity=way.weight.sparsity if way.weight else 0.0,
            threads=threads,
            summary=summary,
            part=contest.part,
            shape=(n, k),
            rows=rows,
            block=way.weight.block if way.weight else 0,
            kept_elements=way.weight.kept_elements if way.weight else n * k,
            layers=len(way.layers),
            dense_ms=dense_ms,
        )
        for way, summary in zip(ways, summaries, strict=True)
    ]


def _is_right(contest: Contest, way: Way, say: Callable[[str], None]) -> bool:
    if contest.is_right(way.weight, way.work(way.layers[0])):
        return True
    block = f" of {way.weight.block}, {way.weight.sparsity:.0%} zeros" if way.weight else ""
    problem = f"{contest.part} is wrong: {way.contender}{block}, {len(contest.operands.x)} rows"
    if way.contender != TORCH_BSR:
        raise WrongProductError(problem)
    say(f"left out: {problem}")
    return False
