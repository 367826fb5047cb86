"""Runs the lanes of some blocks: which go next, where they part and meet, and who waits for whom.

Every lane has its own program counter. Of the lanes that can run, those at the lowest one run together, straight on
until they part, wait, or come to where others stand: compilers lay code out so that this brings parted lanes together
again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptxsim.counters import Counters
from ptxsim.errors import PtxError, SyncFault
from ptxsim.lanes import WARP, Lanes, Mask
from ptxsim.memory import GlobalSpace, PartitionedSpace, Space
from ptxsim.program import Immediate, Instruction, Operand, Register, Symbol
from ptxsim.races import BlockRaces, WarpRaces
from ptxsim.scalars import Array

Handler = Callable[["Machine", Instruction, Mask], None]
HANDLERS: dict[str, Handler] = {}
BLOCK_SYNC = {"bar", "barrier"}
WARP_SYNC = {"shfl", "vote", "redux", "match", "ldmatrix", "stmatrix", "activemask"}


def instruction(*opcodes: str) -> Callable[[Handler], Handler]:
    """Register what executes these opcodes."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register


class Machine:
    def __init__(
        self,
        lanes: Lanes,
        spaces: dict[str, Space],
        counters: Counters,
        block_races: BlockRaces | None,
        shared_granule: int,
    ) -> None:
        self.lanes, self.spaces, self.counters = lanes, spaces, counters
        self.block_races = block_races
        self.warp_races = WarpRaces(spaces["shared"], shared_granule)
        self.epoch = np.zeros(lanes.blocks, np.int32)  # barriers that each block has passed
        self.program = lanes.kernel.instructions
        self.at = np.zeros(lanes.count, np.int32)  # the instruction of every lane that is not running just now
        self.waiting = np.zeros(lanes.count, bool)

    @property
    def global_space(self) -> GlobalSpace:
        space = self.spaces["global"]
        assert isinstance(space, GlobalSpace)
        return space

    @property
    def shared_space(self) -> PartitionedSpace:
        space = self.spaces["shared"]
        assert isinstance(space, PartitionedSpace)
        return space

    # ------------------------------------------------------------------------------------------------------- scheduling

    def run(self) -> None:
        while self.lanes.live.any():
            runnable = self.lanes.live & ~self.waiting
            if not runnable.any():
                self.deadlock()
                return
            places = self.at[runnable]
            first = int(places.min())
            group = runnable & (self.at == first)
            others = places[places > first]
            until = int(others.min()) if others.size else len(self.program)
            self.run_group(first, until, group)

    def run_group(self, place: int, until: int, group: Array) -> None:
        """Run these lanes, which all stand at ``place``."""
        lanes = self.lanes
        together = bool((group == lanes.live).all())
        warps = int(group.reshape(-1, WARP).any(axis=1).sum())
        threads = int(group.sum())
        while place < until:
            ins = lanes.current = self.program[place]
            mask: Mask = None if together else group
            some = True
            if ins.guard is not None:
                some, mask = self.guarded(ins, group, mask)
            self.counters.warp_instructions += warps
            self.counters.thread_instructions += threads
            self.counters.by_opcode[ins.opcode] += warps
            self.counters.by_line[ins.line] += warps
            if ins.opcode == "bra":
                if not some:
                    place += 1
                    continue
                target = self.target(ins.operands[0])
                if mask is None or mask is group or (mask == group).all():
                    place = target
                    continue
                self.at[group] = place + 1
                self.at[mask] = target
                return
            if ins.opcode in ("ret", "exit"):
                leaving = (group if mask is None else mask) if some else np.zeros(lanes.count, bool)
                lanes.live &= ~leaving
                self.at[group] = place + 1
                self.waiting[:] = False  # those who wait for the ones that left look again
                return
            if ins.opcode in BLOCK_SYNC or ins.opcode in WARP_SYNC:
                if not self.synchronise(ins, place, group, together):
                    return
            elif some:
                self.execute(ins, mask)
            place += 1
        self.at[group] = place
        if place >= len(self.program):
            lanes.live &= ~group
            self.waiting[:] = False

    def guarded(self, ins: Instruction, group: Array, mask: Mask) -> tuple[bool, Mask]:
        """Whether any lane executes the instruction, and which."""
        lanes = self.lanes
        assert ins.guard is not None
        lanes.require_defined(ins.guard, 1, mask, "a predicate decides")
        chosen = lanes.raw(ins.guard)
        chosen = ~chosen if ins.guard_negated else chosen
        if chosen.all():
            return True, mask
        mask = chosen & group
        return bool(mask.any()), mask

    def target(self, operand: Operand) -> int:
        if not isinstance(operand, Symbol) or operand.name not in self.lanes.kernel.labels:
            raise PtxError(f"a branch to no label: {self.lanes.text}")
        return self.lanes.kernel.labels[operand.name]

    def execute(self, ins: Instruction, mask: Mask) -> None:
        handler = HANDLERS.get(ins.opcode)
        if handler is None:
            raise PtxError(f"an instruction that the simulator does not know: {self.lanes.text}")
        self.lanes.mask = mask
        try:
            with np.errstate(all="ignore"):
                handler(self, ins, mask)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise PtxError(f"a form of an instruction that the simulator does not know: {self.lanes.text}") from error

    # ------------------------------------------------------------------------------------------------------ waiting

    def synchronise(self, ins: Instruction, place: int, group: Array, together: bool) -> bool:
        """Execute the instruction for the lanes whose partners have all come; True where the group goes on as it is."""
        lanes = self.lanes
        if together and not self.waiting.any() and self.named_are_live(ins):
            mask = None if ins.guard is None else self.guarded(ins, group, None)[1]
            self.execute(ins, mask)
            return True
        here = group | (self.waiting & (self.at == place) & lanes.live)
        ready = here & (self.blocks_complete(here) if ins.opcode in BLOCK_SYNC else self.warps_complete(ins, here))
        self.at[group] = place
        self.waiting[group] = True
        if ready.any():
            mask = ready if ins.guard is None else self.guarded(ins, ready, ready)[1]
            self.execute(ins, mask)
            self.at[ready] = place + 1
            self.waiting[ready] = False
        return False

    def blocks_complete(self, here: Array) -> Array:
        """By lane: whether all live lanes of its block are here."""
        count = self.lanes.blocks
        living = np.bincount(self.lanes.block[self.lanes.live], minlength=count)
        return (np.bincount(self.lanes.block[here], minlength=count) == living)[self.lanes.block]

    def members(self, ins: Instruction) -> Array:
        """By lane: the lanes of its warp that must take part."""
        if ins.opcode == "activemask":
            return np.zeros(self.lanes.count, np.uint32)
        last = ins.operands[-1]
        if ins.opcode in ("ldmatrix", "stmatrix") or not isinstance(last, Register | Immediate):
            return np.full(self.lanes.count, 0xFFFFFFFF, np.uint32)
        return self.lanes.over_lanes(self.lanes.read(last, "b32"))

    def ballot(self, chosen: Array) -> Array:
        """By lane: the chosen lanes of its warp, a bit for each."""
        bits = chosen.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
        return np.repeat(bits.sum(axis=1).astype(np.uint32), WARP)

    def named_are_live(self, ins: Instruction) -> bool:
        if ins.opcode in BLOCK_SYNC or self.lanes.live.all():
            return True
        members = self.members(ins)
        return bool((members & ~self.ballot(self.lanes.live))[self.lanes.live].max() == 0)

    def warps_complete(self, ins: Instruction, here: Array) -> Array:
        members = self.members(ins)
        gone = here & ((members & ~self.ballot(self.lanes.live)) != 0)
        if gone.any():
            self.lanes.report(
                SyncFault, f"lanes that have exited, or never were, are waited for by {self.lanes.where(gone)}"
            )
            members = members & self.ballot(self.lanes.live)
        return (self.ballot(here) & members) == members

    def deadlock(self) -> None:
        lanes = self.lanes
        block = lanes.block[lanes.live][0]
        mine = lanes.live & (lanes.block == block)
        groups = [
            f'{int((mine & (self.at == place)).sum())} threads at "{self.program[place].text}"'
            for place in np.unique(self.at[mine])
        ]
        gone = int((~lanes.live & (lanes.block == block)).sum())
        waiting = "; ".join([*groups, *([f"{gone} have exited"] if gone else [])])
        lanes.report(SyncFault, f"block {lanes.block_id[mine][0]} waits for ever: {waiting}")
