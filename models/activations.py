"""The activations that configurations name."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from neox_kernels import gelu_tanh
from neox_kernels.models.forward import may_stand_for, watched


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class TanhGELU(nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        return gelu_tanh(input)


def activated(linear: nn.Linear, act: nn.Module, x: Tensor) -> Tensor:
    """``act(linear(x))``; where nobody sees what lies between, bias and GELU in one pass over it."""
    if type(act) is TanhGELU and not watched(act) and linear.bias is not None and may_stand_for(linear, x):
        return gelu_tanh(F.linear(x, linear.weight), linear.bias, inplace=True)
    out: Tensor = act(linear(x))
    return out


class _ClippedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x).clamp(-10, 10)


_TANH = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")  # one formula
_MODULES: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "gelu_10": _ClippedGELU,
    "quick_gelu": _QuickGELU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "linear": nn.Identity,
}


ACTIVATIONS = frozenset((*_TANH, *_MODULES))


def activation(name: str) -> nn.Module:
    """The module of an activation that a configuration names, one of ``ACTIVATIONS``."""
    return TanhGELU() if name in _TANH else _MODULES[name]()
