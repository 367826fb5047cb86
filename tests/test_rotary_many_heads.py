"""Known models' shapes, the 64 heads of GPT-NeoX-20B among them, where the CPU kernel walks in another order."""

import pytest
import torch

from neox_kernels import apply_rotary_kv_append, apply_rotary_qk, reference, rotary_tables
from neox_kernels.testing import (
    ROTARY_SHAPES,
    RotaryShape,
    assert_within_budget,
    eager_rotary,
    packed_qkv,
    to_float64,
)

SEQLEN = 21  # a block of 16 tokens and a part of the next


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ROTARY_SHAPES, ids=lambda shape: shape.model)
def test_heads_first(shape: RotaryShape, dtype: torch.dtype) -> None:
    cos, sin = rotary_tables(shape.rotary_dim, 64)
    q, k, v = (x.transpose(1, 2) for x in packed_qkv(2, SEQLEN, shape.nheads, shape.head_dim, dtype))
    ids = torch.randint(0, 64, (2, SEQLEN), generator=torch.Generator().manual_seed(1))
    truth = reference.apply_rotary_qk(
        *to_float64((q, k, cos, sin)), interleaved=shape.interleaved, position_ids=ids, layout="bhsd"
    )
    eager = [eager_rotary(x.transpose(1, 2), cos[ids], sin[ids], shape.interleaved).transpose(1, 2) for x in (q, k)]

    q_out, k_out = apply_rotary_qk(q, k, cos, sin, interleaved=shape.interleaved, position_ids=ids, layout="bhsd")
    assert_within_budget(q_out, eager[0], truth[0], "q")
    assert_within_budget(k_out, eager[1], truth[1], "k")

    caches = [torch.full((2, shape.nheads, SEQLEN + 9, shape.head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    appended = apply_rotary_kv_append(
        q,
        k,
        v,
        cos,
        sin,
        *caches,
        torch.tensor([3, 7]),
        interleaved=shape.interleaved,
        position_ids=ids,
        layout="bhsd",
    )
    assert torch.equal(appended, q_out)
    for cache, new in zip(caches, (k_out, v), strict=True):
        for b, used in enumerate((3, 7)):
            assert torch.equal(cache[b, :, used : used + SEQLEN], new[b])
            assert cache[b, :, :used].isnan().all() and cache[b, :, used + SEQLEN :].isnan().all()
