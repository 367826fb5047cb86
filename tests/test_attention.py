"""Every implementation of attention that runs here against the float64 oracle, forward and every gradient."""

from typing import Any

import pytest
import torch
from attention_checks import FLOATS, HEAD_DIM, LENGTHS, NHEADS, agrees, backward, padding, qkv, randn
from softmax_checks import every
from torch import Tensor

from neox_kernels import attention, prepare_attention
from neox_kernels.testing import assert_within_budget

IMPLEMENTATIONS = ("sdpa", "fused", "auto")


def inputs(q_len: int, k_len: int, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    return dict(zip("qkv", qkv(q_len, k_len, dtype, **options), strict=True))


@every(lengths=LENGTHS, dtype=FLOATS, implementation=IMPLEMENTATIONS)
def test_lengths(lengths: tuple[int, int], dtype: torch.dtype, implementation: str) -> None:
    for causal in (True, False):
        agrees(inputs(*lengths, dtype), implementation, causal=causal)


@every(kind=("none", "left", "right", "mixed", "holes", "dead"), dtype=FLOATS, implementation=IMPLEMENTATIONS)
def test_padding(kind: str, dtype: torch.dtype, implementation: str) -> None:
    for lengths in LENGTHS[:5]:
        given = {**inputs(*lengths, dtype), "key_padding_mask": padding(kind, lengths[1])}
        found = agrees(given, implementation)
        if kind == "dead":
            for name in ("result", "gradient of q", "gradient of k", "gradient of v"):
                assert not found[name][2].any(), name


@pytest.mark.parametrize("implementation", ["sdpa", "fused", "eager"])
def test_a_query_without_a_key_gets_zeros(implementation: str) -> None:
    q, k, v = qkv(9, 4)
    before_the_keys = 5  # bottom-right: the last of nine queries sees four keys
    found = backward({"q": q, "k": k, "v": v}, implementation=implementation)
    assert not found["result"][:, :before_the_keys].any() and found["result"][:, before_the_keys:].all()
    assert not found["gradient of q"][:, :before_the_keys].any()
    hidden = torch.zeros(1, 1, 9, 4, dtype=torch.bool)
    for mask in (hidden, torch.full((9, 4), -torch.inf)):
        found = backward({"q": q, "k": k, "v": v}, attn_mask=mask, implementation=implementation)
        assert not any(x.any() for x in found.values())


MASKS = {
    "bool": lambda q_len, k_len: torch.rand(3, 1, q_len, k_len, generator=torch.Generator().manual_seed(3)) < 0.6,
    "bool, 2-D": lambda q_len, k_len: torch.rand(q_len, k_len, generator=torch.Generator().manual_seed(3)) < 0.6,
    "added": lambda q_len, k_len: randn(3, NHEADS, q_len, k_len, seed=4),
    "added, of heads": lambda q_len, k_len: randn(1, NHEADS, 1, k_len, seed=4),
    "added, -inf": lambda q_len, k_len: randn(3, 1, q_len, k_len, seed=5).where(
        torch.rand(3, 1, q_len, k_len, generator=torch.Generator().manual_seed(3)) < 0.6, -torch.inf
    ),
}


@every(kind=MASKS, dtype=FLOATS, implementation=IMPLEMENTATIONS)
def test_masks(kind: str, dtype: torch.dtype, implementation: str) -> None:
    for lengths in LENGTHS[:3]:
        mask = MASKS[kind](*lengths)
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        given = {**inputs(*lengths, dtype), "attn_mask": mask}
        agrees(given, implementation)
        agrees({**given, "key_padding_mask": padding("mixed", lengths[1])}, implementation)


@pytest.mark.parametrize("implementation", ["sdpa", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_added_masks_of_another_dtype(implementation: str, dtype: torch.dtype) -> None:
    """transformers' finfo.min in float32 is -inf in float16, and hides more there than it says."""
    mask = torch.zeros(3, 1, 7, 7).masked_fill(padding("dead", 7)[:, None, None].logical_not(), torch.finfo().min)
    agrees({**inputs(7, 7, dtype), "attn_mask": mask}, implementation)
    agrees({**inputs(7, 7, torch.float32), "attn_mask": randn(7, 7).to(dtype)}, implementation)


@every(dtype=FLOATS, lengths=LENGTHS[:4], upcast_scores=(False, True))
def test_probabilities_and_head_masks(dtype: torch.dtype, lengths: tuple[int, int], upcast_scores: bool) -> None:
    options = {"output_attentions": True, "upcast_scores": upcast_scores}
    heads = torch.tensor([1.0, 0.0, 0.5])
    for head_mask in (heads, heads.view(1, 3, 1, 1), randn(3, 3, 1, 1, seed=2)):
        given = {**inputs(*lengths, dtype), "key_padding_mask": padding("left", lengths[1])}
        found = agrees({**given, "head_mask": head_mask.to(dtype)}, "fused", **options)
        assert found["probabilities"].shape == (3, NHEADS, *lengths) and found["probabilities"].dtype == dtype
    given = inputs(*lengths, dtype)
    auto = backward(given, implementation="auto", **options)
    assert torch.equal(auto["probabilities"], backward(given, implementation="fused", **options)["probabilities"])


@every(dtype=FLOATS, upcast_scores=(False, True))
def test_many_queries_in_parts(dtype: torch.dtype, upcast_scores: bool) -> None:
    """Without a graph the fused implementation takes them by 128 or 512."""
    q, k, v = qkv(601, 650, dtype, batch=2, head_dim=8)
    mask = torch.arange(650) >= torch.tensor([[0], [140]])
    options = {
        "key_padding_mask": mask,
        "head_mask": randn(2, 3, 1, 1, dtype=dtype),
        "upcast_scores": upcast_scores,
    }
    truth = attention(*(x.double() for x in (q, k, v)), **{**options, "head_mask": options["head_mask"].double()},
                      implementation="eager")[0]  # fmt: skip
    same = attention(q, k, v, **options, implementation="eager")[0]
    out = attention(q, k, v, **options, implementation="fused")[0]
    assert_within_budget(out, same, truth)
    assert out.is_contiguous()
    out = attention(k, q, torch.ones_like(q), implementation="fused")[0]  # the first 49 of 650 see nothing
    assert not out[:, :49].any() and torch.allclose(out[:, 49:].float(), torch.ones(()), atol=0.01)


@pytest.mark.parametrize("implementation", ["sdpa", "fused", "eager"])
def test_one_preparation_serves_every_layer(implementation: str) -> None:
    for lengths in LENGTHS[:3]:
        mask = padding("mixed", lengths[1])
        prepared = prepare_attention(*lengths, mask)
        for _layer in range(2):
            given = inputs(*lengths, torch.float32)
            once = backward(given, prepared=prepared, implementation=implementation)
            each = backward({**given, "key_padding_mask": mask.long()}, implementation=implementation)
            assert all(torch.equal(once[name], each[name]) for name in once)


def test_a_mask_that_hides_nothing_is_dropped() -> None:
    assert prepare_attention(5, 5, torch.ones(2, 5)).key_padding_mask is None
    assert prepare_attention(5, 5, torch.eye(2, 5)).key_padding_mask is not None


@pytest.mark.parametrize("implementation", ["sdpa", "fused", "eager"])
def test_the_scale_and_an_empty_batch(implementation: str) -> None:
    given = inputs(6, 6, torch.float32)
    plain, _ = attention(**given, implementation=implementation)
    scaled, _ = attention(
        **{**given, "q": given["q"] * 2}, softmax_scale=HEAD_DIM**-0.5 / 2, implementation=implementation
    )
    torch.testing.assert_close(plain, scaled)
    empty = inputs(6, 6, torch.float32, batch=0)
    mask = torch.ones(0, 6, dtype=torch.bool)
    assert attention(**empty, key_padding_mask=mask, implementation=implementation)[0].shape == (0, 6, NHEADS, HEAD_DIM)


def test_the_eager_gradients_are_right() -> None:
    q, k, v = (x.double().requires_grad_() for x in qkv(3, 4, batch=1))
    added, heads = randn(3, 4).double().requires_grad_(), randn(NHEADS).double().requires_grad_()

    def call(*leaves: Tensor) -> Any:
        q, k, v, added, heads = leaves
        return attention(q, k, v, attn_mask=added, head_mask=heads, output_attentions=True, implementation="eager")

    leaves = [
        x.detach().clone().requires_grad_() for x in (q[..., :2, :3], k[..., :2, :3], v[..., :2, :3], added, heads[:2])
    ]
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_and_keys_may_be_upcast(dtype: torch.dtype) -> None:
    q, k, v = qkv(6, 6)
    given = {"q": q, "k": k, "v": v.to(dtype)}
    out = agrees(given, "fused")["result"]
    assert out.dtype == dtype
    assert torch.equal(out, backward(given)["result"])
    with pytest.raises(ValueError, match="takes one dtype"):
        attention(**given, implementation="sdpa")
