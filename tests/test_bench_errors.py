"""What ``neox-kernels bench`` refuses: kernels whose numbers are wrong, options that mean nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_calls import TINY, bench, call
from torch import Tensor

from neox_kernels.bench import rotary_cases, selection
from neox_kernels.bench.record import Record


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


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"format": 0})])
def test_what_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json is no"):
        Record.read(tmp_path / "f.json")
