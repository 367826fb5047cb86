"""GELU by tanh: the widest activations of a layer, as GPT-J has them between the two projections of its MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from neox_kernels import gelu_tanh
from neox_kernels.bench.case import MEMCPY, Case, Family, Work, compile_for_shape
from neox_kernels.bench.harness import Call
from neox_kernels.testing import assert_within_budget


def eager(x: Tensor) -> Tensor:
    """What transformers' GPT-J does."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Forward(Work):
    signature = "function(x) -> y; (batch, seqlen, features)"

    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        generator = torch.Generator(case.device).manual_seed(0)
        self.x = torch.randn(*case.size, shape, generator=generator, device=case.device).to(case.dtype)
        self.args = (self.x,)
        self.bytes = 2 * self.x.nbytes

    def ours(self) -> Call:
        return self.call_of(gelu_tanh)

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {
            "transformers": lambda: self.call_of(eager),
            "compile": lambda: self.call_of(compile_for_shape(eager)),
            "torch": lambda: self.call_of(lambda x: functional.gelu(x, approximate="tanh")),
        }

    def limits(self) -> dict[str, Call]:
        there = torch.empty_like(self.x)
        return {MEMCPY: lambda: there.copy_(self.x)}

    def check(self, result: Any) -> None:
        # By transformers' steps, as the other families: each rounds once more than torch's own op.
        assert_within_budget(result, eager(self.x), eager(self.x.double()), str(self.case))


class Bias(Forward):
    """A bias first, as a model's linear layer has it; ours in the same pass and in place."""

    signature = "function(x, bias) -> y; (batch, seqlen, features), (features,)"

    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        generator = torch.Generator(case.device).manual_seed(1)
        self.bias = torch.randn(shape, generator=generator, device=case.device).to(case.dtype)
        self.args = self.x, self.bias

    def ours(self) -> Call:
        spare = self.x.clone()
        return lambda: gelu_tanh(spare, self.bias, inplace=True)

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {
            "transformers": lambda: self.call_of(lambda x, bias: eager(x + bias)),
            "compile": lambda: self.call_of(compile_for_shape(lambda x, bias: eager(x + bias))),
            "torch": lambda: self.call_of(lambda x, bias: functional.gelu(x + bias, approximate="tanh")),
        }

    def check(self, result: Any) -> None:
        exact = eager(self.x.double() + self.bias.double())
        assert_within_budget(result, eager(self.x + self.bias), exact, str(self.case))


SIZES = ((1, 1), (1, 128), (1, 512), (4, 512))
FAMILY = Family(
    name="gelu",
    op="gelu_tanh",
    works={"forward": Forward, "bias": Bias},
    shapes={"gptj-12x768": 3072, "gpt-j-6b": 16384},
    sizes={"forward": SIZES, "bias": SIZES},
    eager="transformers",
    quick=lambda case: case.shape == "gptj-12x768",
)
