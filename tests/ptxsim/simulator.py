"""Launches a kernel on buffers of the host, as a driver would on a GPU."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

# These modules register what executes each instruction.
from ptxsim import access, arithmetic, atomics, moves, warps
from ptxsim.counters import SECTOR, Counters
from ptxsim.errors import Fault, PtxError
from ptxsim.lanes import Lanes, Shape
from ptxsim.machine import Machine
from ptxsim.memory import INITIALISED, VALID, Buffer, GlobalSpace, PartitionedSpace
from ptxsim.parser import parse
from ptxsim.program import Kernel, Module
from ptxsim.races import BlockRaces
from ptxsim.scalars import SIZES

__all__ = ["access", "arithmetic", "atomics", "launch", "moves", "warps"]

# Lanes that run side by side: enough to make NumPy's cost per call small, few enough to stay in the cache.
BATCH = 8192
Argument = int | float | bytes | np.generic


def launch(
    program: str | Module,
    grid: Sequence[int],
    block: int | Sequence[int],
    arguments: Sequence[Argument],
    buffers: Sequence[Buffer] = (),
    *,
    shared_bytes: int = 0,
    kernel: str | None = None,
    ignore: tuple[type[Fault], ...] = (),
    order: int | None = None,
    blocks: Sequence[int] | None = None,
) -> Counters:
    """Run every block of the grid; the arrays of the buffers then hold the results.

    Args:
        arguments: one for each parameter: a number, the address of a buffer's element, or a struct's bytes.
        buffers: all memory that the kernel may touch. What it writes is laid out in their arrays.
        shared_bytes: dynamic shared memory.
        kernel: which one, where the text has several.
        ignore: faults that are let pass. By default all are checked for.
        order: a seed that shuffles the blocks; None runs them by their number.
        blocks: the numbers of those to run, x counting fastest; None runs all of the grid.
    Raises:
        Fault: the first thing that the kernel does wrong.
        PtxError: the simulator does not know an instruction.
    """
    module = program if isinstance(program, Module) else parse(program)
    chosen = module.kernels[kernel] if kernel else next(iter(module.kernels.values()))
    full_grid, full_block = _three(grid), _three([block] if isinstance(block, int) else block)
    threads = int(np.prod(full_block))
    if chosen.threads is not None and chosen.threads != threads:
        raise PtxError(f"{chosen.name} wants blocks of {chosen.threads} threads, not {threads}")

    def report(fault: type[Fault], message: str) -> None:
        if not issubclass(fault, ignore):
            raise fault(message)

    memory = GlobalSpace(buffers, module.constants)
    parameters = _on_device(_parameters(chosen, arguments), memory)
    counters = Counters()
    for traffic in (counters.loads, counters.stores):
        traffic.touched = np.zeros(len(memory.bytes) // SECTOR + 2, bool)
    numbers = np.arange(int(np.prod(full_grid)))
    if blocks is not None:
        numbers = numbers[np.asarray(blocks)]
    if order is not None:
        numbers = np.random.default_rng(order).permutation(numbers)
    races = BlockRaces(memory, _granule(chosen, "global")) if len(numbers) > 1 else None
    per_batch = max(1, BATCH // threads)
    for begin in range(0, len(numbers), per_batch):
        lanes = Lanes(chosen, full_grid, full_block, numbers[begin : begin + per_batch], memory.symbols, report)
        shared_size = chosen.shared_bytes + shared_bytes
        static = [(place.offset, place.offset + place.size) for place in chosen.shared.values()]
        spaces = {
            "global": memory,
            "shared": PartitionedSpace(
                "shared", shared_size, lanes.block, [*static, (chosen.shared_bytes, shared_size)]
            ),
            "local": PartitionedSpace("local", chosen.local_bytes, lanes.all_lanes, [(0, chosen.local_bytes)]),
            "param": PartitionedSpace("param", len(parameters), np.zeros_like(lanes.all_lanes), []),
        }
        spaces["param"].bytes[: len(parameters)] = np.frombuffer(parameters, np.uint8)
        spaces["param"].shadow[: len(parameters)] = VALID | INITIALISED
        Machine(lanes, spaces, counters, races, _granule(chosen, "shared")).run()
    memory.write_back()
    return counters


def _three(sizes: Sequence[int]) -> Shape:
    x, y, z = (*sizes, 1, 1)[:3]
    return int(x), int(y), int(z)


def _parameters(kernel: Kernel, arguments: Sequence[Argument]) -> bytes:
    places = list(kernel.parameters.values())
    if len(arguments) != len(places):
        raise PtxError(f"{kernel.name} has {len(places)} parameters, and {len(arguments)} arguments are given")
    result = bytearray(kernel.parameter_bytes)
    for place, argument in zip(places, arguments, strict=True):
        if isinstance(argument, bytes):
            content = argument
        elif isinstance(argument, np.generic):
            content = argument.tobytes()
        elif isinstance(argument, float):
            content = struct.pack("<f" if place.size == 4 else "<d", argument)
        else:
            content = (int(argument) % (1 << 8 * place.size)).to_bytes(place.size, "little")
        if len(content) != place.size:
            raise PtxError(f"{kernel.name}: {len(content)} bytes for a parameter of {place.size}")
        result[place.offset : place.offset + place.size] = content
    return bytes(result)


def _on_device(parameters: bytes, memory: GlobalSpace) -> bytes:
    """Every word that points into a buffer, of a struct too, becomes the device's address."""
    whole = parameters.ljust(-(-len(parameters) // 8) * 8, b"\0")
    words = [memory.on_device(word) for (word,) in struct.iter_unpack("<Q", whole)]
    return struct.pack(f"<{len(words)}Q", *words)[: len(parameters)]


def _granule(kernel: Kernel, space: str) -> int:
    """The narrowest access that the kernel can make to a space."""
    sizes = [
        SIZES[ins.type]
        for ins in kernel.instructions
        if ins.opcode in ("ld", "st", "ldu", "ldmatrix", "stmatrix")
        and access.space_of(ins) in (space, "generic", "const")
    ]
    return min(sizes, default=4)
