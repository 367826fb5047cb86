"""The cases of ``neox-kernels bench`` under pytest-benchmark: ``pytest bench --benchmark-only``.

The short run's cases, gradients too, each by the eager peer and by neox_kernels; with ``--full`` all cases. Their names
stay the same from commit to commit, so that ``--benchmark-compare`` finds them.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from neox_kernels.bench.case import Case, Family
from neox_kernels.bench.record import OURS
from neox_kernels.bench.selection import choose, contenders, read_options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = read_options([], backward=True, full=metafunc.config.getoption("--full"), against="eager")
    params = [pytest.param(family, case, id=str(case)) for family, case in choose(options)]
    metafunc.parametrize(("family", "case"), params)
    metafunc.parametrize("contender", ["eager", OURS])


# CPU time, as the command takes it; a GPU's events do not fit into pytest-benchmark.
@pytest.mark.benchmark(timer=time.process_time)
def test_case(benchmark: Any, family: Family, case: Case, contender: str) -> None:
    benchmark.group = str(case)
    options = read_options([family.name], against="eager")
    with torch.no_grad():
        entered = contenders(family, case, options)
        assert not entered.wrong, entered.absent
        name = family.eager if contender == "eager" else OURS
        if name not in entered.calls:
            pytest.skip(entered.absent.get(name, f"no {name} there"))
        benchmark(entered.calls[name])
