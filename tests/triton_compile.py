"""What a launch of a Triton kernel compiles, for a GPU that need not be there."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


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
