"""The option of ``pytest bench``, and one thread."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every shape and size, and not the short run's")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
