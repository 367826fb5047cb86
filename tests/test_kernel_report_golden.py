"""No kernel gets worse: every row of the report holds its gates and the figures of kernel_report_golden.json."""

import warnings
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")

import kernel_report_golden as golden

from neox_kernels.kernel_report.command import versions
from neox_kernels.kernel_report.cuda import CudaKernels
from neox_kernels.kernel_report.rows import Row, missed_gates


def hold(rows: list[Row], made_by: dict[str, str | None]) -> None:
    recorded = golden.read()
    missed = {f"{row.name}: {gate}" for row in rows for gate in missed_gates(row)}
    assert not missed, "a gate is missed:\n" + "\n".join(missed)
    unlike = {name: version for name, version in made_by.items() if version not in (None, recorded["versions"][name])}
    if unlike:
        pytest.skip(f"the gates hold; the golden file's figures are of {recorded['versions']}, and here is {unlike}")
    unknown = [row.name for row in rows if row.name not in recorded["rows"]]
    assert not unknown, f"rows without figures; {golden.RENEW}: {unknown}"
    found = [text for row in rows for text in golden.worse(row, recorded["rows"][row.name])]
    assert not found, "worse than the golden file:\n" + "\n".join(found)
    improved = [text for row in rows for text in golden.better(row, recorded["rows"][row.name])]
    if improved:
        warnings.warn(f"better than the golden file; keep it by {golden.RENEW}:\n" + "\n".join(improved), stacklevel=1)


def compilers(kernels: CudaKernels | None) -> dict[str, str | None]:
    return golden.compilers(versions(kernels))


def test_triton() -> None:
    rows = list(golden.triton_rows())
    assert {row.name for row in rows} == {name for name in golden.read()["rows"] if name.startswith("triton")}
    hold(rows, compilers(None))


def test_cuda(cuda: Any) -> None:
    kernels = CudaKernels(cuda)
    rows = list(golden.cuda_rows(kernels))
    assert {row.name for row in rows} == {name for name in golden.read()["rows"] if name.startswith("cuda")}
    hold(rows, compilers(kernels))
