"""What the swap benchmarks run: prefill, one step of decoding and of training, by stock transformers and swapped."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from models_cases import CONFIGS, DTYPES
from torch import Tensor

import neox_kernels
from neox_kernels.testing import error_budget, max_error

OP = "apply_rotary_qk"  # whose backend the report names
MODELS = ("pythia-160m", "gptj-12x768")
LENGTHS = {"prefill": ((1, 512), (4, 512)), "decode": ((1, 512), (8, 512)), "train": ((1, 512),)}
BASELINE = "stock eager"
Call = Callable[[], object]
PEERS: dict[str, Any] = {}


@dataclass(frozen=True)
class SwapCase:
    """A call of a language model: ``seqlen`` tokens without a cache, or one more behind as many in a cache."""

    kind: str  # a key of CONTENDERS
    model: str  # of MODELS
    batch: int
    seqlen: int
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.kind}: {self.model} ({self.batch}, {self.seqlen}) {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """Of the weights, each read once."""
        stock = next(iter(models_of(self.model, self.dtype, self.device).values()))
        return sum(x.numel() for x in stock.parameters()) * self.dtype.itemsize


def cases(device: str = "cpu") -> Iterator[SwapCase]:
    for model, dtype, kind in itertools.product(MODELS, DTYPES, CONTENDERS):
        for lengths in LENGTHS[kind]:
            yield SwapCase(kind, model, *lengths, dtype, device)


@functools.lru_cache(maxsize=1)
def models_of(name: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Stock models and swapped ones, by their names in the report; they share their weights."""
    torch.manual_seed(0)
    first = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval().to(device)

    def another(implementation: str, swap: bool) -> Any:
        model = copy.deepcopy(first, {id(x): x for x in first.parameters()})
        model.set_attn_implementation(implementation)
        if swap:
            neox_kernels.swap(model)
        return model

    found = {"stock eager": another("eager", False)}
    if first._supports_sdpa:
        found["stock sdpa"] = another("sdpa", False)
        found["swapped, of eager"] = another("eager", True)
    found["swapped"] = another("sdpa" if first._supports_sdpa else "eager", True)
    return found


def tokens_of(case: SwapCase) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(50000, (case.batch, case.seqlen), generator=generator).to(case.device)


def check(case: SwapCase) -> None:
    """The numbers policy on the last logits: against float64, at most twice the error of stock eager."""
    tokens, found = tokens_of(case)[:1], models_of(case.model, case.dtype, case.device)
    exact = copy.deepcopy(found["stock eager"]).double()
    truth = exact(tokens, logits_to_keep=32).logits
    same = found["stock eager"](tokens, logits_to_keep=32).logits
    for name in ("swapped", "swapped, of eager"):
        if name in found:
            error = max_error(found[name](tokens, logits_to_keep=32).logits, truth)
            if not error <= error_budget(same, truth):
                raise AssertionError(f"{case}, {name}: error {error:.3g}, above {error_budget(same, truth):.3g}")


def prefill(case: SwapCase, compiled: bool) -> dict[str, Call]:
    check(case)
    tokens = tokens_of(case)

    def call_of(model: Any) -> Call:
        return lambda: model(tokens, use_cache=False).logits

    return {name: call_of(model) for name, model in models_of(case.model, case.dtype, case.device).items()}


def decode(case: SwapCase, compiled: bool) -> dict[str, Call]:
    check(case)
    tokens = tokens_of(case)
    mask = torch.ones(case.batch, case.seqlen + 1, dtype=torch.long, device=case.device)

    def call_of(model: Any) -> Call:
        cache = transformers.DynamicCache(config=model.config)
        model(tokens, past_key_values=cache, logits_to_keep=1)

        def call() -> Tensor:
            logits: Tensor = model(tokens[:, :1], attention_mask=mask, past_key_values=cache).logits
            cache.crop(-1)
            return logits

        return call

    return {name: call_of(model) for name, model in models_of(case.model, case.dtype, case.device).items()}


def train(case: SwapCase, compiled: bool) -> dict[str, Call]:
    check(case)
    tokens = tokens_of(case)

    def call_of(model: Any) -> Call:
        def call() -> None:
            with torch.enable_grad():
                model(tokens, labels=tokens, use_cache=False).loss.backward()
            model.zero_grad()

        return call

    return {name: call_of(model) for name, model in models_of(case.model, case.dtype, case.device).items()}


CONTENDERS = {"prefill": prefill, "decode": decode, "train": train}


def contenders(case: SwapCase, *, compiled: bool = False) -> dict[str, Call]:
    """By name; BASELINE is what the others are compared with. Logits are checked before anything is timed."""
    return CONTENDERS[case.kind](case, compiled)
