"""Figures as people read them."""

from __future__ import annotations

from neox_kernels.bench.record import CaseRecord, Result, Spread


def three_digits(value: float) -> str:
    """``0.950``, ``1.50``, ``23.7``, ``184``, ``12 300``."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{float(f'{value:.3g}'):,.0f}".replace(",", "\u202f")


def seconds(value: float) -> str:
    """``31.4 µs``, ``2.05 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale * 0.9995:
            return f"{three_digits(value / scale)}\u00a0{unit}"
    return f"{three_digits(value / 1e-9)}\u00a0ns"


def duration(value: float) -> str:
    """``47 s``, ``12 min 34 s``, ``1 h 02 min``."""
    minutes, rest = divmod(round(value), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def rate(case: CaseRecord, result: Result) -> str:
    """In GFLOP/s where the case has flops, in GB/s where not."""
    return f"{three_digits(case.rate(result) / 1e9)}\u00a0{'GFLOP/s' if case.flops else 'GB/s'}"


def quartiles(ratio: Spread) -> str:
    return f"{three_digits(ratio.low)} to {three_digits(ratio.high)}"
