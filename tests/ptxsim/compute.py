"""Instructions that only compute: a function of numbers for each, and one executor for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import numpy as np

from ptxsim.errors import PtxError
from ptxsim.lanes import Lanes, Mask
from ptxsim.machine import Machine, instruction
from ptxsim.numerics import flush
from ptxsim.program import Instruction, Operand
from ptxsim.scalars import PACKED, Array, is_float, join_packed, size_of, split_packed, widened

Function = Callable[..., Array]
# Modifiers that change the result. What an instruction carries beyond these and what it knows itself is refused.
ROUNDED = {"rn", "ftz", "sat"}


def compute(*opcodes: str, sources: str = "T", result: str = "T", known: str = "") -> Callable[[Function], Function]:
    """Register ``function(lanes, ins, *numbers)``, which gives the numbers of the result.

    Args:
        sources: the type of each operand; the last holds for all that follow. T is the type of the instruction, P that
            of a product: for .wide the integer type of twice the width.
        result: the type of the result.
        known: the modifiers that the function itself looks at, or that change nothing.
    """
    source_types, allowed = sources.split(), {*known.split(), *ROUNDED}

    def register(function: Function) -> Function:
        @instruction(*opcodes)
        @wraps(function)
        def execute(machine: Machine, ins: Instruction, mask: Mask) -> None:
            lanes = machine.lanes
            unknown = [word for word in ins.modifiers if word not in allowed and word not in ins.types]
            if unknown:
                raise PtxError(f".{unknown[0]}, which the simulator does not know: {lanes.text}")
            operands = ins.operands[1:]
            if ins.type in PACKED:
                value, undefined = _packed(lanes, ins, operands, function, mask)
                lanes.write(ins.operands[0], value, f"b{8 * size_of(ins.type)}", mask, undefined)
                return
            named = {"T": ins.type, "P": widened(ins.type) if "wide" in ins.modifiers else ins.type}
            types = [source_types[min(i, len(source_types) - 1)] for i in range(len(operands))]
            types = [named.get(name, name) for name in types]
            result_type = named.get(result, result)
            if len(ins.types) == 2 and ins.types[0] == "f32":  # f32 += bf16, as sm_100 has it
                types, result_type = [*types[:-1], "f32"], "f32"
            numbers = [lanes.read(operand, t) for operand, t in zip(operands, types, strict=True)]
            if result_type == "f32" and "f32" in types:
                numbers = [x.astype(np.float32) if x.dtype == np.float16 else x for x in numbers]
            value = _finish(ins, function(lanes, ins, *_flushed(ins, numbers)))
            undefined = undefined_any(lanes, list(zip(operands, types, strict=True)), mask)
            lanes.write(ins.operands[0], value, result_type, mask, undefined)

        return function

    return register


def undefined_any(lanes: Lanes, operands: list[tuple[Operand, str]], mask: Mask) -> Array | None:
    """All bytes of the result are undefined where one byte of an operand is."""
    if not lanes.undefined:
        return None
    result: Array | None = None
    for operand, ptx_type in operands:
        bits = lanes.undefined_bytes(operand, size_of(ptx_type), mask)
        if bits is not None:
            result = (bits != 0) if result is None else result | (bits != 0)
    return None if result is None else np.where(result, np.uint8(0xFF), np.uint8(0))


def _packed(
    lanes: Lanes, ins: Instruction, operands: tuple[Operand, ...], function: Function, mask: Mask
) -> tuple[Array, Array | None]:
    """Both halves by themselves, in their numbers and in what is undefined of them."""
    element, size = PACKED[ins.type], size_of(ins.type)
    numbers = [split_packed(lanes.read(operand, f"b{8 * size}"), element) for operand in operands]
    halves = [_finish(ins, function(lanes, ins, *_flushed(ins, [x[half] for x in numbers]))) for half in (0, 1)]
    undefined: Array | None = None
    for operand in operands if lanes.undefined else ():
        bits = lanes.undefined_bytes(operand, size, mask)
        if bits is not None:
            low = np.uint8((1 << size // 2) - 1)
            high = np.uint8(low << (size // 2))
            whole = np.where(bits & low, low, np.uint8(0)) | np.where(bits & high, high, np.uint8(0))
            undefined = whole if undefined is None else undefined | whole
    return join_packed(halves[0], halves[1], element), undefined


def _flushed(ins: Instruction, numbers: list[Array]) -> list[Array]:
    return [flush(x) for x in numbers] if "ftz" in ins.modifiers else numbers


def _finish(ins: Instruction, value: Array) -> Array:
    if "ftz" in ins.modifiers:
        value = flush(value)
    if "sat" in ins.modifiers and value.dtype.kind == "f":
        value = np.clip(np.where(np.isnan(value), value.dtype.type(0), value), value.dtype.type(0), value.dtype.type(1))
    return value


def of_floats(ins: Instruction) -> bool:
    return is_float(PACKED.get(ins.type, ins.type))
