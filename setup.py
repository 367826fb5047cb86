"""Builds the compiled parts of neox_kernels. Everything else about the package stands in pyproject.toml.

``neox_kernels/_C.so``    the ops, on PyTorch's stable ABI: no Python inside, so one file serves every Python and torch.
``neox_kernels/_build``   an optional pybind11 module that tells what was compiled and what this processor has.
``neox_kernels/_build_config.json``   what was built, and why the rest was not; written by every kind of install.

Environment:
    NEOX_KERNELS_EXT            auto (default: leave the library out when it cannot be built), require (and take
                                warnings as errors), or 0
    NEOX_KERNELS_CUDA           the same three, for the CUDA half of the library
    NEOX_KERNELS_TORCH_INCLUDE  torch's include folder, where the one of this environment is not meant
    CXX, CUDA_HOME, CUDA_PATH, TORCH_CUDA_ARCH_LIST, MAX_JOBS   as PyTorch's own extensions read them
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# A build backend runs this file without its own folder on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from toolchain import (
    ROOT,
    TORCH_TARGET,
    X86_ISAS,
    CannotBuild,
    Cuda,
    find_compiler,
    find_cuda,
    find_isas,
    find_torch,
    max_jobs,
    run,
    works,
)

# Fixed, where setuptools would take a new temporary folder for every editable install: objects are reused between
# builds. Relative (every command runs in ROOT), so that no message compiled into the library names a local folder.
OBJECTS = Path("build", "compiled")
TORCH_TARGET_DEFINE = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # TORCH_TARGET, as torch's headers spell it


def choice(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "require", "0"):
        raise SystemExit(f"{name}={value!r} is not understood: use auto, require or 0.")
    return value


EXT, CUDA = choice("NEOX_KERNELS_EXT"), choice("NEOX_KERNELS_CUDA")
if EXT == "0" and CUDA == "require":
    raise SystemExit("NEOX_KERNELS_CUDA=require contradicts NEOX_KERNELS_EXT=0: CUDA is part of the compiled library.")


# ------------------------------------------------------------------------------------------------- compiling, linking


def compile_all(commands: dict[Path, list[str]]) -> None:
    """Compile each object with its command: by ninja, which redoes only what changed, else all in a thread pool."""
    for path in commands:
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    complete = {path: [*words, "-MD", "-MF", f"{path}.d", "-o", str(path)] for path, words in commands.items()}
    # The environment's own first: it is not on PATH where the environment is not activated.
    ninjas = [shutil.which("ninja", path=path) for path in (sysconfig.get_path("scripts"), os.environ.get("PATH"))]
    ninja = next((found for found in ninjas if found and works([found, "--version"])), None)
    if not ninja:
        with ThreadPoolExecutor(max_jobs()) as pool:
            list(pool.map(run, complete.values()))
        return
    text = f"builddir = {OBJECTS}\nrule compile\n  command = $words\n  depfile = $out.d\n  deps = gcc\n"
    for path, words in complete.items():
        source = words[words.index("-c") + 1]
        text += f"build {path}: compile {source}\n  words = {shlex.join(words).replace('$', '$$')}\n"
    (ROOT / OBJECTS / "build.ninja").write_text(text)
    run([ninja, "-f", OBJECTS / "build.ninja", "-j", max_jobs(), *complete])


def compile_library(cxx: list[str], include: Path, isas: list[str], cuda: Cuda | None) -> Path:
    torch = [TORCH_TARGET_DEFINE, "-isystem", str(include)]  # system headers: their warnings are not ours to mend
    common = ["-O3", "-std=c++17", "-Icsrc", *(f"-DNEOX_WITH_{isa.upper()}" for isa in isas if isa != "default")]
    # Warnings are errors where the library is required, as in CI. Elsewhere a warning that only some other compiler
    # gives must not cost the user the library.
    strict = EXT == "require"
    warnings = ["-Wall", "-Wextra", *(["-Werror"] if strict else [])]
    # Where a product is rounded is the kernels' choice: gcc would fuse even intrinsics.
    host = [*cxx, *common, "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", *warnings]
    commands: dict[Path, list[str]] = {}
    for source in sources("*.cpp"):
        if source.name != "build_info.cpp":
            with_cuda = ["-DNEOX_WITH_CUDA"] if cuda else []
            commands[OBJECTS / f"{source.name}.o"] = [*host, *with_cuda, *torch, "-c", str(source)]
    for source in sources("cpu/*.cpp"):
        for isa in isas:
            # Only the default pass sees torch's and the standard library's headers. The linker keeps one copy of an
            # inline function; were it the AVX-512 one, older processors would crash in it.
            extra = [*torch, "-DNEOX_CPU_DEFAULT"] if isa == "default" else X86_ISAS[isa]
            words = [*host, f"-DNEOX_CPU_ISA=isa_{isa}", *extra, "-c", str(source)]
            commands[OBJECTS / "cpu" / f"{source.name}.{isa}.o"] = words
    if cuda:
        words = [cuda.nvcc, *common, *torch, "-DUSE_CUDA", "--expt-relaxed-constexpr"]
        words += ["-Werror", "all-warnings"] if strict else []
        words += ["-Xcompiler=" + ",".join(["-fPIC", "-fvisibility=hidden", *warnings]), *cuda.gencode()]
        words += [f"--threads={max_jobs()}", *(["-ccbin", cxx[-1]] if "CXX" in os.environ else [])]
        for source in sources("cuda/*.cu"):
            commands[OBJECTS / "cuda" / f"{source.name}.o"] = [*words, "-c", str(source)]
    compile_all(commands)

    # The real libtorch is not linked, only named: an empty library of that name stands in for it, and at run time the
    # names resolve to the torch already loaded. Both names, so that a CPU-only torch satisfies a library with CUDA too.
    stubs = OBJECTS / "stubs"
    (ROOT / stubs).mkdir(exist_ok=True)
    for name in ("libtorch.so", "libtorch_cpu.so"):
        run([*cxx, "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-x", "c++", "/dev/null", "-o", stubs / name])
    link = [f"-L{stubs}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    if cuda:
        link += [f"-L{cuda.libraries}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    library = OBJECTS / "_C.so"
    run([*cxx, "-shared", *commands, *link, "-Wl,-s", "-Wl,--exclude-libs,ALL", "-o", library])
    return library


def sources(pattern: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / "csrc").glob(pattern))]


# ---------------------------------------------------------------------------------------- what is built, and the record


def build_library(record: dict[str, Any]) -> Path:
    cxx = find_compiler()
    record["compiler"] = run([*cxx, "--version"]).splitlines()[0]
    include, record["torch_headers"] = find_torch()
    (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
    isas = find_isas(cxx)
    if CUDA != "0":
        try:
            cuda = find_cuda()
            library = compile_library(cxx, include, isas, cuda)
            record.update(cuda=True, cuda_reason="built", cuda_archs=cuda.archs, nvcc=cuda.version, cpu_isas=isas)
            return library
        except CannotBuild as reason:
            if CUDA == "require":
                raise
            record["cuda_reason"] = str(reason)
    library = compile_library(cxx, include, isas, None)
    record["cpu_isas"] = isas
    return library


def build_module(record: dict[str, Any]) -> Path:
    cxx, spec = find_compiler(), importlib.util.find_spec("pybind11")
    if not spec or not spec.origin:
        raise CannotBuild("pybind11 is not in the build environment")
    facts = {"ISAS": record["cpu_isas"], "CUDA_ARCHS": record["cuda_archs"], "NVCC": [record["nvcc"] or ""]}
    words = [*cxx, "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    words += [f'-DNEOX_BUILD_{name}="{",".join(values)}"' for name, values in facts.items()]
    words += [f'-DNEOX_BUILD_TORCH_TARGET="{TORCH_TARGET}"', "-isystem", sysconfig.get_path("include")]
    words += ["-isystem", str(Path(spec.origin).parent / "include")]
    module = OBJECTS / f"_build{sysconfig.get_config_var('EXT_SUFFIX')}"
    compile_all({module.with_suffix(".o"): [*words, "-c", "csrc/build_info.cpp"]})
    run([*cxx, "-shared", module.with_suffix(".o"), "-Wl,-s", "-o", module])
    return module


def build(version: str) -> tuple[list[Path], dict[str, Any]]:
    """Everything that can be built here, and the record of what was, what was not, and why."""
    record: dict[str, Any] = {"version": version, "ext": False, "ext_reason": "NEOX_KERNELS_EXT=0"}
    record.update(cuda=False, cuda_reason="NEOX_KERNELS_CUDA=0" if CUDA == "0" else "the compiled library is not built")
    record.update(cpu_isas=[], cuda_archs=[], nvcc=None, compiler=None, torch_target=TORCH_TARGET, torch_headers=None)
    record.update(build_info=False, build_info_reason="NEOX_KERNELS_EXT=0")
    built = []
    for part, step in {"ext": build_library, "build_info": build_module}.items() if EXT != "0" else ():
        try:
            built.append(step(record))
            record.update({part: True, f"{part}_reason": "built"})
        except CannotBuild as reason:
            required = "NEOX_KERNELS_EXT" if EXT == "require" else "NEOX_KERNELS_CUDA" if CUDA == "require" else ""
            if required and (EXT == "require" or part == "ext"):
                raise SystemExit(f"{required}=require, and the build failed: {reason}") from reason
            record[f"{part}_reason"] = str(reason)
    tell(record)
    # The record travels with the package: what it says must not depend on the folders of the machine that built it.
    folders = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)*")
    return built, {key: folders.sub("", text) if isinstance(text, str) else text for key, text in record.items()}


def tell(record: dict[str, Any]) -> None:
    """Say loudly which part is left out, unless that was asked for. (pip shows it with -v.)"""
    parts = {
        "ext": ("the compiled library", "The ops run in Triton and PyTorch instead: same numbers, slower on CPUs."),
        "cuda": ("the CUDA kernels", "GPUs are served by Triton or PyTorch instead."),
        "build_info": ("the module _build", "Only the report of compiled features misses something."),
    }
    for part, (name, effect) in parts.items():
        reason, variable = record[f"{part}_reason"], "NEOX_KERNELS_CUDA" if part == "cuda" else "NEOX_KERNELS_EXT"
        if not record[part] and os.environ.get(variable) != "0" and (part != "cuda" or record["ext"]):
            lines = ["*" * 100, f"neox-kernels is installed WITHOUT {name}.", f"Why: {reason}.", effect]
            print("", *lines, f"{variable}=require makes this an error.", lines[0], "", sep="\n", file=sys.stderr)


def lay(package: Path, built: Iterable[Path], record: dict[str, Any]) -> list[Path]:
    """Put what was built into the package, in place of what an earlier build left there."""
    package.mkdir(parents=True, exist_ok=True)
    for old in package.glob("*.so"):
        old.unlink()
    laid = [Path(shutil.copy(ROOT / path, package)) for path in built]
    config = package / "_build_config.json"
    config.write_text(json.dumps(record, indent=2) + "\n")
    return [*laid, config]


class BuildExt(build_ext):
    def run(self) -> None:
        built, record = build(self.distribution.get_version())
        laid = lay(Path(self.build_lib, "neox_kernels"), built, record)
        in_place = lay(ROOT / "neox_kernels", built, record) if self.inplace else []
        self.outputs = [str(path) for path in laid]
        self.mapping = dict(zip(self.outputs, map(str, in_place), strict=False))

    def get_outputs(self) -> list[str]:
        return getattr(self, "outputs", [])

    def get_output_mapping(self) -> dict[str, str]:
        return getattr(self, "mapping", {})


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if EXT == "0":  # then no build_ext runs that would write the record
            root = ROOT if getattr(self, "editable_mode", False) else Path(self.build_lib)
            lay(root / "neox_kernels", *build(self.distribution.get_version()))


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Any Python: _C.so has no Python inside, and _build may be missing. Any platform too, if nothing was built."""
        binary = any(Path(self.bdist_dir).rglob("*.so"))
        return "py3", "none", super().get_tag()[2] if binary else "any"


setup(
    # has no sources: it only tells setuptools that the package is not pure Python
    ext_modules=[] if EXT == "0" else [Extension("neox_kernels._C", [])],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": Wheel},
)
