"""The threads of some blocks, side by side in NumPy arrays: their registers, and what each knows of itself.

A register is an array over all lanes, or of one element where all lanes agree. ``mask`` is None for all live lanes,
else bool by lane. Lanes that have exited keep no value that matters, so a write by all live lanes may overwrite
theirs.

A value that nothing wrote is not a fault by itself: compilers compute with such values and then choose others. It is
followed, byte by byte of the register (``undefined``), until it decides an address or a branch, or reaches global
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ptxsim.errors import Fault, PtxError, UninitialisedRead
from ptxsim.program import Immediate, Instruction, Kernel, Negated, Operand, Register, Sink, Special, Symbol, Vector
from ptxsim.scalars import SIZES, UNSIGNED, Array, decode, encode, is_float, size_of

Mask = Array | None
WARP = 32
Shape = tuple[int, int, int]


@lru_cache(maxsize=4096)
def _constant(operand: Immediate, ptx_type: str) -> Array:
    if ptx_type == "pred":
        return np.array([operand.bits != 0])
    size = size_of(ptx_type)
    bits = operand.bits
    if operand.kind != "int" and is_float(ptx_type) and operand.kind != ptx_type:
        number = decode(np.array([bits], UNSIGNED[SIZES[operand.kind]]), operand.kind)
        return decode(encode(number.astype(np.float32), ptx_type), ptx_type)
    return decode(np.array([bits % (1 << 8 * size)], UNSIGNED[size]), ptx_type)


class Lanes:
    def __init__(
        self,
        kernel: Kernel,
        grid: Shape,
        block: Shape,
        blocks: Array,
        symbols: dict[str, int],
        report: Callable[[type[Fault], str], None],
    ) -> None:
        """``blocks``: the numbers of the blocks in the grid. ``symbols``: addresses of the text's global variables."""
        self.kernel, self.report = kernel, report
        threads = block[0] * block[1] * block[2]
        padded = -(-threads // WARP) * WARP  # whole warps; lanes behind the last thread never live
        self.count, self.blocks = len(blocks) * padded, len(blocks)
        thread = np.tile(np.arange(padded), len(blocks))
        self.thread = thread
        self.block = np.repeat(np.arange(len(blocks)), padded)  # within the batch
        self.block_id = np.asarray(blocks, np.int32)[self.block]
        self.warp = thread // WARP  # within the block
        self.batch_warp = np.arange(self.count) // WARP
        self.lane = (thread % WARP).astype(np.uint32)
        self.all_lanes = np.arange(self.count)
        self.live = thread < threads
        self.registers: dict[str, Array] = {}
        self.undefined: dict[str, Array] = {}
        self.special = self._special_registers(grid, block, thread)
        self.symbols = symbols | {name: place.offset for name, place in kernel.shared.items()}
        self.symbols |= {name: place.offset for name, place in (kernel.local | kernel.parameters).items()}
        # What runs just now, and by whom.
        self.current: Instruction | None = None
        self.mask: Mask = None

    def _special_registers(self, grid: Shape, block: Shape, thread: Array) -> dict[str, Array]:
        number = self.block_id.astype(np.int64)
        special = {
            "%tid.x": thread % block[0],
            "%tid.y": thread // block[0] % block[1],
            "%tid.z": thread // (block[0] * block[1]),
            "%ctaid.x": number % grid[0],
            "%ctaid.y": number // grid[0] % grid[1],
            "%ctaid.z": number // (grid[0] * grid[1]),
            "%laneid": self.lane,
            "%warpid": self.warp,
            "%lanemask_lt": (1 << self.lane.astype(np.int64)) - 1,
            "%lanemask_le": (2 << self.lane.astype(np.int64)) - 1,
            "%lanemask_eq": 1 << self.lane.astype(np.int64),
            "%clock": np.zeros(1),
            "%clock64": np.zeros(1),
        }
        for axis, in_block, in_grid in zip("xyz", block, grid, strict=True):
            special |= {f"%ntid.{axis}": np.array([in_block]), f"%nctaid.{axis}": np.array([in_grid])}
        return {name: values.astype(np.uint32) for name, values in special.items()}

    # -------------------------------------------------------------------------------------------------------- reading

    def read(self, operand: Operand, ptx_type: str) -> Array:
        """Its value in every lane, or of one element where all lanes agree."""
        if isinstance(operand, Register):
            return decode(self.raw(operand), ptx_type)
        if isinstance(operand, Immediate):
            return _constant(operand, ptx_type)
        if isinstance(operand, Special):
            if operand.name not in self.special:
                raise PtxError(f"the register {operand.name} in {self.text}")
            return decode(self.special[operand.name], ptx_type)
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise PtxError(f"the name {operand.name} in {self.text}")
            return decode(np.array([self.symbols[operand.name]], np.uint64), ptx_type)
        if isinstance(operand, Negated):
            return ~self.read(operand.predicate, "pred")
        if isinstance(operand, Vector):
            size = size_of(ptx_type) // len(operand.elements)
            wide = UNSIGNED[size_of(ptx_type)]
            result = np.zeros(1, wide)
            for i, element in enumerate(operand.elements):
                result = result | (self.read(element, f"b{8 * size}").astype(wide) << wide(8 * size * i))
            return decode(result, ptx_type)
        raise PtxError(f"an operand of {self.text}")

    def raw(self, register: Register) -> Array:
        found = self.registers.get(register.name)
        if found is None:
            ptx_type = self.kernel.registers[register.name]
            found = np.zeros(1, bool if ptx_type == "pred" else UNSIGNED[SIZES[ptx_type]])
            self.registers[register.name] = found
            self.undefined[register.name] = np.full(self.count, 0xFF, np.uint8)
        return found

    def undefined_bytes(self, operand: Operand, size: int, mask: Mask) -> Array | None:
        """A bit for each of the ``size`` low bytes of the operand that some lane of the mask never wrote; None for
        none.
        """
        if isinstance(operand, Negated):
            operand = operand.predicate
        if isinstance(operand, Vector):
            return self._undefined_elements(operand, size, mask)
        if not isinstance(operand, Register):
            return None
        self.raw(operand)
        found = self.undefined.get(operand.name)
        if found is None:
            return None
        bits = np.where(self.live if mask is None else mask, found & np.uint8((1 << size) - 1), np.uint8(0))
        return bits if bits.any() else None

    def _undefined_elements(self, vector: Vector, size: int, mask: Mask) -> Array | None:
        each = max(size // len(vector.elements), 1)
        result: Array | None = None
        for i, element in enumerate(vector.elements):
            bits = self.undefined_bytes(element, each, mask)
            if bits is not None:
                result = (bits << np.uint8(each * i)) | (np.uint8(0) if result is None else result)
        return result

    def require_defined(self, operand: Operand, size: int, mask: Mask, use: str) -> None:
        bits = self.undefined_bytes(operand, size, mask)
        if bits is not None:
            self.report(UninitialisedRead, f"{use} that nothing wrote, {self.where(bits != 0)}")

    # -------------------------------------------------------------------------------------------------------- writing

    def write(self, operand: Operand, value: Array, ptx_type: str, mask: Mask, undefined: Array | None = None) -> None:
        """Set a register, or the registers of a vector. ``undefined``: the bytes of the value that nothing wrote."""
        raw = encode(value, ptx_type)
        if isinstance(operand, Vector):
            size = raw.dtype.itemsize // len(operand.elements)
            for i, element in enumerate(operand.elements):
                part = (raw >> raw.dtype.type(8 * size * i)).astype(UNSIGNED[size])
                bits = None if undefined is None else (undefined >> np.uint8(size * i)) & np.uint8((1 << size) - 1)
                self._set(element, part, mask, bits)
        else:
            self._set(operand, raw, mask, undefined)

    def _set(self, operand: Operand, raw: Array, mask: Mask, undefined: Array | None) -> None:
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise PtxError(f"a result that is no register in {self.text}")
        name = operand.name
        if raw.dtype != np.bool_:
            raw = raw.astype(UNSIGNED[SIZES[self.kernel.registers[name]]], copy=False)
        if undefined is not None and not undefined.any():
            undefined = None
        if mask is None:
            self.registers[name] = raw
            if undefined is None:
                self.undefined.pop(name, None)
            else:
                self.undefined[name] = np.broadcast_to(undefined, self.count)
            return
        old = self.raw(operand)  # before its undefined bytes: a register that is new becomes undefined here
        self.registers[name] = np.where(mask, raw, old)
        before = self.undefined.pop(name, None)
        if before is not None or undefined is not None:
            zero = np.uint8(0)
            bits = np.where(mask, zero if undefined is None else undefined, zero if before is None else before)
            if bits.any():
                self.undefined[name] = bits

    # ------------------------------------------------------------------------------------------------------- describing

    def active(self, mask: Mask) -> Array:
        return self.live if mask is None else mask

    def over_lanes(self, value: Array) -> Array:
        return np.broadcast_to(value, (self.count,))

    @property
    def text(self) -> str:
        return f'"{self.current.text}"' if self.current else "the launch"

    def where(self, lanes: Array) -> str:
        """The first of these lanes, and the instruction."""
        chosen = np.flatnonzero(self.over_lanes(lanes))
        if not chosen.size:
            return f"at {self.text}"
        first = chosen[0]
        more = f" and {chosen.size - 1} more" if chosen.size > 1 else ""
        return f"block {self.block_id[first]} thread {self.thread[first]}{more}, at {self.text}"
