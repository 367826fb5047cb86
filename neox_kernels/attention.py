"""Attention by the fastest implementation that can serve the call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_kernels import attention_implementations as serve
from neox_kernels.attention_implementations import Call, Result
from neox_kernels.attention_masks import PreparedAttention, prepare_attention
from neox_kernels.checks import attention as checks
from neox_kernels.checks.attention import IMPLEMENTATIONS as IMPLEMENTATIONS

FLASH = "flash_attention_2"

# By name: what serves, and the reason why it cannot serve a call. In the order of preference.
_IMPLEMENTATIONS: dict[str, tuple[Callable[[Call], Result], Callable[[Call], str | None]]] = {
    FLASH: (serve.flash, serve.not_flash),
    "sdpa": (serve.sdpa, serve.not_sdpa),
    "fused": (serve.fused, serve.always),
    "eager": (serve.eager, serve.always),
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

    A query that sees no key gets zeros, and a gradient of zeros, whatever the implementation. FlashAttention also gives
    zeros to queries that are padding themselves (causal, ``q_len == k_len``), where the others give what they see.

    Args:
        q: (batch, q_len, nheads, head_dim); float32, bfloat16, float16 or float64, any strides.
        k, v: (batch, k_len, nheads, head_dim), of the dtype of ``q``, slices of a packed projection and views of a
            preallocated cache as they lie. ``v`` may be bfloat16 or float16 where ``q`` and ``k`` are float32: the
            result has its dtype.
        causal: query i sees key j only where ``j <= i + k_len - q_len``: the last query sees all.
        softmax_scale: what scores are multiplied with; default ``head_dim ** -0.5``.
        key_padding_mask: (batch, k_len), 1 or True for the keys that may be seen; see :func:`prepare_attention`.
        attn_mask: bool (True: may be seen) or floating (added to the scaled scores), broadcastable to
            (batch, nheads, q_len, k_len). Floating masks are float64 only beside float64 tensors, like ``head_mask``.
        head_mask: (nheads,), or broadcastable to (batch, nheads, 1, 1), floating: what each head's probabilities are
            multiplied with.
        dropout_p: probability of dropping a probability; the others are divided by ``1 - dropout_p``.
        output_attentions: also return the probabilities, after head mask and dropout.
        implementation: "flash_attention_2" (the flash-attn package, or torch's varlen attention on a GPU; what it
            cannot serve goes on to the next, with one warning), "sdpa" (PyTorch's scaled_dot_product_attention),
            "fused" (matmul, :func:`causal_softmax`, matmul; plain causal calls without a gradient in one pass of our
            own, on a CPU with AVX-512 or, in bfloat16, AMX), "eager" (plain PyTorch, as the families define it; the
            oracle), or "auto".
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
    name, reasons = _choose(call, implementation)
    if implementation == FLASH != name and not torch.compiler.is_compiling():
        _warn_of_fall(reasons[FLASH], name)
    return _IMPLEMENTATIONS[name][0](call)


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
    chosen, reasons = _choose(call, implementation)
    for name in _IMPLEMENTATIONS.keys() - reasons.keys() - {chosen}:
        reason = _IMPLEMENTATIONS[name][1](call)
        asked = implementation not in ("auto", FLASH)
        reasons[name] = reason or (f"{implementation} is asked for" if asked else f"{chosen} comes first here")
    return AttentionChoice(chosen, {name: reasons[name] for name in _IMPLEMENTATIONS if name in reasons})


def _order(call: Call, implementation: str) -> tuple[str, ...]:
    """The implementations to try, the best first."""
    if implementation not in ("auto", FLASH):
        return (implementation,)
    if call.q.device.type == "cpu":
        if serve.fused_is_faster(call) or serve.fused_is_truer(call):
            return (FLASH, "fused")
    elif implementation == "auto" and serve.sdpa_is_faster_on_gpu(call):
        return ("sdpa", FLASH, "fused")
    elif serve.fused_is_faster_on_gpu(call):
        return (FLASH, "fused")
    return (FLASH, "sdpa", "fused")


def _choose(call: Call, implementation: str) -> tuple[str, dict[str, str]]:
    """The implementation that serves, and why those before it do not."""
    reasons: dict[str, str] = {}
    for name in _order(call, implementation):
        reason = _IMPLEMENTATIONS[name][1](call)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    raise ValueError(f"implementation {implementation!r} cannot serve this call: {reasons[implementation]}")


@functools.cache
def _warn_of_fall(reason: str, name: str) -> None:
    warnings.warn(f"implementation {FLASH!r} cannot serve this call: {reason}; {name} does", UserWarning, stacklevel=4)


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
