"""Who met whom in memory: warps of a block between two barriers, and blocks of a grid.

Both keep a record per granule, the narrowest access that the kernel makes to that space: finer ones would find
nothing more. Two lanes of one warp are not told apart.
"""

from __future__ import annotations

import numpy as np

from ptxsim.memory import Space
from ptxsim.scalars import Array

NOBODY, SEVERAL = -1, -2


def _granules(positions: Array, size: int, granule: int) -> Array:
    """(lanes, granules of an access)"""
    return (positions // granule)[:, None] + np.arange(max(size // granule, 1))


class BlockRaces:
    """Blocks run in any order, so none may touch what another writes."""

    def __init__(self, space: Space, granule: int) -> None:
        self.granule = granule
        self.writer = np.full(len(space.bytes) // granule, NOBODY, np.int32)
        self.reader = np.full(len(space.bytes) // granule, NOBODY, np.int32)

    def load(self, positions: Array, size: int, blocks: Array) -> str | None:
        at, blocks = _granules(positions, size, self.granule), blocks[:, None]
        writer, reader = self.writer[at], self.reader[at]
        # Blocks of one batch load at once: where two of them name themselves, neither finds its own name again.
        self.reader[at] = np.where((reader == NOBODY) | (reader == blocks), blocks, SEVERAL)
        lost = self.reader[at] != blocks
        if lost.any():
            self.reader[at[lost]] = SEVERAL
        if ((writer != NOBODY) & (writer != blocks)).any():
            return "a block reads what another block writes"
        return None

    def store(self, positions: Array, size: int, blocks: Array) -> str | None:
        at, blocks = _granules(positions, size, self.granule), blocks[:, None]
        writer, reader = self.writer[at], self.reader[at]
        self.writer[at] = blocks
        if ((writer != NOBODY) & (writer != blocks)).any() or (self.writer[at] != blocks).any():
            return "two blocks write to one place"
        if ((reader != NOBODY) & (reader != blocks)).any():
            return "a block writes what another block reads"
        return None


class WarpRaces:
    """Warps of a block meet only at barriers. An epoch is the time between two of them.

    Storing what is there already is no race: Triton lets several warps store one value.
    """

    def __init__(self, space: Space, granule: int) -> None:
        self.granule = granule
        count = len(space.bytes) // granule
        self.readers, self.writers = np.zeros(count, np.uint32), np.zeros(count, np.uint32)  # a bit for each warp
        self.read_epoch, self.write_epoch = np.full(count, -1, np.int32), np.full(count, -1, np.int32)

    def _join(self, warps_of: Array, epoch_of: Array, at: Array, bits: Array, epochs: Array) -> None:
        warps_of[at] = np.where(epoch_of[at] == epochs, warps_of[at], np.uint32(0))
        epoch_of[at] = epochs
        np.bitwise_or.at(warps_of, at, np.broadcast_to(bits, at.shape))

    def _others(self, warps_of: Array, epoch_of: Array, at: Array, bits: Array, epochs: Array) -> Array:
        return np.where(epoch_of[at] == epochs, warps_of[at] & ~bits, np.uint32(0)) != 0

    def load(self, positions: Array, size: int, warps: Array, epochs: Array) -> str | None:
        at, bits, epochs = _granules(positions, size, self.granule), _bit(warps), epochs[:, None]
        own = np.where(self.write_epoch[at] == epochs, self.writers[at] & bits, np.uint32(0)) != 0
        hazard = self._others(self.writers, self.write_epoch, at, bits, epochs) & ~own
        self._join(self.readers, self.read_epoch, at, bits, epochs)
        return "a warp reads what another warp wrote since the last barrier" if hazard.any() else None

    def store(self, positions: Array, size: int, warps: Array, epochs: Array, changes: Array) -> str | None:
        """``changes``: whether what the lane stores differs from what is there."""
        at, bits, epochs = _granules(positions, size, self.granule), _bit(warps), epochs[:, None]
        hazard = self._others(self.writers, self.write_epoch, at, bits, epochs)
        hazard |= self._others(self.readers, self.read_epoch, at, bits, epochs)
        self._join(self.writers, self.write_epoch, at, bits, epochs)
        if (hazard & changes[:, None]).any():
            return "a warp writes what another warp wrote or read since the last barrier"
        return None


def _bit(warps: Array) -> Array:
    return (np.uint32(1) << warps.astype(np.uint32))[:, None]
