"""Triton kernels on a machine without a GPU: compiled for one all the same, and their PTX run by ptxsim.

``Gpu(arch).stand_in(kernel)`` takes the place of a kernel: what launches that on a GPU then launches it here, on CPU
tensors, with the same grid, arguments and constants. Fresh memory counts as uninitialised until something writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from ptxsim import Buffer, Counters, Module, launch, parse
from tensor_memory import FreshMemory, as_array
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

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


@contextmanager
def ptx_only(cache: Path) -> Iterator[None]:
    """Compile no further than to PTX, which halves the time, and keep that out of the user's cache of kernels."""
    to_cubin = CUDABackend.make_cubin
    CUDABackend.make_cubin = lambda *args, **kwargs: b""
    try:
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(cache)
            yield
    finally:
        CUDABackend.make_cubin = to_cubin


class Gpu:
    """An architecture that kernels are compiled for and run as."""

    def __init__(self, arch: int, edit: Callable[[str], str] = lambda ptx: ptx, shared_less: int = 0) -> None:
        """Bugs to plant: ``edit`` changes the PTX before it runs, ``shared_less`` takes bytes of shared memory away."""
        self.target, self.edit, self.shared_less = GPUTarget("cuda", arch, 32), edit, shared_less
        self.fresh = FreshMemory()
        self.modules: dict[str, Module] = {}
        self.launches: list[Counters] = []

    def stand_in(self, kernel: Any) -> Any:
        gpu = self

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return partial(gpu.launch, kernel, grid)

        return Kernel()

    def launch(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> Counters:
        options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
        compiled, remaining = compile_kernel(kernel, self.target, arguments, **options)
        module = self.modules.get(compiled.hash)
        if module is None:
            module = self.modules[compiled.hash] = parse(self.edit(compiled.asm["ptx"]))
        tensors = [value for value in remaining if isinstance(value, Tensor)]
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value for value in remaining]
        # The last two parameters are memory for scratch and for a profiler, which these kernels do without.
        counters = launch(
            module,
            grid,
            32 * compiled.metadata.num_warps,
            [*numbers, 0, 0],
            [Buffer(as_array(x), not self.fresh.holds(x)) for x in tensors],
            shared_bytes=compiled.metadata.shared - self.shared_less,
        )
        for x in tensors:
            self.fresh.written(x)
        self.launches.append(counters)
        return counters
