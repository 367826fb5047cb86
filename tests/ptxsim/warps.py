"""Barriers, and what the lanes of a warp tell each other."""

from __future__ import annotations

import re

import numpy as np

from ptxsim.access import Access, addresses_of, elements_of, locate, observe_load, space_of, store
from ptxsim.errors import PtxError, SyncFault
from ptxsim.lanes import WARP, Mask
from ptxsim.machine import Machine, instruction
from ptxsim.numerics import larger, smaller
from ptxsim.program import Instruction, Pair
from ptxsim.scalars import Array


@instruction("bar", "barrier")
def barrier(machine: Machine, ins: Instruction, mask: Mask) -> None:
    if "warp" in ins.modifiers:
        return
    if not {"sync", "red"} & {*ins.modifiers}:
        raise PtxError(f"a barrier that the simulator does not know: {ins.text}")
    lanes = machine.lanes
    active = lanes.active(mask)
    arrived = np.bincount(lanes.block[active], minlength=lanes.blocks)
    machine.epoch += arrived > 0
    machine.counters.barriers += int((arrived > 0).sum())
    if "red" in ins.modifiers:
        p = lanes.over_lanes(lanes.read(ins.operands[-1], "pred")) & active
        count = np.bincount(lanes.block[p], minlength=lanes.blocks)
        kinds = {"and": count == arrived, "or": count > 0, "popc": count.astype(np.uint32)}
        value = next(kinds[word] for word in ins.modifiers if word in kinds)[lanes.block]
        lanes.write(ins.operands[0], value, "pred" if value.dtype == np.bool_ else "u32", mask)


@instruction("shfl")
def shuffle(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes = machine.lanes
    value = lanes.over_lanes(lanes.read(ins.operands[1], "b32"))
    by, limits = (lanes.read(operand, "u32").astype(np.int64) for operand in ins.operands[2:4])
    by, own = by & 31, lanes.lane.astype(np.int64)
    segment = (limits >> 8) & 31
    first, last = own & segment, (own & segment) | (limits & 31 & ~segment)
    mode = next(word for word in ins.modifiers if word in ("up", "down", "bfly", "idx"))
    source = {"up": own - by, "down": own + by, "bfly": own ^ by, "idx": first | (by & ~segment)}[mode]
    inside = source >= last if mode == "up" else source <= last
    source = np.where(inside, source, own)
    active, members = lanes.active(mask), lanes.read(ins.operands[4], "u32")
    outsider = active & ((members >> lanes.lane) & np.uint32(1) == 0)
    if outsider.any():
        lanes.report(SyncFault, f"a lane that its own mask does not name takes part: {lanes.where(outsider)}")
    at = lanes.batch_warp * WARP + source
    absent = active & ~active[at]
    if absent.any():
        lanes.report(SyncFault, f"the value of a lane that does not take part is read by {lanes.where(absent)}")
    undefined = lanes.undefined_bytes(ins.operands[1], 4, mask)
    undefined = None if undefined is None else undefined[at]
    result = ins.operands[0]
    if isinstance(result, Pair):
        lanes.write(result.second, inside, "pred", mask)
        result = result.first
    lanes.write(result, value[at], "b32", mask, undefined)


@instruction("vote")
def vote(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes = machine.lanes
    active = lanes.active(mask)
    lanes.require_defined(ins.operands[1], 1, mask, "a vote is cast")
    yes = machine.ballot(lanes.over_lanes(lanes.read(ins.operands[1], "pred")) & active)
    present = machine.ballot(active)
    kinds = {"ballot": yes, "any": yes != 0, "all": yes == present, "uni": (yes == present) | (yes == 0)}
    value = next(kinds[word] for word in ins.modifiers if word in kinds)
    lanes.write(ins.operands[0], value, "pred" if value.dtype == np.bool_ else "b32", mask)


@instruction("activemask")
def active_mask(machine: Machine, ins: Instruction, mask: Mask) -> None:
    machine.lanes.write(ins.operands[0], machine.ballot(machine.lanes.active(mask)), "b32", mask)


@instruction("redux")
def reduce(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes = machine.lanes
    active, value = lanes.active(mask), lanes.over_lanes(lanes.read(ins.operands[1], ins.type))
    lanes.require_defined(ins.operands[1], value.dtype.itemsize, mask, "a reduction takes a value")
    if "abs" in ins.modifiers:
        value = np.abs(value)
    kind, nan = next(word for word in ins.modifiers if word != "sync"), "NaN" in ins.modifiers
    joins = {
        "add": np.add,
        "min": lambda a, b: smaller(a, b, nan),
        "max": lambda a, b: larger(a, b, nan),
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    result, started = value[::WARP].copy(), np.zeros(lanes.count // WARP, bool)
    for lane in range(WARP):
        mine, present = value[lane::WARP], active[lane::WARP]
        result = np.where(present, np.where(started, joins[kind](result, mine), mine), result)
        started |= present
    lanes.write(ins.operands[0], np.repeat(result.astype(value.dtype), WARP), ins.type, mask)


# Of a matrix of 8 rows of 16 bytes, lane t holds the two elements from column 2 * (t % 4) on of row t / 4.
GROUP, PLACE = np.arange(WARP) // 4, np.arange(WARP) % 4


def _fragments(machine: Machine, ins: Instruction, address: int, mask: Mask) -> tuple[Array, Array]:
    """The lanes that take part, and (matrix, warp, 8) addresses of rows, which lanes 8 * i up to 8 * i + 7 give for
    i.
    """
    if "m8n8" not in ins.modifiers or ins.type != "b16" or space_of(ins) != "shared":
        raise PtxError(f"a matrix that the simulator does not know: {ins.text}")
    lanes = machine.lanes
    chosen, addresses = addresses_of(machine, ins.operands[address], mask)
    if chosen.size % WARP or (chosen[::WARP] % WARP).any():
        lanes.report(SyncFault, f"not all lanes of a warp take part in {lanes.text}")
    count = int(next(word for word in ins.modifiers if re.fullmatch(r"x\d", word))[1])
    rows = addresses.reshape(-1, WARP)[:, : 8 * count].reshape(-1, count, 8).transpose(1, 0, 2)
    if (rows % np.uint64(16) != 0).any():
        locate(machine, "shared", chosen, np.repeat(rows[0][:, :1], WARP, axis=1).ravel(), 8, 2, store=False)
    return chosen, rows


def _element_addresses(rows: Array, transposed: bool) -> list[Array]:
    """Of one matrix, where each lane finds its elements: both at once, or by themselves if transposed."""
    if not transposed:
        return [(rows[:, GROUP] + (4 * PLACE).astype(np.uint64)).ravel()]
    return [(rows[:, 2 * PLACE + half] + (2 * GROUP).astype(np.uint64)).ravel() for half in (0, 1)]


@instruction("ldmatrix")
def load_matrix(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes, transposed = machine.lanes, "trans" in ins.modifiers
    chosen, matrices = _fragments(machine, ins, 1, mask)
    for rows, result in zip(matrices, elements_of(ins.operands[0]), strict=True):
        raw = np.zeros(lanes.count, np.uint32)
        for half, addresses in enumerate(_element_addresses(rows, transposed)):
            access = locate(machine, "shared", chosen, addresses, 2 if transposed else 4, 1, store=False)
            observe_load(machine, access)
            loaded = access.space.load(access.positions, access.size, 0).astype(np.uint32)
            raw[chosen] |= loaded << np.uint32(16 * half)
        lanes.write(result, raw, "b32", mask)


@instruction("stmatrix")
def store_matrix(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes, transposed = machine.lanes, "trans" in ins.modifiers
    chosen, matrices = _fragments(machine, ins, 0, mask)
    for rows, source in zip(matrices, elements_of(ins.operands[1]), strict=True):
        raw = lanes.over_lanes(lanes.read(source, "b32"))[chosen]
        undefined = lanes.undefined_bytes(source, 4, mask)
        bits = None if undefined is None else undefined[chosen]
        for half, addresses in enumerate(_element_addresses(rows, transposed)):
            access: Access = locate(machine, "shared", chosen, addresses, 2 if transposed else 4, 1, store=True)
            value = (raw >> np.uint32(16 * half)).astype(np.uint16) if transposed else raw
            store(machine, access, [value], [bits])
