"""The compiled causal attention, on CPUs with AVX-512 (float32) and with AMX (bfloat16)."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels.compiled import library
from neox_kernels.compiled.library import find_op, same_place

_ATTENTION, _SERVES = find_op("causal_attention"), find_op("serves_causal_attention")


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See :func:`neox_kernels.ops.attention.causal_attention`."""
    result: Tensor = _ATTENTION(q, k, v, scale)
    return result


def serves_causal_attention(dtype: torch.dtype) -> bool:
    """Whether this processor has the instructions for it."""
    serves: bool = _SERVES(dtype)
    return serves


def _register() -> None:
    @torch.library.register_fake("neox_kernels::causal_attention")
    def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        same_place(q, k, v)
        return q.new_empty(q.shape)


if library.load_error is None:
    _register()
