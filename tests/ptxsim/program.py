"""What a PTX text becomes: kernels, their instructions, and the operands of these."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int
    kind: str  # "int", "f32" or "f64": how it was spelt


@dataclass(frozen=True)
class Special:
    """%tid.x and its like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The name of a variable, parameter, label or function."""

    name: str


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    elements: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Pair:
    """a|b: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """!p"""

    predicate: Operand


@dataclass(frozen=True)
class Sink:
    """_: a result that nobody wants."""


Operand = Register | Immediate | Special | Symbol | Vector | Address | Pair | Negated | Sink


@dataclass
class Instruction:
    text: str
    opcode: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    types: tuple[str, ...]  # ("b32",)
    operands: tuple[Operand, ...]
    guard: Register | None  # @p, or with guard_negated @!p
    guard_negated: bool
    line: int  # of the source, by the .loc before it; 0 without

    @property
    def type(self) -> str:
        return self.types[-1]


@dataclass
class Variable:
    """A parameter, or a .shared or .local array: its place in its space."""

    offset: int
    size: int


@dataclass
class Kernel:
    name: str
    parameters: dict[str, Variable]
    parameter_bytes: int
    threads: int | None  # of a block, where the text fixes it
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that each stands before
    registers: dict[str, str] = field(default_factory=dict)  # the type of each
    shared: dict[str, Variable] = field(default_factory=dict)
    shared_bytes: int = 0  # where dynamic shared memory begins
    local: dict[str, Variable] = field(default_factory=dict)
    local_bytes: int = 0


@dataclass
class Module:
    kernels: dict[str, Kernel]
    constants: dict[str, bytes]  # .global and .const variables of the text, and what they hold
