"""Times contenders against each other, interleaved in one run.

A machine's speed drifts, so every round calls every contender once, and ratios are taken within a round. How one sample
is taken is a Sampler's business: by the host's clocks here, by a GPU's events in gpu.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], Any]
Sampler = Callable[[Call], Callable[[], float]]  # warms a contender up; what it gives takes a sample: seconds per call


def host_sampler(clock: Callable[[], float] = time.process_time, sample_seconds: float = 0.01) -> Sampler:
    """By CPU time of this process, for some peers work in a thread of their own: on a busy machine the wall clock
    (``time.perf_counter``) measures the neighbours too. Short calls are repeated to fill a sample."""

    def warm_up(call: Call) -> Callable[[], float]:
        start, calls = clock(), 1
        call()
        if clock() - start < sample_seconds:  # else it is long enough, and was warm: it has been checked
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


class Race:
    """Contenders in step: ``samples`` has, by name, the seconds per call of every whole round."""

    def __init__(self, contenders: Mapping[str, Call], sampler: Sampler) -> None:
        self._takers = {name: sampler(call) for name, call in contenders.items()}
        self.samples: dict[str, list[float]] = {name: [] for name in contenders}

    def run_round(self) -> None:
        """Take one sample of each; an interrupted round leaves none."""
        taken = {name: take() for name, take in self._takers.items()}
        for name, seconds in taken.items():
            self.samples[name].append(seconds)
