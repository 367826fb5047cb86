"""The four heads, written once for both families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from neox_kernels.models import losses
from neox_kernels.models.base import PretrainedModel
from neox_kernels.models.decoder import Decoder
from neox_kernels.models.forward import require_integers
from neox_kernels.models.generation import Generates
from neox_kernels.models.logits import logits_of
from neox_kernels.models.outputs import (
    CausalLMOutput,
    DecoderOutput,
    ModelOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

Output = TypeVar("Output", bound=ModelOutput)


class WithHead(PretrainedModel):
    """A decoder under the family's name, and a head."""

    decoder_class: ClassVar[type[Decoder]]
    prefix: ClassVar[str]  # the decoder's name, as checkpoints have it
    head_name: ClassVar[str]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        setattr(self, self.prefix, self.decoder_class(self.config))

    @property
    def decoder(self) -> Decoder:
        decoder: Decoder = getattr(self, self.prefix)
        return decoder

    def _decode(self, inputs: dict[str, Any], require_labels: Callable[[int, int], None]) -> DecoderOutput:
        """Run the decoder.

        Args:
            require_labels: raises unless labels fit to batch and seqlen; before the decoder, which changes the cache.
        """
        tokens = inputs.get("inputs_embeds") if inputs["input_ids"] is None else inputs["input_ids"]
        if isinstance(tokens, Tensor) and tokens.dim() > 1:
            require_labels(tokens.shape[0], tokens.shape[1])
        output = self.decoder(**{**inputs, "return_dict": True})
        assert isinstance(output, DecoderOutput)
        return output

    def _give(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def parallelize(self, device_map: Mapping[Any, Sequence[int]] | None = None) -> None:
        """Spread the layers over devices: see :meth:`Decoder.parallelize`; the head is where the last layer is, or
        where the input embedding is if that is its weight too."""
        self.decoder.parallelize(device_map)
        head = getattr(self, self.head_name)
        if head.weight is not self.get_input_embeddings().weight:
            head.to(self.decoder.last_device)

    def deparallelize(self) -> None:
        """Put everything back onto the CPU."""
        self.decoder.deparallelize()
        self.to("cpu")


class CausalLM(Generates, WithHead):
    """A language model."""

    head_name = "lm_head"
    head_bias: ClassVar[bool]
    logits_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=self.head_bias)
        self.init_weights(getattr(self, self.head_name))

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, head: nn.Linear) -> None:
        self.lm_head = head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits of the next token.

        Args:
            labels: (batch, seqlen), the tokens themselves, which are shifted here; -100 for those that do not count.
            logits_to_keep: compute logits of as many last tokens only, or of those at these places; 0: of all. With
                ``labels``, of all.
            Others: see :meth:`Decoder.forward`.
        """

        if not isinstance(logits_to_keep, Tensor) and not (isinstance(logits_to_keep, int) and logits_to_keep >= 0):
            raise ValueError(f"logits_to_keep must be a number of tokens or a tensor of places, not {logits_to_keep!r}")

        def require_labels(batch: int, seqlen: int) -> None:
            losses.require_labels(labels, (batch, seqlen), self.config.vocab_size)

        output = self._decode({**inputs, "input_ids": input_ids, "attention_mask": attention_mask}, require_labels)
        hidden = output.last_hidden_state
        if labels is None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            hidden = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        if self.decoder.is_spread:
            hidden = hidden.to(next(self.lm_head.parameters()).device)
        logits = logits_of(self.lm_head, hidden, self.logits_dtype)
        loss = None if labels is None else losses.language_model_loss(logits, labels)
        given = CausalLMOutput(loss, logits, output.past_key_values, output.hidden_states, output.attentions)
        return self._give(given, return_dict)


class SequenceClassification(WithHead):
    """A classifier on the last token of each sequence."""

    head_name = "score"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.score = nn.Linear(self.config.hidden_size, self.config.num_labels, bias=False)
        self.init_weights(getattr(self, self.head_name))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits of each sequence.

        The last token is the rightmost one that is not the configuration's ``pad_token_id``; of ``inputs_embeds``, or
        without a ``pad_token_id``, the rightmost one that ``attention_mask`` shows.

        Args:
            labels: (batch,) classes, or (batch, num_labels) for regression and several classes at once: see
                ``problem_type`` of the configuration.
            Others: see :meth:`Decoder.forward`.
        """

        def require_labels(batch: int, seqlen: int) -> None:
            config = self.config
            losses.require_sequence_labels(labels, batch, config.num_labels, config.problem_type)

        output = self._decode({**inputs, "input_ids": input_ids, "attention_mask": attention_mask}, require_labels)
        hidden = output.last_hidden_state
        last = self._last_tokens(input_ids, attention_mask, hidden)
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = losses.sequence_classification_loss(logits, labels, self.config.problem_type)
        given = SequenceClassifierOutput(loss, logits, output.past_key_values, output.hidden_states, output.attentions)
        return self._give(given, return_dict)

    def _last_tokens(self, input_ids: Tensor | None, mask: Tensor | None, hidden: Tensor) -> Tensor | int:
        batch, seqlen, _ = hidden.shape
        if input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif mask is not None and mask.dim() == 2:
            real = mask[:, -seqlen:] != 0
        elif input_ids is None or batch == 1:
            return -1
        else:
            raise ValueError(
                f"pad_token_id of the configuration must be set, or attention_mask be given, for a batch of {batch}"
            )
        places = torch.arange(seqlen, device=hidden.device)
        last: Tensor = (places * real.to(hidden.device)).argmax(dim=-1)
        return last


class TokenClassification(WithHead):
    """A classifier on every token."""

    head_name = "classifier"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(self.config.classifier_dropout)
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels)
        self.init_weights(getattr(self, self.head_name))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits of every token.

        Args:
            labels: (batch, seqlen), classes; -100 for tokens that do not count.
            Others: see :meth:`Decoder.forward`.
        """

        def require_labels(batch: int, seqlen: int) -> None:
            losses.require_labels(labels, (batch, seqlen), self.config.num_labels)

        output = self._decode({**inputs, "input_ids": input_ids, "attention_mask": attention_mask}, require_labels)
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss = None if labels is None else losses.token_classification_loss(logits, labels)
        return self._give(TokenClassifierOutput(loss, logits, output.hidden_states, output.attentions), return_dict)


class QuestionAnswering(WithHead):
    """The span of the text that answers a question."""

    head_name = "qa_outputs"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(self.config.hidden_size, 2)
        self.init_weights(getattr(self, self.head_name))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Logits of where the answer begins and ends.

        Args:
            start_positions, end_positions: (batch,), of the right answers; one outside the sequence does not count.
            Others: see :meth:`Decoder.forward`.
        """

        def require_labels(batch: int, seqlen: int) -> None:
            for name, x in (("start_positions", start_positions), ("end_positions", end_positions)):
                if x is not None:
                    require_integers(name, x, (batch,), (batch, 1))

        output = self._decode({**inputs, "input_ids": input_ids, "attention_mask": attention_mask}, require_labels)
        start, end = self.qa_outputs(output.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = losses.span_loss(start, end, start_positions, end_positions)
        given = QuestionAnsweringOutput(loss, start, end, output.hidden_states, output.attentions)
        return self._give(given, return_dict)
