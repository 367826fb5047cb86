"""``neox-kernels bench``: what it times, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import neox_kernels
from neox_kernels import cli, reference
from neox_kernels.bench import harness, rotary_cases, selection
from neox_kernels.bench.case import Work
from neox_kernels.bench.record import CaseRecord, Record, Result, Spread

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


# ------------------------------------------------------------------------------------------------------ what it times


def test_the_record(tmp_path: Path) -> None:
    record = bench(tmp_path, *TINY)
    (case,) = record.cases
    assert (case.op, case.kind, case.shape, case.size, case.dtype) == (
        "rotary",
        "forward",
        "pythia-160m",
        "(2, 3)",
        "float32",
    )
    assert case.bytes == 4 * 2 * 3 * 12 * 64 * 4 and case.flops == 0 and case.length == 3
    roles = {result.name: result.role for result in case.results}
    assert roles == {
        "neox_kernels": "ours",
        "neox_kernels, in place": "variant",
        "neox_kernels, q then k": "variant",
        "transformers": "peer",
        "memcpy": "limit",
        "memcpy to fresh memory": "limit",
    }
    assert all(len(result.samples) == 2 and min(result.samples) > 0 for result in case.results)
    assert case.absent.keys() == {"flash-attn", "liger"}
    assert record.complete and record.wrong == [] and record.machine["clock"] == "CPU time"
    assert record.versions["torch"] == torch.__version__ and record.versions["neox_kernels"] == neox_kernels.__version__


@pytest.mark.parametrize("name", selection.FAMILIES[:5])
def test_every_family_checks_every_contender(name: str, tmp_path: Path) -> None:
    """All kinds, the short run's shapes at a tiny size, and no contender left out but those that need a GPU."""
    grid = {"softmax": "1x3x9,2x1x9", "attention": "2x9x9,2x1x9", "rotary": "2x1,2x9"}.get(name, "2x9")
    record = bench(tmp_path, name, "--grid", grid, "--backward")
    (family,) = selection.read_options([name]).families
    assert {case.kind for case in record.cases} == set(family.works)
    assert {case.shape for case in record.cases} == set(family.shapes)
    for case in record.cases:
        assert {result.name for result in case.results if result.role == "peer"} >= {family.eager}
        assert set(case.absent) <= {"flash-attn", "liger", "liger, no mask"}
        assert case.kind in ("append", "metadata") or case.limit is not None


def test_ours_by_a_backend_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    original = reference.apply_rotary_qk
    monkeypatch.setattr(reference, "apply_rotary_qk", lambda *a, **k: served.append(1) or original(*a, **k))
    bench(tmp_path, *TINY, "--backend", "reference")
    assert served


def test_two_backends_side_by_side(tmp_path: Path) -> None:
    if neox_kernels.compiled.load_error:
        pytest.skip(neox_kernels.compiled.load_error)
    record = bench(tmp_path, *TINY, "--backend", "compiled,reference")
    assert "neox_kernels, reference" in {result.name for result in record.cases[0].results}


def test_peers_that_are_named(tmp_path: Path) -> None:
    record = bench(tmp_path, "softmax", "--grid", "1x2x4", "--against", "eager,torch")
    names = {result.name for _, result in record.rows() if result.role == "peer"}
    assert names == {"transformers", "torch, no mask"}


def test_the_short_run_and_the_full_one() -> None:
    def cases(**options: Any) -> set[str]:
        return {str(case) for _, case in selection.choose(selection.read_options([], **options))}

    short, full = cases(), cases(full=True)
    assert short < full and cases(full=True) < cases(full=True, backward=True)
    assert {case.split()[0] for case in short} == set(selection.FAMILIES), "every family is in the short run"
    assert all("training" not in case and "backward" not in case for case in full)


def test_pytest_benchmark_runs_the_same_cases() -> None:
    folder = Path(rotary_cases.__file__).parent
    words = ["-m", "pytest", str(folder), "--collect-only", "-q", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {str(case) for _, case in selection.choose(selection.read_options([], backward=True))}
    tests = [
        line.split("test_case[", 1)[1].removesuffix("]") for line in done.stdout.splitlines() if "test_case[" in line
    ]
    assert len(tests) == 2 * len(expected)
    assert {test.rpartition("-")[0] for test in tests} == expected


# ----------------------------------------------------------------------------------------------------- what it refuses


def test_a_wrong_kernel_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary_cases, "apply_rotary_qk", lambda q, k, *_, **__: (q, k))
    record = bench(tmp_path, *TINY, code=1)
    assert record.cases == []
    (reason,) = record.wrong
    assert "pythia-160m (2, 3)" in reason and "above the budget" in reason


def test_every_work_refuses_what_is_wrong() -> None:
    """A result that is off by a part in ten is refused by every kind of every family."""
    grids = {"softmax": "1x3x9", "attention": "2x9x9", "varlen": "2x9"}
    for name in selection.FAMILIES[:5]:
        options = selection.read_options([name], grid=grids.get(name, "2x1"), backward=True, dtype="float32")
        for family, case in selection.choose(options):
            work = family.work(case)
            result = work.ours()()
            work.check(result)
            with pytest.raises(AssertionError):
                work.check(spoiled(result))


def spoiled(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result + 1 if not result.is_floating_point() else result * 1.1 + 1e-3
    if hasattr(result, "cu_seqlens"):
        return result.indices + 1, result.cu_seqlens
    return type(result)(spoiled(item) for item in result)


@pytest.mark.parametrize(
    ("words", "option", "said"),
    [
        (["rotory"], "OPS", "rotory is not known; known are rotary, softmax"),
        (["rotary", "--shape", "pythia-7b"], "--shape", "pythia-7b is not known; known are pythia-160m"),
        (["rotary", "--grid", "4x"], "--grid", "such as 4x512"),
        (["rotary", "--grid", "0x4"], "--grid", "sizes above 0"),
        (["softmax", "--grid", "4x512"], "--grid", "batchxq_lenxk_len, which softmax takes"),
        (["rotary", "--dtype", "float8"], "--dtype", "float8 is not known"),
        (["rotary", "--kind", "sideways"], "--kind", "known are forward, append, training"),
        (["rotary", "--kind", "append", "--grid", "2x7"], "OPS", "no case"),
        (["rotary", "--device", "tpu"], "--device", "tpu is not known"),
        (["rotary", "--device", "cuda"], "--device", "no CUDA device"),
        (["rotary", "--backend", "cuda"], "--backend", "known are compiled, triton, reference"),
        (["gelu", "--backend", "triton"], "--backend", "triton does not serve gelu_tanh here"),
        (["rotary", "--against", "apex"], "--against", "apex is not known; known are eager"),
        (["--add", "mine:f"], "--add", "does not say of which op it is"),
        (["rotary", "--add", "softmax=mine:f"], "--add", "softmax is not known; known are rotary"),
        (["rotary", "--add", "mine"], "--add", "mine is not module:function"),
        (["rotary", "--add", "no_such_module:f"], "--add", "No module named"),
        (["rotary", "--add", "math:no_such_function"], "--add", "no_such_function"),
        (["rotary", "--add", "math:pi"], "--add", "is a float, and must be a function"),
        (["rotary", "--json", "no/such/folder/f.json"], "--json", "cannot be written"),
        (["rotary", "--html", "no/such/folder/f.html"], "--html", "cannot be written"),
    ],
)
def test_options_that_are_wrong(words: list[str], option: str, said: str) -> None:
    if "--device" in words and words[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("here is a CUDA device")
    done = call(*words)
    text = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and option in text and said in text, done.output


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("models", "swap"):
        monkeypatch.delitem(sys.modules, f"neox_kernels.bench.{name}_cases", raising=False)
    left_out = selection.read_options([]).left_out
    assert left_out == dict.fromkeys(("models", "swap"), "transformers is not installed")
    with pytest.raises(ValueError, match="OPS: models needs transformers, which is not installed"):
        selection.read_options(["models"])


# -------------------------------------------------------------------------------------------------- one's own kernel

MINE = """
import os, signal
import torch
from neox_kernels.reference import apply_rotary_qk

calls = 0

def my_rotary(q, k, cos, sin, *, interleaved):
    return apply_rotary_qk(q, k, cos, sin, interleaved=interleaved)

def wrong(q, k, cos, sin, *, interleaved):
    return q, k

def greedy(q, k, cos, sin, *, interleaved):
    result = my_rotary(q, k, cos, sin, interleaved=interleaved)
    q.zero_()
    return result

def narrow(q):
    return q

def interrupting(q, k, cos, sin, *, interleaved):
    global calls
    calls += 1
    if calls == 300:
        os.kill(os.getpid(), signal.SIGINT)
    return my_rotary(q, k, cos, sin, interleaved=interleaved)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.mark.parametrize("path", ["mine:my_rotary", "rotary=mine:my_rotary"])
def test_a_kernel_of_ones_own(path: str, mine: Path) -> None:
    record = bench(mine, *TINY, "--add", path)
    assert {result.name: result.role for _, result in record.rows()}["my_rotary"] == "added"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong", "above the budget"),
        ("greedy", "changes its arguments"),
        ("narrow", "It is called as function(q, k, cos, sin, *, interleaved)"),
    ],
)
def test_a_kernel_of_ones_own_that_is_wrong(name: str, said: str, mine: Path) -> None:
    record = bench(mine, *TINY, "--add", f"mine:{name}", code=1)
    (case,) = record.cases
    assert name not in {result.name for result in case.results} and said in case.absent[name]
    assert any(name in reason and said in reason for reason in record.wrong)


def test_ctrl_c_keeps_what_is_measured(mine: Path) -> None:
    """The signal comes in the second case, in the middle of a round."""
    words = [*TINY, "--grid", "1x1,2x3", "--add", "mine:interrupting", "--rounds", "50", "--json", "record.json"]
    words.append("--html=record.html")
    done = subprocess.run(
        [sys.executable, "-m", "neox_kernels", "bench", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(mine)},
        timeout=300,
    )
    assert done.returncode == 130, done.stdout + done.stderr
    record = Record.read(Path("record.json"))
    assert not record.complete and record.cases
    for case in record.cases:
        rounds = {len(result.samples) for result in case.results}
        assert len(rounds) == 1 and 0 < rounds.pop() <= 50, "whole rounds only"
    assert len(record.cases[-1].results[0].samples) < 50
    assert "interrupted" in Path("record.html").read_text().lower()


# -------------------------------------------------------------------------------------------------- figures and records


def test_whole_rounds_and_ratios_within_a_round() -> None:
    times = {"a": iter([4.0, 8.0, 4.0, 6.0]), "b": iter([2.0, 2.0, 1.0])}

    def sampler(call: Any) -> Any:
        return lambda: next(times[call()])

    race = harness.Race({"a": lambda: "a", "b": lambda: "b"}, sampler)
    for _ in range(3):
        race.run_round()
    with pytest.raises(StopIteration):
        race.run_round()
    assert race.samples == {"a": [4.0, 8.0, 4.0], "b": [2.0, 2.0, 1.0]}
    results = tuple(Result(name, role, tuple(race.samples[name])) for name, role in (("a", "peer"), ("b", "ours")))
    case = CaseRecord("op", "kind", "shape", "(1)", 1, "series", "float32", 8, 0, results)
    assert case.ratio(results[0]) == Spread(3.0, 4.0, 4.0)  # of 2, 4 and 4
    assert case.rate(results[1]) == 4.0 and case.limit is None


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = bench(tmp_path, *TINY)
    record.write(tmp_path / "again.json")
    assert Record.read(tmp_path / "again.json") == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "record.json"], "no file is left behind"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"format": 0})])
def test_what_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json is no"):
        Record.read(tmp_path / "f.json")


def test_signatures_are_what_works_are_called_with() -> None:
    """The sentence that a user reads names the arguments that a function gets."""
    for family in selection.read_options([]).families:
        for kind, work in family.works.items():
            assert issubclass(work, Work)
            assert not work.signature or work.signature.startswith("function("), (family.name, kind)
