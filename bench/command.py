"""A run of the benchmarks: every case checked, timed, shown as it is done, and written down."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neox_kernels.bench import gpu, machine
from neox_kernels.bench.case import Case, Family
from neox_kernels.bench.harness import Race, Sampler, host_sampler
from neox_kernels.bench.record import OURS, CaseRecord, Record, Result
from neox_kernels.bench.selection import Field, Options, contenders
from neox_kernels.bench.units import quartiles, rate, seconds, three_digits

Writer = Callable[[Record], list[Path]]  # of a finished run; gives the files that it wrote
INTERRUPTED = 130  # the exit code of Ctrl-C


@dataclass(frozen=True)
class Timing:
    """How to time.

    threads: of the host; with one its CPU time is measured, else, or with ``wall``, the wall clock. On a GPU its
        events, or with ``wall`` the wall clock, launches included.
    rounds: samples of each contender; None: the family's.
    """

    threads: int = 1
    wall: bool = False
    rounds: int | None = None


def run(
    cases: list[tuple[Family, Case]],
    options: Options,
    timing: Timing,
    writers: Sequence[Writer] = (),
    command: str = "",
) -> int:
    """Time the cases and write the record. Gives the exit code: 0, 1 where numbers were wrong, or 130 after Ctrl-C,
    which ends the run and keeps what was measured."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    sampler, described = _clock(options.device, timing)
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record = Record(command, started, machine.commit(), described, machine.versions())
    console.print(_headline(record))
    for name, reason in options.left_out.items():
        console.print(f"left out: {name}, {reason}")
    threads, begun = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(timing.threads)
    try:
        with torch.no_grad(), _progress(console) as progress:
            for family, case in progress.track(cases, description=""):
                progress.update(progress.task_ids[0], description=str(case), refresh=True)
                _measure(record, family, case, options, timing.rounds or family.rounds, sampler, console)
        record.complete = True
    except KeyboardInterrupt:
        console.print("interrupted: what was measured until now is kept")
    finally:
        torch.set_num_threads(threads)
        record.seconds = round(time.monotonic() - begun, 1)
        for write in writers:
            for path in write(record):
                console.print(f"wrote {path}")
    if not record.complete:
        return INTERRUPTED
    return 1 if record.wrong else 0


def _clock(device: str, timing: Timing) -> tuple[Sampler, dict[str, object]]:
    if device == "cuda":
        if timing.wall:
            return gpu.WallSampler(), {**gpu.describe(), "clock": "wall clock, launches included"}
        return gpu.CudaSampler(), {**gpu.describe(), "clock": "CUDA events, L2 flushed before every call"}
    if timing.wall or timing.threads > 1:
        return host_sampler(time.perf_counter), machine.describe_cpu(timing.threads, "wall clock")
    return host_sampler(), machine.describe_cpu(1, "CPU time")


def _headline(record: Record) -> str:
    own = f"neox_kernels {record.versions['neox_kernels']}, torch {record.versions['torch']}"
    threads = f", {record.machine['threads']} thread(s)" if "threads" in record.machine else ""
    isa = f", {record.machine['cpu_isa']}" if record.machine.get("cpu_isa") else ""
    how = f"{record.machine['name']}{isa}{threads}, {record.machine['clock']}"
    return f"{own}, on {how}\nmedians, and how many times as fast neox_kernels is (quartiles of the rounds' ratios)"


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # Drawn between samples alone: a thread that draws would be measured.
    return Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)


def _measure(
    record: Record, family: Family, case: Case, options: Options, rounds: int, sampler: Sampler, console: Console
) -> None:
    """One case, into the record: whole rounds, also of a case that is interrupted."""
    entered = contenders(family, case, options)
    for name in entered.wrong:
        record.wrong.append(f"{case}: {name}: {entered.absent[name]}")
        console.print(f"\n{case}\n  NOT TIMED, {name}: {entered.absent[name]}")
    if OURS in entered.wrong:
        return
    race = Race(entered.calls, sampler)
    try:
        for _ in range(rounds):
            race.run_round()
    finally:
        if race.samples[OURS]:
            found = _case_record(case, entered, race)
            record.cases.append(found)
            _show(found, console)


def _case_record(case: Case, entered: Field, race: Race) -> CaseRecord:
    work = entered.work
    results = (Result(name, entered.roles[name], tuple(samples)) for name, samples in race.samples.items())
    return CaseRecord(
        op=case.family,
        kind=case.kind,
        shape=case.shape,
        size="(" + ", ".join(map(str, case.size)) + ")",
        length=case.size[-1],
        series=case.series,
        dtype=case.dtype_name,
        bytes=work.bytes,
        flops=work.flops,
        results=tuple(results),
        absent=entered.absent,
    )


def _show(case: CaseRecord, console: Console) -> None:
    console.print(f"\n{case.title}")
    for result in case.results:
        line = f"  {result.name:30} {seconds(result.seconds.middle):>9}  {rate(case, result):>13}"
        if result.role != "ours":
            ratio = case.ratio(result)
            line += f"  {three_digits(ratio.middle):>5} ({quartiles(ratio)})"
        console.print(line)
    for name, reason in case.absent.items():
        console.print(f"  {name:30} absent: {reason}")


def writers(json: Path | None, html: Path | None, plot: Path | None) -> list[Writer]:
    """Of each file that is given. Raises ModuleNotFoundError where a package that it needs is missing."""
    found: list[Writer] = []
    if json:
        found.append(functools.partial(_write_json, path=json))
    if html:
        from neox_kernels.bench.report import render

        found.append(functools.partial(_write_page, path=html, render=render))
    if plot:
        from neox_kernels.bench.figures import save

        found.append(functools.partial(save, path=plot))
    return found


def _write_json(record: Record, path: Path) -> list[Path]:
    record.write(path)
    return [path]


def _write_page(record: Record, path: Path, render: Callable[[Record], str]) -> list[Path]:
    path.write_text(render(record))
    return [path]
