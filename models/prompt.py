"""What a generation begins with, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neox_kernels.models.cache import KVCache
from neox_kernels.models.forward import require_integers, require_mask


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    Attributes:
        ids: (batch, length), or None where there are ``embeds``, (batch, length, hidden_size).
        mask: (batch, length), bool; None where no token is padding. Padding stays where it is: positions are counted
            without it, and nobody sees it.
        cached: tokens that ``cache`` has already.
    """

    ids: Tensor | None
    embeds: Tensor | None
    mask: Tensor | None
    cache: KVCache | None
    batch: int
    length: int
    cached: int
    longest: int  # tokens of the longest row, without padding

    @property
    def device(self) -> torch.device:
        given = self.embeds if self.ids is None else self.ids
        assert given is not None
        return given.device

    @property
    def shown(self) -> int:
        """Tokens of the prompt that are known as such."""
        return 0 if self.ids is None else self.length


def require_prompt(
    model: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    past: KVCache | Sequence[tuple[Tensor, Tensor]] | None,
    use_cache: bool,
) -> Prompt:
    """The prompt of these arguments of ``generate``, on the device of the model's input embedding."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    device = next(model.get_input_embeddings().parameters()).device
    if inputs_embeds is None:
        given = require_integers("input_ids", input_ids).to(device, torch.long)
        if given.dim() != 2:
            raise ValueError(f"input_ids must be (batch, length), not of shape {tuple(given.shape)}")
    elif not isinstance(inputs_embeds, Tensor) or inputs_embeds.dim() != 3:
        got = tuple(inputs_embeds.shape) if isinstance(inputs_embeds, Tensor) else type(inputs_embeds).__name__
        raise ValueError(f"inputs_embeds must be (batch, length, hidden_size), not {got}")
    elif not use_cache:
        raise ValueError("use_cache must be True with inputs_embeds, which are not there for the tokens that follow")
    else:
        given = inputs_embeds.to(device)
    name = "input_ids" if inputs_embeds is None else "inputs_embeds"
    batch, length = given.shape[:2]
    if not batch or not length:
        raise ValueError(f"{name} must hold at least one token, not be of shape {tuple(given.shape)}")
    if past is not None and not use_cache:
        raise ValueError("use_cache must be True with past_key_values")
    cache = past if past is None or isinstance(past, KVCache) else KVCache.from_tuple(past)
    cached = 0 if cache is None else cache.length
    if cached >= length:
        raise ValueError(
            f"{name} must be the whole sequence, more than the {cached} tokens of past_key_values, not {length}"
        )
    mask = _mask(attention_mask, batch, length, cached, device)
    longest = length if mask is None else int(mask.sum(1).max())
    ids, embeds = (given, None) if inputs_embeds is None else (None, given)
    return Prompt(ids, embeds, mask, cache, batch, length, cached, longest)


def _mask(given: Tensor | None, batch: int, length: int, cached: int, device: torch.device) -> Tensor | None:
    if given is None:
        return None
    if isinstance(given, Tensor) and given.dim() != 2:
        raise ValueError(f"attention_mask must be (batch, length), ({batch}, {length}), not {tuple(given.shape)}")
    mask = require_mask(given, (batch, 1, length, length), torch.float32)
    assert mask is not None
    mask = mask.to(device).bool()
    if bool(mask.all()):
        return None
    empty = ~mask[:, cached:].any(1)
    if bool(empty.any()):
        behind = f" behind the {cached} of past_key_values" if cached else ""
        raise ValueError(
            f"attention_mask must show a token of each row{behind}, and shows none of row {int(empty.int().argmax())}"
        )
    return mask


def require_positions(config: Any, prompt: Prompt, new: int, use_cache: bool) -> None:
    """Raise unless the model has positions for the prompt and ``new`` tokens; the last one is not run."""
    limit, run = config.max_position_embeddings, prompt.longest + new - 1
    if run <= limit:
        return
    if config.rope_scaling is None:
        raise ValueError(
            f"{prompt.longest} tokens of the prompt and {new} new ones run {run} positions, more than the {limit} of "
            "the configuration's max_position_embeddings, which has no rope_scaling to go on"
        )
    if config.rope_scaling["rope_type"] != "dynamic":
        return
    if use_cache or prompt.mask is not None:
        what = "without padding" if not use_cache else "with use_cache=False and without padding"
        raise ValueError(
            f"{run} positions, more than the {limit} of the configuration's max_position_embeddings, can only be run "
            f"{what}: the dynamic rope_scaling changes with the longest sequence, and the keys of the cache, or of a "
            "shorter row, were rotated for another length"
        )
