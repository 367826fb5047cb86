"""What setup.py finds on this machine: a compiler and what it can produce, torch's headers, nvcc.

Nothing here imports torch: its headers are located, so that pip's isolated builds find them as well.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_TARGET = "2.10"  # the oldest torch that the library loads in
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# GCC's own AVX-512 headers trip over these warnings once inlined (its bug 105593); clang does not know one by name.
AVX512 += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]
X86_ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


class CannotBuild(Exception):
    """A part that cannot be built here. The message is the reason that people read."""


def max_jobs() -> int:
    value = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not value.isdecimal() or int(value) < 1:
        raise SystemExit(f"MAX_JOBS={value!r} is not understood: use a number of jobs from 1 up.")
    return int(value)


def run(command: Iterable[object]) -> str:
    """What a command run in ROOT says. A warning is shown; a failure raises with the lines that name the error."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise CannotBuild(f"{words[0]} does not run: {error.strerror}") from error
    if done.returncode != 0 or "warning:" in done.stdout:
        print(shlex.join(words), done.stdout, sep="\n", file=sys.stderr)
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)] or lines[-1:]
    raise CannotBuild(f"{Path(words[0]).name} failed ({done.returncode}): " + " | ".join(errors[:3]))


def works(command: Iterable[object]) -> bool:
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True).returncode == 0


def find_compiler() -> list[str]:
    """The C++ compiler as the words of a command: CXX may hold a launcher too, as in ``ccache g++``."""
    if sys.platform != "linux":
        raise CannotBuild(f"the compiled library is for Linux, and this is {sys.platform}")
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if not shutil.which(named[0]):
            raise CannotBuild(f"no C++ compiler: CXX names {named[0]}, which is not there")
        return named
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if not found:
        raise CannotBuild("no C++ compiler: neither g++ nor c++ nor clang++ is on PATH")
    return [found]


def find_torch() -> tuple[Path, str | None]:
    """torch's include folder, and its version where that stands beside it."""
    variable, header = "NEOX_KERNELS_TORCH_INCLUDE", "torch/csrc/stable/library.h"
    named = os.environ.get(variable)
    if named:
        candidates = [Path(named).resolve()]
        if not (candidates[0] / header).exists():
            raise SystemExit(f"{variable}={named!r} is not torch's include folder: it has no {header}")
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(spec.origin).parent / "include"] if spec and spec.origin else []
        # pip's isolated environment hides the user's torch from import, but the scheme still names its folder.
        candidates += [Path(sysconfig.get_path(kind), "torch/include") for kind in ("platlib", "purelib")]
        if sys.prefix == sys.base_prefix:  # not in a virtual environment
            candidates.append(Path(site.getusersitepackages(), "torch/include"))
    include = next((folder for folder in candidates if (folder / header).exists()), None)
    if include is None:
        raise CannotBuild(
            f"no torch>={TORCH_TARGET} headers in this environment; install torch first, then this package anew, with "
            "pip install --force-reinstall --no-deps --no-cache-dir (where torch lies outside the environment: with "
            f"--no-build-isolation too, or {variable} naming its include folder)"
        )
    version_file = include.parent / "version.py"
    text = version_file.read_text() if version_file.exists() else ""
    version = re.search(r"__version__ = ['\"](\d+\.\d+[^'\"]*)", text)
    if not version:
        return include, None
    if tuple(map(int, version[1].split(".")[:2])) < tuple(map(int, TORCH_TARGET.split("."))):
        raise CannotBuild(f"the headers are torch {version[1]}'s, and the library needs {TORCH_TARGET} or later")
    return include, version[1]


def find_isas(cxx: list[str]) -> list[str]:
    """The instruction sets that this compiler can produce; which of them runs is decided at run time."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["default"]
    probe = ["-x", "c++", "-c", "/dev/null", "-o", "/dev/null"]
    return ["default", *(isa for isa, flags in X86_ISAS.items() if works([*cxx, *flags, *probe]))]


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    archs: list[str]
    libraries: Path

    def gencode(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
            flags.append(f"-gencode=arch=compute_{number},code={code}")
        return flags


def nvcc_of_wheels() -> str | None:
    """The nvcc that pip installs beside torch: with the headers of every CUDA wheel in one folder, as a toolkit."""
    # As for torch: pip's isolated environment hides the user's packages from import, but the scheme names their folder.
    for folder in dict.fromkeys(sysconfig.get_path(kind) for kind in ("platlib", "purelib")):
        for nvcc in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            # Without CCCL's headers, which no other wheel asks for, cuda_fp16.h does not compile.
            if shutil.which(str(nvcc)) and (nvcc.parent.parent / "include/nv/target").exists():
                return str(nvcc)
    return None


def find_cuda() -> Cuda:
    named = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
    home = Path(os.environ[named] if named else "/usr/local/cuda")
    nvcc = shutil.which(str(home / "bin/nvcc")) or (None if named else shutil.which("nvcc") or nvcc_of_wheels())
    if not nvcc:
        wheels = "neither on this machine nor as the wheels nvidia-cuda-nvcc and nvidia-cuda-cccl"
        raise CannotBuild(f"no nvcc: {named}={home} has no bin/nvcc" if named else f"no nvcc found, {wheels}")
    version = re.search(r"release [\d.]+, V([\d.]+)", run([nvcc, "--version"]))
    # nvcc itself is asked where it lives: the one on PATH may be a wrapper script somewhere else.
    top = re.search(r"^#\$ TOP=(.+)$", run([nvcc, "--dryrun", "-x", "cu", "/dev/null"]), re.MULTILINE)
    top_folder = Path(top[1].strip()) if top else home
    folders = [top_folder / "lib64", top_folder / "lib", *top_folder.glob("targets/*/lib")]
    libraries = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if libraries is None:
        raise CannotBuild(f"nvcc is there, but no libcudart_static.a beside it in {top_folder}")
    return Cuda(nvcc, version[1] if version else "unknown", cuda_archs(nvcc), libraries)


def cuda_archs(nvcc: str) -> list[str]:
    named = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if named != [""]:
        for arch in named:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise CannotBuild(f"TORCH_CUDA_ARCH_LIST has {arch!r}, where one like 9.0 or 9.0+PTX belongs")
        return named
    known = run([nvcc, "--list-gpu-arch"]).split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    if not archs:
        raise CannotBuild(f"this nvcc knows none of the architectures {', '.join(CUDA_ARCHS)}")
    return [*archs[:-1], archs[-1] + "+PTX"]  # the PTX serves the GPUs that come later
