"""GELU by its tanh formula in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def gelu_tanh(x: Tensor) -> Tensor:
    """See :func:`neox_kernels.gelu_tanh`."""
    return functional.gelu(x.contiguous(), approximate="tanh")
