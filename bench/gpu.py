"""Timing on a GPU: by its own events, with its L2 cache flushed before every call."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from harness import Call

DEVICE = "cuda"
LEAST_FLUSH = 64 << 20  # bytes
WARM_UP = 5  # calls: the first compile, allocate, and fetch code


def describe() -> dict[str, object]:
    """The device, for the record of a run."""
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


class CudaSampler:
    """Seconds per call, median of ``calls``, each between two events of the current stream.

    Before each call twice the L2 cache is overwritten. That also keeps the GPU busy while the host prepares the call:
    where the preparation is shorter, the kernels alone are timed; where it is longer, what the user waits for.
    """

    def __init__(self, calls: int = 10) -> None:
        self.calls = calls
        l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self.flush = torch.empty(max(2 * l2_bytes, LEAST_FLUSH), dtype=torch.int8, device=DEVICE)

    def __call__(self, call: Call) -> Callable[[], float]:
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize()
        return lambda: self.sample(call)

    def sample(self, call: Call) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.calls)]
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3  # events count milliseconds
