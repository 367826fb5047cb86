"""The CUDA kernels as the compiled library's launcher launches them, and their machine code.

The source tree's tests compile csrc/cuda for a runtime that only listens (tests/cuda_on_ptxsim.py): calling an op then
tells which variant would be launched, with which grid and arguments, and nvcc's PTX of it is at hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from neox_kernels.kernel_report.cases import Case
from neox_kernels.kernel_report.compile import number_lines
from neox_kernels.kernel_report.simulate import Counts, Unavailable, counts_of, import_from_tests, tensors_in

ENTRY = re.compile(r"^(?:\.visible |\.weak )*\.entry ([\w$]+)\(", re.MULTILINE)


def cut_kernel(ptx: str, kernel: str) -> str:
    """A module of this one kernel, with what all of the module's kernels share."""
    begins = [found.start() for found in ENTRY.finditer(ptx)]
    names = ENTRY.findall(ptx)
    at = names.index(kernel)
    end = begins[at + 1] if at + 1 < len(begins) else len(ptx)
    return ptx[: begins[0]] + ptx[begins[at] : end]


class CudaKernels:
    """What csrc/cuda launches, and what nvcc makes of it."""

    def __init__(self, ops: Any) -> None:
        """``ops``: cuda_on_ptxsim.CudaOps, compiled."""
        self.ops = ops
        self.assembled: dict[tuple[str, str], tuple[str, bytes]] = {}

    def launched(self, case: Case) -> tuple[Any, list[Any]]:
        """The launch of a case's kernel (cuda_on_ptxsim.Launch), and the tensors that it uses."""
        call = case.cuda()
        result, launches = self.ops.record(call.op, *call.arguments)
        one = next(launch for launch in launches if call.kernel in launch.kernel)
        return one, tensors_in((*call.arguments, result))

    def run_whole(self, case: Case, arch: str, ptx: str, kernel: str) -> Counts:
        """What a kernel costs in a call of which every launch runs, since one reads memory that another wrote.

        Args:
            ptx: the kernel's, with numbered lines, for the counts of lines are of these.
        """
        call, parse = case.cuda(), import_from_tests("ptxsim").parse
        kernels = self.ops.kernels[int(arch[3:])]
        plain = kernels[kernel]
        kernels[kernel] = parse(ptx)
        try:
            _, counters = self.ops.call(call.op, int(arch[3:]), *call.arguments)
        finally:
            kernels[kernel] = plain
        found = next(c for launch, c in zip(self.ops.launches, counters, strict=True) if launch.kernel == kernel)
        return counts_of(found, 1.0)

    def code_of(self, kernel: str, arch: str) -> tuple[str, bytes]:
        """Its PTX with numbered lines, and the cubin that the toolkit's assembler makes of that."""
        key = kernel, arch
        if key not in self.assembled:
            texts = self.ops.texts[int(arch[3:])]
            ptx = number_lines(cut_kernel(texts[kernel].read_text(), kernel))
            self.assembled[key] = ptx, self.ops.assemble(ptx, arch)
        return self.assembled[key]


def compile_cuda(folder: Path) -> CudaKernels:
    """Compile csrc/cuda into a folder, which takes minutes. Raises Unavailable where that cannot be."""
    tests = import_from_tests("cuda_on_ptxsim")
    reason = tests.missing()
    if reason:
        raise Unavailable(reason)
    try:
        return CudaKernels(tests.CudaOps(folder))
    except tests.CannotBuild as error:
        raise Unavailable(str(error)) from error
