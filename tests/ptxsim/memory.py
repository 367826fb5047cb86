"""The spaces of memory, each with a shadow that knows of every byte whether it may be touched and whether it was
written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ptxsim.scalars import UNSIGNED, Array

VALID, INITIALISED = 1, 2  # the bits of a shadow byte
RED_ZONE = 256  # bytes that nobody owns around every buffer; positions keep their address modulo this
# On the device buffers lie far apart. On the host they may be neighbours, and who runs over the end of one would not
# be seen.
APART = 1 << 40
GAP = 1 << 20  # bytes between the parts of an array that are worth leaving out of the copy
# A generic address names a space by its upper bits.
WINDOWS = {"shared": 1 << 56, "local": 1 << 57, "param": 1 << 58}
WINDOW_MASK = np.uint64(sum(WINDOWS.values()))


class Buffer(NamedTuple):
    """Memory of the host that a kernel may touch: the elements of the array, and no byte between its strides.

    initialised: whether something wrote it; or that of every byte, (*array.shape, array.itemsize), which a launch
    brings up to date, so that a later launch knows what an earlier one left out.
    """

    array: Array
    initialised: bool | Array = True


class Space:
    """Bytes and their shadow. ``locate`` turns addresses into positions; what lies in no buffer goes to ``trap``."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.trap = -(-size // 32) * 32
        self.bytes = np.zeros(self.trap + 32, np.uint8)
        self.shadow = np.zeros(self.trap + 32, np.uint8)

    def locate(self, addresses: Array, lanes: Array) -> Array:
        raise NotImplementedError

    def describe(self, address: int) -> str:
        raise NotImplementedError

    def has(self, positions: Array, size: int, bits: int) -> Array:
        """Whether all ``size`` bytes from each position on have these bits in their shadow."""
        word = min(size, 8)
        pattern = UNSIGNED[word](int.from_bytes(bytes([bits]) * word, "little"))
        words, at = self.shadow.view(UNSIGNED[word]), positions // word
        result = words[at] & pattern == pattern
        for i in range(1, size // word):
            result &= words[at + i] & pattern == pattern
        return result

    def mark_initialised(self, positions: Array, size: int) -> None:
        word = min(size, 8)
        pattern = UNSIGNED[word](int.from_bytes(bytes([VALID | INITIALISED]) * word, "little"))
        words, at = self.shadow.view(UNSIGNED[word]), positions // word
        for i in range(size // word):
            words[at + i] = pattern

    def mark_undefined(self, positions: Array, size: int) -> None:
        for i in range(size):
            self.shadow[positions + i] &= np.uint8(~INITIALISED & 0xFF)

    def load(self, positions: Array, size: int, index: int) -> Array:
        """Element ``index``, each of ``size`` bytes, of the vectors that begin at these positions."""
        return self.bytes.view(UNSIGNED[size])[positions // size + index]

    def store(self, positions: Array, size: int, index: int, values: Array) -> None:
        self.bytes.view(UNSIGNED[size])[positions // size + index] = values


class PartitionedSpace(Space):
    """Memory of which every lane sees one part, beginning at 0: shared by block, local by lane, parameters by all."""

    def __init__(self, name: str, size: int, owners: Array, ranges: Iterable[tuple[int, int]]) -> None:
        """``owners``: of each lane, the number of its part. ``ranges``: begin and end of what may be touched in a
        part.
        """
        self.size = size
        stride = -(-size // 128) * 128 + 128  # a red zone, in the same bank of shared memory
        super().__init__(name, (int(owners.max()) + 1) * stride)
        self.base = owners.astype(np.int64) * stride
        parts = self.shadow[: self.trap].reshape(-1, stride)
        for begin, end in ranges:
            parts[:, begin:end] |= VALID

    def locate(self, addresses: Array, lanes: Array) -> Array:
        return np.where(addresses < np.uint64(self.size), addresses.astype(np.int64) + self.base[lanes], self.trap)

    def describe(self, address: int) -> str:
        return f"byte {address} of {self.size} of {self.name} memory"


class Region:
    """Buffers that overlap, as slices of one tensor may, or a variable of the PTX text: one piece of memory."""

    def __init__(self, content: Array, low: int, host_address: int = 0) -> None:
        self.content, self.host_address = content, host_address
        self.low, self.high = low, low + len(content)  # on the device
        self.position = 0  # of its bytes in the space


Bounds = tuple[int, int]


def _byte_bounds(array: Array) -> Bounds:
    low = high = array.__array_interface__["data"][0]
    for count, stride in zip(array.shape, array.strides, strict=True):
        low, high = low + min(0, (count - 1) * stride), high + max(0, (count - 1) * stride)
    return low, high + array.itemsize


def _parts(buffer: Buffer) -> list[Buffer]:
    """The buffer, or its parts where these lie far apart: rows that are gigabytes away from each other cost no copy."""
    array, initialised = buffer
    low, high = _byte_bounds(array)
    if high - low <= array.nbytes + GAP:
        return [buffer]
    widest = int(
        np.argmax([abs(stride) * (count > 1) for count, stride in zip(array.shape, array.strides, strict=True)])
    )
    rows = np.moveaxis(array, widest, 0)
    flags = [initialised] * len(rows) if isinstance(initialised, bool) else np.moveaxis(initialised, widest, 0)
    return [part for row in zip(rows, flags, strict=True) for part in _parts(Buffer(*row))]


def _merged(bounds: Iterable[Bounds]) -> list[Bounds]:
    merged: list[Bounds] = []
    for low, high in sorted(bounds):
        if merged and low < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _host_memory(low: int, high: int) -> Array:
    return np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), np.uint8)


class GlobalSpace(Space):
    """The buffers of a launch and the variables of the PTX text, at addresses of a device.

    The kernel works on a copy; ``write_back`` lays the results out on the host.
    """

    def __init__(self, buffers: Sequence[Buffer], constants: dict[str, bytes]) -> None:
        buffers = [buffer for buffer in buffers if buffer.array.size]
        # What overlaps is one object, and keeps its distances. Objects lie APART, each aligned as it is on the host.
        objects = _merged(_byte_bounds(buffer.array) for buffer in buffers)
        shifts = [(i + 1) * APART + low % RED_ZONE - low for i, (low, _) in enumerate(objects)]
        self.parts = [part for buffer in buffers for part in _parts(buffer)]
        self.buffers = []
        for low, high in _merged(_byte_bounds(part.array) for part in self.parts):
            shift = next(shift for shift, ends in zip(shifts, objects, strict=True) if low < ends[1])
            self.buffers.append(Region(_host_memory(low, high), low + shift, low))
        self.variables = {
            name: Region(np.frombuffer(content, np.uint8), (len(objects) + i + 1) * APART)
            for i, (name, content) in enumerate(constants.items())
        }
        self.symbols = {name: region.low for name, region in self.variables.items()}
        self.regions = [*self.buffers, *self.variables.values()]
        self._lay_out()
        for region in self.variables.values():
            self.shadow[region.position : region.position + len(region.content)] = VALID | INITIALISED
        for part in self.parts:
            bits = np.where(part.initialised, VALID | INITIALISED, VALID)
            self._shadow_of(part.array)[...] |= bits.astype(np.uint8)

    def _lay_out(self) -> None:
        end = RED_ZONE
        for region in self.regions:
            region.position = -(-end // RED_ZONE) * RED_ZONE + region.low % RED_ZONE
            end = region.position + len(region.content) + RED_ZONE
        super().__init__("global", end)
        for region in self.regions:
            self.bytes[region.position : region.position + len(region.content)] = region.content
        self.lows = np.array([region.low for region in self.regions] or [0], np.uint64)
        self.highs = np.array([region.high for region in self.regions] or [0], np.uint64)
        self.shifts = np.array([region.position - region.low for region in self.regions] or [0], np.int64)

    def _shadow_of(self, array: Array) -> Array:
        """Of each byte of the elements, (*array.shape, array.itemsize)."""
        address = self.on_device(array.__array_interface__["data"][0])
        at = int(np.searchsorted(self.lows, np.uint64(address), side="right")) - 1
        begin, strides = self.shadow[address + int(self.shifts[at]) :], (*array.strides, 1)
        return np.lib.stride_tricks.as_strided(begin, (*array.shape, array.itemsize), strides)

    def on_device(self, word: int) -> int:
        """The device's address of a byte of a buffer; any other number stays what it is."""
        for region in self.buffers:
            if region.host_address <= word < region.host_address + len(region.content):
                return word - region.host_address + region.low
        return word

    def locate(self, addresses: Array, lanes: Array) -> Array:
        if not addresses.size:
            return addresses.astype(np.int64)
        first = max(int(np.searchsorted(self.lows, addresses[0], side="right")) - 1, 0)
        if addresses.min() >= self.lows[first] and addresses.max() < self.highs[first]:
            return addresses.astype(np.int64) + self.shifts[first]
        at = np.maximum(np.searchsorted(self.lows, addresses, side="right") - 1, 0)
        inside = (addresses >= self.lows[at]) & (addresses < self.highs[at])
        return np.where(inside, addresses.astype(np.int64) + self.shifts[at], self.trap)

    def describe(self, address: int) -> str:
        if not self.regions:
            return f"address {address:#x}, and the launch has no buffer"
        nearest = min(self.regions, key=lambda region: max(region.low - address, address - region.high + 1))
        length = nearest.high - nearest.low
        if address < nearest.low:
            return f"{nearest.low - address} bytes before a buffer of {length} bytes"
        if address >= nearest.high:
            return f"{address - nearest.high} bytes past the end of a buffer of {length} bytes"
        return f"byte {address - nearest.low} of a buffer of {length} bytes, between its elements or at its end"

    def write_back(self) -> None:
        for region in self.buffers:
            result = self.bytes[region.position : region.position + len(region.content)]
            if not np.array_equal(region.content, result):
                region.content[:] = result
        for array, initialised in self.parts:
            if not isinstance(initialised, bool):
                initialised[...] = self._shadow_of(array) & INITIALISED != 0
