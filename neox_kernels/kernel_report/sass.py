"""The machine code of NVIDIA's GPUs (SASS), read from what nvdisasm and cuobjdump say of a cubin.

Compilers number the lines that an instruction came from. With the PTX's own lines for that (compile.py), nvdisasm -g
says which PTX every instruction of the machine code serves, and who has run the PTX knows how often it ran.
"""

from __future__ import annotations

import functools
import re
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$]+)", re.MULTILINE)
LABEL = re.compile(r"^([\w.$]+):\s*$")
LINE = re.compile(r'//## File "[^"]*", line (\d+)')
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
USAGE = re.compile(r"Function ([\w$]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
ENDS_BLOCK = ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BSYNC", "BREAK")
SUBROUTINE = "$__internal_"
WIDTHS = ((".256", 32), (".128", 16), (".64", 8), ("16", 2), ("8", 1))


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "LDG.E.128"
    line: int  # of the PTX; 0 where the cubin does not say

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes of a lane's access to memory."""
        words = self.opcode.split(".")[1:]
        return next((width for end, width in WIDTHS for word in words if f".{word}".endswith(end)), 4)


@dataclass
class Code:
    """One kernel: its instructions without padding, in blocks that are entered at the top and left at the end."""

    blocks: list[list[Instruction]]
    subroutines: list[Instruction] = field(default_factory=list)  # such as division's slow path

    def __iter__(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block
        yield from self.subroutines

    def widths(self, *names: str) -> dict[int, int]:
        """How many of these instructions access how many bytes, the widest first."""
        found = Counter(instruction.width for instruction in self if instruction.name in names)
        return dict(sorted(found.items(), reverse=True))

    def executed(self, by_line: Mapping[int, int]) -> int:
        """Instructions that warps issued, where they ran each line of the PTX this often.

        A block is run as often as the median of its instructions' lines: the compiler moves single instructions into
        other blocks, and turns short branches into predicates, but what a block does it got from one place of the PTX.
        Subroutines count for nothing: ordinary numbers never enter them.
        """
        return sum(
            len(block) * int(statistics.median_low(by_line.get(instruction.line, 0) for instruction in block))
            for block in self.blocks
        )


@dataclass(frozen=True)
class Usage:
    registers: int  # of a thread
    stack_bytes: int  # of a thread: what did not fit into registers, or is indexed
    shared_bytes: int  # of a block, static


def parse_code(text: str) -> dict[str, Code]:
    """What ``nvdisasm -c -g`` says, by kernel."""
    parts = SECTION.split(text)
    return {name: _parse_kernel(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def _parse_kernel(body: str) -> Code:
    code, line, label, in_subroutine = Code([[]]), 0, "", False
    for text in body.splitlines():
        if found := LABEL.match(text):
            label, in_subroutine = found[1], in_subroutine or found[1].startswith(SUBROUTINE)
            code.blocks.append([])
        elif found := LINE.search(text):
            line = int(found[1])
        elif found := INSTRUCTION.match(text):
            guard, opcode, operands = found.groups()
            # The end is padded with NOP, behind a trap: a branch to itself.
            if opcode == "NOP" or (opcode == "BRA" and not guard and f"({label})" in operands and not code.blocks[-1]):
                continue
            (code.subroutines if in_subroutine else code.blocks[-1]).append(Instruction(opcode, line))
            if opcode.partition(".")[0] in ENDS_BLOCK:
                code.blocks.append([])
    code.blocks = [block for block in code.blocks if block]
    return code


def parse_usage(text: str) -> dict[str, Usage]:
    """What ``cuobjdump -res-usage`` says, by kernel."""
    return {
        name: Usage(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in USAGE.findall(text)
    }


def find_tool(name: str) -> Path:
    """nvdisasm or cuobjdump, as Triton brings them. Raises FileNotFoundError, with what is missing."""
    try:
        import triton
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"{name} comes with triton, which is not installed") from error
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not tool.exists():
        raise FileNotFoundError(f"{name} is missing: triton {triton.__version__} has none in its backends/nvidia/bin")
    return tool


@functools.cache  # the same variant serves several configurations
def read_cubin(cubin: bytes, kernel: str) -> tuple[Code, Usage]:
    """Code and resources of a kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, *options: str) -> str:
            words = [str(find_tool(tool)), *options, file.name]
            return subprocess.run(words, capture_output=True, encoding="utf-8", check=True).stdout

        code, usage = parse_code(run("nvdisasm", "-c", "-g")), parse_usage(run("cuobjdump", "-res-usage"))
    return code[kernel], usage[kernel]
