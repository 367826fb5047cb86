"""PTX text, as Triton and nvcc write it, into a Module."""

from __future__ import annotations

import re

from ptxsim.errors import PtxError
from ptxsim.program import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)
from ptxsim.scalars import SIZES, size_of

NAME = r"[%\w$]+"
# A label, the brace of a scope, or whatever runs up to a semicolon: braces inside that are vectors.
STATEMENT = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|((?:[^;{}]|\{[^{}]*\})+);)")
PARAMETER = re.compile(
    rf"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)"
    rf"(?:\s+\.ptr(?:\s+\.[a-z]\w*(?:\s+\d+)?)*)?\s+({NAME})(?:\[(\d+)\])?\s*$"
)
ARRAY = re.compile(rf"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+({NAME})((?:\[\d+\])*)$")
CONSTANT = re.compile(
    rf"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+({NAME})(?:\[(\d+)\])?\s*(?:=\s*(\{{[^}}]*\}}|[^;{{]+))?;"
)
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid|clock|clock64|nwarpid|lanemask_\w+)$")
# Between two shared arrays, so that running over the end of one is seen. A multiple of 32 banks of 4 bytes.
RED_ZONE = 128


def parse(text: str) -> Module:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.file\b[^\n]*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.loc\s+\d+\s+(\d+)[^\n]*", r".loc \1;", text, flags=re.MULTILINE)
    text = re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.MULTILINE)[0]
    dynamic_shared = re.findall(rf"\.extern\s+\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+({NAME})\[\]", text)
    kernels = {}
    for entry in re.finditer(rf"\.entry\s+({NAME})\s*\(([^)]*)\)([^{{]*)\{{", text):
        kernel = _declare(entry[1], entry[2], entry[3])
        _Body(kernel, dynamic_shared).parse(_up_to_closing_brace(text, entry.end()))
        kernels[kernel.name] = kernel
    return Module(kernels, {found[2]: _initial_bytes(found) for found in CONSTANT.finditer(text)})


def _up_to_closing_brace(text: str, begin: int) -> str:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, begin):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[begin : brace.start()]
    raise PtxError("a kernel without an end")


def _initial_bytes(found: re.Match[str]) -> bytes:
    size, count = size_of(found[1]), int(found[3] or 1)
    numbers = [word.strip() for word in (found[4] or "").strip("{} ").split(",") if word.strip()]
    packed = b"".join(
        (int(word[2:], 16) if word[:2].lower() in ("0f", "0d") else int(word, 0) % (1 << 8 * size)).to_bytes(
            size, "little"
        )
        for word in numbers
    )
    return packed.ljust(size * count, b"\0")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _declare(name: str, parameters: str, directives: str) -> Kernel:
    placed: dict[str, Variable] = {}
    end = 0
    for text in filter(str.strip, parameters.split(",")):
        found = PARAMETER.match(text)
        if not found:
            raise PtxError(f"a parameter that is not understood: {text.strip()}")
        size = size_of(found[2]) * int(found[4] or 1)
        end = _aligned(end, int(found[1] or 0) or size_of(found[2]))
        placed[found[3]] = Variable(end, size)
        end += size
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    count = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1) if threads else None
    return Kernel(name, placed, end, count)


class _Body:
    """Fills a kernel with what stands between its braces."""

    def __init__(self, kernel: Kernel, dynamic_shared: list[str]) -> None:
        self.kernel = kernel
        self.dynamic_shared = dynamic_shared
        self.scopes: list[dict[str, str]] = [{}]  # of each open brace: its registers, and what they are called here
        self.opened = 0
        self.line = 0

    def parse(self, text: str) -> None:
        position = 0
        while found := STATEMENT.match(text, position):
            position = found.end()
            label, brace, statement = found.groups()
            if label:
                self.kernel.labels[label] = len(self.kernel.instructions)
            elif brace == "{":
                self.opened += 1
                self.scopes.append({})
            elif brace == "}":
                self.scopes.pop()
            else:
                self.statement(" ".join(statement.split()))
        if text[position:].strip():
            raise PtxError(f"not understood: {text[position : position + 80].strip()}")
        self.kernel.shared_bytes = _aligned(self.kernel.shared_bytes, 16)
        for name in self.dynamic_shared:
            self.kernel.shared[name] = Variable(self.kernel.shared_bytes, 0)

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.declare_registers(text)
        elif found := ARRAY.match(text):
            self.declare_array(found)
        elif text.startswith(".loc"):
            self.line = int(text.split()[1])
        elif not text.startswith((".pragma", ".param")):
            if text.startswith("."):
                raise PtxError(f"a directive that is not understood: {text}")
            self.kernel.instructions.append(self.instruction(text))

    def declare_registers(self, text: str) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text)
        if not found or found[1] not in SIZES:
            raise PtxError(f"registers that are not understood: {text}")
        for name in (word.strip() for word in found[2].split(",")):
            if numbered := re.match(rf"({NAME})<(\d+)>$", name):
                self.kernel.registers |= {f"{numbered[1]}{i}": found[1] for i in range(int(numbered[2]))}
            else:
                unique = f"{name}@{self.opened}" if len(self.scopes) > 1 else name
                self.scopes[-1][name] = unique
                self.kernel.registers[unique] = found[1]

    def declare_array(self, found: re.Match[str]) -> None:
        space, alignment, ptx_type, name, dimensions = found.groups()
        size = size_of(ptx_type)
        for count in re.findall(r"\d+", dimensions):
            size *= int(count)
        align = int(alignment or size_of(ptx_type))
        if space == "shared":
            begin = _aligned(self.kernel.shared_bytes, align)
            self.kernel.shared[name] = Variable(begin, size)
            self.kernel.shared_bytes = begin + size + RED_ZONE
        else:
            begin = _aligned(self.kernel.local_bytes, align)
            self.kernel.local[name] = Variable(begin, size)
            self.kernel.local_bytes = begin + size

    def instruction(self, text: str) -> Instruction:
        found = re.match(rf"(?:@(!?)({NAME})\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if not found:
            raise PtxError(f"not understood: {text}")
        opcode, *modifiers = found[3].split(".")
        guard = self.operand(found[2]) if found[2] else None
        if guard is not None and not isinstance(guard, Register):
            raise PtxError(f"a guard that is no register: {text}")
        return Instruction(
            text,
            opcode,
            tuple(modifiers),
            tuple(word for word in modifiers if word in SIZES),
            tuple(self.operand(word) for word in _split(found[4])),
            guard,
            bool(found[1]),
            self.line,
        )

    def operand(self, text: str) -> Operand:
        if text[0] in "{(":
            return Vector(tuple(self.operand(word) for word in _split(text[1:-1])))
        if text[0] == "[":
            found = re.match(rf"\s*({NAME})\s*(?:\+?\s*(-?\s*\w+))?\s*$", text[1:-1])
            if not found:
                raise PtxError(f"an address that is not understood: {text}")
            return Address(self.operand(found[1]), int((found[2] or "0").replace(" ", ""), 0))
        if text[0] == "!":
            return Negated(self.operand(text[1:].strip()))
        if "|" in text:
            first, second = (self.operand(word.strip()) for word in text.split("|"))
            return Pair(first, second)
        if found := re.match(r"0([fFdD])([0-9a-fA-F]+)$", text):
            return Immediate(int(found[2], 16), "f32" if found[1] in "fF" else "f64")
        if found := re.match(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?$", text):
            return Immediate(int(found[1], 0), "int")
        if text == "_":
            return Sink()
        if text == "WARP_SZ":
            return Immediate(32, "int")
        for scope in reversed(self.scopes):
            if text in scope:
                return Register(scope[text])
        if text in self.kernel.registers:
            return Register(text)
        return Special(text) if SPECIAL.match(text) else Symbol(text)


def _split(text: str) -> list[str]:
    """The words between commas that no bracket encloses."""
    words, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            words.append(text[begin:i].strip())
            begin = i + 1
    return [*words, text[begin:].strip()] if text[begin:].strip() else words
