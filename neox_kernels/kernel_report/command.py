"""The command ``neox-kernels kernel-report``: collects the rows, shows a table, writes JSON and HTML."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import neox_kernels
from neox_kernels.kernel_report.cards import ARCHS, CARDS, EFFICIENCY
from neox_kernels.kernel_report.cases import all_cases
from neox_kernels.kernel_report.cuda import CudaKernels, compile_cuda
from neox_kernels.kernel_report.page import number, render, widths
from neox_kernels.kernel_report.rows import Row, collect, missed_gates
from neox_kernels.kernel_report.sass import find_tool
from neox_kernels.kernel_report.simulate import Unavailable


def versions(kernels: CudaKernels | None) -> dict[str, str | None]:
    """Of what made the machine code; nvcc is None where there are no CUDA rows."""
    return {
        "neox_kernels": neox_kernels.__version__,
        "triton": triton.__version__,
        "ptxas": triton.knobs.nvidia.ptxas.version,
        "ptxas_blackwell": triton.knobs.nvidia.ptxas_blackwell.version,
        "nvcc": None if kernels is None else kernels.ops.nvcc_version,
    }


def check_archs(archs: Iterable[str]) -> list[str]:
    """These, or all. Raises ValueError for one that is not known, with those that are."""
    chosen = list(dict.fromkeys(archs)) or list(ARCHS)
    for arch in chosen:
        if arch not in ARCHS:
            raise ValueError(f"{arch} is not known; known are {', '.join(ARCHS)}")
    return chosen


def run(archs: list[str], json_file: Path | None, html_file: Path | None) -> None:
    """Make the report. Raises FileNotFoundError where nvdisasm or cuobjdump is missing."""
    with tempfile.TemporaryDirectory(prefix="neox-kernels-") as folder:
        _run(archs, json_file, html_file, Path(folder))


def _run(archs: list[str], json_file: Path | None, html_file: Path | None, folder: Path) -> None:
    console = Console()
    for tool in ("nvdisasm", "cuobjdump"):
        find_tool(tool)
    absent, kernels = {}, None
    if set(archs) & set(CARDS):
        try:
            console.print("compiling csrc/cuda with nvcc, which takes minutes")
            kernels = compile_cuda(folder)
        except Unavailable as reason:
            absent["cuda"] = str(reason)
            console.print(f"no rows of CUDA kernels: {reason}")
    else:
        absent["cuda"] = f"CUDA kernels are compiled for {', '.join(CARDS)}"
    cases = list(all_cases())
    steps = len(cases) * len(archs)
    with Progress(console=console, transient=True) if console.is_terminal else nullcontext() as progress:
        task = progress.add_task("", total=steps) if progress else None

        def told(name: str) -> None:
            if progress is not None and task is not None:
                progress.update(task, advance=1, description=name)

        rows = list(collect(cases, archs, kernels, told))
    report = as_dict(rows, versions(kernels), absent)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if html_file:
        html_file.write_text(render(rows, report))
    show(console, rows)
    for path in filter(None, (json_file, html_file)):
        console.print(f"written: {path}")


def as_dict(rows: Iterable[Row], made_by: dict[str, str | None], absent: dict[str, str]) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "versions": made_by,
        "absent": absent,
        "prediction": {
            "is": f"bytes of DRAM over {EFFICIENCY:.0%} of the card's bandwidth; nothing was timed",
            "bytes_per_second": {card.name: card.bandwidth for card in CARDS.values()},
        },
        "rows": [{**asdict(row), "missed_gates": missed_gates(row)} for row in rows],
    }


def table_cells(row: Row, narrow: bool) -> dict[str, str]:
    """What the terminal shows of a row, by column."""
    wide_only = {
        "shared": str(row.shared_bytes),
        "limit": row.occupancy_limit,
        "loads": widths(row.loads),
        "stores": widths(row.stores),
        "L1 B/el": number(row.l1_bytes),
    }
    return {
        "backend": row.backend,
        "arch": row.arch,
        "regs": str(row.registers),
        "spill": str(row.spill_bytes),
        "occupancy": f"{row.occupancy:.0%}",
        **({} if narrow else wide_only),
        "SASS/el": number(row.instructions_run),
        "DRAM B/el (min)": f"{number(row.dram_bytes)} ({number(row.minimum_bytes)})",
        "predicted": "-" if row.predicted_us is None else f"{row.predicted_us:.1f} us {row.predicted_card}",
    }


def show(console: Console, rows: list[Row]) -> None:
    """One table for every configuration; a narrow terminal gets fewer columns."""
    narrow = console.width < 130
    for title in dict.fromkeys((row.kernel, row.configuration, row.dtype) for row in rows):
        table = Table(title=", ".join(title), title_justify="left", title_style="bold", header_style="")
        for row in rows:
            if (row.kernel, row.configuration, row.dtype) == title:
                cells = table_cells(row, narrow)
                if not table.columns:
                    for name in cells:
                        table.add_column(name, justify="left" if name in ("backend", "arch") else "right")
                table.add_row(*cells.values(), style="red" if missed_gates(row) else "")
        console.print(table)
    for name, missed in ((row.name, missed_gates(row)) for row in rows):
        for gate in missed:
            console.print(f"misses a gate: {name}: {gate}", style="red")
    for row in rows:
        for reason in dict.fromkeys(row.absent.values()):
            console.print(f"without counts: {row.name}: {reason}", style="dim")
    console.print("Times are predicted from bytes over bandwidth. Nothing was timed.")
