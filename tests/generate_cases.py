"""Prompts, and generate of both sides."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import PAD, batch, pair
from torch import Tensor

from neox_kernels.models import GenerateOutput

EOS = [7, 11, 23]


def both(family: str, **changes: Any) -> tuple[Any, Any]:
    return pair(family, eos_token_id=EOS, **changes)


def prompts(padding: str, seed: int = 1) -> dict[str, Tensor]:
    """As ``batch`` has them; "holes": tokens of padding anywhere."""
    if padding != "holes":
        return batch(padding, seed)
    tokens = batch(seed=seed)["input_ids"]
    mask = (torch.rand(3, 13, generator=torch.Generator().manual_seed(seed)) < 0.6).long()
    mask[:, 5] = 1
    return {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}


def theirs_generates(theirs: Any, inputs: dict[str, Tensor], **changes: Any) -> Any:
    return theirs.generate(**inputs, **{"eos_token_id": EOS, "pad_token_id": PAD, **changes})


def generated(ours: Any, **arguments: Any) -> GenerateOutput:
    output = ours.generate(**arguments, return_dict_in_generate=True)
    assert isinstance(output, GenerateOutput)
    return output


def ends(ours: Any, inputs: dict[str, Tensor]) -> list[int]:
    """End tokens which greedy sequences of these prompts have at different places."""
    free = ours.generate(**inputs, max_new_tokens=16, eos_token_id=())[:, 13:]
    return [int(free[0, 3]), int(free[1, 7])]
