"""Sequences in the making: the one place where a model is run for the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_kernels.models.cache import KVCache
from neox_kernels.models.generation_config import GenerationConfig
from neox_kernels.models.outputs import CausalLMOutput
from neox_kernels.models.prompt import Prompt


class Decoding:
    """Sequences, and all that a model needs to go on with them.

    Everything is made once, for as long as the sequences may become, and written in place. Columns of ``tokens`` are
    those of the cache, padding included, so that a cache and the sequences that it was returned with go together.

    Args:
        prompt: checked, also for the room in its cache.
        new: tokens that may follow.
        copies: sequences for each prompt, which share its run.
        pad: fills what is not written.

    Attributes:
        tokens: (batch * copies, prompt + new); of a prompt of embeddings the first columns mean nothing.
        attentions, hidden_states: of each run, where they are asked for.
    """

    def __init__(self, model: Any, prompt: Prompt, config: GenerationConfig, new: int, copies: int, pad: int) -> None:
        self._model, self._prompt, self._copies = model, prompt, copies
        rows, self.total = prompt.batch * copies, prompt.length + new
        self.tokens = torch.full((rows, self.total), pad, device=prompt.device)
        if prompt.ids is not None:
            self.tokens[:, : prompt.length] = prompt.ids.repeat_interleave(copies, 0)
        self.mask: Tensor | None = None
        self._positions: Tensor | None = None
        if prompt.mask is not None:
            self.mask = torch.ones(rows, self.total, dtype=torch.bool, device=prompt.device)
            self.mask[:, : prompt.length] = prompt.mask.repeat_interleave(copies, 0)
            self._positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache: KVCache | None = prompt.cache
        if self.cache is None and config.use_cache:
            self.cache = KVCache(self.total - 1 if copies == 1 else None)
        for device in {next(layer.parameters()).device for layer in model.decoder.layers_in_order}:
            model.decoder.rotary_emb.tables(prompt.longest + new - 1, device)  # they need not grow on the way
        self._asked = {
            "output_attentions": config.output_attentions,
            "output_hidden_states": config.output_hidden_states,
        }
        self.attentions: list[tuple[Tensor, ...]] = []
        self.hidden_states: list[tuple[Tensor, ...]] = []

    def known(self, end: int) -> Tensor:
        """(rows, length), the tokens before column ``end``, from the first one that is known."""
        return self.tokens[:, self._prompt.length - self._prompt.shown : end]

    def new(self, end: int) -> Tensor:
        """(rows, length), the new tokens before column ``end``."""
        return self.tokens[:, self._prompt.length : end]

    def prefill(self) -> Tensor:
        """Run the prompts, and give the logits of the first new tokens, (rows, vocab_size), float32."""
        prompt, copies = self._prompt, self._copies
        places: int | Tensor = 1
        row: Tensor | None = None
        if prompt.mask is not None:
            behind = prompt.mask.flip(1).int().argmax(1)  # padding behind each row's last token
            if bool(behind.any()):
                places, row = (prompt.length - prompt.cached - 1 - behind).unique(return_inverse=True)
        ids, embeds, positions = prompt.ids, prompt.embeds, self._positions
        logits = self._run(
            input_ids=None if ids is None else ids[:, prompt.cached :],
            inputs_embeds=None if embeds is None else embeds[:, prompt.cached :],
            attention_mask=prompt.mask,
            position_ids=None if positions is None else positions[::copies, prompt.cached : prompt.length],
            logits_to_keep=places,
        )
        logits = logits[:, -1] if row is None else logits[torch.arange(len(row), device=row.device), row]
        if copies == 1:
            if prompt.cache is None and self.cache is not None:
                self.cache.max_length = None  # the room is there, and later turns may need more
            return logits
        if self.cache is not None:  # the caller's has the prompt now, and stays so
            self.cache = KVCache.from_tuple(self.cache.to_tuple(), max_length=self.total - 1)
            self.cache.max_length = None
            self.cache.repeat(copies)
        for runs in (self.attentions, self.hidden_states):
            runs[:] = [tuple(x.repeat_interleave(copies, 0) for x in run) for run in runs]
        return logits.repeat_interleave(copies, 0)

    def step(self, end: int) -> Tensor:
        """Run the token before column ``end``, and give the logits of the one in it, (rows, vocab_size), float32.

        A faster way to decode one token takes the place of this method: what it reads and writes are ``tokens``,
        ``mask`` and the positions, all preallocated, and ``cache``, which then holds ``end`` tokens.
        """
        begin = 0 if self.cache is None else end - 1
        return self._run(
            input_ids=self.tokens[:, begin:end],
            attention_mask=None if self.mask is None else self.mask[:, :end],
            position_ids=None if self._positions is None else self._positions[:, begin:end],
            logits_to_keep=1,
        )[:, -1]

    def reorder(self, rows: Tensor, end: int) -> None:
        """Let each sequence before column ``end`` be what sequence ``rows`` of the same prompt was."""
        new = self.new(end)
        new.copy_(new.index_select(0, rows))
        if self.cache is not None:
            self.cache.reorder(rows, self._prompt.length)

    def _run(self, **inputs: Any) -> Tensor:
        output = self._model(
            **inputs, past_key_values=self.cache, use_cache=self.cache is not None, return_dict=True, **self._asked
        )
        assert isinstance(output, CausalLMOutput) and output.logits is not None
        if output.attentions is not None:
            self.attentions.append(output.attentions)
        if output.hidden_states is not None:
            self.hidden_states.append(output.hidden_states)
        return output.logits.to(self.tokens.device, torch.float32)
