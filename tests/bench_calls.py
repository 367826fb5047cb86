"""Calls of ``neox-kernels bench``, for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from neox_kernels import cli
from neox_kernels.bench.record import Record

TINY = ("rotary", "--shape", "pythia-160m", "--grid", "2x3", "--kind", "forward", "--dtype", "float32")


def call(*words: object) -> Any:
    arguments = ["bench", *map(str, words)]
    done = CliRunner().invoke(cli._app(), arguments, terminal_width=200, env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def bench(tmp_path: Path, *words: object, code: int = 0) -> Record:
    file = tmp_path / "record.json"
    done = call(*words, "--rounds", 2, "--json", file)
    assert done.exit_code == code, done.output
    return Record.read(file)
