"""Text from a language model: greedy, by drawing, by beam search, at once or token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neox_kernels.models import beams
from neox_kernels.models.base import PretrainedModel
from neox_kernels.models.cache import KVCache
from neox_kernels.models.decoding import Decoding
from neox_kernels.models.generation_config import GenerationConfig
from neox_kernels.models.outputs import GenerateOutput
from neox_kernels.models.prompt import require_positions, require_prompt
from neox_kernels.models.sampling import LogitsProcessor, Stops, processors


class Generates(PretrainedModel):
    """A language model that continues text."""

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
        **changes: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts. Each row of a batch gets what it would get alone and without padding.

        Args:
            input_ids: (batch, length), integers; or ``inputs_embeds``, (batch, length, hidden_size).
            attention_mask: (batch, length), 0 for padding, anywhere in a row.
            past_key_values: a cache that has the first tokens of ``input_ids``, as of an earlier turn; the others are
                appended, and then the new ones, but for the last. With several sequences for each prompt it gets the
                prompt only. ``copy.deepcopy`` forks it, ``crop`` goes back.
            generation_config: what is not among ``changes``.
            logits_processor: callables that take the tokens so far, (rows, length), and the scores of the next one,
                (rows, vocab_size), float32, and return the scores to go on with.
            changes: fields of :class:`GenerationConfig`, by name.

        Returns:
            (batch * num_return_sequences, length), the prompts with what follows, and ``pad_token_id`` behind an end;
            only what follows where prompts came as embeddings. With ``return_dict_in_generate`` a
            :class:`GenerateOutput`.

        Raises:
            TypeError, ValueError: arguments that are unknown, out of range or do not go together, or more tokens than
                the cache or the positions of the model can hold; nothing is changed.
        """
        run = self._prepare(
            input_ids, attention_mask, inputs_embeds, past_key_values, generation_config, logits_processor, changes
        )
        output = beams.search(run) if run.config.num_beams > 1 else run.output()
        return output if run.config.return_dict_in_generate else output.sequences

    def stream(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
        **changes: Any,
    ) -> Iterator[Tensor]:
        """Continue prompts, and give the new tokens as they come; there is no beam search.

        Args:
            input_ids, attention_mask, inputs_embeds, past_key_values, generation_config, logits_processor, changes: see
                :meth:`generate`; they are checked at once.

        Returns:
            An iterator of (batch * num_return_sequences,), the tokens of each step. The model runs for a token when it
            is asked for, so that whoever stops asking stops it.
        """
        run = self._prepare(
            input_ids, attention_mask, inputs_embeds, past_key_values, generation_config, logits_processor, changes
        )
        if run.config.num_beams > 1:
            raise ValueError(f"num_beams must be 1 to stream tokens, not {run.config.num_beams}")
        return run.tokens()

    def _prepare(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        past: KVCache | Sequence[tuple[Tensor, Tensor]] | None,
        config: GenerationConfig | None,
        own: LogitsProcessor | Sequence[LogitsProcessor],
        changes: dict[str, Any],
    ) -> Run:
        """A checked run; nothing has run, and nothing is changed."""
        if not isinstance(config, GenerationConfig | None):
            raise TypeError(f"generation_config must be a GenerationConfig, not a {type(config).__name__}")
        config = (config or GenerationConfig()).changed(changes).for_model(self.config)
        own = (own,) if callable(own) else own
        if not isinstance(own, Sequence) or not all(callable(one) for one in own):
            raise TypeError(f"logits_processor must be callable, or a sequence of callables, not {own!r}")
        prompt = require_prompt(self, input_ids, inputs_embeds, attention_mask, past, config.use_cache)
        limit = None if self.config.rope_scaling else self.config.max_position_embeddings
        new, least = config.new_tokens(prompt.length, limit), config.least_tokens(prompt.length)
        if least > new:
            raise ValueError(f"the minimum of {least} new tokens must not be above the maximum of {new}")
        require_positions(self.config, prompt, new, config.use_cache)
        copies = max(config.num_beams, config.num_return_sequences)
        if prompt.cache is not None:
            behind = new - 1 if copies == 1 else 0
            prompt.cache.require_room(
                prompt.batch, prompt.length - prompt.cached + behind, self.config.num_hidden_layers
            )
        eos, pad = config.end_tokens, config.pad_token_id
        if pad is None and config.stop_sequences and prompt.batch * copies > 1:
            raise ValueError("pad_token_id must be given, to follow in sequences that end before others")
        decoding = Decoding(self, prompt, config, new, copies, 0 if pad is None else pad)
        mask = decoding.mask if prompt.shown else None
        made = processors(
            config, own, eos=eos, least=prompt.shown + least if least else 0, mask=mask, device=prompt.device
        )
        stops = Stops(eos, config.stop_sequences, least, prompt.device)
        generator = None
        if config.seed is not None:
            generator = torch.Generator(prompt.device).manual_seed(config.seed)
        return Run(decoding, config, made, stops, prompt.length, generator)


@dataclass
class Run:
    """One generation.

    Attributes:
        first: the column of the first new token.
        scores, logits: of each step, where they are asked for.
    """

    decoding: Decoding
    config: GenerationConfig
    processors: Sequence[LogitsProcessor]
    stops: Stops
    first: int
    generator: torch.Generator | None
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def process(self, logits: Tensor, end: int, normalize: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The scores of the token in column ``end``."""
        if self.config.output_logits:
            self.logits.append(logits.clone())  # a processor may write into its scores
        scores = logits if normalize is None else normalize(logits)
        if self.processors:
            known = self.decoding.known(end)
            for processor in self.processors:
                scores = processor(known, scores)
        if self.config.output_scores:
            self.scores.append(scores)
        return scores

    def draw(self, scores: Tensor, count: int) -> Tensor:
        """(rows, count), places that are drawn without putting back."""
        return torch.multinomial(scores.softmax(-1), count, generator=self.generator)

    @torch.no_grad()
    def tokens(self) -> Iterator[Tensor]:
        """The new tokens, (rows,) each, of every step until all sequences have ended."""
        decoding, stops, config = self.decoding, self.stops, self.config
        logits = decoding.prefill()
        ended: Tensor | None = None
        for end in range(self.first, decoding.total):
            if end > self.first:
                logits = decoding.step(end)
            scores = self.process(logits, end)
            chosen = self.draw(scores, 1)[:, 0] if config.do_sample else scores.argmax(-1)
            if stops:
                if ended is not None and config.pad_token_id is not None:
                    chosen = chosen.masked_fill(ended, config.pad_token_id)
                now = stops(decoding.new(end), chosen)
                ended = now if ended is None else ended | now
            decoding.tokens[:, end] = chosen
            yield chosen
            if ended is not None and bool(ended.all()):
                return

    def output(self) -> GenerateOutput:
        """Of a run to the end, without beams."""
        count = sum(1 for _ in self.tokens())
        return self.given(self.decoding.known(self.first + count), past_key_values=self.decoding.cache)

    def given(self, sequences: Tensor, **others: Any) -> GenerateOutput:
        """The output, with what was asked for on the way."""
        made = GenerateOutput(sequences, **others)
        for holder, names in ((self, ("scores", "logits")), (self.decoding, ("attentions", "hidden_states"))):
            for name in names:
                setattr(made, name, tuple(getattr(holder, name)) or None)
        return made
