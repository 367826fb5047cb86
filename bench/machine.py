"""What a run stands on: the machine, the versions, the commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import neox_kernels
from neox_kernels import compiled
from neox_kernels.info import cpu_name, version

PEERS = ("triton", "transformers", "flash-attn", "liger-kernel", "ctranslate2")


def versions() -> dict[str, str | None]:
    own = {"neox_kernels": neox_kernels.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return {**own, **{name: version(name) for name in PEERS}}


def describe_cpu(threads: int, clock: str) -> dict[str, Any]:
    isa = compiled.cpu_isa() if compiled.load_error is None else None
    return {"device": "cpu", "name": cpu_name(), "threads": threads, "clock": clock, "cpu_isa": isa}


def commit() -> str | None:
    """Of the source tree that runs, "-dirty" behind it where files were changed; None where there is no such tree."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is installed, and the tree another's
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
