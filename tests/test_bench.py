"""The benchmarks for a GPU, run without one: on CPU tensors, with a device and events that are made up."""

from __future__ import annotations

import importlib
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
from typer.testing import CliRunner

from neox_kernels import cli, reference
from neox_kernels.bench import gpu, rotary_cases, softmax_cases, tune


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
    for cases in (rotary_cases, softmax_cases):
        monkeypatch.setattr(cases, "needs_gpu", lambda case, what: None)
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


def peer(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """An installed flash-attn, of which there is this rotary."""
    for name in ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary"):
        module = ModuleType(name)
        module.apply_rotary_emb, module.__spec__ = function, ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


def bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    file = tmp_path / "report.json"
    done = CliRunner().invoke(
        cli._app(), ["bench", *words, "--device", "cuda", "--rounds", "2", "--json", str(file)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return json.loads(file.read_text())


def test_rotary_beside_its_peers(made_up: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as if it were not installed

    def right(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return reference.apply_rotary(x, cos.float(), sin.float(), interleaved=interleaved)

    def wrong(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return x

    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401 - before there is a flash-attn

    words = ("rotary", "--kind", "forward", "--shape", "pythia-160m", "--grid", "2x3", "--dtype", "bfloat16")
    for function, serves in ((right, True), (wrong, False)):
        peer(monkeypatch, function)
        report = bench(tmp_path, *words, "--against", "transformers,compile,flash-attn,liger")
        assert report["machine"]["name"] == "made up" and report["machine"]["capability"] == "9.0"
        assert "CUDA events" in report["machine"]["clock"]
        (case,) = report["cases"]
        names = {result["name"] for result in case["results"]}
        assert {"neox_kernels", "transformers", "compile", "memcpy"} <= names
        assert ("flash-attn" in names) == serves
        assert serves or "above the budget" in case["absent"]["flash-attn"]
        assert case["absent"]["liger"] == "liger_kernel.transformers is not installed"


@pytest.mark.parametrize(
    ("family", "grid", "absent"),
    [
        ("softmax", "1x4x9,2x1x9", {"liger, no mask"}),
        ("varlen", "3x9", {"flash-attn"}),
        ("attention", "2x9x9,2x1x9", {"flash-attn"}),
    ],
)
def test_every_kind_of(family: str, grid: str, absent: set[str], made_up: None, tmp_path: Path) -> None:
    report = bench(tmp_path, family, "--grid", grid, "--backward")
    module = importlib.import_module(f"neox_kernels.bench.{family}_cases")
    assert {case["kind"] for case in report["cases"]} == set(module.FAMILY.works)
    assert set().union(*(case["absent"] for case in report["cases"])) == absent


def test_by_the_wall_clock(made_up: None, tmp_path: Path) -> None:
    report = bench(tmp_path, "gelu", "--grid", "1x2", "--shape", "gptj-12x768", "--wall")
    assert report["machine"]["clock"] == "wall clock, launches included"


def test_sizes_that_only_a_gpu_has(made_up: None) -> None:
    cases = rotary_cases.FAMILY.cases
    assert {case.size for case in cases("cuda")} - {case.size for case in cases("cpu")} == {(8, 2048)}


def test_tune_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("here is one")
    with pytest.raises(SystemExit, match="no CUDA device"):
        tune.main([])


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
