"""Atomics: one lane after another, in the order of their numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptxsim.access import addresses_of, elements_of, locate, space_of, spread
from ptxsim.errors import PtxError, UninitialisedRead
from ptxsim.lanes import Mask
from ptxsim.machine import Machine, instruction
from ptxsim.memory import INITIALISED
from ptxsim.program import Instruction
from ptxsim.scalars import PACKED, Array, decode, encode, join_packed, size_of, split_packed

Change = Callable[[Array, Array], Array]
CHANGES: dict[str, Change] = {
    "add": lambda old, x: old + x,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, x: x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "inc": lambda old, x: np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - old.dtype.type(1)),
}


def _changed(change: Change, old: Array, x: Array, ptx_type: str) -> Array:
    """On raw bits."""
    element = PACKED.get(ptx_type)
    if element is None:
        return encode(change(decode(old, ptx_type), decode(x, ptx_type)), ptx_type)
    halves = zip(split_packed(old, element), split_packed(x, element), strict=True)
    low, high = (change(a, b) for a, b in halves)
    return join_packed(low, high, element)


@instruction("atom", "red")
def atomic(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes, size = machine.lanes, size_of(ins.type)
    operands = ins.operands if ins.opcode == "red" else ins.operands[1:]
    kind = next((word for word in ins.modifiers if word in CHANGES or word == "cas"), None)
    if kind is None:
        raise PtxError(f"an atomic that the simulator does not know: {ins.text}")
    sources = elements_of(operands[1])
    chosen, addresses = addresses_of(machine, operands[0], mask)
    access = locate(machine, space_of(ins), chosen, addresses, size, len(sources), store=True)
    unwritten = ~access.space.has(access.positions, access.bytes, INITIALISED)
    if unwritten.any():
        lanes.report(UninitialisedRead, f"{access.space.name} memory that nothing wrote is changed at {lanes.text}")
    results = () if ins.opcode == "red" else elements_of(ins.operands[0])
    for i, source in enumerate(sources):
        lanes.require_defined(source, size, mask, "an atomic gets a value")
        words = access.space.bytes.view(f"u{size}")
        at = access.positions // size + i
        values = lanes.over_lanes(lanes.read(source, f"b{8 * size}"))[chosen]
        swap = lanes.over_lanes(lanes.read(operands[2], f"b{8 * size}"))[chosen] if kind == "cas" else values
        old = np.empty(chosen.size, words.dtype)
        for n in range(chosen.size):
            one = slice(n, n + 1)
            place = slice(at[n], at[n] + 1)
            old[one] = words[place]
            if kind != "cas":
                words[place] = _changed(CHANGES[kind], words[place], values[one], ins.type)
            elif words[place] == values[one]:
                words[place] = swap[one]
        if results:
            lanes.write(results[i], spread(lanes, chosen, old), f"b{8 * size}", mask)
    if access.space.name == "global":
        warps = lanes.batch_warp[chosen]
        machine.counters.global_access(machine.counters.stores, access.positions, warps, access.bytes)
