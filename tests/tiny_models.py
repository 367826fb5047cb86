"""Small models of transformers with random weights, biases too, for the tests of neox_kernels.models."""

from typing import Any

import torch
import transformers
from torch import nn

NEOX = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPTJ = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "n_inner": 48}
CLASSES = (
    *(f"GPTNeoX{head}" for head in ("Model", "ForCausalLM", "ForSequenceClassification")),
    *(f"GPTNeoX{head}" for head in ("ForTokenClassification", "ForQuestionAnswering")),
    *(f"GPTJ{head}" for head in ("Model", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering")),
)


def their_config(name: str, **changes: Any) -> Any:
    """transformers' configuration for the class of this name."""
    family, sizes = ("GPTNeoX", NEOX) if name.startswith("GPTNeoX") else ("GPTJ", GPTJ)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return getattr(transformers, f"{family}Config")(**{**sizes, **tokens, **changes})


def randomize(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def their_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    return randomize(getattr(transformers, name)(their_config(name, **changes))).to(dtype)


def renamed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of either side by the names that 5.x has."""
    return {name.replace("embed_out.", "lm_head."): parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Bit for bit, and in dtype."""
    left, right = renamed(ours), renamed(theirs)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
