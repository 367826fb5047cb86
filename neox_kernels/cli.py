"""The command ``neox-kernels``: what this installation has, and a demonstration of what it does."""

# No `from __future__ import annotations`: typer evaluates the annotations of its commands, which are local to _app().

import importlib
import importlib.metadata
import json
import platform
import runpy
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import neox_kernels
from neox_kernels import compiled

if TYPE_CHECKING:
    import typer

NEEDED = """neox-kernels needs {} to run as a command: pip install "neox-kernels[cli]"
Without it, python -c "import neox_kernels; print(neox_kernels.explain())" tells which backend serves what, and why."""


def main() -> None:
    """Run the command line; without its optional packages, say which one is missing and how to get it."""
    try:
        app = _app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(NEEDED.format(error.name))
    app()


def _app() -> "typer.Typer":
    import rich  # noqa: F401 - missed now, and not in the middle of a table
    import typer

    app = typer.Typer(
        name="neox-kernels",
        help=neox_kernels.__doc__,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
    )
    as_json = typer.Option("--json", help="Print JSON and nothing else.")

    @app.command()
    def info(json: Annotated[bool, as_json] = False) -> None:
        """Say which versions, backends, compiled features and devices there are, and why others are not."""
        print_info(json)

    @app.command()
    def demo(
        layers: Annotated[int, typer.Option(min=1, help="Layers of each model.")] = 12,
        width: Annotated[int, typer.Option(min=64, help="Hidden size: a multiple of 64, the size of a head.")] = 768,
        seqlen: Annotated[int, typer.Option(min=8, help="Tokens of the longest sequence.")] = 128,
        seconds: Annotated[float, typer.Option(min=0, help="Time each measurement may take.")] = 5.0,
        device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
        json: Annotated[bool, as_json] = False,
    ) -> None:
        """Swap the kernels into a GPT-NeoX and a GPT-J of transformers: the same logits, in less time.

        The models have random weights of a fixed seed (Pythia-160M's shape by default) and read this project's README,
        one token a byte, padded. Ends with exit code 1 if the numbers differ by more than rounding explains.
        """
        if width % 64:
            raise typer.BadParameter("must be a multiple of 64", param_hint="--width")
        if device not in ("cpu", "cuda"):
            raise typer.BadParameter("must be cpu or cuda", param_hint="--device")
        if device == "cuda" and not torch.cuda.is_available():
            raise typer.BadParameter("torch sees no CUDA device here", param_hint="--device")
        try:
            from neox_kernels import demo as demonstration
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "transformers":
                raise
            sys.exit('The demo needs transformers: pip install "neox-kernels[transformers]"')
        if not demonstration.show(demonstration.Scale(layers, width, seqlen, seconds, device), json):
            raise typer.Exit(1)

    @app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        help="Time ops against others' code: bench/run.py of the source tree, with its options (--help lists them).",
    )
    def bench(context: typer.Context) -> None:
        script = Path(neox_kernels.__file__).resolve().parent.parent / "bench" / "run.py"
        if not script.is_file():
            sys.exit("The benchmarks come with the source tree, which this installation is without: clone it.")
        sys.argv = [str(script), *context.args]
        runpy.run_path(str(script), run_name="__main__")

    @app.command()
    def kernel_report(
        arch: Annotated[
            list[str] | None,
            typer.Option(help="sm_80, sm_90, sm_100 or gfx942 (Triton only); may be repeated. Default: all of them."),
        ] = None,
        json: Annotated[Path | None, typer.Option(help="Write the rows there.")] = None,
        html: Annotated[Path | None, typer.Option(help="Write one self-contained page there.")] = None,
    ) -> None:
        """Report what the GPU kernels cost, without a GPU: registers, occupancy, instructions, bytes; no time.

        Counts of instructions and bytes come from the simulator in the source tree's tests; CUDA rows also need nvcc.
        Where these are missing, the figures are absent with the reason. Times are predicted, from bytes over bandwidth.

        The JSON has "versions", "absent" (part: reason), "prediction" and "rows". A row has backend, kernel,
        configuration, dtype, arch, grid, threads, registers, spill_bytes, shared_bytes, occupancy (0 to 1) and
        occupancy_limit, loads and stores ({bytes of an access: instructions}), access_bytes (the widest that alignment
        allows), instructions (of the code) and, per element, instructions_run, ptx_run, l1_bytes, dram_bytes and
        minimum_bytes; then narrow_share (of l1_bytes), torn_share (of dram_bytes, what is stored again since sectors
        are written in parts), instruction_limit, predicted_card, predicted_us, absent and missed_gates. What is absent
        is null.
        """
        try:
            from neox_kernels.kernel_report import command
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "triton":
                raise
            sys.exit('The report needs triton: pip install "neox-kernels[triton]"')
        try:
            archs = command.check_archs(arch or [])
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--arch") from error
        for option, path in (("--json", json), ("--html", html)):
            try:
                command.check_writable(path)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint=option) from error
        try:
            command.run(archs, json, html)
        except FileNotFoundError as error:
            sys.exit(f"The report cannot be made: {error}")

    return app


def information() -> dict[str, Any]:
    """What ``neox-kernels info --json`` prints."""
    return {
        "versions": {
            "neox_kernels": neox_kernels.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in ("torch", "triton", "transformers", "flash-attn")},
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


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[dict[str, Any]]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    yield {"device": "cpu", "name": name, "threads": torch.get_num_threads()}
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
