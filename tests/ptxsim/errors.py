"""What the simulator raises."""


class PtxError(Exception):
    """PTX that the simulator does not understand: it names the instruction, and never skips it."""


class Fault(Exception):
    """What the kernel does wrong. The message names the instruction, and where it matters block and thread."""


class MemoryFault(Fault):
    """An access out of bounds or misaligned."""


class UninitialisedRead(Fault):
    """A value that nothing wrote decides an address or a branch, is loaded, or reaches global memory."""


class Race(Fault):
    """Two warps or two blocks meet in memory, and nothing orders them."""


class SyncFault(Fault):
    """Threads wait for threads that do not come."""


class ArithmeticFault(Fault):
    """A division by zero, or a shift by the width or more."""


class Trap(Fault):
    """The kernel itself gave up: a trap, or a failed assertion."""
