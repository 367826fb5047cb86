"""PTX's scalar types: a register's raw bits, and the numbers that they stand for.

A raw array is unsigned and as wide as the register (bool for a predicate). A bfloat16 becomes the float32 that has
its value, since NumPy has no bfloat16; every other type becomes NumPy's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptxsim.errors import PtxError

Array = np.ndarray[Any, np.dtype[Any]]

UNSIGNED: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, type] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS: dict[str, type] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
# Two numbers in one register, and the type of each.
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
SIZES = {f"{kind}{8 * size}": size for kind in "bus" for size in UNSIGNED}
SIZES |= {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "f32x2": 8}


def size_of(ptx_type: str) -> int:
    return SIZES[ptx_type]


def is_float(ptx_type: str) -> bool:
    return ptx_type in FLOATS or ptx_type == "bf16"


def is_signed(ptx_type: str) -> bool:
    return ptx_type[0] == "s"


def widened(ptx_type: str) -> str:
    """The integer type of twice the width."""
    return f"{ptx_type[0]}{16 * SIZES[ptx_type]}"


def decode(raw: Array, ptx_type: str) -> Array:
    """Numbers from the low bits of a register."""
    if raw.dtype == np.bool_:
        return raw
    size = SIZES[ptx_type]
    if raw.dtype.itemsize != size:
        raw = raw.astype(UNSIGNED[size])
    if ptx_type in FLOATS:
        return raw.view(FLOATS[ptx_type])
    if ptx_type == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if is_signed(ptx_type):
        return raw.view(SIGNED[size])
    if ptx_type[0] in "bu":
        return raw
    raise PtxError(f"numbers of type {ptx_type}")


def encode(value: Array, ptx_type: str) -> Array:
    """The raw bits of numbers; what goes into a bfloat16 is rounded."""
    if value.dtype == np.bool_:
        return value
    if ptx_type == "bf16":
        return bfloat16_bits(value)
    if ptx_type in FLOATS:
        value = value.astype(FLOATS[ptx_type], copy=False)
    return np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize])


def bfloat16_bits(value: Array, toward_zero: bool = False) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; NaN becomes the one NaN that the hardware makes."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    if not toward_zero:
        bits = np.where(
            np.isnan(value), np.uint32(0x7FFF0000), bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
        )
    return (bits >> np.uint32(16)).astype(np.uint16)


def split_packed(raw: Array, element: str) -> tuple[Array, Array]:
    size = SIZES[element]
    return decode(raw, element), decode(raw >> raw.dtype.type(8 * size), element)


def join_packed(low: Array, high: Array, element: str) -> Array:
    wide = UNSIGNED[2 * SIZES[element]]
    high_bits = encode(high, element).astype(wide) << wide(8 * SIZES[element])
    return encode(low, element).astype(wide) | high_bits
