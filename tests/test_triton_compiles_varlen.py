"""The Triton unpad and pad compiled for GPUs that this machine does not have: no spills, accesses of 16 bytes."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton_compile import compile_kernel  # noqa: E402 - not without triton

from neox_kernels.kernels import varlen  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_for(target: Any, kernel: Any, args: dict[str, Any], constants: dict[str, Any]) -> Any:
    return compile_kernel(kernel, target, {**args, **constants}, num_warps=varlen.NUM_WARPS)[0]


def assert_no_spill(kernel: Any, tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert re.search(r"STACK:0 .*LOCAL:0\b", usage.stdout), usage.stdout


BF16, F16 = torch.bfloat16, torch.float16
TENSORS: dict[str, tuple[Tensor, ...]] = {
    "packed qkv": torch.empty(2, 8, 12, 192, dtype=BF16).chunk(3, -1),
    "packed qkv of 96 features": torch.empty(2, 8, 64, 288, dtype=BF16).chunk(3, -1),
    "hidden": (torch.empty(2, 8, 768),),
    "heads first": (torch.empty(2, 16, 8, 80, dtype=F16).transpose(1, 2),),
}


def plan(tensors: tuple[Tensor, ...]) -> Any:
    outputs = tuple(torch.empty(9, *x.shape[2:], dtype=x.dtype) for x in tensors)
    return varlen.plan_launch(tensors, outputs, torch.empty(9, dtype=torch.int64), 2)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", TENSORS)
def test_rows_move_by_16_bytes(case: str, arch: int, tmp_path: Path) -> None:
    _, args, constants = plan(TENSORS[case])
    kernel = compile_for(triton.backends.compiler.GPUTarget("cuda", arch, 32), varlen._gather_kernel, args, constants)
    assert_no_spill(kernel, tmp_path)
    stores, loads = (re.findall(rf"{name}\.global\S*", kernel.asm["ptx"]) for name in ("st", "ld"))
    wide = re.compile(r"\.v2\.b64|\.v4\.b32")
    assert stores and all(map(wide.search, stores)), stores
    assert sum(bool(wide.search(load)) for load in loads) == len(stores), loads


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_metadata(dtype: torch.dtype, arch: int, tmp_path: Path) -> None:
    _, _, counting, placing = varlen.plan_metadata(torch.empty(3, 40, dtype=dtype), 100)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    for kernel, args in ((varlen._count_kernel, counting), (varlen._metadata_kernel, placing)):
        assert_no_spill(compile_for(target, kernel, args, {"BLOCK": 1024}), tmp_path)


def test_compiles_for_amd() -> None:
    target = triton.backends.compiler.GPUTarget("hip", "gfx942", 64)
    _, args, constants = plan(TENSORS["packed qkv"])
    assert "s_endpgm" in compile_for(target, varlen._gather_kernel, args, constants).asm["amdgcn"]
    placing = varlen.plan_metadata(torch.empty(3, 40, dtype=torch.bool), 100)[3]
    assert "s_endpgm" in compile_for(target, varlen._metadata_kernel, placing, {"BLOCK": 1024}).asm["amdgcn"]


def test_no_length_is_compiled_anew() -> None:
    """Lengths are neither constants nor specialised, and no constant depends on one."""
    plans = [plan(torch.empty(2, seqlen, 12, 192, dtype=BF16).chunk(3, -1)) for seqlen in (1, 2, 16, 4096)]
    assert all(constants == plans[0][2] for _, _, constants in plans)
    specialised = [p.name for p in varlen._gather_kernel.params if not p.is_constexpr and not p.do_not_specialize]
    assert not [n for n in specialised if "_ptr" not in n and not n.startswith(("stride_", "blocks_"))]


@pytest.mark.parametrize(
    ("x", "unit"),
    [
        (torch.empty(2, 8, 24, dtype=BF16), 16),
        (torch.empty(2, 8, 20, dtype=BF16), 8),
        (torch.empty(2, 8, 3), 4),
        (torch.empty(2, 9, 24, dtype=BF16).view(-1)[1:-47].view(2, 8, 24)[..., :16], 2),
        (torch.empty(2, 8, 5, dtype=torch.uint8), 1),
    ],
)
def test_the_widest_unit_that_every_address_allows(x: Tensor, unit: int) -> None:
    assert plan((x,))[2]["UNIT_0"] == unit
