"""The rows of the report: a kernel in one configuration, compiled for one architecture, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from neox_kernels.kernel_report import gcn, sass, simulate
from neox_kernels.kernel_report.cards import CARDS, WARP, occupancy
from neox_kernels.kernel_report.cases import Case
from neox_kernels.kernel_report.compile import compile_kernel, numbered_lines, target_of
from neox_kernels.kernel_report.cuda import CudaKernels
from neox_kernels.kernel_report.simulate import Counts, Unavailable


@dataclass
class Row:
    """Figures of one kernel. None: not there, and ``absent`` says why. Per element: of the case's elements."""

    backend: str  # triton or cuda
    kernel: str
    configuration: str
    dtype: str
    arch: str
    grid: tuple[int, ...]
    threads: int  # of a block
    registers: int  # of a thread
    spill_bytes: int  # of a thread, in memory; for gfx942 registers
    shared_bytes: int  # of a block
    occupancy: float  # of all warps that a multiprocessor holds
    occupancy_limit: str
    loads: dict[int, int]  # bytes of a lane's access to global memory: how many such instructions
    stores: dict[int, int]
    access_bytes: int  # the widest access that the tensors' alignment allows
    minimum_bytes: float  # per element, that the call must read and write
    instructions: int | None = None  # of the machine code, without padding
    instructions_run: float | None = None  # per element
    ptx_run: float | None = None  # PTX instructions per element
    l1_bytes: float | None = None  # per element, asked of L1
    dram_bytes: float | None = None  # per element
    narrow_share: float | None = None  # of l1_bytes, by accesses narrower than access_bytes
    torn_share: float | None = None  # of dram_bytes, what is stored again because sectors are written in parts
    instruction_limit: float | None = None  # of instructions_run
    predicted_card: str | None = None
    predicted_us: float | None = None  # a prediction, not a measurement
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " | ".join((self.backend, self.kernel, self.configuration, self.dtype, self.arch))


# Of the bytes asked of L1, what accesses narrower than need be may ask for: numbers that all lanes read, such as a
# seed, cost a sector each. One tensor of three that is read by 2 bytes would ask for more than half.
NARROW_SHARE = 0.1
# A sector that two stores write in parts is read and written once more than need be: on an H100, a rotary kernel where
# that was a fifth of the bytes took twice the time.
TORN_SHARE = 0.05


def missed_gates(row: Row) -> list[str]:
    """What a row must hold whatever the compiler, and does not."""
    missed = []
    if row.spill_bytes:
        missed.append(f"spill_bytes {row.spill_bytes}, limit 0")
    if row.narrow_share is not None and row.narrow_share > NARROW_SHARE:
        missed.append(f"narrow_share {row.narrow_share:.3f} below {row.access_bytes} bytes, limit {NARROW_SHARE}")
    if row.dram_bytes is not None and row.dram_bytes > 1.1 * row.minimum_bytes:
        missed.append(f"dram_bytes {row.dram_bytes:.3f}, limit {1.1 * row.minimum_bytes:.3f} (1.1 of the minimum)")
    if row.torn_share is not None and row.torn_share > TORN_SHARE:
        missed.append(f"torn_share {row.torn_share:.3f} of dram_bytes, limit {TORN_SHARE}")
    run, limit = row.instructions_run, row.instruction_limit
    if run is not None and limit is not None and run > limit:
        missed.append(f"instructions_run {run:.2f}, limit {limit}")
    return missed


def dtype_name(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def add_counts(row: Row, case: Case, code: sass.Code, counts: Counts) -> None:
    row.instructions_run = code.executed(counts.by_line) * WARP / (case.elements * counts.share)
    row.ptx_run = sum(counts.by_line.values()) * WARP / (case.elements * counts.share)
    row.l1_bytes = counts.l1_bytes / case.elements
    row.dram_bytes = counts.dram_bytes / case.elements
    row.narrow_share = counts.narrow_share(case.width)
    row.torn_share = counts.torn_share


def make_row(
    case: Case, backend: str, arch: str, grid: tuple[int, ...], threads: int, cubin: bytes, kernel: str, dynamic: int
) -> tuple[Row, sass.Code]:
    """A row of an NVIDIA GPU without what the simulator says; ``dynamic`` bytes of shared memory."""
    code, usage = sass.read_cubin(cubin, kernel)
    card = CARDS[arch]
    # cuobjdump counts what the system reserves of a block's shared memory from sm_90 on.
    static = usage.shared_bytes if usage.shared_bytes < 1024 or arch == "sm_80" else usage.shared_bytes - 1024
    shared = static + dynamic
    held = occupancy(card, threads, usage.registers, shared)
    row = Row(
        backend, case.kernel, case.configuration, dtype_name(case), arch, grid, threads, usage.registers,
        usage.stack_bytes, shared, held.share, held.limit, code.widths("LDG", "LD"), code.widths("STG", "ST"),
        case.width, case.minimum_bytes / case.elements, sum(1 for _ in code), predicted_card=card.name,
        instruction_limit=case.instruction_limit if arch == "sm_90" and case.dtype == torch.bfloat16 else None,
    )  # fmt: skip
    return row, code


def predict(row: Row, case: Case) -> None:
    if row.arch in CARDS:
        moved = (row.dram_bytes or row.minimum_bytes) * case.elements
        row.predicted_us = CARDS[row.arch].predicted_seconds(moved) * 1e6


def triton_row(case: Case, arch: str) -> Row:
    planned = case.triton()
    options = {name: value for name, value in planned.arguments.items() if name not in planned.kernel.arg_names}
    options["enable_fp_fusion"] = triton.knobs.language.default_fp_fusion  # as a launch has it, and said aloud
    with numbered_lines():
        compiled, remaining = compile_kernel(planned.kernel, target_of(arch), planned.arguments, **options)
    threads, shared = compiled.metadata.num_warps * target_of(arch).warp_size, compiled.metadata.shared
    if arch not in CARDS:
        found = gcn.parse_assembly(compiled.asm["amdgcn"])
        reason = "compiled only: nothing here runs this GPU's code"
        return Row(
            "triton", case.kernel, case.configuration, dtype_name(case), arch, planned.grid, threads, found.registers,
            found.spills, found.shared_bytes, found.waves / gcn.MAX_WAVES, "as the compiler says", found.loads,
            found.stores, case.width, case.minimum_bytes / case.elements,
            absent=dict.fromkeys(("instructions_run", "ptx_run", "l1_bytes", "dram_bytes", "predicted_us"), reason),
        )  # fmt: skip
    name = compiled.metadata.name
    row, code = make_row(case, "triton", arch, planned.grid, threads, compiled.asm["cubin"], name, shared)

    def run() -> Counts:
        # The last two parameters are memory for scratch and for a profiler, which these kernels do without.
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value for value in remaining]
        return simulate.simulate(
            compiled.asm["ptx"], name, planned.grid, threads, [*numbers, 0, 0], simulate.tensors_in(remaining),
            case.elements, shared,
        )  # fmt: skip

    finish(row, case, code, run)
    return row


def cuda_row(case: Case, arch: str, kernels: CudaKernels) -> Row:
    one, tensors = kernels.launched(case)
    ptx, cubin = kernels.code_of(one.kernel, arch)
    threads = one.block[0] * one.block[1] * one.block[2]
    row, code = make_row(case, "cuda", arch, tuple(one.grid), threads, cubin, one.kernel, one.shared_bytes)

    def run() -> Counts:
        if case.cuda().own_memory:
            return kernels.run_whole(case, arch, ptx, one.kernel)
        return simulate.simulate(
            ptx, one.kernel, one.grid, one.block, one.arguments, tensors, case.elements, one.shared_bytes
        )

    finish(row, case, code, run)
    return row


def finish(row: Row, case: Case, code: sass.Code, run: Callable[[], Counts]) -> None:
    """Add what the simulator counts, where it is there, and the prediction."""
    try:
        add_counts(row, case, code, run())
    except Unavailable as reason:
        row.absent = dict.fromkeys(
            ("instructions_run", "ptx_run", "l1_bytes", "dram_bytes", "narrow_share", "torn_share"), str(reason)
        )
    predict(row, case)


Told = Callable[[str], Any]


def collect(
    cases: Iterable[Case], archs: Iterable[str], kernels: CudaKernels | None, told: Told = lambda name: None
) -> Iterator[Row]:
    """The rows of every case; ``told`` hears the name of each before the work on it. Without ``kernels``, no CUDA."""
    archs = list(archs)
    for case in cases:
        for arch in archs:
            told(f"{case.kernel}, {case.configuration}, {arch}")
            yield triton_row(case, arch)
            if kernels is not None and arch in CARDS:
                yield cuda_row(case, arch, kernels)
