"""The command ``neox-kernels``: what this installation has, what it does, and how fast."""

# No `from __future__ import annotations`: typer evaluates the annotations of its commands, which are local to _app().

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch

import neox_kernels
from neox_kernels.info import print_info

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
    def generate(
        folder: Annotated[Path, typer.Argument(help="A checkpoint: config.json, safetensors, tokenizer.json.")],
        prompt: Annotated[str, typer.Argument(help="What to continue; - reads it from standard input.")],
        max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that may follow.")] = 64,
        temperature: Annotated[float | None, typer.Option(help="Draw tokens, their scores divided by this.")] = None,
        top_k: Annotated[int | None, typer.Option(help="Draw from so many likely tokens.")] = None,
        top_p: Annotated[float | None, typer.Option(help="Draw from tokens of this probability together.")] = None,
        min_p: Annotated[float | None, typer.Option(help="Draw from tokens of this share of the best.")] = None,
        seed: Annotated[int | None, typer.Option(help="Draw, and the same again with the same seed.")] = None,
        repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
        num_beams: Annotated[int, typer.Option(min=1, help="Beam search; the text comes at the end.")] = 1,
        stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = "",
        device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON with timings and nothing else.")] = False,
    ) -> None:
        """Continue a prompt by a checkpoint of GPT-NeoX or GPT-J, as the tokens come.

        The most likely token each time; with --temperature, --top-k, --top-p, --min-p or --seed they are drawn. The
        JSON has prompt, text, prompt_tokens, new_tokens, finish ("end", "stop", "length", "interrupted") and seconds:
        load, first_token and each_token. Ctrl-C keeps the text so far, and ends with 130.
        """
        try:
            from neox_kernels import text
        except ModuleNotFoundError as error:
            sys.exit(f'To generate needs {error.name}: pip install "neox-kernels[generate]"')
        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        settings = {name: value for name, value in drawn.items() if value is not None}
        settings |= {"do_sample": True} if settings else {}
        settings |= {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty, "num_beams": num_beams}
        if threads:
            torch.set_num_threads(threads)
        words = sys.stdin.read() if prompt == "-" else prompt
        try:
            finish = text.show(folder, words, settings, stop or [], dtype, device, json)
        except (ValueError, OSError) as error:
            sys.exit(f"neox-kernels generate: {error}")
        raise typer.Exit(130 if finish == "interrupted" else 0)

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
