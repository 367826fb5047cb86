"""Figures as people read them."""

from __future__ import annotations

from neox_kernels.bench.record import CaseRecord, Result, Spread


def seconds_text(seconds: float) -> str:
    """Three digits: 1.23 us, 45.6 ms, 789 ms, 1.20 s."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{three_digits(seconds * factor)} {unit}"
    return f"{three_digits(seconds)} s"


def three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def rate_text(case: CaseRecord, result: Result) -> str:
    unit = "GFLOP/s" if case.flops else "GB/s"
    return f"{three_digits(case.rate(result) / 1e9)} {unit}"


def ratio_text(ratio: Spread) -> str:
    return f"{three_digits(ratio.middle)} x ({three_digits(ratio.low)} to {three_digits(ratio.high)})"
