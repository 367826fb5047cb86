"""The cases of every op family under pytest-benchmark: ``pytest bench --benchmark-only``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from run import FAMILIES

CASES = [
    pytest.param(family, case, id=f"{family.__name__.removesuffix('_cases')}-{case}")
    for family in (importlib.import_module(f"{name}_cases") for name in FAMILIES)
    for case in family.cases()
]


@pytest.mark.parametrize("contender", ["baseline", "neox_kernels"])
@pytest.mark.parametrize(("family", "case"), CASES)
def test_case(benchmark: Any, family: ModuleType, case: Any, contender: str) -> None:
    benchmark.group = str(case)
    torch.set_num_threads(1)
    with torch.no_grad():
        benchmark(family.contenders(case)[family.BASELINE if contender == "baseline" else contender])
