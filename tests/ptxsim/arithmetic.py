"""Arithmetic on integers and floats, and the functions of the special function unit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptxsim.compute import compute, of_floats
from ptxsim.errors import ArithmeticFault, PtxError
from ptxsim.lanes import Lanes
from ptxsim.numerics import divide, fma, larger, multiply_high, remainder, smaller
from ptxsim.program import Instruction
from ptxsim.scalars import PACKED, UNSIGNED, Array, size_of


@compute("add")
def add(lanes: Lanes, ins: Instruction, a: Array, b: Array) -> Array:
    return a + b


@compute("sub")
def subtract(lanes: Lanes, ins: Instruction, a: Array, b: Array) -> Array:
    return a - b


@compute("mul", result="P", known="lo hi wide")
def multiply(lanes: Lanes, ins: Instruction, a: Array, b: Array) -> Array:
    if "wide" in ins.modifiers:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return a.astype(wide) * b.astype(wide)
    return multiply_high(a, b) if "hi" in ins.modifiers else a * b


@compute("mad", "fma", sources="T T P", result="P", known="lo hi wide relu")
def multiply_add(lanes: Lanes, ins: Instruction, a: Array, b: Array, c: Array) -> Array:
    if not of_floats(ins):
        return multiply(lanes, ins, a, b) + c
    mixed = len(ins.types) == 2
    value = fma(a, b, c, "f32" if mixed else PACKED.get(ins.type, ins.type))
    return larger(value, value.dtype.type(0)) if "relu" in ins.modifiers else value


def _report_zero(lanes: Lanes, divisor: Array) -> None:
    # Lanes that do not take part may divide by anything.
    if not divisor.all():
        zero = lanes.over_lanes(divisor == 0) & lanes.active(lanes.mask)
        if zero.any():
            lanes.report(ArithmeticFault, f"division by zero in {lanes.where(zero)}")


@compute("div", known="full approx")
def division(lanes: Lanes, ins: Instruction, a: Array, b: Array) -> Array:
    if not of_floats(ins):
        _report_zero(lanes, b)
    return divide(a, b)


@compute("rem")
def modulo(lanes: Lanes, ins: Instruction, a: Array, b: Array) -> Array:
    _report_zero(lanes, b)
    return remainder(a, b)


@compute("neg")
def negate(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    return -a if of_floats(ins) else (a.dtype.type(0) - a)


@compute("abs")
def absolute(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    return np.abs(a)


@compute("copysign")
def copy_sign(lanes: Lanes, ins: Instruction, sign: Array, a: Array) -> Array:
    return np.copysign(a, sign)


def _fold(function: Callable[..., Array], numbers: tuple[Array, ...], ins: Instruction) -> Array:
    result = numbers[0]
    for x in numbers[1:]:
        result = function(result, x, "NaN" in ins.modifiers)
    return result


@compute("min", known="NaN")
def minimum(lanes: Lanes, ins: Instruction, *numbers: Array) -> Array:
    return _fold(smaller, numbers, ins)


@compute("max", known="NaN")
def maximum(lanes: Lanes, ins: Instruction, *numbers: Array) -> Array:
    return _fold(larger, numbers, ins)


# The hardware's own functions are good to about two units in the last place; here they are exact but for the
# rounding, so a result that needs their last bit is not to be trusted.
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@compute(*FUNCTIONS, known="approx")
def special_function(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    return FUNCTIONS[ins.opcode](a.astype(np.float64)).astype(a.dtype)


# -------------------------------------------------------------------------------------------------------------------
# bits


@compute("and")
def bit_and(lanes: Lanes, ins: Instruction, a: Array, b: Array) -> Array:
    return a & b


@compute("or")
def bit_or(lanes: Lanes, ins: Instruction, a: Array, b: Array) -> Array:
    return a | b


@compute("xor")
def bit_xor(lanes: Lanes, ins: Instruction, a: Array, b: Array) -> Array:
    return a ^ b


@compute("not")
def bit_not(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    return ~a


@compute("cnot")
def is_zero(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    return (a == 0).astype(a.dtype)


def _shift_amount(lanes: Lanes, ins: Instruction, amount: Array) -> tuple[Array, Array]:
    """The amount below the width, and where it was too large. The hardware then gives zeros or signs; C promises
    nothing.
    """
    width = 8 * size_of(ins.type)
    too_large = amount >= width
    if too_large.any():
        wrong = lanes.over_lanes(too_large) & lanes.active(lanes.mask)
        if wrong.any():
            lanes.report(ArithmeticFault, f"a shift by the width or more in {lanes.where(wrong)}")
    return np.minimum(amount, np.uint32(width - 1)).astype(UNSIGNED[size_of(ins.type)]), too_large


@compute("shl", sources="T u32")
def shift_left(lanes: Lanes, ins: Instruction, a: Array, amount: Array) -> Array:
    amount, too_large = _shift_amount(lanes, ins, amount)
    return np.where(too_large, a.dtype.type(0), a << amount.astype(a.dtype))


@compute("shr", sources="T u32")
def shift_right(lanes: Lanes, ins: Instruction, a: Array, amount: Array) -> Array:
    amount, too_large = _shift_amount(lanes, ins, amount)
    shifted = a >> amount.astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(too_large, a.dtype.type(0), shifted)


@compute("shf", sources="u32", known="l r clamp wrap")
def funnel_shift(lanes: Lanes, ins: Instruction, low: Array, high: Array, amount: Array) -> Array:
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    amount = amount & np.uint32(31) if "wrap" in ins.modifiers else np.minimum(amount, np.uint32(32))
    count = amount.astype(np.uint64)
    moved = (both << count) >> np.uint64(32) if "l" in ins.modifiers else both >> count
    return moved.astype(np.uint32)


@compute("lop3", sources="u32")
def logic_of_three(lanes: Lanes, ins: Instruction, a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros(1, np.uint32)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


@compute("prmt", sources="u32")
def permute_bytes(lanes: Lanes, ins: Instruction, a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(1, np.uint32)
    for i in range(4):
        chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        signs = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | (np.where(chosen & np.uint32(8), signs, byte) << np.uint32(8 * i))
    return result


@compute("bfe", sources="T u32 u32")
def extract_bits(lanes: Lanes, ins: Instruction, a: Array, position: Array, length: Array) -> Array:
    width = 8 * size_of(ins.type)
    position, length = (np.minimum(x & np.uint32(255), np.uint32(width)).astype(np.int64) for x in (position, length))
    # Bits beyond the register are its sign, or zero: as of a wider integer, arithmetically shifted.
    if width == 64:
        lifted = a << (64 - np.minimum(position + length, 64)).astype(a.dtype)
        return np.where(length == 0, a.dtype.type(0), lifted >> np.minimum(64 - length, 63).astype(a.dtype))
    wide = a.astype(np.int64) >> position
    kept = wide << (64 - np.maximum(length, 1))
    if a.dtype.kind == "u":
        kept = (kept.view(np.uint64) >> (64 - np.maximum(length, 1)).astype(np.uint64)).view(np.int64)
    else:
        kept = kept >> (64 - np.maximum(length, 1))
    return np.where(length == 0, 0, kept).astype(a.dtype)


@compute("bfi", sources="T T u32 u32")
def insert_bits(lanes: Lanes, ins: Instruction, a: Array, b: Array, position: Array, length: Array) -> Array:
    width = 8 * size_of(ins.type)
    if (position + length > width).any():
        raise PtxError(f"bits beyond the register: {lanes.text}")
    one = np.uint64(1)
    ones = np.where(length == 64, ~np.uint64(0), (one << (length.astype(np.uint64) & np.uint64(63))) - one)
    kept = ones << position.astype(np.uint64)
    moved = (a.astype(np.uint64) << position.astype(np.uint64)) & kept
    return ((b.astype(np.uint64) & ~kept) | moved).astype(a.dtype)


def _bit_lengths(a: Array) -> Array:
    return np.array([int(x).bit_length() for x in a], np.uint32)


@compute("clz", result="u32")
def leading_zeros(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    return np.uint32(8 * size_of(ins.type)) - _bit_lengths(a)


@compute("bfind", result="u32")
def highest_bit(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    return _bit_lengths(a) - np.uint32(1)


@compute("popc", result="u32")
def count_bits(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


@compute("brev")
def reverse_bits(lanes: Lanes, ins: Instruction, a: Array) -> Array:
    width = 8 * size_of(ins.type)
    return np.array([int(f"{int(x):0{width}b}"[::-1], 2) for x in a], a.dtype)
