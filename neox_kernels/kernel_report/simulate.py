"""The instructions that a kernel runs and the memory that it asks for, counted by the source tree's tests/ptxsim.

ptxsim executes PTX on the CPU. It lies among the tests, so that these figures are there where the source tree is.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SECTOR = 32  # bytes of memory that are moved at once
# Blocks of a grid do alike; so many elements' worth of them, evenly spaced, stand for all.
ELEMENTS = 400_000


class Unavailable(Exception):
    """A part of the report that cannot be made here. The message is the reason."""


def find_tests() -> Path:
    tests = Path(__file__).resolve().parents[2] / "tests"
    if not (tests / "ptxsim" / "__init__.py").exists():
        raise Unavailable("tests/ptxsim is not here: install from the source tree, with pip install -e")
    return tests


def import_from_tests(name: str) -> Any:
    """A module of the source tree's tests."""
    tests = str(find_tests())
    if tests not in sys.path:
        sys.path.append(tests)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise Unavailable("ptxsim needs numpy, which is not installed") from error


@dataclass(frozen=True)
class Counts:
    """What the whole grid costs, by the blocks of it that ran."""

    by_line: Mapping[int, int]  # warp instructions of each line of the PTX, of the blocks that ran
    share: float  # of the grid's blocks that ran
    l1_bytes: float  # asked of the L1 cache: a sector for each warp's access that touches it
    dram_bytes: float  # different sectors: what a cache that forgets nothing moves
    bytes_by_width: Mapping[int, float]  # of l1_bytes, by the width of each lane's access
    torn_share: float  # stores of sectors that another store wrote a part of, to all different sectors

    def narrow_share(self, width: int) -> float:
        """The share of ``l1_bytes`` that accesses narrower than ``width`` ask for."""
        return sum(n for of, n in self.bytes_by_width.items() if of < width) / self.l1_bytes


def sample(blocks: int, elements: int) -> range:
    """Numbers of evenly spaced blocks, enough for ELEMENTS."""
    step = max(1, min(blocks // 8, elements // ELEMENTS))
    return range(step // 2, blocks, step)


def simulate(
    ptx: str,
    kernel: str | None,
    grid: Sequence[int],
    block: int | Sequence[int],
    arguments: Sequence[Any],
    tensors: Sequence[Tensor],
    elements: int,
    shared_bytes: int = 0,
) -> Counts:
    """Run a sample of the grid.

    Args:
        ptx: with numbered lines (compile.py).
        tensors: all memory that the kernel may touch.
        elements: of the whole grid.
    """
    ptxsim, memory = import_from_tests("ptxsim"), import_from_tests("tensor_memory")
    blocks = math.prod(grid)
    chosen = sample(blocks, elements)
    counters = ptxsim.launch(
        ptx,
        grid,
        block,
        arguments,
        [ptxsim.Buffer(memory.as_array(x)) for x in tensors],
        shared_bytes=shared_bytes,
        kernel=kernel,
        blocks=chosen,
    )
    return counts_of(counters, len(chosen) / blocks)


def counts_of(counters: Any, share: float) -> Counts:
    """Of ptxsim's Counters, where this share of the grid's blocks ran."""
    both = counters.loads, counters.stores
    by_width = counters.loads.sectors_by_width + counters.stores.sectors_by_width
    return Counts(
        counters.by_line,
        share,
        sum(traffic.l1_sectors for traffic in both) * SECTOR / share,
        sum(traffic.dram_sectors for traffic in both) * SECTOR / share,
        {width: sectors * SECTOR / share for width, sectors in by_width.items()},
        (counters.stores.l1_sectors - counters.stores.dram_sectors) / max(sum(t.dram_sectors for t in both), 1),
    )


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors that have memory among these values, and among those of lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found += [value] if value.numel() else []
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found
