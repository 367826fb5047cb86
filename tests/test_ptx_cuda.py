"""The CUDA kernels as a GPU would run them: their PTX for sm_80, sm_90 and sm_100, on the CPU with all checks on.

Grids, blocks and arguments are those of the launcher: the ops themselves are called.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from cuda_on_ptxsim import ARCHS, CudaOps
from torch import Tensor

from neox_kernels import reference, rotary_tables
from neox_kernels.testing import assert_within_budget, to_float64

INTERLEAVED, HEADS_FIRST, CONJUGATE = 1, 2, 4
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def heads(view: str, tokens: tuple[int, ...], nheads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(nheads)
    if view == "packed":
        return torch.randn(*tokens, nheads, 3 * head_dim, generator=generator).to(dtype)[..., head_dim : 2 * head_dim]
    if view == "unaligned":
        return torch.randn(*tokens, nheads, head_dim + 1, generator=generator).to(dtype)[..., 1:]
    if view == "bhsd":
        return torch.randn(tokens[0], nheads, tokens[1], head_dim, generator=generator).to(dtype)
    return torch.randn(*tokens, nheads, head_dim, generator=generator).to(dtype)


# dtype, heads of q and k, head_dim, rotary_dim, interleaved, view, positions, lengths
ROTARY = [
    (F32, (5, 3), 32, 8, False, "contiguous", "default", (1, 31, 33, 1000)),
    (F32, (3, 1), 64, 64, True, "unaligned", "cu_seqlens", (33, 2049)),
    (F32, (2, 1), 9, 6, False, "contiguous", "offset", (7,)),
    (BF16, (15, 8), 80, 20, True, "packed", "ids", (1, 31)),
    (BF16, (16, 16), 128, 32, False, "contiguous", "cu_seqlens", (33,)),
    (BF16, (5, 5), 96, 24, False, "unaligned", "offsets", (31,)),
    (F16, (12, 12), 96, 24, False, "packed", "offsets", (33,)),
    (F16, (2, 1), 256, 64, True, "bhsd", "default", (31,)),
    (F16, (3, 3), 32, 20, True, "unaligned", "ids", (33,)),
]


def same_and_exact(function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(function(*args), function(*to_float64(args)), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", ROTARY, ids=lambda case: "-".join(map(str, case[:-1])).replace("torch.", ""))
def test_rotary(cuda: CudaOps, arch: int, case: tuple) -> None:
    dtype, nheads, head_dim, rotary_dim, interleaved, view, positions, lengths = case
    for length in lengths:
        batch, flat = 2, positions == "cu_seqlens"
        tokens = (length,) if flat else (batch, length)
        cos, sin = rotary_tables(rotary_dim, length + 40)
        given = {
            "default": {},
            "offset": {"seqlen_offsets": 7},
            "offsets": {"seqlen_offsets": torch.tensor([0, 40])},
            "ids": {"position_ids": (torch.arange(batch * length).reshape(batch, length) * 7 % (length + 40)).int()},
            "cu_seqlens": {"cu_seqlens": torch.tensor([0, 0, length // 3, length // 3, length - 2]).int()},
        }[positions]
        options = {**given, "interleaved": interleaved, "layout": "bhsd" if view == "bhsd" else "bshd"}
        offset = given.get("seqlen_offsets", 0)
        tensors = [given.get(name) for name in ("position_ids", "seqlen_offsets", "cu_seqlens")]
        rest = [x if isinstance(x, Tensor) else None for x in tensors]
        flags = INTERLEAVED * interleaved + HEADS_FIRST * (view == "bhsd")
        q, k = (heads(view, tokens, n, head_dim, dtype) for n in nheads)
        common = (cos, sin, *rest, 0 if isinstance(offset, Tensor) else offset)

        forward, counters = cuda.call("rotary_qk", arch, q, k, *common, flags)
        assert len(counters) == 1
        backward, _ = cuda.call("rotary_qk", arch, q, k, *common, flags | CONJUGATE)

        def rotate(q: Tensor, k: Tensor, c: Tensor, s: Tensor, options: dict = options) -> tuple[Tensor, ...]:
            return reference.apply_rotary_qk(q, k, c, s, **options)

        for actual, sine in ((forward, sin), (backward, -sin)):
            for x, (same, exact) in zip(actual, same_and_exact(rotate, q, k, cos, sine), strict=True):
                assert_within_budget(x, same, exact, f"length {length}")
        cuda.call("rotary_", arch, q, *common, flags)
        assert torch.equal(q, forward[0])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "interleaved"), [(BF16, False), (F16, True), (F32, False)])
def test_rotary_kv_append(cuda: CudaOps, arch: int, dtype: torch.dtype, interleaved: bool) -> None:
    batch, length, room = 3, 5, 40
    cos, sin = rotary_tables(24, room)
    used = torch.tensor([0, 7, room - length], dtype=torch.int32)
    q, k, v = (heads("packed", (batch, length), n, 96, dtype) for n in (15, 8, 8))
    cache = torch.randn(batch, room, 8, 96).to(dtype)

    def append(q: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        caches = [cache.to(q.dtype, copy=True) for _ in "kv"]
        return reference.apply_rotary_kv_append(q, k, v, c, s, *caches, used, interleaved=interleaved), *caches

    caches = [cache.clone(), cache.clone()]
    q_out, _ = cuda.call("rotary_kv_append", arch, *caches, q, k, v, cos, sin, used, None, INTERLEAVED * interleaved)
    for x, (same, exact) in zip((q_out, *caches), same_and_exact(append, q, k, v, cos, sin), strict=True):
        assert_within_budget(x, same, exact)
    assert torch.equal(caches[1], append(q, k, v, cos, sin)[2])


def test_nothing_to_launch(cuda: CudaOps) -> None:
    cos, sin = rotary_tables(8, 16)
    for shape in ((2, 0, 3, 32), (0, 5, 3, 32), (2, 5, 0, 32)):
        y, counters = cuda.call("rotary", 80, torch.empty(shape), cos, sin, None, None, None, 0, 0)
        assert y.shape == shape and counters == []


@pytest.mark.parametrize("arch", ARCHS)
def test_every_width(cuda: CudaOps, arch: int) -> None:
    """Every kernel of rotary.cu, in place too, and one result to the last bit, by whatever access."""
    ran = set()
    for dtype, flags, rotary_dim in itertools.product((F32, BF16, F16), (0, INTERLEAVED), (32, 24, 20, 22)):
        cos, sin = rotary_tables(rotary_dim, 40)
        whole = heads("contiguous", (2, 7), 3, 40, dtype)  # a multiple of 16 bytes from head to head
        results = []
        for width in (8, 4, 2, 1):
            x = torch.empty(2, 7, 3, 48, dtype=dtype)[..., width : width + 40].copy_(whole)
            results.append(cuda.call("rotary", arch, x, cos, sin, None, None, None, 3, flags)[0])
            ran |= {one.kernel for one in cuda.launches}
            cuda.call("rotary_", arch, x, cos, sin, None, None, None, 3, flags)
            ran |= {one.kernel for one in cuda.launches}
            results.append(x)
        assert all(torch.equal(results[0], y) for y in results[1:])
    assert ran == cuda.kernels_of("rotary.cu")
