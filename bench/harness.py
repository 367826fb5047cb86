"""Times contenders against each other: interleaved in one run, medians, ratios round by round.

A machine's speed drifts, so every round calls every contender once, and ratios are taken within a round. How one sample
is taken is a Sampler's business: by the host's clocks here, by a GPU's events in gpu.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]
Sampler = Callable[[Call], Callable[[], float]]  # warms a contender up; what it gives takes a sample: seconds per call


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


def host_sampler(clock: Callable[[], float] = time.thread_time, sample_seconds: float = 0.01) -> Sampler:
    """By CPU time of this thread: on a busy machine the wall clock (``time.perf_counter``) of several threads measures
    the neighbours. Short calls are repeated to fill a sample."""

    def warm_up(call: Call) -> Callable[[], float]:
        call()
        start, calls = clock(), 0
        while clock() - start < sample_seconds / 4:
            call()
            calls += 1
        repeats = max(1, round(sample_seconds * calls / (clock() - start)))

        def sample() -> float:
            start = clock()
            for _ in range(repeats):
                call()
            return (clock() - start) / repeats

        return sample

    return warm_up


def compare(contenders: Mapping[str, Call], baseline: str, sampler: Sampler, *, rounds: int = 15) -> dict[str, Timing]:
    """Time every contender in every round; the ratio is the baseline's time over the contender's, above 1 is faster.

    Args:
        contenders: by name, what to call. Results must have been checked before.
        baseline: the name that the others are compared with.
        rounds: samples of each contender; the spread given is the quartiles of the rounds' ratios.
    """
    takers = {name: sampler(call) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, take in takers.items():
            samples[name].append(take())
    timings = {}
    for name, own in samples.items():
        ratios = [theirs / mine for theirs, mine in zip(samples[baseline], own, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        timings[name] = Timing(name, statistics.median(own), middle, low, high)
    return timings
