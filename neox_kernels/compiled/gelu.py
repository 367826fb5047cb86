"""The compiled GELU, on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_kernels.compiled import library
from neox_kernels.compiled.library import find_op, mark_written, needs_grad, same_place

_GELU_TANH, _GELU_TANH_INFERENCE = find_op("gelu_tanh"), find_op("gelu_tanh", "inference")
_INPLACE = find_op("gelu_tanh_")


def gelu_tanh(x: Tensor, bias: Tensor | None = None, inplace: bool = False) -> Tensor:
    """See :func:`neox_kernels.gelu_tanh`."""
    if inplace:
        if needs_grad(x) or (bias is not None and needs_grad(bias)):
            raise ValueError("inplace must be False where a gradient is needed")
        _INPLACE(x, bias)
        mark_written(x)
        return x
    if bias is not None:
        x = x + bias
    result: Tensor = (_GELU_TANH if needs_grad(x) else _GELU_TANH_INFERENCE)(x)
    return result


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


def _register() -> None:
    @torch.library.register_fake("neox_kernels::gelu_tanh")
    @torch.library.register_fake("neox_kernels::gelu_tanh.inference")
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("neox_kernels::gelu_tanh_")
    def _(x: Tensor, bias: Tensor | None) -> None:
        same_place(x, bias)

    torch.library.register_autograd("neox_kernels::gelu_tanh", _backward, setup_context=_save)


if library.load_error is None:
    _register()
