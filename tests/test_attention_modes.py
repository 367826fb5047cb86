"""Attention under torch.compile, with dropout, on packed tensors, under autocast; and what is not copied."""

import importlib

import pytest
import torch
from attention_checks import HEAD_DIM, NHEADS, agrees, padding, qkv, randn
from torch import Tensor

from neox_kernels import attention, prepare_attention
from neox_kernels import attention_implementations as serve
from neox_kernels.testing import packed_qkv

IMPLEMENTATIONS = ("sdpa", "fused", "eager", "auto")


@pytest.mark.parametrize("implementation", ["sdpa", "fused", "eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_as_one_graph(implementation: str, grad: bool) -> None:
    mask = padding("dead", 6)

    def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        prepared = prepare_attention(6, 6, mask)
        for name in (implementation, implementation if grad else "auto"):
            q, _ = attention(q, k, v, prepared=prepared, implementation=name)
        return q

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager", dynamic=False)
    leaves = [x.detach().clone().requires_grad_(grad) for x in qkv(6, 6)]
    found, expected = compiled(*leaves, mask), layers(*leaves, mask)
    torch.testing.assert_close(found, expected)
    if grad:
        gradients = (torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout(implementation: str) -> None:
    q, k, v = (randn(2, 64, 2, 8, seed=i) for i in range(3))
    v = v.abs() + 1

    def run(seed: int, p: float = 0.25) -> Tensor:
        torch.manual_seed(seed)
        return attention(q, k, v, dropout_p=p, implementation=implementation)[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    plain = run(0, 0.0)
    mean = torch.stack([run(seed) for seed in range(60)]).mean(0)
    # A row of many keys; the spread of a mean of 60 is far less than what is asked.
    torch.testing.assert_close(mean[:, 16:].mean(), plain[:, 16:].mean(), rtol=0.02, atol=0.0)
    assert not run(0, 1.0).any()


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_probabilities_are_returned_as_they_were_used(implementation: str) -> None:
    q, k, v = qkv(6, 6)
    heads = torch.tensor([1.0, 0.0, 2.0])
    options = {"dropout_p": 0.5, "head_mask": heads, "output_attentions": True}
    out, probs = attention(q, k, v, **options, implementation=implementation)
    assert probs is not None and (probs[:, 0] == 0).any() and not probs[:, 1].any()
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", probs, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "fused"])
def test_any_strides(implementation: str, dtype: torch.dtype) -> None:
    q, k, v = packed_qkv(2, 9, NHEADS, HEAD_DIM, dtype)
    layouts = {
        "packed": (q, k, v),
        "heads first": tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        "features not contiguous": tuple(x.mT.contiguous().mT for x in (q, k, v)),
        "expanded": tuple(x[:1].expand(2, -1, -1, -1) for x in (q, k, v)),
    }
    for strided in layouts.values():
        agrees(dict(zip("qkv", strided, strict=True)), implementation)


def test_the_result_needs_no_copy_for_the_projection() -> None:
    for q_len in (1, 700):
        q, k, v = qkv(q_len, 700, torch.float32)
        for implementation in ("sdpa", "fused"):
            out, _ = attention(q, k, v, implementation=implementation)
            assert out.reshape(3, q_len, -1).data_ptr() == out.data_ptr(), (q_len, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str) -> None:
    q, k, v = qkv(200, 200)  # more than the fused implementation takes at once
    plain, _ = attention(q, k, v, implementation="eager")
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention(q, k, v, implementation=implementation)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("implementation", ["sdpa", "fused"])
def test_no_mask_is_made_where_none_is_needed(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor | None] = []
    masks = importlib.import_module("neox_kernels.attention_masks").PreparedAttention
    make = masks.visible
    monkeypatch.setattr(masks, "visible", lambda self, device: made.append(make(self, device)) or made[-1])
    for q_len, k_len in ((6, 6), (1, 6)):
        attention(*qkv(q_len, k_len), implementation=implementation)
    assert made == ([] if implementation == "fused" else [None])  # for a lone query sdpa asks, and needs none
    attention(*qkv(3, 6), key_padding_mask=padding("mixed", 6), implementation=implementation)
    assert len(made) == (0 if implementation == "fused" else 2)


def test_the_function_and_its_module_share_a_name() -> None:
    import neox_kernels
    from neox_kernels import attention as public

    module = importlib.import_module("neox_kernels.attention")
    assert neox_kernels.attention is public is module.attention and callable(public)


def test_what_a_gpu_takes_first() -> None:
    """By the shapes and dtypes alone; bench/results says why."""

    def asked(q_len: int, k_len: int, dtype: torch.dtype, mask: Tensor | None = None, batch: int = 1) -> serve.Call:
        q, k = (torch.zeros(batch, n, 2, 8, dtype=dtype) for n in (q_len, k_len))
        return serve.Call(q, k, k, 1.0, prepare_attention(q_len, k_len, mask), None, 0.0, False, False)

    half, single, mask = torch.bfloat16, torch.float32, torch.arange(9)[None] > 3
    for call in (asked(9, 9, half), asked(1, 9, half), asked(9, 9, half, batch=3)):
        assert serve.sdpa_is_faster_on_gpu(call) and not serve.fused_is_faster_on_gpu(call)
    for call in (asked(4, 9, half), asked(4, 9, single), asked(1, 9, single)):
        assert serve.fused_is_faster_on_gpu(call) and not serve.sdpa_is_faster_on_gpu(call)
    neither = asked(9, 9, single), asked(9, 9, half, mask), asked(1, 9, single, mask), asked(4, 9, half, batch=2)
    trained = asked(9, 9, half)
    trained.q.requires_grad_()
    for call in (*neither, trained):
        assert not serve.fused_is_faster_on_gpu(call) and not serve.sdpa_is_faster_on_gpu(call)
