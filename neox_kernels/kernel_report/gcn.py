"""What Triton's assembly for AMD's GPUs says of a kernel. It is compiled for them; nothing here runs it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
WIDTHS = (("dwordx4", 16), ("b128", 16), ("dwordx2", 8), ("b64", 8), ("short", 2), ("16", 2), ("byte", 1), ("8", 1))
MAX_WAVES = 8  # of a SIMD unit of gfx942


@dataclass(frozen=True)
class Assembly:
    registers: int  # vector registers of a thread
    spills: int  # registers that went to memory
    shared_bytes: int
    waves: int  # of a SIMD unit at once
    loads: dict[int, int]  # how many access how many bytes
    stores: dict[int, int]


def parse_assembly(text: str) -> Assembly:
    """Raises ValueError where the assembly does not say what it must."""

    def number(name: str) -> int:
        found = re.findall(rf"\.{name}:\s+(\d+)", text)
        if not found:
            raise ValueError(f"the assembly does not say .{name}")
        return int(found[-1])

    def widths(kind: str) -> dict[int, int]:
        words = [word for found, word in ACCESS.findall(text) if found == kind]
        counts = Counter(next((width for end, width in WIDTHS if end in word), 4) for word in words)
        return dict(sorted(counts.items(), reverse=True))

    waves = re.search(r"; Occupancy: (\d+)", text)
    if not waves:
        raise ValueError("the assembly does not say its occupancy")
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    shared = number("group_segment_fixed_size")
    return Assembly(number("vgpr_count"), spills, shared, int(waves[1]), widths("load"), widths("store"))
