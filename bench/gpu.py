"""Timing on a GPU: by its own events, with its L2 cache flushed before every call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from neox_kernels.bench.harness import Call

DEVICE = "cuda"
LEAST_FLUSH = 64 << 20  # bytes
WARM_UP = 5  # calls: the first compile, allocate, and fetch code
AHEAD = 2  # times as long as the host takes to launch a call, the GPU is kept busy before it
MOST_FLUSHES = 200


def describe() -> dict[str, object]:
    """The device, for the record of a run."""
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "device": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


class CudaSampler:
    """Seconds of the GPU per call, median of ``calls``, each between two events of the current stream.

    Before each call twice the L2 cache is overwritten, so often that the GPU is still at it when the host has launched
    the whole call: the kernels and the gaps between them are timed, and not how fast Python launches. A call that waits
    for the GPU itself cannot be launched ahead; of that, all is timed.
    """

    def __init__(self, calls: int = 10) -> None:
        self.calls = calls
        l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self.flush = torch.empty(max(2 * l2_bytes, LEAST_FLUSH), dtype=torch.int8, device=DEVICE)
        self.flush_seconds = self.sample(self.flush.zero_, flushes=1)

    def __call__(self, call: Call) -> Callable[[], float]:
        host = min(_host_seconds(call) for _ in range(WARM_UP))
        flushes = min(1 + int(AHEAD * host / self.flush_seconds), MOST_FLUSHES)
        return lambda: self.sample(call, flushes)

    def sample(self, call: Call, flushes: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.calls)]
        for start, end in pairs:
            for _ in range(flushes):
                self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        milliseconds = statistics.median(start.elapsed_time(end) for start, end in pairs)
        return float(milliseconds) / 1e3


def _host_seconds(call: Call) -> float:
    """How long the host takes to launch a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


class WallSampler:
    """Seconds per call by the wall clock, of many calls one after another: what bounds them is what a user waits for,
    the GPU's work or the host's launches. The L2 cache holds what fits."""

    def __init__(self, calls: int = 50) -> None:
        self.calls = calls

    def __call__(self, call: Call) -> Callable[[], float]:
        for _ in range(WARM_UP):
            call()
        return lambda: self.sample(call)

    def sample(self, call: Call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.calls
