"""The arguments of the softmax ops."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels.checks.common import (
    FLOATS,
    not_a_tensor,
    require_broadcast,
    require_flag,
    require_number,
    require_probability,
    require_writable,
    shape_of,
)


def require_causal_softmax(
    scores: object,
    scale: object,
    causal: object,
    key_padding_mask: object,
    attn_mask: object,
    head_mask: object,
    dropout_p: object,
    rng: object,
    inplace: object,
    dtype: object,
) -> None:
    """The arguments of :func:`neox_kernels.causal_softmax`."""
    if not isinstance(scores, Tensor):
        not_a_tensor("scores", scores)
    if scores.dtype not in FLOATS:
        raise TypeError(f"scores must be float32, bfloat16, float16 or float64, not {scores.dtype}")
    if scores.dim() != 4:
        raise ValueError(f"scores must be (batch, nheads, q_len, k_len), not of the shape {shape_of(scores)}")
    require_number("scale", scale)
    require_probability("dropout_p", dropout_p)
    require_flag("causal", causal)
    require_flag("inplace", inplace)
    batch, nheads, q_len, k_len = scores.shape
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, Tensor):
            not_a_tensor("key_padding_mask", key_padding_mask)
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, True for the keys to see, not {key_padding_mask.dtype}")
        if tuple(key_padding_mask.shape) != (batch, k_len):
            raise ValueError(
                f"key_padding_mask must be (batch, k_len), ({batch}, {k_len}), not {shape_of(key_padding_mask)}"
            )
        if key_padding_mask.device != scores.device:
            raise ValueError(
                f"key_padding_mask must be on {scores.device} like scores, not on {key_padding_mask.device}"
            )
    floats = FLOATS if scores.dtype == torch.float64 else FLOATS - {torch.float64}
    if attn_mask is not None:
        require_broadcast(
            "attn_mask", attn_mask, "scores", scores, (batch, nheads, q_len, k_len), floats | {torch.bool}
        )
    if head_mask is not None:
        flat = isinstance(head_mask, Tensor) and head_mask.dim() == 1
        require_broadcast(
            "head_mask", head_mask, "scores", scores, (nheads,) if flat else (batch, nheads, 1, 1), floats
        )
    if rng is not None:
        if not isinstance(rng, Tensor):
            not_a_tensor("rng", rng)
        if rng.dtype != torch.int64 or tuple(rng.shape) != (2,) or rng.device != scores.device:
            raise ValueError(
                f"rng must be (2,) int64 on {scores.device}, a seed and an offset, not {shape_of(rng)} {rng.dtype} on "
                f"{rng.device}"
            )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        raise TypeError(f"dtype must be None or a floating dtype, not {dtype!r}")
    if (dtype or scores.dtype) == torch.float64 and scores.dtype != torch.float64:
        raise TypeError(f"dtype must be float32, bfloat16 or float16 for scores of {scores.dtype}, not float64")
    if inplace:
        _require_inplace(scores, attn_mask, head_mask, dtype)


def _require_inplace(scores: Tensor, attn_mask: object, head_mask: object, dtype: object) -> None:
    require_writable("scores", scores)
    if dtype is not None and dtype != scores.dtype:
        raise ValueError(f"dtype must be None or {scores.dtype} like scores, which are written, not {dtype}")
    inputs = {"scores": scores, "attn_mask": attn_mask, "head_mask": head_mask}
    for name, x in inputs.items():
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"inplace must be False where {name} requires a gradient: its graph needs what would be lost"
            )
