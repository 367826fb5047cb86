"""What the softmax benchmarks run: scores of known models, and contenders that are checked before they are timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_kernels import causal_softmax
from neox_kernels.reference import causal_softmax as oracle
from neox_kernels.testing import assert_within_budget

OP = "causal_softmax"  # whose backend the report names
LENGTHS = ((1, 1, 512), (8, 1, 512), (1, 128, 128), (4, 512, 512), (1, 2048, 2048))
GPU_LENGTHS = (*LENGTHS, (8, 2048, 2048))
DTYPES = (torch.float32, torch.bfloat16)
BASELINE = "transformers eager"
Call = Callable[[], object]


@dataclass(frozen=True)
class SoftmaxCase:
    """One layer's attention scores over a batch, no padding."""

    kind: str  # a key of CONTENDERS
    batch: int
    nheads: int
    q_len: int
    k_len: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def model(self) -> str:
        return f"heads-{self.nheads}"

    def __str__(self) -> str:
        shape = f"({self.batch}, {self.nheads}, {self.q_len}, {self.k_len})"
        return f"{self.kind}: {shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """Of the scores, read once and written once; backward, of output and gradient and what is written."""
        elements = self.batch * self.nheads * self.q_len * self.k_len
        return (3 if self.kind == "backward" else 2) * elements * self.dtype.itemsize


def cases(device: str = "cpu") -> Iterator[SoftmaxCase]:
    all_lengths = LENGTHS if device == "cpu" else GPU_LENGTHS
    for kind, nheads, lengths, dtype in itertools.product(CONTENDERS, (12, 16), all_lengths, DTYPES):
        if kind == "forward" or lengths[1] > 1:
            yield SoftmaxCase(kind, lengths[0], nheads, lengths[1], lengths[2], dtype, device)


class Inputs:
    """Scores, and the masks that transformers builds once for all layers."""

    scale = 0.125

    def __init__(self, case: SoftmaxCase) -> None:
        generator = torch.Generator(case.device).manual_seed(0)
        shape = case.batch, case.nheads, case.q_len, case.k_len
        self.scores = torch.randn(shape, generator=generator, device=case.device).mul_(8).to(case.dtype)
        every = torch.ones(1, 1, case.q_len, case.k_len, dtype=torch.bool, device=case.device)
        self.visible = every.tril(case.k_len - case.q_len)
        self.lowest = torch.tensor(torch.finfo(case.dtype).min, dtype=case.dtype, device=case.device)
        self.mask = torch.where(self.visible, torch.zeros_like(self.lowest), self.lowest)

    def eager(self, scores: Tensor) -> Tensor:
        """What transformers 5 does: scale, add a mask, softmax in float32, cast."""
        return torch.softmax(scores * self.scale + self.mask, dim=-1, dtype=torch.float32).to(scores.dtype)

    def old_eager(self, scores: Tensor) -> Tensor:
        """What transformers did before: scale, choose, add a mask, softmax, cast."""
        scores = torch.where(self.visible, scores * self.scale, self.lowest)
        return torch.softmax(scores + self.mask, dim=-1).to(scores.dtype)

    def fused(self, scores: Tensor, *, inplace: bool = False) -> Tensor:
        return causal_softmax(scores, scale=self.scale, inplace=inplace)

    def check(self, case: SoftmaxCase) -> None:
        # Few heads: the oracle in float64 takes eight times the memory.
        scores = self.scores[:1, :2]
        truth = oracle(scores.double(), scale=self.scale)
        assert_within_budget(self.fused(scores), self.old_eager(scores), truth, str(case))


def forward(case: SoftmaxCase, compiled: bool) -> dict[str, Call]:
    inputs = Inputs(case)
    inputs.check(case)
    scores, target = inputs.scores, torch.empty_like(inputs.scores)
    spare = scores.clone()
    calls: dict[str, Call] = {
        BASELINE: lambda: inputs.eager(scores),
        "transformers 4 eager": lambda: inputs.old_eager(scores),
        "torch.softmax": lambda: torch.softmax(scores, dim=-1),
        "neox_kernels": lambda: inputs.fused(scores),
        "neox_kernels in place": lambda: inputs.fused(spare, inplace=True),
        "memcpy to fresh memory": lambda: scores.clone(),
        "memcpy": lambda: target.copy_(scores),
    }
    if compiled:
        fast = torch.compile(inputs.eager, dynamic=False)
        calls["transformers compiled"] = lambda: fast(scores)
    return calls


def backward(case: SoftmaxCase, compiled: bool) -> dict[str, Call]:
    inputs = Inputs(case)
    inputs.check(case)
    scores = inputs.scores.requires_grad_()
    grad = torch.randn_like(inputs.scores)

    def call_of(function: Callable[[Tensor], Tensor]) -> Call:
        with torch.enable_grad():
            output = function(scores)
        return lambda: torch.autograd.grad(output, scores, grad, retain_graph=True)

    calls = {
        BASELINE: call_of(inputs.eager),
        "transformers 4 eager": call_of(inputs.old_eager),
        "torch.softmax": call_of(lambda x: torch.softmax(x, dim=-1)),
        "neox_kernels": call_of(inputs.fused),
    }
    if compiled:
        calls["transformers compiled"] = call_of(torch.compile(inputs.eager, dynamic=False))
    return calls


def liger(case: SoftmaxCase) -> Call:
    """Liger's softmax: neither scale nor mask, as torch.softmax."""
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    scores = Inputs(case).scores

    def call() -> Tensor:
        probs: Tensor = LigerSoftmaxFunction.apply(scores)
        return probs

    truth = torch.softmax(scores[:1, :2].double(), -1)
    assert_within_budget(call()[:1, :2], torch.softmax(scores[:1, :2], -1), truth, str(case))
    return call


PEERS = {"forward": {"Liger, no mask": liger}}
CONTENDERS = {"forward": forward, "backward": backward}


def contenders(case: SoftmaxCase, *, compiled: bool = False) -> dict[str, Call]:
    """By name; BASELINE is what the others are compared with. Results are checked against the float64 oracle first."""
    return CONTENDERS[case.kind](case, compiled)
