"""Causal attention in one pass: the budget, strides, what is not seen, who is served by it, and bad input."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from neox_kernels import attention, compiled, explain_attention, reference, use_backend
from neox_kernels.ops.attention import causal_attention, serves_causal_attention
from neox_kernels.testing import assert_within_budget, packed_qkv

DTYPES = [torch.float32, torch.bfloat16]
# q_len, k_len, nheads, head_dim: parts of blocks, a chunk behind a cache, more than one step of keys, wide heads.
SHAPES = [(1, 1, 1, 1), (32, 32, 2, 64), (33, 33, 3, 7), (70, 70, 2, 80), (64, 300, 2, 64), (40, 1500, 1, 96),
          (600, 600, 2, 64), (70, 1100, 1, 256)]  # fmt: skip


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    if not serves_causal_attention(found):
        pytest.skip(f"this processor or build has no kernel for {found}")
    return found


def inputs(q_len: int, k_len: int, nheads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = packed_qkv(2, max(q_len, k_len), nheads, head_dim, dtype)
    return q[:, :q_len] * 2, k[:, :k_len], v[:, :k_len]


def within_budget(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    got = causal_attention(q, k, v, scale)
    options = {"softmax_scale": scale, "implementation": "eager"}
    truth, _ = attention(q.double(), k.double(), v.double(), **options)
    same, _ = attention(q, k, v, upcast_scores=True, **options)
    assert got.shape == q.shape and got.is_contiguous()
    assert_within_budget(got, same, truth)
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_budget(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    within_budget(*inputs(*shape, dtype), shape[-1] ** -0.5)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 4.0])
def test_scales(scale: float, dtype: torch.dtype) -> None:
    within_budget(*inputs(50, 900, 2, 32, dtype), scale)


def test_the_reference_is_the_formula() -> None:
    q, k, v = (x.double() for x in inputs(9, 13, 2, 5, torch.float32))
    expected, _ = attention(q, k, v, softmax_scale=0.4, implementation="eager")
    torch.testing.assert_close(reference.causal_attention(q, k, v, 0.4), expected)


def test_any_strides(dtype: torch.dtype) -> None:
    q, k, v = inputs(50, 50, 3, 24, dtype)
    expected = causal_attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    features_apart = [x.mT.contiguous().mT for x in (q, k, v)]
    odd = torch.empty(q.numel() + 1, dtype=dtype)[1:].view(q.shape).copy_(q)
    for strided in ((q, k, v), heads_first, features_apart, (odd, k, v)):
        assert torch.equal(causal_attention(*strided, 0.2), expected)
    whole = causal_attention(*(x[:1].expand(2, -1, -1, -1) for x in (q, k, v)), 0.2)
    assert torch.equal(whole[0], whole[1]) and torch.equal(whole[0], expected[0])


def test_what_is_not_seen(dtype: torch.dtype) -> None:
    q, k, v = inputs(70, 30, 2, 16, dtype)
    got = within_budget(q, k, v, 0.25)
    assert not got[:, :40].any() and got[:, 40:].any(-1).all()
    q, k, v = inputs(40, 40, 2, 16, dtype)
    before = causal_attention(q, k, v, 0.25)
    changed = k.clone()
    changed[:, 20:] = torch.nan  # no earlier query sees these, in the same block of keys either
    after = causal_attention(q, changed, v, 0.25)
    assert torch.equal(after[:, :20], before[:, :20]) and after[:, 20:].isnan().all()
    none = causal_attention(q, k[:, :0], v[:, :0], 0.25)
    assert none.shape == q.shape and not none.any()
    assert causal_attention(q[:0], k[:0], v[:0], 0.25).shape == (0, *q.shape[1:])
    assert causal_attention(q[:, :0], k, v, 0.25).shape == (2, 0, *q.shape[2:])


def test_scores_of_any_size(dtype: torch.dtype) -> None:
    q, k, v = inputs(600, 600, 1, 32, dtype)
    k[:, 550] *= 300.0  # in the second step of keys: all before counts for nothing, or it does itself
    within_budget(q, k, v, 1.0)
    q, k = torch.full_like(q, 1.0), torch.full_like(k, -torch.inf)
    assert not causal_attention(q, k, v, 1.0).any()  # every score is -inf
    k[:, 0] = 0.0
    torch.testing.assert_close(causal_attention(q, k, v, 1.0), v[:, :1].expand_as(v).contiguous())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_change_nothing(dtype: torch.dtype, threads: None) -> None:
    q, k, v = inputs(200, 200, 3, 40, dtype)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(causal_attention(q, k, v, 0.2))
        torch.mm(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))  # whose tiles are its own again
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_who_takes_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(64, 64, 2, 64, dtype)
    expected = causal_attention(q, k, v, 0.125)
    for implementation in ("auto", "fused"):
        assert torch.equal(attention(q, k, v, implementation=implementation)[0], expected)
    assert explain_attention(q, k, v).implementation == "fused"
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[0, 0] = False
    monkeypatch.setattr("neox_kernels.attention_implementations.causal_attention", None)
    attention(q, k, v, key_padding_mask=mask)
    attention(q, k, v, head_mask=torch.ones(2))
    attention(q, k, v, attn_mask=torch.zeros(64, 64), implementation="fused")
    attention(q, k, v, dropout_p=0.5, implementation="fused")
    attention(q, k, v, output_attentions=True)
    attention(q, k, v, causal=False)
    attention(q, k, v, softmax_scale=-1.0)
    attention(q[:, :1], k, v)
    attention(q.clone().requires_grad_(), k, v)
    with torch.autocast("cpu", torch.bfloat16):
        attention(q, k, v)
    with use_backend("reference"):
        attention(q, k, v)
    compiled.cpu_isa("default")
    attention(q, k, v)
    compiled.cpu_isa("best")
    torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v)


def test_bad_input(dtype: torch.dtype) -> None:
    q, k, v = inputs(8, 8, 2, 16, dtype)
    for given, message in (
        ((q[0], k, v), "q, k and v must be"),
        ((q, k.double(), v), "one dtype"),
        ((q.half(), k.half(), v.half()), "one dtype"),
        ((q, k[:, :4], v), "must agree"),
        ((q[:, :, :1], k, v), "must agree"),
        ((q, k[..., :8], v[..., :8]), "must agree"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.neox_kernels.causal_attention(*given, 0.25)
    for scale in (0.0, -1.0, torch.nan):
        with pytest.raises(ValueError, match="above zero"):
            causal_attention(q, k, v, scale)
    compiled.cpu_isa("default")
    assert not serves_causal_attention(dtype)
    with pytest.raises(ValueError, match="one dtype"):
        causal_attention(q, k, v, 0.25)
    compiled.cpu_isa("best")


def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.neox_kernels.causal_attention.default, (*inputs(9, 13, 2, 8, dtype), 0.3))
