"""Bugs planted in kernels that are right: ptxsim finds each of them, and nothing in the kernel as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402 - not without triton
from ptxsim import Fault, MemoryFault, Race, Trap  # noqa: E402
from triton_on_ptxsim import Gpu, ptx_only  # noqa: E402

from neox_kernels import rotary_tables  # noqa: E402
from neox_kernels.kernels import rotary  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def compile_to_ptx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ptx_only(tmp_path_factory.mktemp("triton")):
        yield


def rotate(gpu: Gpu) -> None:
    """A call that needs every mask, and barriers: half of 24 features, a loop over 23 heads, positions beyond tables,
    and in place, where threads exchange what they turn."""
    cos, sin = rotary_tables(24, 7)
    q = torch.randn(1, 5, 23, 96).bfloat16()
    grid, args, constants = rotary.plan_launch((q,), (q,), (cos, sin, None, None, 3, None, False, False, False))
    gpu.launch(rotary._rotary_kernel, (grid[0], 1), **args, **constants)


def matches(pattern: str, ptx: str) -> list[re.Match[str]]:
    return list(re.finditer(pattern, ptx))


def without(pattern: str, which: int) -> Callable[[str], str]:
    """PTX in which the match number ``which`` of the pattern is gone, but for its group 1, if it has one."""

    def edit(ptx: str) -> str:
        found = matches(pattern, ptx)[which]
        kept = found[1] if found.re.groups else ""
        return ptx[: found.start()] + kept + ptx[found.end() :]

    return edit


LOAD_MASK, STORE_MASK, BARRIER = r"@%p\d+ (ld\.global)", r"@%p\d+ (st\.global)", r"bar\.sync\s+0;"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_rotary_with_a_bug(arch: int) -> None:
    seen: list[str] = []
    rotate(Gpu(arch, edit=lambda ptx: seen.append(ptx) or ptx))
    ptx = seen[0]

    def outcome(edit: Callable[[str], str] = lambda ptx: ptx, shared_less: int = 0) -> type[Fault] | None:
        try:
            rotate(Gpu(arch, edit, shared_less))
        except Fault as fault:
            return type(fault)
        return None

    barriers = [outcome(without(BARRIER, i)) for i in range(len(matches(BARRIER, ptx)))]
    # The first stands between two exchanges inside each warp, which need none. Those of the loop are needed.
    assert barriers == [None, Race, Race]
    assert outcome(shared_less=16) is MemoryFault
    loads = [outcome(without(LOAD_MASK, i)) for i in range(len(matches(LOAD_MASK, ptx)))]
    stores = [outcome(without(STORE_MASK, i)) for i in range(len(matches(STORE_MASK, ptx)))]
    assert len(loads) > 4 and len(stores) > 2
    assert set(loads) == set(stores) == {MemoryFault}


@triton.jit
def _add_program(x_ptr, out_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) + tl.program_id(0), mask=at < n)


@triton.jit
def _add_neighbour(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(out_ptr + at - BLOCK, mask=(at >= BLOCK) & (at < n), other=0.0)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) + before, mask=at < n)


@triton.jit
def _copy_rows(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * 2
    column = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * BLOCK + column, tl.load(x_ptr + row * stride + column))


def test_programs_that_meet() -> None:
    x = torch.randn(1000)
    gpu = Gpu(90)
    gpu.launch(_add_program, (8,), x_ptr=x, out_ptr=torch.zeros(1000), n=1000, STEP=128, BLOCK=128, num_warps=4)
    with pytest.raises(Race, match="two blocks write"):
        gpu.launch(_add_program, (8,), x_ptr=x, out_ptr=torch.zeros(1000), n=1000, STEP=127, BLOCK=128, num_warps=4)
    with pytest.raises(Race, match="another block"):
        gpu.launch(_add_neighbour, (8,), x_ptr=x, out_ptr=torch.zeros(1000), n=1000, BLOCK=128, num_warps=4)


def test_int32_overflow() -> None:
    """Rows of 2**30 elements: the offset of row 2 does not fit into 32 bits."""
    x, out = torch.zeros(128), torch.zeros(4, 128)
    launch = {"x_ptr": x, "out_ptr": out, "stride": 1 << 30, "BLOCK": 128, "num_warps": 1}
    gpu = Gpu(90)
    gpu.launch(_copy_rows, (1,), **launch)
    with pytest.raises(MemoryFault, match="before a buffer"):
        gpu.launch(_copy_rows, (2,), **launch)
    with pytest.raises(Trap, match="assertion"):  # Triton's own check, in the PTX
        gpu.launch(_copy_rows, (2,), **launch, debug=True, sanitize_overflow=True)
