"""Tiny models of transformers with random weights, and ours with the same ones."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from neox_kernels import models
from neox_kernels.testing import max_error

VOCAB, WIDTH, HEADS, LAYERS, PAD = 61, 48, 3, 2, 60
FAMILIES = ("GPTNeoX", "GPTJ")
HEADED = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def hf_config(family: str, **changes: Any) -> Any:
    """A transformers configuration of LAYERS layers, WIDTH features and HEADS heads, which are 3."""
    common = {"vocab_size": VOCAB, "pad_token_id": PAD, "num_labels": 2, "attn_implementation": "eager"}
    if family == "GPTNeoX":
        sizes = {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 80,
            "max_position_embeddings": 64,
        }
        return transformers.GPTNeoXConfig(**{**common, **sizes, **changes})
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "rotary_dim": 8}
    return transformers.GPTJConfig(**{**common, **sizes, **changes})


def pair(family: str, head: str = "ForCausalLM", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """transformers' model and ours, of the same weights, large enough that errors show; without dropout."""
    torch.manual_seed(0)
    theirs = getattr(transformers, family + head)(hf_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    theirs = theirs.to(dtype)
    ours = getattr(models, family + head)(theirs.config).eval().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def in_float64(model: nn.Module) -> Any:
    return copy.deepcopy(model).double()


def batch(padding: str = "none", seed: int = 1, rows: int = 3, seqlen: int = 13) -> dict[str, Tensor]:
    """Tokens, and where there is padding a mask: "left", "right", or "both" sides of different rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(PAD, (rows, seqlen), generator=generator)
    if padding == "none":
        return {"input_ids": tokens}
    mask = torch.ones(rows, seqlen, dtype=torch.long)
    for row, gap in zip(range(rows), itertools.cycle((0, 4, 7)), strict=False):
        left = padding == "left" or (padding == "both" and row % 2)
        if gap:
            mask[row, slice(None, gap) if left else slice(-gap, None)] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}


class Errors:
    """The numbers policy over several inputs: by name, our largest error is at most twice transformers' own in the same
    dtype, and one rounding. Many inputs, since a number that comes alone may be right by chance."""

    def __init__(self) -> None:
        self.ours: dict[str, float] = {}
        self.theirs: dict[str, float] = {}
        self.floor: dict[str, float] = {}

    def add(self, name: str, got: Tensor, same: Tensor, truth: Tensor) -> None:
        for errors, x in ((self.ours, got), (self.theirs, same)):
            errors[name] = max(errors.get(name, 0.0), max_error(x, truth))
        rounding = float(truth.abs().max()) * torch.finfo(same.dtype).eps / 2 if truth.numel() else 0.0
        self.floor[name] = max(self.floor.get(name, 0.0), rounding)

    def check(self) -> None:
        assert self.ours
        budgets = {name: 2 * self.theirs[name] + self.floor[name] for name in self.ours}
        above = {name: (error, budgets[name]) for name, error in self.ours.items() if not error <= budgets[name]}
        assert not above, f"(error, budget): {above}"
