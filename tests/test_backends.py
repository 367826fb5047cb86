"""Which backend serves a call, what is said of the others, and what happens where one is missing or broken."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import neox_kernels
from neox_kernels import apply_rotary, backends, compiled, explain, reference, rotary_tables, use_backend

OPS = backends.OPS
COS, SIN = rotary_tables(16, 8)
X = torch.randn(1, 5, 2, 32)
needs_library = pytest.mark.skipif(compiled.load_error is not None, reason=str(compiled.load_error))


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    with use_backend(None):
        yield


def served_by(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The backend: the package that the implementation's file lies in."""
    return sys.modules[backends.select("apply_rotary", device, dtype)[0].__module__.removesuffix(".rotary")]


@needs_library
def test_explain_says_who_serves_and_why_not_the_others() -> None:
    everything = explain()
    assert [(choice.op, choice.device) for choice in everything] == [(op, d) for d in ("cpu", "cuda") for op in OPS]
    for choice in explain(device="cpu"):
        assert choice.backend == "compiled"
        assert choice.reasons == {"triton": "triton serves GPUs only", "reference": "compiled comes first"}
    text = str(explain("apply_rotary", "cpu"))
    assert text.splitlines()[0] == "apply_rotary on cpu: compiled" and "not triton: triton serves GPUs only" in text
    for choice in explain(device="cuda"):
        assert {choice.backend, *choice.reasons} == {"compiled", "triton", "reference"}
        assert all(choice.reasons.values())
    with use_backend("reference"):
        (forced,) = explain("apply_rotary", "cpu")
        assert forced.backend == "reference" and forced.reasons["compiled"] == "reference is forced"
    with use_backend("triton"):
        (forced,) = explain("apply_rotary", "cpu")
        assert forced.backend is None and str(explain("apply_rotary", "cpu")).startswith(
            "apply_rotary on cpu: NO BACKEND"
        )
    with pytest.raises(ValueError, match="op must be one of apply_rotary, "):
        explain("rotary")


@needs_library
def test_use_backend_as_a_function_and_nested() -> None:
    assert served_by() is compiled
    use_backend("reference")
    assert served_by() is reference
    with use_backend("compiled"):
        assert served_by() is compiled
        with use_backend(None):
            assert served_by() is compiled and served_by(torch.float64) is reference
        with use_backend("reference"):
            assert served_by() is reference
        assert served_by() is compiled
    assert served_by() is reference
    with pytest.raises(ZeroDivisionError), use_backend(None):
        raise ZeroDivisionError
    assert served_by() is reference, "an exception leaves the block too"
    for name in ("eager", "", "Compiled", 1):
        with pytest.raises(ValueError, match="name must be one of compiled, triton, reference or None"):
            use_backend(name)  # type: ignore[arg-type]
    assert served_by() is reference, "a wrong name changes nothing"


@needs_library
def test_the_call_goes_where_the_registry_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for module in (compiled, reference):
        kept = module.apply_rotary

        def spy(*args: Any, kept: Any = kept, module: Any = module, **options: Any) -> Any:
            calls.append(module)
            return kept(*args, **options)

        monkeypatch.setattr(module, "apply_rotary", spy)
    use_backend(None)  # fills the table anew
    apply_rotary(X, COS, SIN)
    apply_rotary(X.double(), COS, SIN)
    with use_backend("reference"):
        apply_rotary(X, COS, SIN)
    assert calls == [compiled, reference, reference]


@needs_library
def test_a_forced_backend_that_cannot_serve_raises_and_never_switches() -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"triton: triton serves GPUs only"):
        apply_rotary(X, COS, SIN)
    with use_backend("compiled"), pytest.raises(RuntimeError, match=r"compiled: it does not serve torch.float64"):
        apply_rotary(X.double(), COS.double(), SIN.double())
    assert served_by(torch.float64) is reference


# ------------------------------------------------------------------------------------------- in processes of their own


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package as installed, without the compiled library."""
    folder = tmp_path_factory.mktemp("site")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "_build_config.json")
    copy = shutil.copytree(Path(neox_kernels.__file__).parent, folder / "neox_kernels", ignore=skip)
    for name in ("kernels", "models"):
        spec = importlib.util.find_spec(f"neox_kernels.{name}")
        assert spec is not None and spec.submodule_search_locations
        shutil.copytree(spec.submodule_search_locations[0], copy / name, ignore=skip, dirs_exist_ok=True)
    return folder


@pytest.fixture
def library(package: Path) -> Iterator[Path]:
    yield package / "neox_kernels" / "_C.so"
    (package / "neox_kernels" / "_C.so").unlink(missing_ok=True)


def run(package: Path, code: str, **environment: str) -> tuple[Any, str]:
    """What the code gives as ``result``, and what it wrote to stderr."""
    code = textwrap.dedent(code) + "\nimport json\nprint(json.dumps(result))"
    kept = {name: value for name, value in os.environ.items() if name != "NEOX_KERNELS_BACKEND"}
    kept |= {"PYTHONPATH": str(package), "PYTHONWARNINGS": "always", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=package, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


CALLS = """
import sys, torch, neox_kernels
from neox_kernels import apply_rotary, backends, explain, reference, rotary_tables
from neox_kernels.testing import assert_within_budget, eager_rotary, to_float64
x, tables = torch.randn(1, 5, 2, 32), rotary_tables(16, 8)
def call():
    try:
        y = apply_rotary(x, *tables)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    oracle = reference.apply_rotary(*to_float64((x, *tables)))
    assert_within_budget(y, eager_rotary(x, *(table[None, :5] for table in tables), False), oracle)
    return backends.select("apply_rotary", "cpu", torch.float32)[0].__module__.removesuffix(".rotary")
for _ in range(2):
    first = call()
(choice,) = explain("apply_rotary", "cpu")
"""


def test_importing_imports_nothing_that_may_be_missing(package: Path) -> None:
    loaded, _ = run(
        package,
        """
        import sys
        import torch
        before = set(sys.modules)
        import neox_kernels, neox_kernels.testing
        from neox_kernels import apply_rotary, rotary_tables
        apply_rotary(torch.zeros(1, 2, 1, 16), *rotary_tables(16, 8))
        neox_kernels.explain(device="cpu")
        wanted = ("triton", "transformers", "flash_attn", "matplotlib", "numpy", "typer", "rich")
        result = [name for name in wanted if name in sys.modules and name not in before]
        """,
    )
    assert loaded == []


@pytest.mark.parametrize("library_is", ["missing", "garbage", "unresolved", "good"])
def test_the_library_missing_or_broken(package: Path, library: Path, library_is: str) -> None:
    if library_is == "garbage":
        library.write_bytes(b"not a library")
        named = "invalid ELF header|file too short|not a library"
    elif library_is == "unresolved":
        source = library.with_name("broken.cpp")
        source.write_text("void no_such_function(); struct Load { Load() { no_such_function(); } } load;")
        compiler = shutil.which("g++") or shutil.which("c++") or pytest.skip("needs a C++ compiler")
        subprocess.run([compiler, "-shared", "-fPIC", "-O0", source, "-o", library], check=True)
        named = "undefined symbol.*no_such_function"
    elif library_is == "good":
        if compiled.load_error is not None:
            pytest.skip(compiled.load_error)
        shutil.copy(Path(compiled.__file__).parent.parent / "_C.so", library)
    code = CALLS + "result = [first, choice.backend, choice.reasons]"
    (module, backend, reasons), errors = run(package, code)
    ours = [line for line in errors.splitlines() if "neox_kernels" in line and "Warning" in line]
    if library_is == "good":
        assert (module, backend, ours) == ("neox_kernels.compiled", "compiled", [])
        return
    assert (module, backend) == ("neox_kernels.reference", "reference")
    if library_is == "missing":
        assert "has no compiled library" in reasons["compiled"] and ours == []
        return
    assert len(ours) == 1, errors
    for text in (ours[0], reasons["compiled"]):
        assert re.search(named, text), text


def test_without_triton(package: Path) -> None:
    blocked = """
    import sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("triton", "transformers", "flash_attn"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Block())
    """
    code = textwrap.dedent(blocked) + CALLS
    code += """
gpu = explain("apply_rotary", "cuda")[0]
try:
    neox_kernels.swap(torch.nn.Linear(1, 1))
except ModuleNotFoundError as error:
    missing = error.name
result = [first, choice.backend, gpu.backend, gpu.reasons["triton"], missing]
"""
    result, errors = run(package, code)
    assert result == ["neox_kernels.reference", "reference", "reference", "triton is not installed", "transformers"]
    assert "neox_kernels" not in errors


FORCED = {
    "reference": "neox_kernels.reference",
    "triton": "RuntimeError: no backend can serve .* .triton: triton serves GPUs only",
    "compiled": "RuntimeError: no backend can serve .* .compiled: this installation has no compiled library",
    "eager": "ValueError: the backend must be one of compiled, triton, reference, not 'eager' .NEOX_KERNELS_BACKEND",
}


@pytest.mark.parametrize("name", FORCED)
def test_the_environment_variable(package: Path, name: str) -> None:
    code = CALLS.replace("(choice,)", "rows") + "neox_kernels.use_backend(None)\nresult = [first, call()]"
    (first, unforced), _ = run(package, code, NEOX_KERNELS_BACKEND=name)
    assert re.match(FORCED[name], first), first
    assert unforced == "neox_kernels.reference"
