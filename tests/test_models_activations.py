"""Bias and GELU in one pass over what a linear layer gave: the same numbers, and nobody passed by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neox_kernels.models import activations
from neox_kernels.models.activations import activated, activation
from neox_kernels.testing import assert_within_budget


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every GELU, whether it was in place."""
    seen: list[bool] = []
    gelu_tanh = activations.gelu_tanh

    def record(*args: Any, inplace: bool = False) -> Tensor:
        seen.append(inplace)
        return gelu_tanh(*args, inplace=inplace)

    monkeypatch.setattr(activations, "gelu_tanh", record)
    return seen


def inputs(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(24, 96, bias=bias).to(dtype), activation("gelu_new"), torch.randn(2, 5, 24).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_the_same_numbers(dtype: torch.dtype, passes: list[bool]) -> None:
    linear, act, x = inputs(dtype)
    same = nn.functional.gelu(linear(x), approximate="tanh")
    truth = nn.functional.gelu(linear.double()(x.double()), approximate="tanh")
    got = activated(linear.to(dtype), act, x)
    assert passes == [True] and got.shape == (2, 5, 96)
    assert_within_budget(got, same, truth)


def test_who_looks_sees_the_calls(passes: list[bool]) -> None:
    linear, act, x = inputs()
    with torch.no_grad():
        middle = linear(x)
        expected = act(middle)
        for module, output in ((linear, middle), (act, expected)):
            calls: list[Any] = []
            handle = module.register_forward_hook(lambda *args, calls=calls: calls.append(args[-1]))
            assert torch.equal(activated(linear, act, x), expected)
            assert len(calls) == 1 and torch.equal(calls[0], output)
            handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            assert activated(linear, act, x).dtype == torch.bfloat16
        activated(linear, nn.ReLU(), x)
        activated(*inputs(bias=False))
    activated(linear, act, x).sum().backward()
    assert linear.weight.grad is not None and linear.bias.grad is not None
    assert not any(passes)
