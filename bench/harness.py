"""Times contenders against each other: interleaved in one run, medians, ratios round by round.

A machine's speed drifts, so every round calls every contender once, and ratios are taken within a round. CPU time of
one thread by default: on a busy machine the wall clock of several threads measures the neighbours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One contender: seconds per call (median over the rounds), and the baseline's time over its own."""

    name: str
    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def describe(self) -> str:
        return f"{self.seconds * 1e6:10.1f} us  {self.ratio:6.2f} x  ({self.ratio_low:.2f} .. {self.ratio_high:.2f})"


def _calls_per_sample(call: Call, clock: Callable[[], float], seconds: float) -> int:
    call()
    start = clock()
    calls = 0
    while clock() - start < seconds / 4:
        call()
        calls += 1
    return max(1, calls * 4)


def compare(
    contenders: Mapping[str, Call],
    baseline: str,
    *,
    rounds: int = 15,
    sample_seconds: float = 0.01,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, Timing]:
    """Time every contender in every round; the ratio is the baseline's time over the contender's, above 1 is faster.

    Args:
        contenders: by name, what to call. Results must have been checked before.
        baseline: the name that the others are compared with.
        rounds: samples of each contender; the spread given is the quartiles of the rounds' ratios.
        sample_seconds: about how long one sample lasts: short calls are repeated to fill it.
        clock: CPU time of this thread, or ``time.perf_counter`` for the wall clock.
    """
    repeats = {name: _calls_per_sample(call, clock, sample_seconds) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            samples[name].append((clock() - start) / repeats[name])
    timings = {}
    for name, own in samples.items():
        ratios = [theirs / mine for theirs, mine in zip(samples[baseline], own, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        timings[name] = Timing(name, statistics.median(own), middle, low, high)
    return timings
