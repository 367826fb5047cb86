"""What a multiprocessor holds at once, and how fast a card's memory is: NVIDIA's published numbers.

Limits: CUDA C++ Programming Guide, "Compute Capabilities". Bandwidths: the data sheets of the cards.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of a multiprocessor, a quarter in each of its four parts
REGISTER_UNIT = 256  # granted to a warp at a time
PARTS = 4
SHARED_UNIT = 128  # bytes of shared memory granted at a time
RESERVED_SHARED = 1024  # bytes that the system takes of each block's

# What a streaming kernel is expected to reach of the memory's peak.
EFFICIENCY = 0.85


@dataclass(frozen=True)
class Card:
    name: str
    bandwidth: float  # bytes per second
    shared_bytes: int  # of a multiprocessor
    warps: int = 64
    blocks: int = 32

    def predicted_seconds(self, memory_bytes: float) -> float:
        """A prediction and no measurement: what moving these bytes takes at EFFICIENCY of the bandwidth."""
        return memory_bytes / (EFFICIENCY * self.bandwidth)


CARDS = {
    "sm_80": Card("A100", 2.039e12, 164 * 1024),
    "sm_90": Card("H100", 3.35e12, 228 * 1024),
    "sm_100": Card("B200", 8.0e12, 228 * 1024),
}
AMD = ("gfx942",)  # compiled only
ARCHS = (*CARDS, *AMD)


@dataclass(frozen=True)
class Occupancy:
    share: float  # of the warps that a multiprocessor could hold
    limit: str  # what keeps it from holding more blocks


def occupancy(card: Card, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """How full a multiprocessor gets.

    Args:
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block, static and dynamic, without what the system reserves.
    Raises:
        ValueError: ``threads`` is not from 1 to 1024, ``registers`` not from 0 to 255, or ``shared_bytes`` negative.
    """
    for name, value, low, high in (("threads", threads, 1, 1024), ("registers", registers, 0, 255)):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, not {value}")
    if shared_bytes < 0:
        raise ValueError(f"shared_bytes must not be negative, and is {shared_bytes}")
    warps = -(-threads // WARP)
    registers_of_warp = -(-max(registers, 1) * WARP // REGISTER_UNIT) * REGISTER_UNIT
    shared_of_block = -(-(shared_bytes + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    blocks = {
        "warps": card.warps // warps,
        "blocks": card.blocks,
        # A warp's registers lie in one part.
        "registers": REGISTERS // PARTS // registers_of_warp * PARTS // warps,
        "shared memory": card.shared_bytes // shared_of_block,
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return Occupancy(blocks[limit] * warps / card.warps, limit)
