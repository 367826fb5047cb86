"""Prefill, one step of decoding and one of training, by stock transformers and swapped."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import neox_kernels
from neox_kernels.bench.case import Absent, Case, Family, Work
from neox_kernels.bench.harness import Call
from neox_kernels.bench.models_cases import CONFIGS, linears_of, products, tokens_of
from neox_kernels.testing import error_budget, max_error

KEPT = 32  # logits that are looked at


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

    found = {"transformers": another("eager", False)}
    if first._supports_sdpa:
        found["sdpa"] = another("sdpa", False)
        found["neox_kernels, of eager"] = another("eager", True)
    found["neox_kernels"] = another("sdpa" if first._supports_sdpa else "eager", True)
    return found


@functools.lru_cache(maxsize=1)
def truth_of(case: Case) -> tuple[Tensor, Tensor]:
    """The last logits of the first sequence, by stock eager in float64 and in the dtype of the case."""
    stock, tokens = models_of(case.shape, case.dtype, case.device)["transformers"], tokens_of(case)[:1]
    exact = copy.deepcopy(stock).double()
    return exact(tokens, logits_to_keep=KEPT).logits, stock(tokens, logits_to_keep=KEPT).logits


class Swapped(Work):
    """``seqlen`` tokens without a cache. ``run`` is what every model does; it gives the last logits to look at."""

    signature = "function(tokens, *, model) -> logits; (batch, seqlen) int64; model: stock transformers, eager"
    passes = 1

    def __init__(self, case: Case, shape: Any) -> None:
        super().__init__(case, shape)
        self.models = models_of(case.shape, case.dtype, case.device)
        self.args, self.options = (tokens_of(case),), {"model": self.models["transformers"]}
        stock = self.models["transformers"]
        self.bytes = sum(x.numel() for x in stock.parameters()) * case.dtype.itemsize
        self.linears = linears_of(stock)
        weights = sum(linear.weight.numel() for linear in self.linears)
        self.flops = 2 * self.tokens * weights * self.passes

    @property
    def tokens(self) -> int:
        """That run through the model in a call."""
        return self.case.size[0] * self.case.size[1]

    def limits(self) -> dict[str, Call]:
        """The products of the linear layers, as often as a call takes as many."""
        once = products(self.linears, self.tokens, self.case)
        return {"matrix products": lambda: [once() for _ in range(self.passes)]}

    def run(self, model: Any) -> Call:
        return self.call_of(lambda tokens, **_: model(tokens, use_cache=False).logits)

    def ours(self) -> Call:
        return self.run(self.models["neox_kernels"])

    def variants(self) -> dict[str, Call]:
        name = "neox_kernels, of eager"
        return {name: self.run(self.models[name])} if name in self.models else {}

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {"transformers": lambda: self._stock("transformers"), "sdpa": lambda: self._stock("sdpa")}

    def _stock(self, name: str) -> Call:
        if name not in self.models:
            raise Absent("transformers has no sdpa for this model")
        return self.run(self.models[name])

    def check(self, result: Any) -> None:
        truth, same = truth_of(self.case)
        self.require_close(result[:1, -KEPT:], same, truth)

    def require_close(self, result: Tensor, same: Tensor, truth: Tensor) -> None:
        """The numbers policy: against float64, at most twice the error of stock eager."""
        error, budget = max_error(result, truth), error_budget(same, truth)
        if not error <= budget:
            raise AssertionError(f"{self.case}: error {error:.3g}, above the budget of {budget:.3g}")


class Decode(Swapped):
    """One token behind ``seqlen`` in a cache."""

    signature = ""

    @property
    def tokens(self) -> int:
        return self.case.size[0]

    def run(self, model: Any) -> Call:
        (tokens,) = self.args
        batch, seqlen = tokens.shape
        mask = torch.ones(batch, seqlen + 1, dtype=torch.long, device=tokens.device)
        cache = transformers.DynamicCache(config=model.config)
        model(tokens, past_key_values=cache, logits_to_keep=1)

        def call() -> Tensor:
            logits: Tensor = model(tokens[:, :1], attention_mask=mask, past_key_values=cache).logits
            cache.crop(-1)
            return logits

        return call

    def check(self, result: Any) -> None:
        """Against the whole sequence without a cache."""
        (tokens,) = self.args
        whole, stock = torch.cat((tokens[:1], tokens[:1, :1]), dim=1), self.models["transformers"]
        truth = copy.deepcopy(stock).double()(whole, logits_to_keep=1).logits
        self.require_close(result[:1], stock(whole, logits_to_keep=1).logits, truth)


class Train(Swapped):
    """Forward and backward of a step of training."""

    signature = ""
    passes = 3  # backward, for the inputs and for the weights

    def run(self, model: Any) -> Call:
        (tokens,) = self.args

        def call() -> Tensor:
            model.zero_grad()
            with torch.enable_grad():
                out = model(tokens, labels=tokens, use_cache=False)
                out.loss.backward()
            logits: Tensor = out.logits.detach()
            return logits

        return call


FAMILY = Family(
    name="swap",
    op="apply_rotary_qk",
    works={"prefill": Swapped, "decode": Decode, "train": Train},
    shapes={name: CONFIGS[name] for name in ("pythia-160m", "gptj-12x768")},
    sizes={"prefill": ((1, 512), (4, 512)), "decode": ((1, 512), (8, 512)), "train": ((1, 512),)},
    eager="transformers",
    quick=lambda case: case.kind == "decode" and case.size == (1, 512),
    backward=frozenset({"train"}),
    rounds=5,
)
