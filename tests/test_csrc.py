"""The C++ sources on a processor that is not this one."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CXX = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"{CXX} is not installed")
@pytest.mark.parametrize("source", ["schema.cpp", "cpu/isa.cpp", "cpu/rotary.cpp"])
def test_aarch64_compiles(source: str, tmp_path: Path) -> None:
    flags = ["-O3", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Icsrc"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DNEOX_CPU_ISA=isa_default", "-DNEOX_CPU_DEFAULT"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include")]
    command = [CXX, *flags, "-c", f"csrc/{source}", "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
