"""Models whose text varies, prompts for them, and generate of both sides."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import PAD, batch, pair
from torch import Tensor

from neox_kernels.models import GenerateOutput

EOS = [7, 11, 23]


def talkers(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """transformers' model and ours, whose next token hangs on all that came: other random ones say one word forever."""
    theirs, ours = pair(family, dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.05 * noise + name.endswith("weight"))
            else:
                parameter.copy_(
                    noise * (0.3 if "embed_in" in name or "wte" in name else 3 * parameter.shape[1] ** -0.5)
                )
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


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


def ends(ours: Any, inputs: dict[str, Tensor], **changes: Any) -> list[int]:
    """End tokens which sequences of these prompts have at different places."""
    free = ours.generate(**inputs, max_new_tokens=12, eos_token_id=(), **changes)[:, 13:]
    return [int(free[0, 4]), int(free[1, 8])]
