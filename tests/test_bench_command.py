"""``neox-kernels bench``: what it times, what it refuses, and what it leaves behind."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_calls import TINY, bench

import neox_kernels
from neox_kernels import reference
from neox_kernels.bench import harness, models_cases, rotary_cases, selection, swap_cases
from neox_kernels.bench.case import Work
from neox_kernels.bench.record import CaseRecord, Record, Result, Spread

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


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, config in models_cases.CONFIGS.items():
        tiny = copy.deepcopy(config)
        tiny.vocab_size, tiny.num_hidden_layers = 2000, 2  # of fewer logits the largest error hangs on chance
        tiny.bos_token_id = tiny.eos_token_id = 0
        for family in (models_cases.FAMILY, swap_cases.FAMILY):
            if name in family.shapes:
                monkeypatch.setitem(family.shapes, name, tiny)
    caches = models_cases.pair, models_cases.truth_of, swap_cases.models_of, swap_cases.truth_of
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_whole_models(tiny_models: None, tmp_path: Path) -> None:
    record = bench(tmp_path, "models", "--grid", "2x40")
    found = {(case.shape, case.kind, case.dtype): {result.name for result in case.results} for case in record.cases}
    assert len(found) == 3 * 2 * 2
    for (shape, kind, dtype), names in found.items():
        assert {"neox_kernels", "transformers", "matrix products"} <= names
        assert ("sdpa" in names) == (shape != "gptj-12x768" and kind == "logits")
        if importlib.util.find_spec("ctranslate2"):
            assert ("ctranslate2" in names) == (kind == "logits" and dtype == "float32"), record.cases[0].absent


def test_swapped_models(tiny_models: None, tmp_path: Path) -> None:
    record = bench(tmp_path, "swap", "--grid", "2x40", "--backward")
    assert {(case.shape, case.kind) for case in record.cases} == {
        (shape, kind) for shape in ("pythia-160m", "gptj-12x768") for kind in ("prefill", "decode", "train")
    }
    assert all({"neox_kernels", "transformers"} <= {x.name for x in case.results} for case in record.cases)


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


def test_a_peer_that_an_op_does_not_have_is_named(tmp_path: Path) -> None:
    (case,) = bench(tmp_path, *TINY, "--against", "transformers,sdpa").cases
    assert case.absent == {"sdpa": "it has nothing of this kind"}


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

def greedy_with_many(heads, indices):
    result = [x.flatten(0, 1)[indices] for x in heads]
    heads[1].zero_()
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


def test_arguments_in_a_tuple_are_left_alone_too(mine: Path) -> None:
    words = "varlen", "--shape", "768 features", "--grid", "2x9", "--kind", "qkv", "--dtype", "float32"
    (case,) = bench(mine, *words, "--add", "mine:greedy_with_many", code=1).cases
    assert "changes its arguments" in case.absent["greedy_with_many"]


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


def test_signatures_are_what_works_are_called_with() -> None:
    """The sentence that a user reads names the arguments that a function gets."""
    for family in selection.read_options([]).families:
        for kind, work in family.works.items():
            assert issubclass(work, Work)
            assert not work.signature or work.signature.startswith("function("), (family.name, kind)
