"""The language model's head, which takes a third of a short forward on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neox_kernels import memory
from neox_kernels.models.forward import may_stand_for

_COLUMNS = 2048  # of the vocabulary at a time: what they give stays in the cache until it is converted


def logits_of(head: nn.Linear, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``head(hidden)``, in ``dtype`` where one is given.

    On a CPU, without a gradient, memory that is so large is written once, and in pages of 2 MB.

    Args:
        hidden: (..., hidden_size).

    Returns:
        (..., vocab_size).
    """
    shape = (*hidden.shape[:-1], head.out_features)
    if not may_stand_for(head, hidden) or math.prod(shape) * hidden.dtype.itemsize < memory.LARGE:
        logits: Tensor = head(hidden)
        return logits if dtype is None else logits.to(dtype)
    rows, weight, bias = hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias
    out = memory.empty((rows.shape[0], head.out_features), dtype or hidden.dtype)
    if out.dtype == hidden.dtype == torch.float32:  # large matrices are its fastest
        torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)
    else:
        for begin in range(0, head.out_features, _COLUMNS):
            some = slice(begin, begin + _COLUMNS)
            out[:, some] = F.linear(rows, weight[some], None if bias is None else bias[some])
    return out.view(shape)
