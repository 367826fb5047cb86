"""Causal attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels.reference.softmax import causal_softmax


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See :func:`neox_kernels.ops.attention.causal_attention`."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.matmul(q.transpose(1, 2).to(compute), k.transpose(1, 2).to(compute).mT)
    probs = causal_softmax(scores, scale=scale, dtype=v.dtype)
    return torch.matmul(probs, v.transpose(1, 2)).transpose(1, 2).contiguous()


def serves_causal_attention(dtype: torch.dtype) -> bool:
    """No: this is slower than PyTorch's SDPA."""
    return False
