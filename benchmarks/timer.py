"""How time is taken: contenders in turn, on fresh memory, reported as a median with its spread.

Contenders are interleaved (every round calls each of them once, each round beginning with the next one), so that a slow
spell of the machine hits all of them alike. Each result is dropped before the next call, and the C library is told to
map large blocks afresh, so that every call pays the page faults of its result, as it does when a model is loaded.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Contender:
    """Something to time.

    `call(i)` runs it on input i, `prepare()` goes before it outside of the timed part, and `slow` marks one that gets
    few repetitions.
    """

    call: Callable[[int], object]
    prepare: Callable[[], object] = lambda: None
    slow: bool = False


@dataclass(frozen=True)
class Budget:
    """How often to repeat: between `min_rounds` and `max_rounds`, until the fast contenders took `seconds`."""

    min_rounds: int
    max_rounds: int
    slow_rounds: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Spread of one contender's samples, in milliseconds."""

    samples: int
    min_ms: float
    q1_ms: float
    median_ms: float
    q3_ms: float
    max_ms: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> "Summary":
        """Summarise the samples (at least one)."""
        spread = [milliseconds[0]] * 3
        if len(milliseconds) > 1:
            spread = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(len(milliseconds), min(milliseconds), spread[0], spread[1], spread[2], max(milliseconds))

    def per(self, calls: int) -> "Summary":
        """The same for one call, where each sample is of so many."""
        times = (self.min_ms, self.q1_ms, self.median_ms, self.q3_ms, self.max_ms)
        return Summary(self.samples, *(milliseconds / calls for milliseconds in times))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the body with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


Stopwatch = Callable[[Callable[[], object]], float]  # calls a function, and returns the milliseconds it took


def host_milliseconds(work: Callable[[], object]) -> float:
    """By the clock of this machine; what the work returns is dropped afterwards."""
    start = time.perf_counter_ns()
    result = work()
    elapsed = time.perf_counter_ns() - start
    del result
    return elapsed / 1e6


def interleave(
    contenders: Sequence[Contender], inputs: int, budget: Budget, stopwatch: Stopwatch = host_milliseconds
) -> list[Summary]:
    """Time the contenders in turn over `inputs` rotating inputs; one summary for each, in their order."""

    def sample(contender: Contender, index: int) -> float:
        contender.prepare()
        return stopwatch(partial(contender.call, index))

    samples: list[list[float]] = [[] for _ in contenders]
    calls = 0
    spent = 0.0
    with _no_garbage_collection():
        for contender in contenders:
            sample(contender, 0)
        for turn in range(budget.max_rounds):
            if turn >= budget.min_rounds and spent > budget.seconds * 1e3:
                break
            for place in range(len(contenders)):
                which = (turn + place) % len(contenders)
                contender = contenders[which]
                if contender.slow and turn >= budget.slow_rounds:
                    continue
                elapsed = sample(contender, calls % inputs)
                samples[which].append(elapsed)
                spent += 0.0 if contender.slow else elapsed
                calls += 1
    return [Summary.of(each) for each in samples]


def copy_bandwidth(threads: int, nbytes: int, rounds: int = 9) -> float:
    """GB/s of the best of `rounds` copies between two existing buffers of `nbytes`, counting reads and writes."""
    source = torch.ones(nbytes, dtype=torch.uint8).view(torch.float32)
    target = torch.zeros_like(source)
    with torch_threads(threads):
        budget = Budget(min_rounds=rounds, max_rounds=rounds, slow_rounds=0, seconds=0.0)
        (summary,) = interleave([Contender(lambda _: target.copy_(source))], 1, budget)
    return 2 * nbytes / summary.min_ms / 1e6
