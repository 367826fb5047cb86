"""What the Triton kernels compile to, beyond the usual calls that kernel_report_golden.json holds."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from neox_kernels.kernel_report.compile import compile_kernel, target_of
from neox_kernels.kernel_report.sass import read_cubin
from neox_kernels.kernels import rotary, softmax, softmax_backward


def plan(seqlen: int) -> Any:
    q, k = (torch.empty(2, seqlen, 16, 128, dtype=torch.bfloat16) for _ in "qk")
    cos = torch.empty(max(64, seqlen), 16)
    table = (cos, cos, None, None, 0, None, False, False, False)
    return rotary.plan_launch((q, k), (torch.empty_like(q), torch.empty_like(k)), table)


def test_no_length_is_compiled_anew() -> None:
    """Lengths are neither constants nor specialised, and no constant depends on one."""
    plans = [plan(seqlen) for seqlen in (8, 1, 16, 17, 4096)]
    assert all(constants == plans[0][2] for _, _, constants in plans)
    specialised = [p.name for p in rotary._rotary_kernel.params if not p.is_constexpr and not p.do_not_specialize]
    assert not [
        name for name in specialised if not name.endswith("_ptr") and not name.startswith(("stride_", "nheads_"))
    ]


@pytest.mark.parametrize(
    ("nheads", "expected"),
    [((16, 16), 16), ((12, 12), 4), ((32, 8), 8), ((64,), 16), ((71, 1), 8), ((5, 2), 1), ((1,), 1), ((71,), 8)],
)
def test_heads_of_a_block(nheads: tuple[int, ...], expected: int) -> None:
    """At most an eighth of the rows of a block may be without a head."""
    assert rotary.block_sizes(128, 128, nheads, 2, False)["BLOCK_H"] == expected


# Softmax

FORWARD, BACKWARD = softmax._softmax_kernel, softmax_backward._softmax_backward_kernel
MANY_ROWS = (4, 16, 512)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Beyond the usual calls of kernel_report_golden.json.
FEATURES: list[dict[str, Any]] = [
    {"mask": torch.bool}, {"mask": FP32}, {"head_mask": True},
    {"dropout_p": 0.1, "mask": BF16, "padding": True, "head_mask": True},
]  # fmt: skip


def plan_softmax(
    k_len: int, dtype: torch.dtype, *, backward: bool = False, rows: tuple[int, int, int] = MANY_ROWS,
    causal: bool = True, padding: bool = False, mask: torch.dtype | None = None, head_mask: bool = False,
    dropout_p: float = 0.0,
) -> Any:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(*rows, k_len, dtype=dtype)
    rng, head = empty(2, dtype=torch.int64), empty(rows[1]) if head_mask else None
    if backward:
        dots = empty(*rows) if head_mask else None
        return softmax_backward.plan_backward(x, x, x, dots, 0.125, causal, head, rng, dropout_p)
    keys = empty(rows[0], k_len, dtype=torch.bool) if padding else None
    attn_mask = None if mask is None else empty(1, 1, rows[2], k_len, dtype=mask)
    probs = x if head_mask or dropout_p > 0 else None
    return softmax.plan_launch(x, x, probs, 0.125, causal, keys, attn_mask, head, rng, dropout_p)


def compiled(arch: str, planned: Any, backward: bool) -> Any:
    _, args, constants = planned
    kernel = BACKWARD if backward else FORWARD
    return compile_kernel(kernel, target_of(arch), {**args, **constants}, num_warps=constants["num_warps"])[0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("k_len", "dtype", "features"),
    [
        *((2048, BF16, features) for features in FEATURES),
        *((k_len, BF16, {}) for k_len in (64, 1024)),
        (2048, FP16, {}),
    ],
)
def test_softmax_no_spills_wide_accesses_and_half_of_all_warps(
    arch: str, k_len: int, dtype: torch.dtype, features: dict[str, Any], backward: bool
) -> None:
    if backward and {"padding", "mask"} & features.keys():
        pytest.skip("the backward has no masks")
    kernel = compiled(arch, plan_softmax(k_len, dtype, backward=backward, **features), backward)
    code, usage = read_cubin(kernel.asm["cubin"], kernel.metadata.name)
    assert usage.stack_bytes == 0
    assert usage.registers <= 64  # of 65536 for 64 warps: half of them run at once
    narrow = sum(count for width, count in code.widths("STG").items() if width < 16)
    assert narrow == (1 if backward and features.get("head_mask") else 0), "the sums of rows"
    loads = code.widths("LDG")
    assert min(loads) >= 4 and max(loads) >= 16, loads  # rng and head mask are wider than elements


@pytest.mark.parametrize("backward", [False, True])
def test_softmax_compiles_for_amd(backward: bool) -> None:
    features: dict[str, Any] = {} if backward else {"padding": True, "mask": torch.bool}
    planned = plan_softmax(1000, FP16, backward=backward, dropout_p=0.1, head_mask=True, **features)
    assert "s_endpgm" in compiled("gfx942", planned, backward).asm["amdgcn"]


def test_softmax_lengths_between_two_powers_of_two_share_their_code() -> None:
    """No constant depends on a length but by its power of two, and nothing but strides along keys is specialised."""
    same = [plan_softmax(k_len, BF16, rows=(4, 16, q_len))[2] for k_len, q_len in ((1032, 64), (1600, 99), (2048, 300))]
    assert same[0] == same[1] == same[2]
    for kernel in (FORWARD, BACKWARD):
        names = [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
        rest = {name for name in names if not name.endswith("_ptr")}
        assert rest <= {"scale", "keep_scale", "stride_mask_k", "stride_padding_k"}


def test_softmax_grid_of_many_heads() -> None:
    grid, _, constants = plan_softmax(8, BF16, rows=(70_000, 2, 3))
    assert grid[1] <= 65535 and grid[1] * grid[2] >= 140_000 and grid[0] * constants["BLOCK_M"] >= 3
