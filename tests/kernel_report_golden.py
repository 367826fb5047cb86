"""The figures of the GPU kernels that a change must not worsen: kernel_report_golden.json, a row a line.

    python tests/kernel_report_golden.py --renew

writes the file anew; it needs triton and nvcc, and takes some minutes. A row has what the compilers named in the file
made of a kernel. With others only the gates hold that no compiler excuses (rows.missed_gates).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neox_kernels.kernel_report.cards import ARCHS, CARDS
from neox_kernels.kernel_report.cases import Case, all_cases
from neox_kernels.kernel_report.command import versions
from neox_kernels.kernel_report.cuda import CudaKernels, compile_cuda
from neox_kernels.kernel_report.rows import Row, cuda_row, missed_gates, triton_row

FILE = Path(__file__).with_name("kernel_report_golden.json")
RENEW = "python tests/kernel_report_golden.py --renew"
# Relative, where a figure counts what a sample of the grid does.
TOLERANCE = 0.005


def selection() -> Iterator[tuple[Case, tuple[str, ...]]]:
    """All cases on sm_90, and the first of every kernel on all architectures."""
    seen = set()
    for case in all_cases():
        yield case, ("sm_90",) if case.kernel in seen else ARCHS
        seen.add(case.kernel)


def triton_rows() -> Iterator[Row]:
    for case, archs in selection():
        for arch in archs:
            yield triton_row(case, arch)


def cuda_rows(kernels: CudaKernels) -> Iterator[Row]:
    for case, archs in selection():
        for arch in archs:
            if arch in CARDS:
                yield cuda_row(case, arch, kernels)


def figures(row: Row) -> dict[str, float | None]:
    """What must not grow."""
    run = {"instructions_run": row.instructions_run, "l1_bytes": row.l1_bytes, "dram_bytes": row.dram_bytes}
    return {
        "registers": row.registers,
        "spill_bytes": row.spill_bytes,
        "shared_bytes": row.shared_bytes,
        "idle_warps": round(1 - row.occupancy, 4),
        "narrow_loads": sum(n for width, n in row.loads.items() if width < row.access_bytes),
        "narrow_stores": sum(n for width, n in row.stores.items() if width < row.access_bytes),
        **{name: None if value is None else round(value, 3) for name, value in run.items()},
    }


def worse(row: Row, limits: dict[str, float | None]) -> list[str]:
    """The figures that are above their limits, in words."""
    return [
        f"{row.name}: {name} {value}, limit {limits[name]}"
        for name, value in figures(row).items()
        if value is not None and above(value, limits[name])
    ]


def better(row: Row, limits: dict[str, float | None]) -> list[str]:
    return [
        f"{row.name}: {name} {value}, was {limits[name]}"
        for name, value in figures(row).items()
        if value is not None and limits[name] is not None and above(limits[name], value)
    ]


def above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit * (1 + TOLERANCE)


def read() -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(FILE.read_text())
    return golden


def as_text(rows: list[Row], made_by: dict[str, str | None]) -> str:
    lines = [f"  {json.dumps(row.name)}: {json.dumps(figures(row))}" for row in rows]
    return '{"versions": ' + json.dumps(made_by) + ',\n "rows": {\n' + ",\n".join(lines) + "\n }}\n"


def compilers(made_by: dict[str, str | None]) -> dict[str, str | None]:
    return {name: version for name, version in made_by.items() if name != "neox_kernels"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", required=True, help="write the file anew")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_cuda(Path(folder))
        rows = []
        for row in (*triton_rows(), *cuda_rows(kernels)):
            rows.append(row)
            print(row.name, *missed_gates(row), file=sys.stderr)
        FILE.write_text(as_text(rows, compilers(versions(kernels))))


if __name__ == "__main__":
    main()
