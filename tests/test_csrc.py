"""The C++ sources on a processor that is not this one, and the nvcc of wheels."""

import shutil
import subprocess
from pathlib import Path

import cuda_on_ptxsim  # which finds toolchain
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


def test_nvcc_of_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts with CCCL's headers beside it, which have a wheel of their own."""
    nvcc_of_wheels = cuda_on_ptxsim.find_cuda.__globals__["nvcc_of_wheels"]
    monkeypatch.setitem(
        nvcc_of_wheels.__globals__, "sysconfig", type("Scheme", (), {"get_path": lambda kind: tmp_path})
    )
    assert nvcc_of_wheels() is None
    nvcc = tmp_path / "nvidia/cu13/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert nvcc_of_wheels() is None
    (tmp_path / "nvidia/cu13/include/nv").mkdir(parents=True)
    (tmp_path / "nvidia/cu13/include/nv/target").touch()
    assert nvcc_of_wheels() == str(nvcc)
