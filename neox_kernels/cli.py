"""The command ``neox-kernels``: what this installation has, what it does, and how fast."""

# No `from __future__ import annotations`: typer evaluates the annotations of its commands, which are local to _app().

import importlib
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import neox_kernels
from neox_kernels import compiled
from neox_kernels.bench import machine

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

    def refuse_unwritable(option: str, path: Path | None) -> None:
        try:
            check_writable(path)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=option) from error

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

    many = "Separated by commas."

    @app.command()
    def bench(
        ops: Annotated[
            list[str] | None,
            typer.Argument(help="rotary, softmax, varlen, gelu, attention, models, swap. Default: all of them."),
        ] = None,
        shape: Annotated[str, typer.Option(help=f"Shapes by name, such as pythia-160m. {many}")] = "",
        grid: Annotated[str, typer.Option(help=f"Sizes, such as 4x512: batch x length, or batch x q x k. {many}")] = "",
        dtype: Annotated[str, typer.Option(help=f"float32, bfloat16, float16. {many}")] = "",
        kind: Annotated[str, typer.Option(help=f"Kinds of call, such as forward or decode. {many}")] = "",
        device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
        backend: Annotated[str, typer.Option(help=f"Our backends: compiled, triton, reference. {many}")] = "",
        against: Annotated[
            str, typer.Option(help=f"Peers: eager, transformers, compile, sdpa, liger, flash-attn, ... {many}")
        ] = "",
        add: Annotated[
            list[str] | None,
            typer.Option(help="module:function of your own to compare, or OP=module:function; may be repeated."),
        ] = None,
        backward: Annotated[bool, typer.Option("--backward", help="Time the kinds with gradients too.")] = False,
        full: Annotated[bool, typer.Option("--full", help="Every shape and size; without it, a short run.")] = False,
        threads: Annotated[int, typer.Option(min=1, help="CPU threads; above 1 by the wall clock.")] = 1,
        wall: Annotated[bool, typer.Option("--wall", help="Wall clock, not CPU time or CUDA events.")] = False,
        rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each contender.")] = None,
        json: Annotated[Path | None, typer.Option(help="Write every sample there.")] = None,
        html: Annotated[Path | None, typer.Option(help="Write one self-contained page there.")] = None,
        plot: Annotated[Path | None, typer.Option(help="Write figures there, .png or .svg: F-rotary-....png.")] = None,
    ) -> None:
        """Time the ops against others' code, interleaved in one run, beside what the machine can do.

        The numbers are checked first; what is wrong is not timed, and the command then ends with exit code 1. Peers
        that are not installed are named with the reason. Ctrl-C keeps what was measured, and ends with 130. --against
        compile times torch.compile of transformers' code, which takes minutes.
        """
        try:
            from neox_kernels.bench import command, selection

            writers = command.writers(json, html, plot)
        except ModuleNotFoundError as error:
            sys.exit(f'The benchmarks need {error.name}: pip install "neox-kernels[bench]"')
        if plot and plot.suffix not in (".png", ".svg"):
            raise typer.BadParameter(f"{plot} must end with .png or .svg", param_hint="--plot")
        for option, path in (("--json", json), ("--html", html), ("--plot", plot)):
            refuse_unwritable(option, path)
        try:
            options = selection.read_options(
                ops or [],
                shape=shape,
                grid=grid,
                dtype=dtype,
                kind=kind,
                device=device,
                backend=backend,
                against=against,
                add=add or [],
                backward=backward,
                full=full,
            )
            cases = selection.choose(options)
        except ValueError as error:
            option, _, what = str(error).partition(": ")
            raise typer.BadParameter(what, param_hint=option) from error
        line = shlex.join(["neox-kernels", *sys.argv[1:]])
        raise typer.Exit(command.run(cases, options, command.Timing(threads, wall, rounds), writers, line))

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
            refuse_unwritable(option, path)
        try:
            command.run(archs, json, html)
        except FileNotFoundError as error:
            sys.exit(f"The report cannot be made: {error}")

    return app


def check_writable(path: Path | None) -> None:
    """Raises ValueError where the file cannot be written; a file that was not there is not left behind."""
    if path is None:
        return
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()


def information() -> dict[str, Any]:
    """What ``neox-kernels info --json`` prints."""
    return {
        "versions": {
            "neox_kernels": neox_kernels.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: machine.version(name) for name in ("torch", "triton", "transformers", "flash-attn")},
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


def _devices() -> Iterator[dict[str, Any]]:
    yield {"device": "cpu", "name": machine.cpu_name(), "threads": torch.get_num_threads()}
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
