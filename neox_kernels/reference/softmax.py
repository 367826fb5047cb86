"""Causal softmax in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels.reference.dropout import dropout_keep


def above_diagonal(q_len: int, k_len: int, device: torch.device) -> Tensor:
    """(q_len, k_len): the keys that a query does not see, the last query seeing all."""
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).triu(k_len - q_len + 1)


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
    """See :func:`neox_kernels.causal_softmax`; with ``dropout_p`` it needs ``rng``."""
    compute = torch.float64 if scores.dtype == torch.float64 else torch.float32
    logits = scores.to(compute) * scale
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        else:
            logits = logits + attn_mask.to(compute)
    if key_padding_mask is not None:
        logits = logits.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
    hidden = torch.zeros((), dtype=torch.bool, device=scores.device)
    if causal:
        hidden = above_diagonal(scores.shape[-2], scores.shape[-1], scores.device)
        logits = logits.masked_fill(hidden, -torch.inf)
    dead = (logits == -torch.inf).all(dim=-1, keepdim=True)
    # Zero in place of -inf: softmax would give such a row NaN, and its gradient too.
    probs = torch.softmax(logits.masked_fill(dead, 0.0), dim=-1)
    if dropout_p > 0:
        assert rng is not None
        keep = dropout_keep(rng, dropout_p, scores.shape)
        probs = torch.where(keep, probs * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0.0)
    if head_mask is not None:
        probs = probs * (head_mask.to(compute).view(-1, 1, 1) if head_mask.dim() == 1 else head_mask.to(compute))
    # Last, so that nothing that comes in for them, forward or backward, shows.
    probs = probs.masked_fill(dead | hidden, 0.0)
    return scores.copy_(probs) if inplace else probs.to(dtype or scores.dtype)
