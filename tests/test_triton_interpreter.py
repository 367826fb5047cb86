"""The Triton kernels against the oracle on a machine without a GPU, by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "name", ["triton_interpreter_script.py", "triton_interpreter_softmax.py", "triton_interpreter_varlen.py"]
)
def test_by_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    # A process of its own: Triton reads the variable when the kernels are imported.
    script = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
