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

import triton
from ptxsim import Counters, Module, launch, parse
from tensor_memory import FreshMemory
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from neox_kernels.kernel_report.compile import compile_kernel


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
            [self.fresh.buffer(x) for x in tensors],
            shared_bytes=compiled.metadata.shared - self.shared_less,
        )
        self.launches.append(counters)
        return counters
