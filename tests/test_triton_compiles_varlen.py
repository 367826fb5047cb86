"""What the Triton unpad and pad compile to, beyond the usual calls that kernel_report_golden.json holds."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from neox_kernels.kernel_report.compile import compile_kernel, target_of
from neox_kernels.kernel_report.sass import Code, read_cubin
from neox_kernels.kernels import varlen, varlen_autograd


def code_of(arch: str, kernel: Any, args: dict[str, Any], constants: dict[str, Any]) -> Code:
    """The machine code, in which nothing went to memory for want of registers."""
    arguments = {**args, **constants}
    compiled = compile_kernel(kernel, target_of(arch), arguments, num_warps=varlen.NUM_WARPS)[0]
    code, usage = read_cubin(compiled.asm["cubin"], compiled.metadata.name)
    assert usage.stack_bytes == 0
    return code


BF16, F16 = torch.bfloat16, torch.float16
TENSORS: dict[str, tuple[Tensor, ...]] = {
    "packed qkv of 96 features": torch.empty(2, 8, 64, 288, dtype=BF16).chunk(3, -1),
    "heads first": (torch.empty(2, 16, 8, 80, dtype=F16).transpose(1, 2),),
}


def plan(tensors: tuple[Tensor, ...]) -> Any:
    outputs = tuple(torch.empty(9, *x.shape[2:], dtype=x.dtype) for x in tensors)
    return varlen.plan_launch(tensors, outputs, torch.empty(9, dtype=torch.int64), 2)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("case", TENSORS)
def test_rows_move_by_16_bytes(case: str, arch: str) -> None:
    _, args, constants = plan(TENSORS[case])
    code = code_of(arch, varlen._gather_kernel, args, constants)
    stores, loads = code.widths("STG"), code.widths("LDG")
    assert stores.keys() == {16} and loads[16] == stores[16], (loads, stores)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_metadata(dtype: torch.dtype, arch: str) -> None:
    _, _, counting, placing = varlen.plan_metadata(torch.empty(3, 40, dtype=dtype), 100)
    for kernel, args in ((varlen._count_kernel, counting), (varlen._metadata_kernel, placing)):
        assert code_of(arch, kernel, args, {"BLOCK": varlen_autograd._BLOCK}).widths("STG")


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
