"""What the GELU benchmarks run: the widest activations of known models, against PyTorch's and transformers' code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from neox_kernels import gelu_tanh
from neox_kernels.testing import assert_within_budget

OP = "gelu_tanh"  # whose backend the report names
MODELS = {"gptj-12x768": 3072, "gpt-j-6b": 16384}  # features
LENGTHS = ((1, 1), (1, 512), (4, 512))
DTYPES = (torch.float32, torch.bfloat16)
BASELINE = "transformers eager"
Call = Callable[[], object]
PEERS: dict[str, dict[str, Callable[[object], Call]]] = {}


@dataclass(frozen=True)
class GeluCase:
    """What lies between the two projections of one layer's MLP."""

    kind: str  # a key of CONTENDERS
    model: str  # a key of MODELS
    batch: int
    seqlen: int
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        shape = f"({self.batch}, {self.seqlen}, {MODELS[self.model]})"
        return f"{self.kind}: {self.model} {shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        return 2 * self.batch * self.seqlen * MODELS[self.model] * self.dtype.itemsize


def cases(device: str = "cpu") -> Iterator[GeluCase]:
    for kind, model, lengths, dtype in itertools.product(CONTENDERS, MODELS, LENGTHS, DTYPES):
        yield GeluCase(kind, model, *lengths, dtype, device)


def eager(x: Tensor) -> Tensor:
    """What transformers' GPT-J does."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def forward(case: GeluCase, compiled: bool) -> dict[str, Call]:
    generator = torch.Generator(case.device).manual_seed(0)
    shape = case.batch, case.seqlen, MODELS[case.model]
    x = torch.randn(shape, generator=generator, device=case.device).to(case.dtype)
    target = torch.empty_like(x)
    assert_within_budget(gelu_tanh(x), functional.gelu(x, approximate="tanh"), eager(x.double()), str(case))
    calls: dict[str, Call] = {
        BASELINE: lambda: eager(x),
        "torch gelu": lambda: functional.gelu(x, approximate="tanh"),
        "neox_kernels": lambda: gelu_tanh(x),
        "memcpy": lambda: target.copy_(x),
    }
    if compiled:
        fast = torch.compile(eager, dynamic=False)
        calls["transformers compiled"] = lambda: fast(x)
    return calls


CONTENDERS = {"forward": forward}


def contenders(case: GeluCase, *, compiled: bool = False) -> dict[str, Call]:
    """By name; BASELINE is what the others are compared with. Results are checked before anything is timed."""
    return CONTENDERS[case.kind](case, compiled)
