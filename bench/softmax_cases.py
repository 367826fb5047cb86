"""Causal softmax of one layer's attention scores, no padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neox_kernels import causal_softmax
from neox_kernels.bench.case import MEMCPY, Case, Family, Work, compile_for_shape, needs_gpu
from neox_kernels.bench.harness import Call
from neox_kernels.reference import causal_softmax as oracle
from neox_kernels.testing import assert_within_budget, eager_causal_softmax


class Forward(Work):
    """Scores of standard deviation 8, and the masks that transformers builds once for all layers."""

    signature = """function(scores, *, scale) -> probabilities
    scores: (batch, nheads, q_len, k_len); the last query sees all keys"""

    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        batch, q_len, k_len = case.size
        generator = torch.Generator(case.device).manual_seed(0)
        scores = torch.randn(batch, shape, q_len, k_len, generator=generator, device=case.device)
        self.scores = scores.mul_(8).to(case.dtype)
        self.scale = 0.125
        self.args, self.options = (self.scores,), {"scale": self.scale}
        self.bytes = 2 * self.scores.nbytes  # read once and written once
        self.visible = torch.ones(1, 1, q_len, k_len, dtype=torch.bool, device=case.device).tril(k_len - q_len)
        self.lowest = torch.tensor(torch.finfo(case.dtype).min, dtype=case.dtype, device=case.device)
        self.mask = torch.where(self.visible, torch.zeros_like(self.lowest), self.lowest)

    def ours(self) -> Call:
        return self.call_of(causal_softmax)

    def variants(self) -> dict[str, Call]:
        spare = self.scores.clone()
        return {"neox_kernels, in place": lambda: causal_softmax(spare, inplace=True, **self.options)}

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {
            "transformers": lambda: self.call_of(self._transformers),
            "transformers-4": lambda: self.call_of(self._transformers_4),
            "compile": lambda: self.call_of(compile_for_shape(self._transformers)),
            "torch, no mask": lambda: self.unmasked(lambda scores: torch.softmax(scores, dim=-1)),
            "liger, no mask": self._liger,
        }

    def limits(self) -> dict[str, Call]:
        scores, there = self.scores.detach(), torch.empty_like(self.scores)
        return {MEMCPY: lambda: there.copy_(scores), "memcpy to fresh memory": scores.clone}

    def check(self, result: Any) -> None:
        # Few heads: the oracle in float64 takes eight times the memory.
        scores = self.scores.detach()[:1, :2]
        truth = oracle(scores.double(), **self.options)
        assert_within_budget(result[:1, :2], eager_causal_softmax(scores, **self.options), truth, str(self.case))

    def _transformers(self, scores: Tensor, *, scale: float) -> Tensor:
        """What transformers 5 does: scale, add a mask, softmax in float32, cast."""
        return torch.softmax(scores * scale + self.mask, dim=-1, dtype=torch.float32).to(scores.dtype)

    def _transformers_4(self, scores: Tensor, *, scale: float) -> Tensor:
        """What transformers did before: scale, choose, add a mask, softmax, cast."""
        scores = torch.where(self.visible, scores * scale, self.lowest)
        return torch.softmax(scores + self.mask, dim=-1).to(scores.dtype)

    def unmasked(self, function: Callable[[Tensor], Tensor]) -> Call:
        """A softmax without scale and mask: less than the others do, and checked by what it says that it is."""
        few = self.scores.detach()[:1, :2]
        truth = torch.softmax(few.double(), -1)
        assert_within_budget(function(few), torch.softmax(few, -1), truth, str(self.case))
        return self.call_of(lambda scores, scale: function(scores))

    def _liger(self) -> Call:
        needs_gpu(self.case, "Liger's softmax (Triton)")
        from liger_kernel.ops.softmax import LigerSoftmaxFunction

        return self.unmasked(LigerSoftmaxFunction.apply)


class Backward(Forward):
    """The gradient of the scores, the forward done before."""

    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        self.scores.requires_grad_()
        generator = torch.Generator(case.device).manual_seed(1)
        self.grad = torch.randn(self.scores.shape, generator=generator, device=case.device).to(case.dtype)
        self.bytes = 3 * self.scores.nbytes  # probabilities and their gradient read, that of the scores written

    def call_of(self, function: Callable[..., Any]) -> Call:
        with torch.enable_grad():
            output = function(*self.args, **self.options)
        return lambda: torch.autograd.grad(output, self.scores, self.grad, retain_graph=True)[0]

    def variants(self) -> dict[str, Call]:
        return {}

    def check(self, result: Any) -> None:
        few = self.scores.detach()[:1, :2]

        def gradient(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
            x = few.to(dtype).requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(function(x, **self.options), x, self.grad[:1, :2].to(dtype))[0]

        same, truth = gradient(eager_causal_softmax, few.dtype), gradient(oracle, torch.float64)
        assert_within_budget(result[:1, :2], same, truth, str(self.case))


SIZES = ((1, 1, 512), (8, 1, 512), (1, 128, 128), (1, 512, 512), (4, 512, 512), (1, 2048, 2048))
FAMILY = Family(
    name="softmax",
    op="causal_softmax",
    works={"forward": Forward, "backward": Backward},
    shapes={"12 heads": 12, "16 heads": 16},
    sizes={"forward": SIZES, "backward": tuple(size for size in SIZES if size[1] > 1)},
    gpu_sizes=dict.fromkeys(("forward", "backward"), ((8, 2048, 2048),)),
    size_names=("batch", "q_len", "k_len"),
    eager="transformers",
    quick=lambda case: case.shape == "12 heads" and case.size != (4, 512, 512),
    backward=frozenset({"backward"}),
)
