"""Causal attention by a kernel of ours, for :func:`neox_kernels.attention` alone."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels import backends


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale * q k^T) v`` in one pass that holds no scores; query i sees key j where
    ``j <= i + k_len - q_len``, and one that sees none gets zeros. On a CPU, without a gradient.

    Args:
        q: (batch, q_len, nheads, head_dim), of a dtype that :func:`serves_causal_attention` takes.
        k, v: (batch, k_len, nheads, head_dim), of the same dtype.
        scale: above zero.

    Returns:
        Of the shape and dtype of ``q``, contiguous.

    Source: Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135. Oracle:
    ``neox_kernels.reference.causal_attention``.
    """
    serve, _ = backends.select("causal_attention", "cpu", q.dtype)
    result: Tensor = serve(q, k, v, scale)
    return result


def serves_causal_attention(dtype: torch.dtype) -> bool:
    """Whether a kernel of ours serves on this processor: with AVX-512 float32, with AMX bfloat16."""
    serve, _ = backends.select("serves_causal_attention", "cpu", dtype)
    serves: bool = serve(dtype)
    return serves
