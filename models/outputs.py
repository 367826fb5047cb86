"""What the models return: small dataclasses that also unpack, index and iterate as the tuples of what is not None."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from neox_kernels.models.cache import KVCache


class ModelOutput:
    """Attributes by name; as a tuple, those that are not None, in their order."""

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __getitem__(self, index: int | slice | str) -> Any:
        if not isinstance(index, str):
            return self.to_tuple()[index]
        value = getattr(self, index) if index in (field.name for field in fields(self)) else None  # type: ignore[arg-type]
        if value is None:
            raise KeyError(index)
        return value


@dataclass
class DecoderOutput(ModelOutput):
    """Of a model without a head.

    Attributes:
        last_hidden_state: (batch, seqlen, hidden_size), after the final layer norm.
        past_key_values: the cache with these tokens in it, where one was asked for.
        hidden_states: with ``output_hidden_states``, what goes into each layer, and ``last_hidden_state``.
        attentions: with ``output_attentions``, each layer's probabilities, (batch, nheads, seqlen, keys).
    """

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """Of a language model: ``logits`` (batch, seqlen, vocab_size), and the loss where labels came."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(CausalLMOutput):
    """Of a sequence classifier: ``logits`` (batch, num_labels) of each sequence's last token."""


@dataclass
class TokenClassifierOutput(ModelOutput):
    """Of a token classifier: ``logits`` (batch, seqlen, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """Of an extractive question answering model: the logits of a span's ends, (batch, seqlen) each."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """Of ``generate``: what a run for each new token gave, as a tuple in their order, where it is asked for.

    Attributes:
        sequences: (rows, length), the prompts, unless they came as embeddings, and the new tokens.
        sequences_scores: of a beam search, (rows,), by which the sequences are ranked.
        scores: (rows, vocab_size) each, from which tokens were taken; of a beam search log-probabilities of all beams.
        logits: (rows, vocab_size) each, as the model gave them, in float32.
        beam_indices: of a beam search, (rows, new tokens), the row of the beam that each token continued; -1 behind
            the end.
        attentions, hidden_states: of each run, what the model gave.
        past_key_values: the cache, with all of ``sequences`` but the last token in it; None of a beam search, whose
            cache is that of the open beams.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: KVCache | None = None
