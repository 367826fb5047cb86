"""Attention by the fastest implementation that can serve the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from neox_kernels.attention_masks import PreparedAttention, prepare_attention
from neox_kernels.checks import attention as checks
from neox_kernels.ops.softmax import causal_softmax

Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Call:
    """The arguments of a call, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    masks: PreparedAttention
    head_mask: Tensor | None
    dropout_p: float
    output_attentions: bool
    upcast_scores: bool

    def needs_grad(self) -> bool:
        masks = (self.masks.attn_mask, self.head_mask)
        return torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (self.q, self.k, self.v, *masks)
        )


def _eager(call: Call) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    if call.upcast_scores:  # GPT-J
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = torch.matmul(q.to(compute), k.to(compute).mT) * call.scale
    else:  # GPT-NeoX
        scores = torch.matmul(q, k.mT) * call.scale
    masks = call.masks
    seen = masks.visible(q.device)
    if masks.attn_mask is not None and masks.attn_mask.dtype != torch.bool:
        scores = scores + masks.attn_mask
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    # A softmax over nothing is NaN, and so is its gradient.
    probs = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1, dtype=_compute(scores)).masked_fill(dead, 0.0)
    probs = dropout(probs.to(v.dtype), call.dropout_p)
    if call.head_mask is not None:
        probs = probs * _by_head(call.head_mask, probs.dtype)
    return torch.matmul(probs, v).transpose(1, 2), probs if call.output_attentions else None


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_head(head_mask: Tensor, dtype: torch.dtype) -> Tensor:
    return (head_mask[:, None, None] if head_mask.dim() == 1 else head_mask).to(dtype)


def _fused(call: Call) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    if call.upcast_scores:
        q, k = q.to(_compute(q)), k.to(_compute(k))
    scores = torch.matmul(q, k.mT)
    probs = causal_softmax(
        scores,
        scale=call.scale,
        causal=call.masks.causal,
        key_padding_mask=call.masks.key_padding_mask,
        attn_mask=call.masks.attn_mask,
        head_mask=call.head_mask,
        dropout_p=call.dropout_p,
        inplace=scores.dtype == v.dtype and not call.needs_grad(),
        dtype=v.dtype,
    )
    return torch.matmul(probs, v).transpose(1, 2), probs if call.output_attentions else None


def _sdpa(call: Call) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    masks = call.masks
    mask = dead = None
    # torch's is_causal aligns top-left: the same only for a square.
    square = masks.causal and masks.q_len == masks.k_len and masks.key_padding_mask is None and masks.attn_mask is None
    if not square:
        mask, dead = masks.for_sdpa(q.device)
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
            mask = mask.to(_compute(q))
    out = scaled_dot_product_attention(q, k, v, mask, call.dropout_p, is_causal=square, scale=call.scale)
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2), None


def _not_sdpa(call: Call) -> str | None:
    if call.output_attentions:
        return "it gives no probabilities"
    if call.head_mask is not None:
        return "it takes no head mask"
    return None


def _always(call: Call) -> str | None:
    return None


# By name: what serves, and the reason why it cannot serve a call. In the order of preference.
_IMPLEMENTATIONS: dict[str, tuple[Callable[[Call], Result], Callable[[Call], str | None]]] = {
    "sdpa": (_sdpa, _not_sdpa),
    "fused": (_fused, _always),
    "eager": (_eager, _always),
}


@dataclass(frozen=True)
class AttentionChoice:
    """Which implementation serves a call, and the reason of every other, by name."""

    implementation: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"attention: {self.implementation}"]
        lines.extend(f"    not {name}: {reason}" for name, reason in self.reasons.items())
        return "\n".join(lines)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    output_attentions: bool = False,
    implementation: str = "auto",
    upcast_scores: bool = False,
    prepared: PreparedAttention | None = None,
) -> Result:
    """Attention, ``softmax(softmax_scale * q k^T + masks) v``, by the fastest implementation that can serve the call.

    A query that sees no key gets zeros, and a gradient of zeros, whatever the implementation.

    Args:
        q: (batch, q_len, nheads, head_dim); float32, bfloat16, float16 or float64, any strides.
        k, v: (batch, k_len, nheads, head_dim), of the dtype of ``q``: slices of a packed projection and views of a
            preallocated cache as they lie.
        causal: query i sees key j only where ``j <= i + k_len - q_len``: the last query sees all.
        softmax_scale: what scores are multiplied with; default ``head_dim ** -0.5``.
        key_padding_mask: (batch, k_len), 1 or True for the keys that may be seen; see :func:`prepare_attention`.
        attn_mask: bool (True: may be seen) or floating (added to the scaled scores), broadcastable to
            (batch, nheads, q_len, k_len). Floating masks are float64 only beside float64 tensors, like ``head_mask``.
        head_mask: (nheads,), or broadcastable to (batch, nheads, 1, 1), floating: what each head's probabilities are
            multiplied with.
        dropout_p: probability of dropping a probability; the others are divided by ``1 - dropout_p``.
        output_attentions: also return the probabilities, after head mask and dropout.
        implementation: "sdpa" (PyTorch's scaled_dot_product_attention), "fused" (matmul, :func:`causal_softmax`,
            matmul), "eager" (plain PyTorch, as the families define it; the oracle), or "auto".
        upcast_scores: multiply q and k in float32, as GPT-J does, in ``fused`` and ``eager``; the others hold scores in
            float32 anyway.
        prepared: from :func:`prepare_attention`, in place of ``key_padding_mask``, ``attn_mask`` and ``causal``: what
            is made of the masks is then made once, and not in every layer.

    Returns:
        The result, (batch, q_len, nheads, head_dim), and the probabilities, (batch, nheads, q_len, k_len), or None.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together, or a named implementation that cannot
            serve the call.

    Source: Vaswani et al., arXiv:1706.03762. Oracle: ``implementation="eager"`` on float64.
    """
    call = _call(
        q, k, v, causal, softmax_scale, key_padding_mask, attn_mask, head_mask, dropout_p, output_attentions,
        implementation, upcast_scores, prepared,
    )  # fmt: skip
    choice = _choose(call, implementation)
    return _IMPLEMENTATIONS[choice.implementation][0](call)


def explain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    output_attentions: bool = False,
    implementation: str = "auto",
    upcast_scores: bool = False,
    prepared: PreparedAttention | None = None,
) -> AttentionChoice:
    """Say which implementation would serve a call of :func:`attention`, and why each other would not.

    Args:
        q, k, v, causal, softmax_scale, key_padding_mask, attn_mask, head_mask, dropout_p, output_attentions,
            implementation, upcast_scores, prepared: see :func:`attention`. Nothing is computed.

    Returns:
        An :class:`AttentionChoice`; it prints well.

    Raises:
        ValueError, TypeError: as :func:`attention`.
    """
    call = _call(
        q, k, v, causal, softmax_scale, key_padding_mask, attn_mask, head_mask, dropout_p, output_attentions,
        implementation, upcast_scores, prepared,
    )  # fmt: skip
    return _choose(call, implementation)


def _choose(call: Call, implementation: str) -> AttentionChoice:
    chosen, reasons = "", {}
    for name, (_, against) in _IMPLEMENTATIONS.items():
        reason = against(call)
        if implementation == name and reason is not None:
            raise ValueError(f"implementation {name!r} cannot serve this call: {reason}")
        if reason is None and implementation not in ("auto", name):
            reason = f"{implementation} is asked for"
        if reason is None and chosen:
            reason = f"{chosen} comes first"
        if reason is None:
            chosen = name
        else:
            reasons[name] = reason
    return AttentionChoice(chosen, reasons)


def _call(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None, key_padding_mask: Tensor | None,
    attn_mask: Tensor | None, head_mask: Tensor | None, dropout_p: float, output_attentions: bool, implementation: str,
    upcast_scores: bool, prepared: PreparedAttention | None,
) -> Call:  # fmt: skip
    checks.require_attention(
        q, k, v, softmax_scale, head_mask, dropout_p, output_attentions, implementation, upcast_scores
    )
    if prepared is None:
        prepared = prepare_attention(q.shape[1], k.shape[1], key_padding_mask, attn_mask, causal)
    elif not isinstance(prepared, PreparedAttention):
        raise TypeError(f"prepared must be what prepare_attention returns, not {type(prepared).__name__}")
    elif key_padding_mask is not None or attn_mask is not None or causal is not True:
        raise ValueError("key_padding_mask, attn_mask and causal must be left out where prepared says them")
    checks.require_prepared(q, k, prepared.q_len, prepared.k_len, prepared.key_padding_mask, prepared.attn_mask)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return Call(q, k, v, scale, prepared, head_mask, float(dropout_p), output_attentions, upcast_scores)
