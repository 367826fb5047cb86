"""The rotary cases under pytest-benchmark: ``pytest bench --benchmark-only``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rotary_cases import RotaryCase, cases, contenders


@pytest.mark.parametrize("contender", ["transformers eager", "neox_kernels"])
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_rotary(benchmark: Any, case: RotaryCase, contender: str) -> None:
    benchmark.group = str(case)
    torch.set_num_threads(1)
    with torch.no_grad():
        benchmark(contenders(case)[contender])
