"""The benchmarks for a GPU, run without one: on CPU tensors, with a device and events that are made up."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import reference

BENCH = str(Path(__file__).resolve().parent.parent / "bench")
sys.path.append(BENCH)
import gpu  # noqa: E402 - found by the line above
import harness  # noqa: E402
import run  # noqa: E402
import tune  # noqa: E402

sys.path.remove(BENCH)


class Event:
    """Tells the milliseconds that tests say have passed, and half a millisecond for itself."""

    now, synchronised = 0.0, False

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 0.5
        Event.synchronised, self.at = False, Event.now

    def elapsed_time(self, end: Event) -> float:
        assert Event.synchronised, "events are read before they have happened"
        return end.at - self.at


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device of CPU tensors."""
    properties = SimpleNamespace(
        name="made up", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=1 << 10
    )
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "LEAST_FLUSH", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(Event, "synchronised", True))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(sys, "path", [*sys.path, BENCH])
    Event.now = 0.0


def test_only_the_call_lies_between_the_events(made_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = gpu.CudaSampler(calls=3)
    assert sampler.flush.numel() >= 2 << 10
    calls = []

    class Flush:
        def zero_(self) -> None:
            calls.append("flush")
            Event.now += 100.0

    def call() -> None:
        calls.append("call")
        Event.now += 1.0

    sampler.flush, sampler.flush_seconds = Flush(), 0.1
    monkeypatch.setattr(gpu, "_host_seconds", lambda call: call() or 0.12)
    take = sampler(call)
    assert calls == ["call"] * gpu.WARM_UP
    assert take() == 1.5e-3
    assert calls[gpu.WARM_UP :] == ["flush", "flush", "flush", "call"] * 3  # 0.3 s, above twice what the host takes


def test_the_wall_clock_counts_all(made_up: None) -> None:
    calls: list[str] = []
    take = gpu.WallSampler(calls=20)(lambda: calls.append("call") or time.sleep(1e-3))
    assert 1e-3 <= take() < 1 and len(calls) == gpu.WARM_UP + 20


def test_medians_and_ratios() -> None:
    times = {"a": iter([4.0, 8.0, 4.0, 6.0]), "b": iter([2.0, 2.0, 1.0, 3.0])}

    def sampler(call: Any) -> Any:
        return lambda: next(times[call()])

    timings = harness.compare({"a": lambda: "a", "b": lambda: "b"}, "a", sampler, rounds=4)
    assert (timings["a"].seconds, timings["a"].ratio) == (5.0, 1.0)
    assert (timings["b"].seconds, timings["b"].ratio) == (2.0, 3.0)
    assert timings["b"].ratio_low < 3.0 < timings["b"].ratio_high


def peer(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """An installed flash-attn, of which there is this rotary."""
    for name in ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary"):
        module = ModuleType(name)
        module.apply_rotary_emb, module.__spec__ = function, ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


def bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    file = tmp_path / "report.json"
    run.main([*words, "--device", "cuda", "--rounds", "2", "--json", str(file)])
    return json.loads(file.read_text())


def test_rotary_beside_its_peers(made_up: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as if it were not installed

    def right(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return reference.apply_rotary(x, cos.float(), sin.float(), interleaved=interleaved)

    def wrong(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return x

    import rotary_cases
    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401 - before there is a flash-attn

    monkeypatch.setattr(rotary_cases, "LENGTHS", ((2, 3),))
    words = ("rotary", "--kind", "forward", "--model", "pythia-160m", "--compiled")
    for function, serves in ((right, True), (wrong, False)):
        peer(monkeypatch, function)
        report = bench(tmp_path, *words)
        assert report["device"]["name"] == "made up" and report["device"]["capability"] == "9.0"
        rows = {row["name"]: row for row in report["rows"] if "bfloat16" in row["case"]}
        assert rows["neox_kernels"]["seconds"] >= 0 and "transformers compiled" in rows
        assert ("seconds" in rows["flash-attn"]) == serves
        assert serves or "above the budget" in rows["flash-attn"]["absent"]
        assert "ModuleNotFoundError" in rows["Liger"]["absent"]


@pytest.mark.parametrize("family", ["softmax", "varlen", "attention"])
def test_every_kind_of(family: str, made_up: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import attention_cases
    import softmax_cases
    import varlen_cases

    for lengths in ("PREFILL", "PADDED", "DECODE"):
        monkeypatch.setattr(attention_cases, lengths, ((2, 1 if lengths == "DECODE" else 9, 9),))
    monkeypatch.setattr(softmax_cases, "LENGTHS", ((1, 4, 9),))
    monkeypatch.setattr(varlen_cases, "SIZES", ((3, 9),))
    report = bench(tmp_path, family)
    kinds = {row["case"].partition(":")[0] for row in report["rows"]}
    cases = {"softmax": softmax_cases, "varlen": varlen_cases, "attention": attention_cases}
    assert kinds == set(cases[family].CONTENDERS)
    assert {row["name"] for row in report["rows"] if "absent" in row} == {
        "softmax": {"Liger, no mask"},
        "varlen": {"flash-attn"},
        "attention": set(),
    }[family]


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("here is one")
    for main in (run.main, tune.main):
        with pytest.raises(SystemExit, match="no CUDA device"):
            main(["--device", "cuda"] if main is run.main else [])


@pytest.fixture
def on_ptxsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("triton")
    from triton_on_ptxsim import Gpu, ptx_only

    from neox_kernels.kernels import rotary_autograd, softmax_autograd, varlen_autograd

    device = Gpu(90)
    for module, name in (
        (rotary_autograd, "_rotary_kernel"),
        (softmax_autograd, "_softmax_kernel"),
        (softmax_autograd, "_softmax_backward_kernel"),
        (varlen_autograd, "_gather_kernel"),
    ):
        monkeypatch.setattr(module, name, device.stand_in(getattr(module, name)))
    with ptx_only(tmp_path), device.fresh:
        yield device


def test_neighbours_of_the_fixed_choices(made_up: None, on_ptxsim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every neighbour runs, as other code than the fixed choice, and gives its numbers."""
    x, cos, sin = torch.randn(2, 33, 6, 32).bfloat16(), torch.rand(33, 8), torch.rand(33, 8)
    scores = torch.randn(1, 8, 33, 80).bfloat16()
    indices, inverse = torch.arange(66), torch.arange(66).int().view(2, 33)
    runs = {
        "rotary": lambda: tune.kernels.apply_rotary_qk(x, x[:, :, :2], cos, sin),
        "softmax": lambda: [tune.kernels.causal_softmax(scores)],
        "varlen": lambda: tune.kernels.unpad_input([x], indices, inverse),
    }
    for op, run_fixed in runs.items():

        def sampler(call: Any) -> Any:
            on_ptxsim.launches.clear()
            call()
            count = float(on_ptxsim.launches[0].warp_instructions)
            return lambda: count

        report = tune.tune(op, "tiny", run_fixed, sampler, rounds=2, within=5.0)
        assert report["refused"] == {} and set(report["seconds"]) == {tune.FIXED, *tune.neighbours(op)}
        assert len(set(report["seconds"].values())) > 1, "all neighbours are one"
        assert report["within"] == (report["fixed_over_best"] <= 1.05)
        assert report["best"] == min(report["seconds"], key=report["seconds"].get)
