"""Arithmetic that NumPy does not have as the hardware does it."""

from __future__ import annotations

import numpy as np

from ptxsim.scalars import SIGNED, UNSIGNED, Array

SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(x: Array) -> Array:
    """.ftz: subnormal float32 become zeros of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def _sum_rounded_to_odd(x: Array, y: Array) -> Array:
    """x + y in float64, rounded so that a further rounding to fewer bits is the rounding of the exact sum.

    Rounding to odd: where the sum is not exact, of its two neighbours the one whose last bit is set.
    """
    total = x + y
    back = total - x
    error = (x - (total - back)) + (y - back)
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error)
    if not inexact.any():
        return total
    bits = np.ascontiguousarray(total).view(np.int64)
    toward_error = np.where((error > 0) == (total > 0), bits + 1, bits - 1)
    return np.where(inexact & (bits & 1 == 0), toward_error, bits).view(np.float64)


def _float32_rounded_to_odd(x: Array) -> Array:
    rounded = x.astype(np.float32)
    bits = np.ascontiguousarray(rounded).view(np.uint32)
    truncated = np.where(np.abs(rounded.astype(np.float64)) > np.abs(x), bits - np.uint32(1), bits) | np.uint32(1)
    return np.where((rounded != x) & np.isfinite(rounded), truncated, bits).view(np.float32)


def fma(a: Array, b: Array, c: Array, ptx_type: str) -> Array:
    """a * b + c with one rounding. The product of two float32 is exact in float64, so only the sum needs care."""
    if ptx_type == "f64":
        exact = np.longdouble(a) * np.longdouble(b) + np.longdouble(c)
        return exact.astype(np.float64)  # 64 bits of 106: near enough for what only tables use
    total = _sum_rounded_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    if ptx_type == "bf16":
        return _float32_rounded_to_odd(total)  # the last rounding is that of the bfloat16
    return total.astype(a.dtype)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of integers."""
    size, signed = a.dtype.itemsize, a.dtype.kind == "i"
    if size < 8:
        wide = (SIGNED if signed else UNSIGNED)[2 * size]
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    x, y = (np.ascontiguousarray(n).view(np.uint64) for n in (a, b))
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    first = (x >> half) * (y & low) + (((x & low) * (y & low)) >> half)
    second = (x & low) * (y >> half) + (first & low)
    high = (x >> half) * (y >> half) + (first >> half) + (second >> half)
    if not signed:
        return high
    high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(np.int64)


def divide(a: Array, b: Array) -> Array:
    """Toward zero for integers, as C does it. A zero divisor gives anything: the caller has reported it."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)) if a.dtype.kind == "i" else quotient


def remainder(a: Array, b: Array) -> Array:
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def smaller(a: Array, b: Array, nan: bool = False) -> Array:
    """min: of a NaN and a number the number, unless the instruction asks for the NaN (.NaN)."""
    return np.minimum(a, b) if nan or a.dtype.kind != "f" else np.fmin(a, b)


def larger(a: Array, b: Array, nan: bool = False) -> Array:
    return np.maximum(a, b) if nan or a.dtype.kind != "f" else np.fmax(a, b)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, rounding: str, dtype: type) -> Array:
    """Saturating, and NaN to zero, as cvt does it."""
    info = np.iinfo(dtype)
    y = ROUNDINGS[rounding](x.astype(np.float64))
    # The largest 64-bit integers are no float64: what reaches them is set apart.
    inside = np.where((y > float(info.min)) & (y < float(info.max)), y, 0.0).astype(dtype)
    ends = np.where(y >= float(info.max), info.max, np.where(y <= float(info.min), info.min, 0)).astype(dtype)
    return inside + np.where(np.isnan(y) | (inside != 0), dtype(0), ends)
