"""What a launch cost: instructions as warps issue them, and memory in sectors of 32 bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ptxsim.scalars import Array

SECTOR = 32


@dataclass
class Traffic:
    """Accesses to global memory in one direction."""

    requests: int = 0  # by warps
    l1_sectors: int = 0  # what the requests ask of the L1 cache: a sector once for each request that touches it
    sectors_by_width: Counter[int] = field(default_factory=Counter)  # the same by the bytes of each lane's access
    touched: Array = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def dram_sectors(self) -> int:
        """Different sectors: what a cache that forgets nothing would move."""
        return int(self.touched.sum())


@dataclass
class Counters:
    warp_instructions: int = 0
    thread_instructions: int = 0
    barriers: int = 0
    by_opcode: Counter[str] = field(default_factory=Counter)
    by_line: Counter[int] = field(default_factory=Counter)  # warp instructions of each source line
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)
    shared_requests: int = 0
    shared_wavefronts: int = 0  # equal to the requests' least number where no banks conflict

    def instructions_per(self, elements: int) -> float:
        """Thread instructions per element, idle lanes of a warp included: what the issue slots see."""
        return 32 * self.warp_instructions / elements

    def global_access(self, traffic: Traffic, positions: Array, warps: Array, size: int) -> None:
        """One access of ``size`` bytes by each lane: its position in memory, and its warp's number in the batch."""
        first, last = positions // SECTOR, (positions + (size - 1)) // SECTOR
        traffic.touched[first] = traffic.touched[last] = True
        sectors = np.concatenate((first, last)) if size > SECTOR else first
        traffic.requests += np.unique(warps).size
        span = int(sectors.max()) + 1
        asked = np.unique(np.resize(warps, sectors.size).astype(np.int64) * span + sectors).size
        traffic.l1_sectors += asked
        traffic.sectors_by_width[size] += asked

    def shared_access(self, positions: Array, warps: Array, size: int) -> None:
        """Banks of 4 bytes: a warp needs a wavefront for every different word of its busiest bank."""
        words = (positions[:, None] // 4 + np.arange(max(size // 4, 1))).ravel()
        owners, warp_of = np.unique(warps, return_inverse=True)
        span = int(words.max()) + 1
        different = np.unique(np.repeat(warp_of, max(size // 4, 1)).astype(np.int64) * span + words)
        banks = np.zeros((owners.size, 32), np.int64)
        np.add.at(banks, (different // span, different % span % 32), 1)
        self.shared_requests += owners.size
        self.shared_wavefronts += int(banks.max(axis=1).sum())
