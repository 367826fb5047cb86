"""CUDA kernels on a machine without a GPU: the ops compiled by nvcc as they are, and their PTX run by ptxsim.

The ops are registered for CPU tensors under a name of their own. What they launch, down to the bytes of the
arguments, is told by a CUDA runtime that only listens (fake_cuda_runtime.cpp), and run at once on the memory of these
tensors and on what the ops take for results and scratch.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ptxsim import Buffer, Counters, Module, launch, parse
from tensor_memory import as_array
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "csrc"))
from toolchain import CannotBuild, find_compiler, find_cuda, find_torch, run  # noqa: E402 - found by the line above

sys.path.remove(str(ROOT / "csrc"))

ARCHS = (80, 90, 100)
LIBRARY = "neox_kernels_on_ptxsim"
# Included before each source: its ops get another name, and those for CUDA tensors take CPU tensors.
PREFIX = f"""
#include <torch/csrc/stable/library.h>
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
#define neox_kernels {LIBRARY}
"""
HOOK = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
MEMORY_HOOK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


@dataclass
class Launch:
    kernel: str
    grid: list[int]
    block: list[int]
    shared_bytes: int
    arguments: list[bytes]


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among these values, and among those of lists and tuples."""
    lists = [[x] if isinstance(x, Tensor) else tensors_in(x) for x in values if isinstance(x, Tensor | list | tuple)]
    return [x for found in lists for x in found]


class CudaOps:
    """The ops of csrc/cuda, and the PTX of their kernels by architecture."""

    def __init__(self, folder: Path) -> None:
        """Compile into the folder. Raises CannotBuild where a tool is missing."""
        cuda, cxx, (include, _) = find_cuda(), find_compiler(), find_torch()
        self.folder, self.nvcc, self.nvcc_version = folder, cuda.nvcc, cuda.version
        (folder / "prefix.h").write_text(PREFIX)
        target = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
        common = [*target, "-isystem", include, "-include", folder / "prefix.h"]
        archs = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS]
        objects = [folder / "schema.o", folder / "runtime.o"]
        run([*cxx, "-fPIC", *common, "-c", ROOT / "csrc/schema.cpp", "-o", objects[0]])
        run([*cxx, "-fPIC", "-c", ROOT / "tests/fake_cuda_runtime.cpp", "-o", objects[1]])
        texts: dict[int, list[Path]] = {arch: [] for arch in ARCHS}
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects.append(folder / f"{source.stem}.o")
            words = [
                cuda.nvcc,
                "--expt-relaxed-constexpr",
                "-Xcompiler=-fPIC",
                "--keep",
                "--keep-dir",
                folder,
                *archs,
                *common,
            ]
            run([*words, "-c", source, "-o", objects[-1]])
            for arch in ARCHS:
                texts[arch].append(folder / f"{source.stem}.compute_{arch}.ptx")
        # Its own runtime comes first, also where the process has a real one.
        library = folder / f"{LIBRARY}.so"
        torch_folder = Path(torch.__file__).parent / "lib"
        link = ["-shared", "-Wl,-Bsymbolic", "-Wl,--wrap=aoti_torch_empty_strided", f"-L{torch_folder}"]
        run([*cxx, *link, *objects, "-ltorch_cpu", "-ltorch", "-o", library])
        torch.ops.load_library(library)
        self.ops = getattr(torch.ops, LIBRARY)
        self.kernels: dict[int, dict[str, Module]] = {arch: {} for arch in ARCHS}
        self.texts: dict[int, dict[str, Path]] = {arch: {} for arch in ARCHS}
        for arch, paths in texts.items():
            for path in paths:
                module = parse(path.read_text())
                self.kernels[arch] |= dict.fromkeys(module.kernels, module)
                self.texts[arch] |= dict.fromkeys(module.kernels, path)
        self.arch = ARCHS[0]
        self.launches: list[Launch] = []
        self.counters: list[Counters] = []
        self.given: list[Buffer] = []
        self.made: dict[int, Buffer] = {}  # by address
        self.fault: Exception | None = None
        self.recording = False
        self._hooks = HOOK(self._run), MEMORY_HOOK(self._own)  # kept: the library only has their addresses
        ctypes.CDLL(str(library)).neox_set_hooks(*self._hooks)

    def kernels_of(self, source: str) -> set[str]:
        """The names of all kernels of a file of csrc/cuda."""
        return {name for name, path in self.texts[ARCHS[0]].items() if path.name.startswith(f"{Path(source).stem}.")}

    def text_of(self, arch: int, kernel: str) -> str:
        """The PTX of one kernel, without those that share its file."""
        text = self.texts[arch][kernel].read_text()
        begin = text.index(f".entry {kernel}(")
        return text[: text.index(".entry")] + text[begin : text.index("\n}\n", begin) + 3]

    def _own(self, address: int | None, size: int) -> None:
        if size > 0 and address is not None:
            content = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
            self.made[address] = Buffer(content, np.zeros((size, 1), bool))

    def _run(self, name: bytes, grid: Any, block: Any, shared_bytes: int, arguments: Any) -> None:
        if self.fault is not None:
            return
        try:
            kernel = name.decode()
            module = self.kernels[self.arch][kernel]
            places = module.kernels[kernel].parameters.values()
            contents = [ctypes.string_at(arguments[i], place.size) for i, place in enumerate(places)]
            one = Launch(kernel, grid[:3], block[:3], shared_bytes, contents)
            self.launches.append(one)
            if self.recording:
                return
            buffers = [*self.given, *self.made.values()]
            self.counters.append(
                launch(module, one.grid, one.block, contents, buffers, shared_bytes=shared_bytes, kernel=kernel)
            )
        except Exception as fault:  # C++ called, and no exception passes through it
            self.fault = fault

    def record(self, name: str, *arguments: Any) -> tuple[Any, list[Launch]]:
        """What the op allocates for its results, and its launches, which do not run."""
        self.launches, self.fault, self.recording = [], None, True
        try:
            result = getattr(self.ops, name)(*arguments)
        finally:
            self.recording = False
        if self.fault is not None:
            raise self.fault
        return result, self.launches

    def assemble(self, ptx: str, arch: str) -> bytes:
        """The machine code of a PTX text for ``sm_90``, say, with the lines that the text numbers."""
        text, cubin = self.folder / "one.ptx", self.folder / "one.cubin"
        text.write_text(ptx)
        run([self.nvcc, f"-arch={arch}", "-Xptxas=-lineinfo", "-cubin", text, "-o", cubin])
        return cubin.read_bytes()

    def call(self, name: str, arch: int, *arguments: Any) -> tuple[Any, list[Counters]]:
        """What the op gives, its launches run as on this architecture, and what they cost."""
        self.arch, self.launches, self.counters, self.fault = arch, [], [], None
        self.given, self.made = [Buffer(as_array(x)) for x in tensors_in(arguments)], {}
        result = getattr(self.ops, name)(*arguments)
        if self.fault is not None:
            raise self.fault
        return result, self.counters


def missing() -> str | None:
    """Why the CUDA ops cannot be compiled here."""
    try:
        find_cuda()
        find_compiler()
        find_torch()
    except CannotBuild as reason:
        return str(reason)
    return None
