"""Whole forwards of language models with random weights, against transformers' models with the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from neox_kernels import models
from neox_kernels.bench import ctranslate2_peer
from neox_kernels.bench.case import Absent, Case, Family, Work, compile_for_shape
from neox_kernels.bench.harness import Call
from neox_kernels.testing import error_budget, max_error

CONFIGS: dict[str, Any] = {
    "pythia-70m": transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    ),
    "pythia-160m": transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "gptj-12x768": transformers.GPTJConfig(vocab_size=50400, n_embd=768, n_layer=12, n_head=12, rotary_dim=64),
}


@functools.lru_cache(maxsize=1)
def pair(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """transformers' model and ours, which share their weights."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval().to(device)
    kind = models.GPTNeoXForCausalLM if CONFIGS[name].model_type == "gpt_neox" else models.GPTJForCausalLM
    return theirs, kind.from_transformers(theirs).eval()


@functools.lru_cache(maxsize=1)
def truth_of(case: Case) -> tuple[Tensor, Tensor]:
    """The logits of the first sequence, by transformers' eager code in float64 and in the dtype of the case."""
    theirs, _ = pair(case.shape, case.dtype, case.device)
    exact = type(theirs)(theirs.config).double()
    exact.load_state_dict({name: x.double() for name, x in theirs.state_dict().items()})
    tokens = tokens_of(case)[:1]
    for model in (exact, theirs):
        model.set_attn_implementation("eager")
    return exact.eval().to(case.device)(tokens).logits, theirs(tokens).logits


def tokens_of(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = CONFIGS[case.shape].vocab_size
    return torch.randint(vocabulary, case.size, generator=generator).to(case.device)


def products(linears: Sequence[torch.nn.Linear], tokens: int, case: Case) -> Call:
    """The products of linear layers with so many tokens, into memory that is there, and nothing between them."""
    weights = [linear.weight.detach().T for linear in linears]
    options: dict[str, Any] = {"dtype": case.dtype, "device": case.device}
    inputs = {width: torch.randn(tokens, width, **options) for width in {x.shape[0] for x in weights}}
    outputs = {width: torch.empty(tokens, width, **options) for width in {x.shape[1] for x in weights}}

    def call() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight, out=outputs[weight.shape[1]])

    return call


def linears_of(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


class Logits(Work):
    """A batch without padding."""

    signature = "function(tokens, *, model) -> logits; (batch, seqlen) int64; model: transformers' with the weights"
    attentions = False

    def __init__(self, case: Case, shape: Any) -> None:
        super().__init__(case, shape)
        self.theirs, self.model = pair(case.shape, case.dtype, case.device)
        self.args, self.options = (tokens_of(case),), {"model": self.theirs}
        self.bytes = sum(x.numel() for x in self.model.parameters()) * case.dtype.itemsize  # each read once
        self.linears = linears_of(self.model)
        self.flops = 2 * case.size[0] * case.size[1] * sum(linear.weight.numel() for linear in self.linears)

    def ours(self) -> Call:
        options = {"output_attentions": self.attentions, "use_cache": False}
        return self.call_of(lambda tokens, model: self.model(tokens, **options).logits)

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {
            "transformers": lambda: self._transformers("eager"),
            "sdpa": lambda: self._transformers("sdpa"),
            "compile": self._compiled,
            "ctranslate2": self._ctranslate2,
        }

    def limits(self) -> dict[str, Call]:
        return {"matrix products": products(self.linears, self.case.size[0] * self.case.size[1], self.case)}

    def _transformers(self, implementation: str) -> Call:
        if implementation == "sdpa" and (self.attentions or not self.theirs._supports_sdpa):
            raise Absent("transformers has no sdpa " + ("with probabilities" if self.attentions else "for this model"))
        options = {"output_attentions": self.attentions, "use_cache": False}

        def call(tokens: Tensor, model: Any) -> Tensor:
            model.set_attn_implementation(implementation)
            logits: Tensor = model(tokens, **options).logits
            return logits

        return self.call_of(call)

    def _compiled(self) -> Call:
        """transformers' model by torch.compile, with its own choice of attention."""
        fast = compile_for_shape(self.theirs)
        options = {"output_attentions": self.attentions, "use_cache": False}
        self.theirs.set_attn_implementation("sdpa" if self.theirs._supports_sdpa and not self.attentions else "eager")
        return self.call_of(lambda tokens, model: fast(tokens, **options).logits)

    def _ctranslate2(self) -> Call:
        if self.attentions or self.case.dtype != torch.float32 or self.case.device != "cpu":
            raise Absent("CTranslate2 takes part on a CPU in float32, without probabilities")
        return ctranslate2_peer.logits_of(self.theirs, self.args[0])

    def check(self, result: Any) -> None:
        """The numbers policy on the first sequence: at most twice the error of transformers' eager code."""
        truth, same = truth_of(self.case)
        error, budget = max_error(result[:1].to(same.dtype), truth), error_budget(same, truth)
        if not error <= budget:
            raise AssertionError(f"{self.case}: error {error:.3g}, above the budget of {budget:.3g}")


class Attentions(Logits):
    """With the attention probabilities of every layer."""

    attentions = True


FAMILY = Family(
    name="models",
    op="apply_rotary_qk",
    works={"logits": Logits, "attentions": Attentions},
    shapes=CONFIGS,
    sizes=dict.fromkeys(("logits", "attentions"), ((1, 128), (1, 512), (4, 512))),
    eager="transformers",
    quick=lambda case: case.shape != "pythia-160m" and case.kind == "logits" and case.size == (1, 512),
    rounds=5,
)
