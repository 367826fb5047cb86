"""What the model benchmarks run: whole forwards of known shapes with random weights, against transformers' models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from neox_kernels import models
from neox_kernels.testing import error_budget, max_error

OP = "apply_rotary_qk"  # whose backend the report names
LENGTHS = ((1, 512), (4, 512))
DTYPES = (torch.float32, torch.bfloat16)
BASELINE = "transformers eager"
Call = Callable[[], object]
PEERS: dict[str, Any] = {}

CONFIGS: dict[str, Any] = {
    "pythia-70m": transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    ),
    "pythia-160m": transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "gptj-12x768": transformers.GPTJConfig(vocab_size=50400, n_embd=768, n_layer=12, n_head=12, rotary_dim=64),
}


@dataclass(frozen=True)
class ModelCase:
    """A forward of a language model over a batch without padding: "logits" alone, or "attentions" too."""

    kind: str  # a key of CONTENDERS
    model: str  # a key of CONFIGS
    batch: int
    seqlen: int
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.kind}: {self.model} ({self.batch}, {self.seqlen}) {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """Of the weights, each read once."""
        return sum(x.numel() for x in pair(self.model, self.dtype, self.device)[1].parameters()) * self.dtype.itemsize


def cases(device: str = "cpu") -> Iterator[ModelCase]:
    for model, dtype, lengths, kind in itertools.product(CONFIGS, DTYPES, LENGTHS, CONTENDERS):
        yield ModelCase(kind, model, *lengths, dtype, device)


@functools.lru_cache(maxsize=1)
def pair(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """transformers' model and ours, which share their weights."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval().to(device)
    kind = models.GPTNeoXForCausalLM if CONFIGS[name].model_type == "gpt_neox" else models.GPTJForCausalLM
    return theirs, kind.from_transformers(theirs).eval()


def tokens_of(case: ModelCase) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(50000, (case.batch, case.seqlen), generator=generator).to(case.device)


def forward(case: ModelCase, compiled: bool, *, attentions: bool) -> dict[str, Call]:
    theirs, ours = pair(case.model, case.dtype, case.device)
    tokens = tokens_of(case)

    def stock(implementation: str) -> Tensor:
        theirs.set_attn_implementation(implementation)
        logits: Tensor = theirs(tokens, output_attentions=attentions, use_cache=False).logits
        return logits

    def fused() -> Tensor:
        logits: Tensor = ours(tokens, output_attentions=attentions, use_cache=False).logits
        return logits

    check(case, fused, lambda: stock("eager"))
    calls: dict[str, Call] = {BASELINE: lambda: stock("eager")}
    if case.model.startswith("pythia") and not attentions:  # GPT-J has no other there; sdpa gives no probabilities
        calls["transformers sdpa"] = lambda: stock("sdpa")
    calls["neox_kernels"] = fused
    calls["its matrix products alone"] = products(case)
    if compiled:
        theirs.set_attn_implementation("eager")
        fast = torch.compile(theirs, dynamic=False)
        calls["transformers compiled"] = lambda: fast(tokens, output_attentions=attentions, use_cache=False).logits
    return calls


def products(case: ModelCase) -> Call:
    """The limit: the multiplications of every linear layer, into memory that is there, and nothing between them."""
    _, ours = pair(case.model, case.dtype, case.device)
    weights = [module.weight.T for module in ours.modules() if isinstance(module, torch.nn.Linear)]
    tokens, options = case.batch * case.seqlen, {"dtype": case.dtype, "device": case.device}
    inputs = {width: torch.randn(tokens, width, **options) for width in {x.shape[0] for x in weights}}
    outputs = {width: torch.empty(tokens, width, **options) for width in {x.shape[1] for x in weights}}

    def call() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight, out=outputs[weight.shape[1]])

    return call


def check(case: ModelCase, fused: Call, eager: Call) -> None:
    """The numbers policy: against a float64 run, at most twice the error of transformers' own in the same dtype."""
    same, got = eager(), fused()
    assert isinstance(same, Tensor) and isinstance(got, Tensor)
    same, got = same[:1], got[:1]  # float64 of the whole batch would take too much memory
    theirs, _ = pair(case.model, case.dtype, case.device)
    exact = type(theirs)(theirs.config).double()
    exact.load_state_dict({name: x.double() for name, x in theirs.state_dict().items()})
    truth = exact.eval().to(case.device)(tokens_of(case)[:1]).logits
    error, budget = max_error(got.to(same.dtype), truth), error_budget(same, truth)
    if not error <= budget:
        raise AssertionError(f"{case}: error {error:.3g}, above the budget of {budget:.3g}")


CONTENDERS = {
    "logits": functools.partial(forward, attentions=False),
    "attentions": functools.partial(forward, attentions=True),
}


def contenders(case: ModelCase, *, compiled: bool = False) -> dict[str, Call]:
    """By name; BASELINE is what the others are compared with. The logits of the first sequence are checked first."""
    return CONTENDERS[case.kind](case, compiled)
