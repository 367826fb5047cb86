"""GELU by its tanh formula, which GPT-J calls gelu_new."""

from __future__ import annotations

from torch import Tensor

from neox_kernels import backends
from neox_kernels.checks.common import FLOATS, not_a_tensor, refuse, require_flag, shape_of


def gelu_tanh(x: Tensor, bias: Tensor | None = None, *, inplace: bool = False) -> Tensor:
    """``x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2`` in one pass, in float32, rounded once.

    On a CPU by a kernel of ours, where PyTorch's takes the tanh itself; on a GPU PyTorch's is one launch, and serves.

    Args:
        x: of any shape and strides; float32, bfloat16, float16 or float64.
        bias: of the last dimension of ``x``, of its dtype, added first: with ``inplace``, on a CPU, in the same pass.
        inplace: write into ``x``, which is contiguous, and return it; only where nothing requires a gradient.

    Returns:
        Of the shape and dtype of ``x``, contiguous; ``x`` itself with ``inplace``.

    Raises:
        TypeError: ``x`` or ``bias`` is no tensor of these.
        ValueError: ``bias`` does not fit ``x``, or ``inplace`` where a gradient is needed or ``x`` is not contiguous.

    Source: Hendrycks and Gimpel, arXiv:1606.08415. Oracle: ``neox_kernels.reference.gelu_tanh``.
    """
    try:
        if bias is not None or inplace is not False:
            _require(x, bias, inplace)
        serve, _ = backends.select("gelu_tanh", x.device.type, x.dtype)
        result: Tensor = serve(x) if bias is None and not inplace else serve(x, bias, inplace)
        return result
    except Exception as error:
        refuse(error, _require, x, bias, inplace)


def _require(x: object, bias: object, inplace: bool) -> None:
    if not isinstance(x, Tensor):
        not_a_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    require_flag("inplace", inplace)
    if bias is not None:
        if not isinstance(bias, Tensor):
            not_a_tensor("bias", bias)
        if bias.dtype != x.dtype:
            raise TypeError(f"bias must be {x.dtype} like x, not {bias.dtype}")
        if bias.dim() != 1 or bias.shape != x.shape[-1:]:
            raise ValueError(f"bias must be of the last dimension of x, {shape_of(x)}, not of shape {shape_of(bias)}")
    if inplace and not x.is_contiguous():
        raise ValueError("x must be contiguous where inplace is True")
