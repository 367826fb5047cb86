"""Causal softmax of attention scores: scale, masks, softmax, head mask and dropout in one pass over what is visible."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels import backends
from neox_kernels.checks.common import refuse
from neox_kernels.checks.softmax import require_causal_softmax


def causal_softmax(
    scores: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention probabilities: softmax of ``scale * scores + attn_mask`` over the keys that each query sees.

    All arithmetic is in float32, rounded once. What lies above the diagonal is neither read nor summed, only written as
    zero. A query that sees no key (or whose every score is -inf) gets a row of zeros, and a gradient of zeros.

    Args:
        scores: (batch, nheads, q_len, k_len); float32, bfloat16, float16 or float64, any strides, any lengths.
        scale: what scores are multiplied with first, such as ``head_dim ** -0.5``.
        causal: query i sees key j only where ``j <= i + k_len - q_len``: the last query sees all.
        key_padding_mask: (batch, k_len), bool: True for the keys that may be seen; the others are not looked at.
        attn_mask: bool (True: may be seen) or floating (added to the scaled scores), broadcastable to ``scores``; read
            through its strides, never expanded. Like ``head_mask``, float64 only beside float64 scores.
        head_mask: (nheads,), or broadcastable to (batch, nheads, 1, 1), floating: what each head's probabilities are
            multiplied with.
        dropout_p: probability of dropping an element; the others are divided by ``1 - dropout_p``.
        rng: (2,) int64 on the device of ``scores``, the seed and the offset of the dropout. The same ones drop the same
            elements, in every backend. Default: drawn from PyTorch's generator of the device.
        inplace: write into ``scores`` and return them; only where nothing requires a gradient.
        dtype: of the result; default that of ``scores``. The gradient is computed from the result as it was rounded.

    Returns:
        (batch, nheads, q_len, k_len), contiguous; ``scores`` itself with ``inplace``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together, a probability outside 0 to 1, or
            ``inplace`` where a gradient is needed.

    NaN or +inf among the keys that a query sees gives NaN up to the diagonal, padding included: ``torch.softmax`` too
    spreads it over the row.

    Source: the softmax of Vaswani et al., arXiv:1706.03762; dropout by Philox 4x32-10. Oracle:
    ``neox_kernels.reference.causal_softmax``.
    """
    try:
        serve, checks_itself = backends.select("causal_softmax", scores.device.type, scores.dtype)
        if not checks_itself:
            require_causal_softmax(
                scores, scale, causal, key_padding_mask, attn_mask, head_mask, dropout_p, rng, inplace, dtype
            )
        if dropout_p > 0 and rng is None:
            rng = torch.randint(2**63 - 1, (2,), device=scores.device)
        result: Tensor = serve(
            scores,
            scale=scale,
            causal=causal,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            head_mask=head_mask,
            dropout_p=dropout_p,
            rng=rng,
            inplace=inplace,
            dtype=dtype,
        )
        return result
    except Exception as error:
        refuse(
            error,
            require_causal_softmax,
            scores,
            scale,
            causal,
            key_padding_mask,
            attn_mask,
            head_mask,
            dropout_p,
            rng,
            inplace,
            dtype,
        )
