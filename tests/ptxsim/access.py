"""Loads, stores and atomics, and what is checked at each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptxsim.errors import MemoryFault, PtxError, Race, Trap, UninitialisedRead
from ptxsim.lanes import Lanes, Mask
from ptxsim.machine import Machine, instruction
from ptxsim.memory import INITIALISED, VALID, WINDOW_MASK, WINDOWS, Space
from ptxsim.program import Address, Instruction, Operand, Register, Vector
from ptxsim.scalars import SIGNED, SIZES, UNSIGNED, Array, is_signed, size_of


@dataclass
class Access:
    """Where the lanes that take part touch memory."""

    space: Space
    lanes: Array  # their numbers
    positions: Array
    size: int  # bytes of one element
    count: int  # elements of one lane

    @property
    def bytes(self) -> int:
        return self.size * self.count


def elements_of(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def space_of(ins: Instruction) -> str:
    words = [word.split("::")[0] for word in ins.modifiers]
    return next((word for word in words if word in ("global", "shared", "local", "param", "const")), "generic")


def addresses_of(machine: Machine, operand: Operand, mask: Mask) -> tuple[Array, Array]:
    """The lanes that take part, and the address of each."""
    lanes = machine.lanes
    if not isinstance(operand, Address):
        raise PtxError(f"no address: {lanes.text}")
    base = operand.base
    size = SIZES[lanes.kernel.registers[base.name]] if isinstance(base, Register) else 8
    addresses = lanes.read(base, f"u{8 * size}").astype(np.uint64) + np.uint64(operand.offset % (1 << 64))
    lanes.require_defined(base, size, mask, "an address")
    active = lanes.active(mask)
    chosen = lanes.all_lanes if active.all() else np.flatnonzero(active)
    return chosen, lanes.over_lanes(addresses)[chosen]


def locate(machine: Machine, name: str, chosen: Array, addresses: Array, size: int, count: int, store: bool) -> Access:
    """Find the bytes, and check that they are there and aligned."""
    if name == "generic":
        windows = np.unique(addresses & WINDOW_MASK)
        if windows.size != 1:
            raise PtxError(f"generic addresses of several spaces in one instruction: {machine.lanes.text}")
        names = {window: space for space, window in WINDOWS.items()}
        name = names.get(int(windows[0]), "global")
        addresses = addresses & ~WINDOW_MASK
    space = machine.spaces["global" if name == "const" else name]
    bytes_of = size * count
    positions = space.locate(addresses, chosen)
    # An address that is not aligned is brought to one that is, for the check of the bounds and for what comes after.
    misaligned = addresses % np.uint64(bytes_of) != 0
    if misaligned.any():
        _fault(
            machine, chosen, addresses, misaligned, f"a misaligned {'store' if store else 'load'} of {bytes_of} bytes"
        )
        positions = positions - positions % bytes_of
    outside = ~space.has(positions, bytes_of, VALID)
    if outside.any():
        first = int(addresses[outside][0])
        kind = "store" if store else "load"
        what = f"a {kind} of {bytes_of} bytes out of bounds ({space.describe(first)})"
        _fault(machine, chosen, addresses, outside, what)
        positions = np.where(outside, space.trap, positions)
    return Access(space, chosen, positions, size, count)


def _fault(machine: Machine, chosen: Array, addresses: Array, wrong: Array, what: str) -> None:
    lanes = np.zeros(machine.lanes.count, bool)
    lanes[chosen[wrong]] = True
    machine.lanes.report(MemoryFault, f"{what} by {machine.lanes.where(lanes)}")


def _race(machine: Machine, found: str | None) -> None:
    if found:
        machine.lanes.report(Race, f"{found}, at {machine.lanes.text}")


def observe_load(machine: Machine, access: Access) -> None:
    lanes = machine.lanes
    unwritten = ~access.space.has(access.positions, access.bytes, INITIALISED)
    if unwritten.any():
        who = np.zeros(lanes.count, bool)
        who[access.lanes[unwritten]] = True
        lanes.report(UninitialisedRead, f"{access.space.name} memory that nothing wrote is read by {lanes.where(who)}")
    if access.space.name == "global":
        warps = lanes.batch_warp[access.lanes]
        machine.counters.global_access(machine.counters.loads, access.positions, warps, access.bytes)
        if machine.block_races:
            _race(machine, machine.block_races.load(access.positions, access.bytes, lanes.block_id[access.lanes]))
    elif access.space.name == "shared":
        machine.counters.shared_access(access.positions, lanes.batch_warp[access.lanes], access.bytes)
        epochs = machine.epoch[lanes.block[access.lanes]]
        _race(machine, machine.warp_races.load(access.positions, access.bytes, lanes.warp[access.lanes], epochs))


def store(machine: Machine, access: Access, values: list[Array], undefined: list[Array | None]) -> None:
    """Write one array for each element, over the lanes of the access."""
    space, positions = access.space, access.positions
    _observe_store(machine, access, values)
    space.mark_initialised(positions, access.bytes)
    for i, (value, bits) in enumerate(zip(values, undefined, strict=True)):
        space.store(positions, access.size, i, value)
        if bits is not None and bits.any():
            space.mark_undefined(positions[bits != 0] + i * access.size, access.size)
    if space.name in ("global", "shared"):
        for i, value in enumerate(values):
            if (space.load(positions, access.size, i) != value).any():
                _race(machine, f"lanes store different values to one place of {space.name} memory in one instruction")
                break


def _observe_store(machine: Machine, access: Access, values: list[Array]) -> None:
    lanes, space, positions = machine.lanes, access.space, access.positions
    if space.name == "global":
        warps = lanes.batch_warp[access.lanes]
        machine.counters.global_access(machine.counters.stores, positions, warps, access.bytes)
        if machine.block_races:
            _race(machine, machine.block_races.store(positions, access.bytes, lanes.block_id[access.lanes]))
    elif space.name == "shared":
        machine.counters.shared_access(positions, lanes.batch_warp[access.lanes], access.bytes)
        changes = ~space.has(positions, access.bytes, INITIALISED)
        for i, value in enumerate(values):
            changes |= space.load(positions, access.size, i) != value
        epochs = machine.epoch[lanes.block[access.lanes]]
        found = machine.warp_races.store(positions, access.bytes, lanes.warp[access.lanes], epochs, changes)
        _race(machine, found)
    elif space.name == "param":
        raise PtxError(f"a store to parameters: {lanes.text}")


def spread(lanes: Lanes, chosen: Array, values: Array) -> Array:
    """Values of the chosen lanes as an array over all."""
    if chosen is lanes.all_lanes:
        return values
    result = np.zeros(lanes.count, values.dtype)
    result[chosen] = values
    return result


@instruction("ld", "ldu")
def load(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes, size = machine.lanes, size_of(ins.type)
    results = elements_of(ins.operands[0])
    chosen, addresses = addresses_of(machine, ins.operands[1], mask)
    access = locate(machine, space_of(ins), chosen, addresses, size, len(results), store=False)
    observe_load(machine, access)
    for i, result in enumerate(results):
        value = spread(lanes, chosen, access.space.load(access.positions, size, i))
        width = SIZES[lanes.kernel.registers[result.name]] if isinstance(result, Register) else size
        if width > size:  # a narrow number fills its register with its sign, or zeros
            value = (value.view(SIGNED[size]) if is_signed(ins.type) else value).astype(
                (SIGNED if is_signed(ins.type) else UNSIGNED)[width]
            )
        lanes.write(result, value, f"b{8 * max(width, size)}", mask)


@instruction("st")
def store_elements(machine: Machine, ins: Instruction, mask: Mask) -> None:
    lanes, size = machine.lanes, size_of(ins.type)
    if space_of(ins) == "param":
        return  # an argument of a call; the call itself is refused
    sources = elements_of(ins.operands[1])
    chosen, addresses = addresses_of(machine, ins.operands[0], mask)
    access = locate(machine, space_of(ins), chosen, addresses, size, len(sources), store=True)
    values = [lanes.over_lanes(lanes.read(source, f"b{8 * size}"))[chosen] for source in sources]
    undefined: list[Array | None] = []
    for source in sources:
        if access.space.name == "global":
            lanes.require_defined(source, size, mask, "global memory gets a value")
        bits = lanes.undefined_bytes(source, size, mask)
        undefined.append(None if bits is None else bits[chosen])
    store(machine, access, values, undefined)


@instruction("call")
def call(machine: Machine, ins: Instruction, mask: Mask) -> None:
    if "__assertfail" not in ins.text:
        raise PtxError(f"a call: {ins.text}")
    machine.lanes.report(
        Trap, f"an assertion of the kernel failed in {machine.lanes.where(machine.lanes.active(mask))}"
    )


@instruction("trap", "brkpt")
def trap(machine: Machine, ins: Instruction, mask: Mask) -> None:
    machine.lanes.report(Trap, f"the kernel gave up in {machine.lanes.where(machine.lanes.active(mask))}")


@instruction("membar", "fence", "griddepcontrol", "nanosleep", "prefetch")
def nothing(machine: Machine, ins: Instruction, mask: Mask) -> None:
    """Memory is in order here, and nothing is ever late."""
