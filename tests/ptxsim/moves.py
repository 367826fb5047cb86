"""Moves, conversions, comparisons and choices. Here what is undefined is followed by the byte, or by the choice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptxsim.compute import undefined_any
from ptxsim.errors import PtxError
from ptxsim.lanes import Lanes, Mask
from ptxsim.machine import Machine, instruction
from ptxsim.memory import WINDOWS
from ptxsim.numerics import ROUNDINGS, flush, to_integer
from ptxsim.program import Instruction, Pair, Register
from ptxsim.scalars import (
    FLOATS,
    PACKED,
    SIGNED,
    SIZES,
    UNSIGNED,
    Array,
    bfloat16_bits,
    encode,
    is_float,
    is_signed,
    size_of,
)


def _bits(ptx_type: str) -> str:
    return f"b{8 * size_of(ptx_type)}"


@instruction("mov")
def move(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes = machine.lanes
    whole = ins.type if ins.type == "pred" else _bits(ins.type)
    value = lanes.read(ins.operands[1], whole)
    lanes.write(ins.operands[0], value, whole, mask, lanes.undefined_bytes(ins.operands[1], size_of(whole), mask))


@instruction("cvta")
def convert_address(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """Between an address of one space and a generic one: the space is in the upper bits."""
    lanes = machine.lanes
    space = next(
        word for word in ins.modifiers if word.split("::")[0] in ("global", "shared", "local", "const", "param")
    )
    window = np.uint64(WINDOWS.get(space.split("::")[0], 0))
    address = lanes.read(ins.operands[1], ins.type).astype(np.uint64)
    undefined = undefined_any(lanes, [(ins.operands[1], ins.type)], mask)
    value = address & ~window if "to" in ins.modifiers else address | window
    lanes.write(ins.operands[0], value, "u64", mask, undefined)


@instruction("cvt")
def convert(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes, to, source = machine.lanes, ins.types[0], ins.types[-1]
    if to in PACKED:
        _convert_two(lanes, ins, mask)
        return
    x = lanes.read(ins.operands[1], source)
    narrowing = not is_float(to) and not is_float(source) and SIZES[to] <= SIZES[source]
    if narrowing:
        undefined = lanes.undefined_bytes(ins.operands[1], SIZES[to], mask)
    else:
        undefined = undefined_any(lanes, [(ins.operands[1], source)], mask)
    rounding = next((word for word in ins.modifiers if word in ROUNDINGS), None)
    dtype = FLOATS.get(to) or (SIGNED if is_signed(to) else UNSIGNED)[SIZES[to]] if to != "bf16" else np.float32
    if is_float(source) and not is_float(to):
        value = to_integer(x, rounding or "rzi", dtype)
    elif not is_float(source) and not is_float(to):
        value = x.astype(dtype)
        if "sat" in ins.modifiers:
            info = np.iinfo(dtype)
            value = np.clip(x.astype(object), info.min, info.max).astype(dtype)
    else:
        value = _to_float(ins, x, to, rounding)
    destination = ins.operands[0]
    if not is_float(to) and isinstance(destination, Register):
        # A narrow integer fills a wider register with its sign.
        width = SIZES[lanes.kernel.registers[destination.name]]
        value = value.astype((SIGNED if is_signed(to) else UNSIGNED)[max(width, SIZES[to])])
        if undefined is not None:
            undefined = np.where(undefined != 0, np.uint8(0xFF), np.uint8(0)) if width > SIZES[to] else undefined
        to = _bits(f"b{8 * max(width, SIZES[to])}")
    lanes.write(destination, value, to, mask, undefined)


def _to_float(ins: Instruction, x: Array, to: str, rounding: str | None) -> Array:
    if rounding:
        x = ROUNDINGS[rounding](x)
    if "ftz" in ins.modifiers:
        x = flush(x)
    if to == "bf16":
        if "rz" in ins.modifiers:
            return bfloat16_bits(x.astype(np.float32), toward_zero=True)
        value = x.astype(np.float32)
    elif "rz" in ins.modifiers and to != "f64":
        raise PtxError(f"rounding toward zero: {ins.text}")
    else:
        value = x.astype(FLOATS[to])
    if "ftz" in ins.modifiers:
        value = flush(value)
    if "sat" in ins.modifiers:
        value = np.clip(np.where(np.isnan(value), 0, value), 0, 1).astype(value.dtype)
    if "relu" in ins.modifiers:
        value = np.fmax(value, value.dtype.type(0))
    return value


def _convert_two(lanes: Lanes, ins: Instruction, mask: Mask) -> None:
    """Two float32 into one register; the first becomes the upper half."""
    if len(ins.operands) != 3 or ins.types[-1] != "f32":
        raise PtxError(f"a conversion that the simulator does not know: {ins.text}")
    element = PACKED[ins.types[0]]
    halves = [_to_float(ins, lanes.read(operand, "f32"), element, None) for operand in ins.operands[1:]]
    high, low = (x if x.dtype == np.uint16 else encode(x, element) for x in halves)
    raw = low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
    undefined = None
    for operand, bytes_of in zip(ins.operands[1:], (0b1100, 0b0011), strict=True):
        bits = lanes.undefined_bytes(operand, 4, mask)
        if bits is not None:
            part = np.where(bits != 0, np.uint8(bytes_of), np.uint8(0))
            undefined = part if undefined is None else undefined | part
    lanes.write(ins.operands[0], raw, "b32", mask, undefined)


# --------------------------------------------------------------------------------------------- comparisons and choices

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _compare(name: str, a: Array, b: Array, ptx_type: str) -> Array:
    if not is_float(ptx_type):
        return COMPARISONS[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name == "num":
        return ~unordered
    if name == "nan":
        return unordered
    if name in COMPARISONS:
        return COMPARISONS[name](a, b) & ~unordered
    return COMPARISONS[name[:-1]](a, b) | unordered  # equ, neu, ltu, ...


@instruction("setp", "set")
def set_predicate(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes, source = machine.lanes, ins.type
    a, b = (lanes.read(operand, source) for operand in ins.operands[1:3])
    if "ftz" in ins.modifiers:
        a, b = flush(a), flush(b)
    if source in PACKED:
        raise PtxError(f"a comparison of packed numbers: {ins.text}")
    result = _compare(ins.modifiers[0], a, b, source)
    sources = [(operand, source) for operand in ins.operands[1:3]]
    opposite = ~result
    if len(ins.operands) > 3:
        sources.append((ins.operands[3], "pred"))
        p = lanes.read(ins.operands[3], "pred")
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[ins.modifiers[1]]
        result, opposite = join(result, p), join(opposite, p)
    undefined = undefined_any(lanes, sources, mask)
    destination = ins.operands[0]
    if ins.opcode == "set":
        true = {"f32": 0x3F800000}.get(ins.types[0], 0xFFFFFFFF)
        lanes.write(destination, np.where(result, np.uint32(true), np.uint32(0)), "b32", mask, undefined)
    elif isinstance(destination, Pair):
        lanes.write(destination.first, result, "pred", mask, undefined)
        lanes.write(destination.second, opposite, "pred", mask, undefined)
    else:
        lanes.write(destination, result, "pred", mask, undefined)


@instruction("selp")
def select(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """Undefined where the one that is chosen is, or the predicate."""
    lanes, whole = machine.lanes, _bits(ins.type)
    first, second, predicate = ins.operands[1:4]
    chosen = lanes.read(predicate, "pred")
    value = np.where(chosen, lanes.read(first, whole), lanes.read(second, whole))
    undefined = undefined_any(lanes, [(predicate, "pred")], mask)
    if lanes.undefined:
        for operand, taken in ((first, chosen), (second, ~chosen)):
            bits = lanes.undefined_bytes(operand, size_of(whole), mask)
            if bits is not None:
                part = np.where(taken, bits, np.uint8(0))
                undefined = part if undefined is None else undefined | part
    lanes.write(ins.operands[0], value, whole, mask, undefined)


@instruction("testp")
def test_property(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes = machine.lanes
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)}
    result = tests[ins.modifiers[0]](lanes.read(ins.operands[1], ins.type))
    lanes.write(ins.operands[0], result, "pred", mask, undefined_any(lanes, [(ins.operands[1], ins.type)], mask))
