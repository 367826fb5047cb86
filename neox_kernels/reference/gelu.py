"""GELU by its tanh formula in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def gelu_tanh(x: Tensor, bias: Tensor | None = None, inplace: bool = False) -> Tensor:
    """See :func:`neox_kernels.gelu_tanh`."""
    if inplace:
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            raise ValueError("inplace must be False where a gradient is needed")
        written: Tensor = torch.ops.aten.gelu_(x if bias is None else x.add_(bias), approximate="tanh")
        return written
    if bias is not None:
        x = x + bias
    return functional.gelu(x.contiguous(), approximate="tanh")
