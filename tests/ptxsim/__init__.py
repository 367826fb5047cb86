"""Runs PTX, as Triton and nvcc emit it, on the CPU: the instructions of the GPU code itself, and what a GPU does not
tell.

    launch(ptx, grid, block, [x.ctypes.data, n], [Buffer(x)])

runs a kernel on the memory of NumPy arrays, all lanes side by side, and raises a Fault for an access out of bounds or
misaligned, a value that nothing wrote, a race between warps or between blocks, threads that wait for ever, and a
division by zero or a shift too far. It returns Counters: instructions, and sectors of memory.

Not known: tensor cores (mma, wgmma, tcgen05), TMA and mbarrier, textures, clusters, calls. They raise PtxError. Not
seen: races between the lanes of one warp, and between atomics and plain accesses. Approximate functions (ex2, rcp,
...) are exact here.

Where things are: program and parser read the text; scalars and numerics are the numbers; memory, races and counters
the memory; lanes the registers; machine the order in which lanes run; compute, arithmetic, moves, access, atomics and
warps the instructions; simulator brings them together.
"""

from ptxsim.counters import Counters
from ptxsim.errors import (
    ArithmeticFault,
    Fault,
    MemoryFault,
    PtxError,
    Race,
    SyncFault,
    Trap,
    UninitialisedRead,
)
from ptxsim.memory import Buffer
from ptxsim.parser import parse
from ptxsim.program import Module
from ptxsim.simulator import launch

__all__ = [
    "ArithmeticFault",
    "Buffer",
    "Counters",
    "Fault",
    "MemoryFault",
    "Module",
    "PtxError",
    "Race",
    "SyncFault",
    "Trap",
    "UninitialisedRead",
    "launch",
    "parse",
]
