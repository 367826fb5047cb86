"""The package as pip builds it: what is in the wheel, what is left out and why, on machines that lack this or that."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "bench",
    "csrc",
    "kernels",
    "models",
    "neox_kernels",
)
READ_BY_SETUP = ("NEOX_KERNELS_", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")


class Wheel:
    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.names = archive.namelist()
            self.config = json.loads(archive.read("neox_kernels/_build_config.json"))

    @property
    def tag(self) -> str:
        return "-".join(self.path.stem.split("-")[-3:])


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, less what CI or a developer set for the build: no CUDA, unless it is asked for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(READ_BY_SETUP)}
    return {**kept, "NEOX_KERNELS_CUDA": "0", "MAX_JOBS": "2", **variables}


def pip_wheel(
    tree: Path, *, isolated: bool = False, python: str = sys.executable, **variables: str
) -> tuple[Wheel | None, str]:
    """The wheel, or None where pip failed, and what it said."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "--python", python, "wheel", "-v", "--no-deps", "-w", "dist", "."]
    command += [] if isolated else ["--no-build-isolation"]
    done = subprocess.run(
        command, cwd=tree, env=environment(**variables), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wheels = list((tree / "dist").glob("*.whl"))
    assert bool(wheels) == (done.returncode == 0), done.stdout
    return (Wheel(wheels[0]) if wheels else None), done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that every test here builds in, so that unchanged objects are compiled once."""
    copy = tmp_path_factory.mktemp("a folder") / "neox kernels"
    copy.mkdir()
    built = shutil.ignore_patterns("*.so", "_build_config.json", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=built)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def compiled(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Built in isolation, where torch cannot be imported: its headers must be found all the same."""
    wheel, said = pip_wheel(tree, isolated=True, NEOX_KERNELS_EXT="require")
    assert wheel, said
    return Wheel(Path(shutil.copy(wheel.path, tmp_path_factory.mktemp("compiled"))))


@pytest.fixture(scope="module")
def library(compiled: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """_C.so, in the package that the wheel unpacks to."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(compiled.path) as archive:
        archive.extractall(folder)
    return folder / "neox_kernels/_C.so"


def test_compiled_wheel_serves_every_python(compiled: Wheel) -> None:
    assert re.fullmatch(r"py3-none-linux_\w+", compiled.tag)
    assert "neox_kernels/_C.so" in compiled.names
    assert any(re.fullmatch(r"neox_kernels/_build\..+\.so", name) for name in compiled.names)
    config = compiled.config
    assert config["ext"] and config["build_info"] and config["cpu_isas"][0] == "default"
    assert config["torch_target"] == "2.10" and config["torch_headers"] and config["compiler"]
    assert (config["cuda"], config["cuda_reason"], config["cuda_archs"]) == (False, "NEOX_KERNELS_CUDA=0", [])


def test_wheel_holds_one_package(compiled: Wheel) -> None:
    tops = {name.split("/")[0] for name in compiled.names}
    assert tops == {"neox_kernels", f"neox_kernels-{compiled.config['version']}.dist-info"}
    parts = ("py.typed", "kernels/__init__.py", "models/__init__.py", "ops/__init__.py", "integrations/__init__.py")
    assert {f"neox_kernels/{part}" for part in parts} <= set(compiled.names)
    assert not [name for name in compiled.names if name.endswith((".cpp", ".cu", ".h", ".pyc"))]


def test_record_names_no_folder(compiled: Wheel) -> None:
    assert not re.search(r'["\s=]/\w', json.dumps(compiled.config))


def test_library_needs_only_stable_torch(library: Path) -> None:
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    assert not [name for name in needed if re.match(r"lib(python|c10|torch_python|cudart)", name)]
    undefined = subprocess.check_output(["nm", "-DC", "--undefined-only", library], text=True)
    assert not re.findall(r"\b(?:c10|at|torch)::.*", undefined)
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    assert audit, "torch-abi-audit is a part of the dev extra"
    subprocess.check_call([audit, "--check", "torch", library])


def test_wheel_works_outside_the_repository(library: Path, tmp_path: Path) -> None:
    code = (
        "import json, neox_kernels, torch\n"
        "from neox_kernels import _build, compiled\n"
        "torch.ops.load_library(compiled.__file__.replace('compiled/__init__.py', '_C.so'))\n"
        "print(json.dumps([neox_kernels.__file__, _build.info(), _build.cpu()]))\n"
    )
    variables = environment(PYTHONPATH=str(library.parent.parent))
    said = subprocess.check_output([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=variables, text=True)
    file, info, cpu = json.loads(said)
    assert Path(file).parent == library.parent
    assert info["cpu_isas"][0] == "default" and info["cuda"] is False and info["torch_target"] == "2.10"
    assert all(isinstance(has, bool) for has in cpu.values())


def test_without_extension_the_wheel_is_pure(tree: Path) -> None:
    stale = tree / "neox_kernels/_C.so"
    stale.write_bytes(b"left by an editable install")
    wheel, said = pip_wheel(tree, NEOX_KERNELS_EXT="0")
    stale.unlink()
    assert wheel, said
    assert wheel.tag == "py3-none-any"
    assert not [name for name in wheel.names if name.endswith(".so")]
    assert (wheel.config["ext"], wheel.config["ext_reason"]) == (False, "NEOX_KERNELS_EXT=0")
    assert "WITHOUT" not in said  # it was asked for


NO_COMPILER = [pytest.param({"CXX": "/nowhere/g++"}, id="CXX"), pytest.param({"PATH": "/nowhere"}, id="PATH")]


@pytest.mark.parametrize("variables", NO_COMPILER)
def test_no_compiler_installs_without_the_library(tree: Path, variables: dict[str, str]) -> None:
    wheel, said = pip_wheel(tree, **variables)
    assert wheel, said
    assert wheel.tag == "py3-none-any"  # nothing of an earlier build either
    assert wheel.config["ext"] is False and "no C++ compiler" in wheel.config["ext_reason"]
    assert "WITHOUT the compiled library" in said and "no C++ compiler" in said


@pytest.mark.parametrize("variables", NO_COMPILER)
def test_no_compiler_fails_where_the_library_is_required(tree: Path, variables: dict[str, str]) -> None:
    wheel, said = pip_wheel(tree, NEOX_KERNELS_EXT="require", **variables)
    assert wheel is None
    assert "NEOX_KERNELS_EXT=require" in said and "no C++ compiler" in said


@pytest.mark.parametrize("required", [False, True])
def test_no_torch_headers(tree: Path, tmp_path: Path, required: bool) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python = str(tmp_path / "venv/bin/python")
    wheel, said = pip_wheel(tree, isolated=True, python=python, NEOX_KERNELS_EXT="require" if required else "auto")
    assert (wheel is None) == required, said
    assert "install torch first" in said
    if wheel:
        assert wheel.config["ext"] is False and "headers" in wheel.config["ext_reason"]
        assert wheel.config["build_info"] is True  # it needs no torch
        assert "neox_kernels/_C.so" not in wheel.names


@pytest.mark.parametrize(
    ("name", "value"),
    [("NEOX_KERNELS_EXT", "yes"), ("NEOX_KERNELS_CUDA", "1"), ("NEOX_KERNELS_TORCH_INCLUDE", "/nowhere")],
)
def test_values_that_mean_nothing_are_named(tree: Path, name: str, value: str) -> None:
    wheel, said = pip_wheel(tree, **{name: value})
    assert wheel is None
    assert f"{name}='{value}'" in said


def test_cuda_required_without_nvcc(tree: Path, tmp_path: Path) -> None:
    wheel, said = pip_wheel(tree, NEOX_KERNELS_CUDA="require", CUDA_HOME=str(tmp_path))
    assert wheel is None
    assert "NEOX_KERNELS_CUDA=require" in said and "no nvcc" in said


def test_cuda_cannot_be_required_of_a_pure_install(tree: Path) -> None:
    wheel, said = pip_wheel(tree, NEOX_KERNELS_CUDA="require", NEOX_KERNELS_EXT="0")
    assert wheel is None
    assert "contradicts" in said


ANSWERS_BUT_DOES_NOT_COMPILE = """case "$*" in
  *--version*) echo "Cuda compilation tools, release 99.1, V99.1.7" ;;
  *--dryrun*) echo "#$ TOP=$(dirname "$0")/.." ;;
  *--list-gpu-arch*) echo compute_90 ;;
  *) echo "nvcc fatal: out of order"; exit 1 ;;
esac
"""


@pytest.mark.parametrize("script", ["echo 'nvcc fatal: out of order'; exit 1\n", ANSWERS_BUT_DOES_NOT_COMPILE])
def test_failing_nvcc_leaves_cuda_out(tree: Path, tmp_path: Path, script: str) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n" + script)
    nvcc.chmod(0o755)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libcudart_static.a").touch()
    wheel, said = pip_wheel(tree, NEOX_KERNELS_EXT="require", NEOX_KERNELS_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert wheel, said
    assert (wheel.config["ext"], wheel.config["cuda"]) == (True, False)
    assert "out of order" in wheel.config["cuda_reason"]
    assert "WITHOUT the CUDA kernels" in said


def test_changed_header_is_noticed(tree: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    objects = tree / "build/compiled/cpu"

    def times() -> dict[Path, int]:
        subprocess.check_call(command, cwd=tree, env=environment(NEOX_KERNELS_EXT="require"))
        return {path: path.stat().st_mtime_ns for path in objects.glob("*.o")}

    before = times()
    assert (tree / "neox_kernels/_C.so").exists()
    assert before and times() == before
    for header in (tree / "csrc").rglob("*.h"):
        header.touch()
    after = times()
    assert all(after[path] > before[path] for path in before)


def test_sources_that_do_not_compile(tree: Path) -> None:
    broken = tree / "csrc/broken.cpp"
    broken.write_text("int answer() { return forty_two; }\n")
    wheel, said = pip_wheel(tree)
    broken.unlink()
    assert wheel, said
    assert wheel.config["ext"] is False and "forty_two" in wheel.config["ext_reason"]
    assert "neox_kernels/_C.so" not in wheel.names
