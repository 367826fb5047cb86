"""The command neox-kernels: what it says, and what it says where something is missing."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")

from typer.testing import CliRunner

import neox_kernels
from neox_kernels import backends, cli, info

TINY = ("demo", "--layers", "1", "--width", "64", "--seqlen", "16", "--seconds", "0")

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["neox-kernels", {command!r}]
from neox_kernels.cli import main
main()
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli._app(), list(arguments), terminal_width=200)


def test_info() -> None:
    done = run("info")
    assert done.exit_code == 0, done.output
    assert neox_kernels.__version__ in done.stdout and torch.__version__ in done.stdout
    assert all(op in done.stdout for op in backends.OPS)
    assert all(backend in done.stdout for backend in backends.MODULES)


def test_info_json() -> None:
    done = run("info", "--json")
    facts = json.loads(done.stdout)
    assert facts.keys() == {"versions", "devices", "backends", "compiled"}
    assert {"neox_kernels", "python", "platform", "torch", "triton", "transformers", "flash-attn"} == set(
        facts["versions"]
    )
    assert facts["devices"][0]["device"] == "cpu" and facts["devices"][0]["name"]
    said = {(row["op"], row["device"]): row["backend"] for row in facts["backends"]}
    assert said == {(choice.op, choice.device): choice.backend for choice in neox_kernels.explain()}
    library = facts["compiled"]
    assert {"loaded", "reason", "cpu_isa", "build", "build_info", "build_info_reason", "processor"} == set(library)
    assert library["loaded"] == (library["reason"] is None) == (library["cpu_isa"] is not None)


def test_info_without_a_compiled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"ext": False, "cpu_isas": [], "cuda_archs": [], "nvcc": None, "cuda": False, "compiler": None}
    record |= {"cuda_reason": "nvcc was not found", "torch_target": "2.10", "torch_headers": None}
    monkeypatch.setattr(info.compiled, "build_config", record)
    monkeypatch.setattr(info.compiled, "load_error", "no C++ compiler")
    monkeypatch.setitem(sys.modules, "neox_kernels._build", None)
    for words in ("no C++ compiler", "nvcc was not found", "this processor", "unknown"):
        assert words in run("info").stdout
    assert json.loads(run("info", "--json").stdout)["compiled"]["processor"] is None


def test_module_is_the_command() -> None:
    said = subprocess.check_output([sys.executable, "-m", "neox_kernels", "--help"], text=True)
    assert "info" in said and "demo" in said


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_packages_one_sentence(missing: str) -> None:
    code = WITHOUT.format(missing=missing, command="info")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert f"needs {missing}" in done.stderr and 'pip install "neox-kernels[cli]"' in done.stderr
    assert "neox_kernels.explain()" in done.stderr and "Traceback" not in done.stderr


def test_demo_without_transformers() -> None:
    code = WITHOUT.format(missing="transformers", command="demo")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == 'The demo needs transformers: pip install "neox-kernels[transformers]"'


def test_demo() -> None:
    pytest.importorskip("transformers")
    done = run(*TINY)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("kept") == 4
    choice = neox_kernels.explain("apply_rotary_qk", "cpu")[0]
    assert f"on cpu was served by {choice.backend}" in done.stdout


def test_demo_json() -> None:
    pytest.importorskip("transformers")
    facts = json.loads(run(*TINY, "--json").stdout)
    cases = [(result["model"], result["dtype"]) for result in facts["results"]]
    assert cases == [(model, dtype) for dtype in ("float32", "bfloat16") for model in ("GPT-NeoX", "GPT-J")]
    for result in facts["results"]:
        assert 0 < result["swapped_error"] <= result["budget"]
        assert all(ms > 0 for ms in result["rotary_ms"] + result["forward_ms"])


def test_demo_fails_on_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from neox_kernels.integrations import transformers_layers

    def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return neox_kernels.apply_rotary_qk(q, k, cos, -sin, **options)

    monkeypatch.setattr(transformers_layers, "apply_rotary_qk", wrong)
    done = run(*TINY)
    assert done.exit_code == 1
    assert "BROKEN" in done.stdout


@pytest.mark.parametrize(("option", "value"), [("--width", "100"), ("--device", "tpu"), ("--layers", "0")])
def test_demo_refuses(option: str, value: str) -> None:
    done = run("demo", option, value)
    assert done.exit_code == 2
    assert option in done.output
