"""Attention on a GPU by every implementation, FlashAttention among them, against the float64 oracle."""

from collections.abc import Iterator

import pytest
import torch
from attention_checks import FLOATS, LENGTHS, agrees, padding, qkv, randn
from flash_attn_standin import look_again
from softmax_checks import every
from test_flash_attention import serves
from to_device import move
from torch import Tensor

from neox_kernels import attention, explain_attention, flash_attention, prepare_attention

pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)
PADDINGS = ("none", "left", "right", "mixed", "holes", "dead")


@every(kind=PADDINGS, dtype=FLOATS, implementation=("eager", "sdpa", "fused"))
def test_padding(kind: str, dtype: torch.dtype, implementation: str) -> None:
    for q_len, k_len in LENGTHS[:5]:
        inputs = dict(zip("qkv", qkv(q_len, k_len, dtype), strict=True))
        for causal in (True, False):
            agrees({**inputs, "key_padding_mask": padding(kind, k_len)}, implementation, device="cuda", causal=causal)


@every(dtype=FLOATS, implementation=("eager", "sdpa", "fused", "auto"))
def test_masks_and_probabilities(dtype: torch.dtype, implementation: str) -> None:
    for q_len, k_len in LENGTHS[:3]:
        inputs = dict(zip("qkv", qkv(q_len, k_len, dtype), strict=True))
        added = randn(3, 3, q_len, k_len, dtype=dtype, seed=4)
        for mask in (added, added > 0.3, added[:, :1].where(added[:, :1] < 0.6, -torch.inf)):
            agrees({**inputs, "attn_mask": mask}, implementation, device="cuda")
        agrees(inputs, implementation, device="cuda", upcast_scores=True)
        if implementation != "sdpa":
            agrees({**inputs, "head_mask": torch.tensor([0.5, 0.0, 2.0])}, implementation, device="cuda")
            agrees(inputs, implementation, device="cuda", output_attentions=True)


@pytest.fixture(params=["flash-attn", "torch"])
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What serves flash_attention_2: the package, and torch's own where it is hidden."""
    if request.param == "torch":
        monkeypatch.setattr(flash_attention, "_package", lambda: "flash-attn is hidden")
    look_again(monkeypatch)
    found = flash_attention.find_flash()
    if isinstance(found, str) or not found.name.startswith(request.param):
        pytest.skip(found if isinstance(found, str) else f"{found.name} serves here")
    yield request.param


def heads(q_len: int, k_len: int, dtype: torch.dtype) -> list[Tensor]:
    return [move(x) for x in qkv(q_len, k_len, dtype, head_dim=64)]


@every(dtype=HALF, kind=PADDINGS, causal=(True, False))
def test_flash(flash: str, dtype: torch.dtype, kind: str, causal: bool) -> None:
    """It serves what its alignment of causal and its padding allow, within the budget."""
    for q_len, k_len in ((33, 33), (1, 40), (12, 40), (40, 24)):
        mask = None if kind == "none" else padding(kind, k_len).cuda()
        served = serves(*heads(q_len, k_len, dtype), mask, causal=causal)
        between = causal and q_len not in (1, k_len)
        left = kind == "none" or (kind in ("left", "dead") and q_len < k_len)
        assert served == (not between or (left and flash == "flash-attn")), (q_len, k_len)


def test_flash_at_length(flash: str) -> None:
    """Thousands of tokens, and q, k and v as slices of one projection."""
    packed = randn(2, 2048, 2, 3 * 128, seed=7).bfloat16().cuda()
    q, k, v = packed.chunk(3, dim=-1)
    assert serves(q, k, v, None)
    mask = torch.arange(2048, device="cuda") >= torch.tensor([[0], [777]], device="cuda")
    assert serves(q, k, v, mask)
    assert serves(q[:, -1:], k, v, mask) and serves(q, k, v, None, softmax_scale=0.05)


def test_flash_under_autocast(flash: str) -> None:
    q, k, v = heads(33, 33, torch.float32)
    flash_attention._warn_of_cast.cache_clear()
    with torch.autocast("cuda", torch.bfloat16), pytest.warns(UserWarning, match="computes in torch.bfloat16"):
        out, _ = attention(q, k, v, implementation="flash_attention_2")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(q, k, v, implementation="eager")[0], atol=0.05, rtol=0.05)


def test_flash_in_a_graph(flash: str) -> None:
    """What a captured forward needs of the host is asked for before the capture."""
    q, k, v = heads(33, 33, torch.bfloat16)
    prepared = prepare_attention(33, 33, padding("left", 33).cuda())
    attention(q, k, v, prepared=prepared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out, _ = attention(q, k, v, prepared=prepared)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.testing.assert_close(out, attention(q, k, v, prepared=prepared)[0])


def test_auto_takes_what_was_the_fastest(flash: str) -> None:
    def chosen(q_len: int, k_len: int, dtype: torch.dtype, mask: Tensor | None = None, **options: bool) -> str:
        q, k, v = (x[:1] for x in heads(q_len, k_len, dtype))
        return explain_attention(q, k, v, key_padding_mask=mask, **options).implementation

    mask = torch.arange(33, device="cuda")[None] > 5
    assert chosen(33, 33, torch.bfloat16) == chosen(1, 33, torch.bfloat16) == "sdpa"
    assert chosen(33, 33, torch.bfloat16, mask) == "flash_attention_2"
    assert chosen(12, 33, torch.bfloat16) == ("flash_attention_2" if flash == "flash-attn" else "fused")
    assert chosen(1, 33, torch.float32) == chosen(12, 33, torch.float32) == "fused"
    assert chosen(33, 33, torch.float32) == chosen(1, 33, torch.float32, mask) == "sdpa"
    assert chosen(33, 33, torch.bfloat16, output_attentions=True) == "fused"
