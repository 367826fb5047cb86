"""Every Triton kernel as a GPU would run it: its PTX for sm_80, sm_90 and sm_100, on the CPU with all checks on.

A kernel is added by its line in KERNELS and a table of cases, which call the functions that the registry serves:
these plan and launch as they do on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_on_ptxsim import Gpu, ptx_only

from neox_kernels import kernels, reference, rotary_tables
from neox_kernels.kernels import rotary_autograd
from neox_kernels.testing import assert_within_budget, to_float64

# The module that launches a kernel, and what it calls it.
KERNELS = [(rotary_autograd, "_rotary_kernel")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module", autouse=True)
def compile_to_ptx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ptx_only(tmp_path_factory.mktemp("triton")):
        yield


@pytest.fixture(params=[80, 90, 100], ids=lambda arch: f"sm_{arch}")
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu(request.param)
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, gpu.stand_in(getattr(module, name)))
    with gpu.fresh:
        yield gpu
    assert gpu.launches, "nothing ran"


@dataclass(frozen=True)
class Rotary:
    """One compilation, or few: lengths compile nothing anew."""

    dtype: torch.dtype
    nheads: tuple[int, int]  # of q and k
    head_dim: int
    rotary_dim: int
    interleaved: bool
    view: str = "contiguous"
    positions: str = "default"
    lengths: tuple[int, ...] = (1, 31, 33)

    def __str__(self) -> str:
        pairing = "interleaved" if self.interleaved else "half"
        words = (str(self.dtype)[6:], *self.nheads, self.rotary_dim, self.head_dim, pairing, self.view, self.positions)
        return "-".join(map(str, words))


ROTARY = [
    Rotary(F32, (5, 3), 32, 8, False),
    Rotary(F32, (3, 1), 64, 64, True, positions="cu_seqlens", lengths=(1, 31, 33, 1000, 2049)),
    Rotary(BF16, (15, 8), 80, 20, True, view="packed", positions="ids"),
    Rotary(BF16, (16, 16), 128, 32, False, positions="cu_seqlens", lengths=(33,)),
    Rotary(F16, (12, 12), 96, 24, False, view="unaligned", positions="offsets"),
    Rotary(F16, (2, 1), 256, 64, True, view="bhsd", positions="gathered"),
]


def make_heads(case: Rotary, tokens: tuple[int, ...], nheads: int) -> Tensor:
    generator, dim = torch.Generator().manual_seed(nheads), case.head_dim
    if case.view == "packed":
        return torch.randn(*tokens, nheads, 3 * dim, generator=generator).to(case.dtype)[..., dim : 2 * dim]
    if case.view == "unaligned":
        return torch.randn(*tokens, nheads, dim + 1, generator=generator).to(case.dtype)[..., 1:]
    if case.view == "bhsd":
        return torch.randn(tokens[0], nheads, tokens[1], dim, generator=generator).to(case.dtype)
    return torch.randn(*tokens, nheads, dim, generator=generator).to(case.dtype)


def make_tables(case: Rotary, batch: int, length: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    limit = length + 40
    cos, sin = rotary_tables(case.rotary_dim, limit)
    options: dict[str, Any] = {
        "default": {},
        "gathered": {},
        "offsets": {"seqlen_offsets": torch.arange(batch) * 20},
        "ids": {"position_ids": (torch.arange(batch * length).reshape(batch, length) * 7 % limit).int()},
        # Empty sequences, and tokens behind the last one.
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 0, length // 3, length // 3, length - length // 8]).int()},
    }[case.positions]
    if case.positions == "gathered":
        cos, sin = cos[:length][None].to(case.dtype), sin[:length][None].to(case.dtype)
    layout = "bhsd" if case.view == "bhsd" else "bshd"
    return {**options, "interleaved": case.interleaved, "layout": layout}, cos, sin


def forward_and_backward(functions: Any, inputs: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = functions.apply_rotary_qk(*leaves, *args, **kwargs)
    grads = [x.detach().repeat_interleave(2, -1)[..., ::2] for x in inputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, grads))]


@pytest.mark.parametrize("case", ROTARY, ids=str)
def test_rotary(gpu: Gpu, case: Rotary) -> None:
    batch = 2
    for length in case.lengths:
        tokens = (length,) if case.positions == "cu_seqlens" else (batch, length)
        options, cos, sin = make_tables(case, batch, length)
        inputs = [make_heads(case, tokens, nheads) for nheads in case.nheads]
        before = [x.clone() for x in inputs]
        actual = forward_and_backward(kernels, inputs, cos, sin, **options)
        same = forward_and_backward(reference, inputs, cos, sin, **options)
        exact = forward_and_backward(reference, *to_float64((inputs, cos, sin)), **options)
        for name, x, expected, oracle in zip(("q", "k", "dq", "dk"), actual, same, exact, strict=True):
            assert_within_budget(x, expected, oracle, f"{name} of length {length}")
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "an input was changed"
    assert len(gpu.modules) <= 2 * len(case.lengths)


@pytest.mark.parametrize(
    "case",
    [Rotary(F32, (3, 3), 32, 20, True), Rotary(BF16, (15, 15), 96, 24, False, view="packed")],
    ids=str,
)
def test_rotary_in_place(gpu: Gpu, case: Rotary) -> None:
    options, cos, sin = make_tables(case, 2, 31)
    x = make_heads(case, (2, 31), case.nheads[0])
    same = reference.apply_rotary(x, cos, sin, **options)
    exact = reference.apply_rotary(*to_float64((x, cos, sin)), **options)
    assert kernels.apply_rotary(x, cos, sin, inplace=True, **options) is x
    assert_within_budget(x, same, exact)


@pytest.mark.parametrize(
    "case",
    [Rotary(BF16, (15, 8), 96, 24, False, view="packed"), Rotary(F16, (4, 1), 64, 16, True, view="bhsd")],
    ids=str,
)
def test_rotary_kv_append(gpu: Gpu, case: Rotary) -> None:
    batch, length, room = 3, 5, 40
    cos, sin = rotary_tables(case.rotary_dim, room)
    used = torch.tensor([0, 7, room - length], dtype=torch.int32)
    q, k, v = (make_heads(case, (batch, length), nheads) for nheads in (*case.nheads, case.nheads[1]))
    heads_first = case.view == "bhsd"
    options = {"interleaved": case.interleaved, "layout": "bhsd" if heads_first else "bshd"}
    shape = (batch, room, case.nheads[1], case.head_dim)
    cache = torch.randn(shape).to(case.dtype)
    cache = cache.transpose(1, 2).contiguous() if heads_first else cache

    def run(functions: Any, *inputs: Tensor) -> list[Tensor]:
        caches = [cache.to(inputs[0].dtype, copy=True) for _ in "kv"]
        return [functions.apply_rotary_kv_append(*inputs, *caches, used, **options), *caches]

    actual, same = run(kernels, q, k, v, cos, sin), run(reference, q, k, v, cos, sin)
    exact = run(reference, *to_float64((q, k, v, cos, sin)))
    for name, x, expected, oracle in zip(("q", "k_cache", "v_cache"), actual, same, exact, strict=True):
        assert_within_budget(x, expected, oracle, name)
    assert torch.equal(actual[2], same[2])


def test_positions_outside_the_tables(gpu: Gpu) -> None:
    """Their rows become NaN, and the tables are not read there."""
    x, (cos, sin) = torch.randn(1, 4, 3, 16), rotary_tables(8, 6)
    y = kernels.apply_rotary(x, cos, sin, position_ids=torch.tensor([5, -1, 6, 2**40]))
    assert torch.equal(y[..., 8:], x[..., 8:]) and not y[:, 0].isnan().any()
    assert y[:, 1:, :, :8].isnan().all()
