"""The arguments of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels.checks.common import (
    FLOATS,
    not_a_tensor,
    require_broadcast,
    require_flag,
    require_int,
    require_number,
    require_probability,
    shape_of,
)
from neox_kernels.checks.varlen import MASKS, may_look

IMPLEMENTATIONS = ("auto", "flash_attention_2", "sdpa", "fused", "eager")


def require_lengths(q_len: object, k_len: object) -> None:
    for name, length in (("q_len", q_len), ("k_len", k_len)):
        require_int(name, length)
        assert isinstance(length, int | torch.SymInt)
        if length < 0:
            raise ValueError(f"{name} must not be negative, not {length}")


def require_masks(key_padding_mask: object, attn_mask: object, k_len: int) -> None:
    """The masks by themselves; what they must share with q is for :func:`require_attention`."""
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, Tensor):
            not_a_tensor("key_padding_mask", key_padding_mask)
        if key_padding_mask.dtype not in MASKS:
            raise TypeError(
                f"key_padding_mask must be bool, of an integer dtype or of a floating one, not {key_padding_mask.dtype}"
            )
        if key_padding_mask.dim() != 2 or key_padding_mask.shape[1] != k_len:
            raise ValueError(
                f"key_padding_mask must be (batch, k_len), (batch, {k_len}), not {shape_of(key_padding_mask)}"
            )
        if key_padding_mask.dtype != torch.bool and may_look(key_padding_mask):
            other = ((key_padding_mask != 0) & (key_padding_mask != 1)).nonzero()
            if len(other):
                b, j = other[0].tolist()
                raise ValueError(
                    f"key_padding_mask must hold only 0 and 1, not {key_padding_mask[b, j].item()} (at [{b}, {j}])"
                )
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            not_a_tensor("attn_mask", attn_mask)
        if attn_mask.dtype not in FLOATS and attn_mask.dtype != torch.bool:
            raise TypeError(f"attn_mask must be bool or of a floating dtype, not {attn_mask.dtype}")


def _require_heads(name: str, x: object, q: Tensor | None) -> Tensor:
    if not isinstance(x, Tensor):
        not_a_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be (batch, seqlen, nheads, head_dim), not of the shape {shape_of(x)}")
    if q is None:
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {x.dtype}")
        return x
    if x.shape[0] != q.shape[0] or x.shape[2:] != q.shape[2:]:
        raise ValueError(f"{name} must have the shape of q, {shape_of(q)}, but for its length, not {shape_of(x)}")
    lower = name == "v" and q.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    if x.dtype != q.dtype and not lower:
        raise TypeError(f"{name} must be {q.dtype} like q, not {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, not on {x.device}")
    return x


def require_attention(
    q: object,
    k: object,
    v: object,
    softmax_scale: object,
    head_mask: object,
    dropout_p: object,
    output_attentions: object,
    implementation: object,
    upcast_scores: object,
) -> None:
    """The arguments of :func:`neox_kernels.attention`, but for the masks."""
    q = _require_heads("q", q, None)
    k = _require_heads("k", k, q)
    v = _require_heads("v", v, q)
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v must have the length of k, {k.shape[1]}, not {v.shape[1]}")
    if softmax_scale is not None:
        require_number("softmax_scale", softmax_scale)
    if head_mask is not None:
        floats = FLOATS if q.dtype == torch.float64 else FLOATS - {torch.float64}
        flat = isinstance(head_mask, Tensor) and head_mask.dim() == 1
        nheads = q.shape[2]
        require_broadcast("head_mask", head_mask, "q", q, (nheads,) if flat else (q.shape[0], nheads, 1, 1), floats)
    require_probability("dropout_p", dropout_p)
    require_flag("output_attentions", output_attentions)
    require_flag("upcast_scores", upcast_scores)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}")


def require_prepared(
    q: Tensor, k: Tensor, q_len: int, k_len: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> None:
    """What was prepared against the tensors that it is used with."""
    if (q.shape[1], k.shape[1]) != (q_len, k_len):
        raise ValueError(
            f"prepared must be for the lengths of q and k, {q.shape[1]} and {k.shape[1]}, not for {q_len} and {k_len}"
        )
    batch, _, nheads, _ = q.shape
    if key_padding_mask is not None:
        if key_padding_mask.shape[0] != batch:
            raise ValueError(
                f"key_padding_mask must be (batch, k_len), ({batch}, {k_len}), not {shape_of(key_padding_mask)}"
            )
        if key_padding_mask.device != q.device:
            raise ValueError(f"key_padding_mask must be on {q.device} like q, not on {key_padding_mask.device}")
    if attn_mask is not None:
        floats = FLOATS if q.dtype == torch.float64 else FLOATS - {torch.float64}
        require_broadcast("attn_mask", attn_mask, "q", q, (batch, nheads, q_len, k_len), floats | {torch.bool})
