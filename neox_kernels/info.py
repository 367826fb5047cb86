"""What this installation has: versions, devices, backends, and what was compiled."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import neox_kernels
from neox_kernels import compiled


def information() -> dict[str, Any]:
    """What ``neox-kernels info --json`` prints."""
    return {
        "versions": {
            "neox_kernels": neox_kernels.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: version(name) for name in ("torch", "triton", "transformers", "flash-attn")},
        },
        "devices": list(_devices()),
        "backends": [asdict(choice) for choice in neox_kernels.explain()],
        "compiled": {
            "loaded": compiled.load_error is None,
            "reason": compiled.load_error,
            "cpu_isa": compiled.cpu_isa() if compiled.load_error is None else None,
            "build": compiled.build_config,
            **_build_module(),
        },
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[dict[str, Any]]:
    yield {"device": "cpu", "name": cpu_name(), "threads": torch.get_num_threads()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        yield {"device": f"cuda:{index}", "name": properties.name, "capability": capability}


def _build_module() -> dict[str, Any]:
    """What the optional pybind11 module says of the build and of this processor."""
    try:
        module: Any = importlib.import_module("neox_kernels._build")
    except ImportError as error:
        return {"build_info": None, "build_info_reason": str(error), "processor": None}
    return {"build_info": module.info(), "build_info_reason": None, "processor": module.cpu()}


def print_info(as_json: bool) -> None:
    facts = information()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def table(title: str, rows: Iterator[tuple[str, ...]], *columns: str) -> None:
        grid = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns), header_style="")
        for column in columns or ("", ""):
            grid.add_column(column, overflow="fold")
        for row in rows:
            grid.add_row(*row)
        console.print(grid)

    table("Versions", ((name, version or "not installed") for name, version in facts["versions"].items()))
    table("Devices", ((device.pop("device"), _listed(device, ", ")) for device in facts["devices"]))
    table("Backends", _backend_rows(facts["backends"]), "op", "device", "served by", "and not by")
    table("Compiled library", _compiled_rows(facts["compiled"]))


def _listed(facts: dict[str, Any], between: str) -> str:
    return between.join(f"{name}: {value}" for name, value in facts.items())


def _backend_rows(choices: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for choice in choices:
        yield choice["op"], choice["device"], choice["backend"] or "none", _listed(choice["reasons"], "\n")


def _compiled_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    build = facts["build"]
    yield "library", "loaded" if facts["loaded"] else facts["reason"]
    if build:
        yield "CPU instruction sets", f"{', '.join(build['cpu_isas']) or 'none'}; in use: {facts['cpu_isa'] or 'none'}"
        archs = f"{', '.join(build['cuda_archs'])} by nvcc {build['nvcc']}" if build["cuda"] else build["cuda_reason"]
        yield "CUDA", archs
        yield "compiler", build["compiler"] or "none"
        yield "torch", f"from {build['torch_target']} on; headers of {build['torch_headers'] or 'none'}"
    has = facts["processor"]
    if has is None:
        yield "this processor", f"unknown: {facts['build_info_reason']}"
    else:
        yield "this processor", ", ".join(name for name, present in has.items() if present) or "nothing that is used"
