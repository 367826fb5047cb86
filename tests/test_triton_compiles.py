"""The Triton kernels compiled for GPUs that this machine does not have: no spills, wide accesses, few instructions."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton_compile import compile_kernel  # noqa: E402 - not without triton

from neox_kernels.kernels import rotary, softmax, softmax_backward  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# nheads, head_dim, rotary_dim
FULL, PYTHIA, NEOX, GPTJ = (16, 128, 128), (16, 128, 32), (64, 96, 24), (16, 256, 64)


def compile_for(
    target: Any, args: dict[str, Any], constants: dict[str, Any], kernel: Any = rotary._rotary_kernel
) -> Any:
    return compile_kernel(kernel, target, {**args, **constants}, num_warps=constants["num_warps"])[0]


def plan(shape: tuple[int, int, int], dtype: torch.dtype, interleaved: bool, kind: str = "qk") -> Any:
    nheads, head_dim, rotary_dim = shape
    q, k, v = (torch.empty(2, 8, nheads, head_dim, dtype=dtype) for _ in range(3))
    cos = torch.empty(64, rotary_dim // 2)
    table = (cos, cos, None, None, 0, None, interleaved, False, False)
    if kind == "kv_append":
        used = torch.zeros(2, dtype=torch.int32)
        cache = torch.empty(2, 32, nheads, head_dim, dtype=dtype)
        table = (cos, cos, None, used, 0, None, interleaved, False, False)
        return rotary.plan_launch((q, k, v), (torch.empty_like(q), cache, cache), table, used, 32)
    if kind == "varlen":
        table = (cos, cos, None, None, 0, torch.zeros(3, dtype=torch.int32), interleaved, False, True)
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        return rotary.plan_launch((q, k), (q, k), table)
    return rotary.plan_launch((q, k), (torch.empty_like(q), torch.empty_like(k)), table)


def run(tool: str, *words: object) -> str:
    return subprocess.run([TOOLS / tool, *map(str, words)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("shape", "dtype", "interleaved", "kind"),
    [
        (FULL, torch.bfloat16, False, "qk"),
        (FULL, torch.bfloat16, True, "qk"),
        (FULL, torch.float16, True, "kv_append"),
        (FULL, torch.float32, False, "varlen"),
        (PYTHIA, torch.float16, False, "qk"),
        (NEOX, torch.bfloat16, False, "kv_append"),
        (GPTJ, torch.bfloat16, True, "varlen"),
    ],
)
def test_no_spills_and_wide_accesses(
    arch: int, shape: tuple[int, int, int], dtype: torch.dtype, interleaved: bool, kind: str, tmp_path: Path
) -> None:
    _, args, constants = plan(shape, dtype, interleaved, kind)
    kernel = compile_for(triton.backends.compiler.GPUTarget("cuda", arch, 32), args, constants)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = run("cuobjdump", "-res-usage", cubin)
    assert re.search(r"STACK:0 .*LOCAL:0\b", usage), usage
    if shape != NEOX:  # half of 24 features is 24 bytes, so its accesses are of 8
        stores = re.findall(r"st\.global\S*", kernel.asm["ptx"])
        wide = re.compile(r"\.v4\.b32|\.v2\.b64|\.v8\.b32|\.v4\.b64")
        assert stores and all(map(wide.search, stores)), stores
        loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
        assert sum(bool(wide.search(load)) for load in loads) >= len(stores), loads
    if (arch, kind, dtype) == (90, "qk", torch.bfloat16):
        code = run("nvdisasm", "-c", cubin)
        instructions = [i for i in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code) if i != "NOP"]
        # q and k of all heads are one pass through the code.
        elements = (
            2 * constants["BLOCK_M"] * constants["BLOCK_H"] * constants["HEAD_DIM"] / (32 * constants["num_warps"])
        )
        assert constants["BLOCK_H"] == shape[0]
        assert len(instructions) / elements <= 10


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiles_for_amd(interleaved: bool) -> None:
    _, args, constants = plan(NEOX, torch.bfloat16, interleaved, "kv_append")
    kernel = compile_for(triton.backends.compiler.GPUTarget("hip", "gfx942", 64), args, constants)
    assert "s_endpgm" in kernel.asm["amdgcn"]


def test_no_length_is_compiled_anew() -> None:
    """Lengths are neither constants nor specialised, and no constant depends on one."""
    plans = [plan(PYTHIA, torch.bfloat16, False)]
    for seqlen in (1, 16, 17, 4096):
        q = torch.empty(2, seqlen, 16, 128, dtype=torch.bfloat16)
        cos = torch.empty(max(64, seqlen), 16)
        plans.append(
            rotary.plan_launch((q, q), (q.clone(), q.clone()), (cos, cos, None, None, 0, None, False, False, False))
        )
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
    assert rotary.block_sizes(128, 128, nheads, 2)["BLOCK_H"] == expected


# Softmax

FORWARD, BACKWARD = softmax._softmax_kernel, softmax_backward._softmax_backward_kernel
MANY_ROWS = (4, 16, 512)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FEATURES = [
    {}, {"causal": False}, {"padding": True}, {"mask": torch.bool}, {"mask": BF16}, {"mask": FP32}, {"head_mask": True},
    {"dropout_p": 0.1}, {"dropout_p": 0.1, "mask": BF16, "padding": True, "head_mask": True},
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


def compiled(arch: int, planned: Any, kernel: Any) -> Any:
    _, args, constants = planned
    return compile_for(triton.backends.compiler.GPUTarget("cuda", arch, 32), args, constants, kernel)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("k_len", "dtype", "features"),
    [
        *((2048, BF16, features) for features in FEATURES),
        *((k_len, BF16, {}) for k_len in (64, 512, 1024, 8192, 20480)),
        (2048, FP16, {}),
        (2048, FP32, {}),
        (2048, BF16, {"rows": (4, 16, 1)}),
    ],
)
def test_softmax_no_spills_wide_accesses_and_half_of_all_warps(
    arch: int, k_len: int, dtype: torch.dtype, features: dict[str, Any], backward: bool, tmp_path: Path
) -> None:
    if backward and {"padding", "mask"} & features.keys():
        pytest.skip("the backward has no masks")
    planned = plan_softmax(k_len, dtype, backward=backward, **features)
    kernel = compiled(arch, planned, BACKWARD if backward else FORWARD)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = run("cuobjdump", "-res-usage", cubin)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()  # type: ignore[union-attr]
    assert (stack, local) == ("0", "0"), usage
    assert int(registers) <= 64  # of 65536 for 64 warps: half of them run at once
    wide = re.compile(r"\.v4\.b32|\.v2\.b64|\.v8\.b32|\.v4\.b64")
    stores = [s for s in re.findall(r"st\.global\S*", kernel.asm["ptx"]) if wide.search(s) is None]
    assert len(stores) == (1 if backward and features.get("head_mask") else 0), stores  # the sums of rows
    loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
    assert not [load for load in loads if load.endswith(("8", "16"))], loads  # rng and head mask are wider
    assert any(map(wide.search, loads)), loads


def test_softmax_instructions_per_element(tmp_path: Path) -> None:
    """At most 20 in a row of which more than half is visible: without the half tile, and what only rows of NaN run."""
    _, args, constants = plan_softmax(2048, BF16)
    kernel = compiled(90, ((), args, {**constants, "HALVE": False}), FORWARD)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    lines = re.findall(r"^\.L_x_\d+:|/\*[0-9a-f]{4,}\*/ .*;", run("nvdisasm", "-c", cubin), re.MULTILINE)
    lines = [line for line in lines if "NOP" not in line]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    branches = [(i, re.search(r"BRA `\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines)]
    skipped = [labels[target[1]] - i for i, target in branches if target]
    assert all(n > -3 for n in skipped), "a loop would be counted once"  # but for the trap behind the end
    elements = 2048 / (32 * constants["num_warps"])
    assert max(skipped) <= 4 * elements
    assert (len(lines) - len(labels) - max(skipped)) / elements <= 20


@pytest.mark.parametrize("backward", [False, True])
def test_softmax_compiles_for_amd(backward: bool) -> None:
    features: dict[str, Any] = {} if backward else {"padding": True, "mask": torch.bool}
    _, args, constants = plan_softmax(1000, FP16, backward=backward, dropout_p=0.1, head_mask=True, **features)
    target = triton.backends.compiler.GPUTarget("hip", "gfx942", 64)
    kernel = compile_for(target, args, constants, BACKWARD if backward else FORWARD)
    assert "s_endpgm" in kernel.asm["amdgcn"]


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
