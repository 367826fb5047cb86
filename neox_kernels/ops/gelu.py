"""GELU by its tanh formula, which GPT-J calls gelu_new."""

from __future__ import annotations

from torch import Tensor

from neox_kernels import backends
from neox_kernels.checks.common import FLOATS, not_a_tensor, refuse


def gelu_tanh(x: Tensor) -> Tensor:
    """``x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2`` in one pass, in float32, rounded once.

    On a CPU by a kernel of ours, where PyTorch's takes the tanh itself; on a GPU PyTorch's is one launch, and serves.

    Args:
        x: of any shape and strides; float32, bfloat16, float16 or float64.

    Returns:
        Of the shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: ``x`` is no tensor of these.

    Source: Hendrycks and Gimpel, arXiv:1606.08415. Oracle: ``neox_kernels.reference.gelu_tanh``.
    """
    try:
        serve, _ = backends.select("gelu_tanh", x.device.type, x.dtype)
        result: Tensor = serve(x)
        return result
    except Exception as error:
        refuse(error, _require, x)


def _require(x: object) -> None:
    if not isinstance(x, Tensor):
        not_a_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, not {x.dtype}")
