"""Triton kernels compiled for GPUs that need not be there: what a launch with given arguments compiles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
PTX_INSTRUCTION = re.compile(r"(\{\s*)?(@!?%\w+\s+)?[a-z][\w.:]*(\s|;)")


def target_of(arch: str) -> GPUTarget:
    """Triton's name of an architecture: ``sm_90``, ``gfx942``."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compile_kernel(kernel: Any, target: GPUTarget, arguments: dict[str, Any], **options: Any) -> tuple[Any, list[Any]]:
    """What a launch with these arguments compiles, for any target, and the arguments that remain for the launch."""
    signature, constants, attributes, remaining = {}, {}, {}, []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialised = isinstance(value, Tensor) or not parameter.do_not_specialize
        is_one = specialised and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
            continue
        remaining.append(value)
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, bool | float):
            signature[name] = "fp32" if isinstance(value, float) else "u1"
            aligned = False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialised and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options), remaining


def number_lines(ptx: str) -> str:
    """The same PTX, every instruction its own source line: what the compiler makes of it says where it came from."""
    ptx = re.split(r"^\s*\.section\b", ptx, maxsplit=1, flags=re.MULTILINE)[0]  # the compiler's own line numbers
    lines = [line for line in ptx.splitlines() if not line.lstrip().startswith((".loc", ".file"))]
    numbered: list[str] = []
    for number, line in enumerate(lines, 1):
        if PTX_INSTRUCTION.match(line.strip()) and line.rstrip().endswith((";", "}")):
            numbered.append(f".loc 1 {number} 0")
        numbered.append(line)
        if line.startswith(".address_size"):
            numbered.append('.file 1 "kernel.ptx"')
    return "\n".join(numbered) + "\n"


@contextmanager
def numbered_lines() -> Iterator[None]:
    """Within this, Triton numbers the lines of its PTX before it goes on to machine code."""

    def hook(
        backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
    ) -> Any:
        if backend is None:  # asked for what tells these compilations from others in the cache
            return "numbered lines", "numbered lines"
        if "ptx" in stages:
            make_ptx = stages["ptx"]
            stages["ptx"] = lambda source, metadata: number_lines(make_ptx(source, metadata))
        return None

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = hook
        yield
