"""GPT-NeoX: Pythia, GPT-NeoX-20B, Dolly, RedPajama-INCITE, polyglot and others.

The modules and their names are those of Hugging Face's, so that checkpoints, hooks and tools for these find them.
Source of the architecture: Black et al., GPT-NeoX-20B, arXiv:2204.06745.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neox_kernels import RotaryEmbedding
from neox_kernels.models import heads
from neox_kernels.models.activations import activated, activation
from neox_kernels.models.configuration import GPTNeoXConfig, ModelConfig
from neox_kernels.models.decoder import Decoder
from neox_kernels.models.forward import Forward, may_overwrite, watched


class GPTNeoXAttention(nn.Module):
    def __init__(self, config: GPTNeoXConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.nheads = config.num_attention_heads
        self.dropout_p = config.attention_dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden: Tensor, shared: Forward) -> tuple[Tensor, Tensor | None]:
        # Each head's q, k and v lie beside each other.
        q, k, v = self.query_key_value(hidden).unflatten(-1, (self.nheads, -1)).chunk(3, dim=-1)
        attended, probabilities = shared.attend(
            self.layer,
            q,
            k,
            v,
            dropout=self.dropout_p if self.training else 0.0,
            upcast_scores=False,
            inplace=may_overwrite(self.query_key_value),
        )
        return self.dense(attended), probabilities


class GPTNeoXMLP(nn.Module):
    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.dense_4h_to_h(activated(self.dense_h_to_4h, self.act, hidden))
        return out


class GPTNeoXLayer(nn.Module):
    def __init__(self, config: GPTNeoXConfig, layer: int) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = GPTNeoXAttention(config, layer)
        self.mlp = GPTNeoXMLP(config)

    def forward(self, hidden: Tensor, shared: Forward) -> Tensor:
        attended: Tensor = self.post_attention_dropout(self.attention(self.input_layernorm(hidden), shared)[0])
        if self.use_parallel_residual:  # both parts see the same input
            given: Tensor = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden)))
            return given + attended + hidden
        hidden = attended + hidden
        given = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden)))
        return given + hidden


class GPTNeoXRotaryEmbedding(RotaryEmbedding):
    """The rotary embedding under the name and with the call of transformers, for hooks; the layers need no call."""

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """cos and sin of (batch or 1, seqlen, rotary_dim), their halves repeated, in the dtype of ``hidden``."""
        length = int(position_ids.max()) + 1 if position_ids.numel() else 0
        cos, sin = (table[position_ids].to(hidden.dtype) for table in self.tables(length, hidden.device))
        return cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)


class GPTNeoXModel(Decoder):
    """GPT-NeoX without a head. Arguments and result of a call: see :meth:`Decoder.forward`."""

    config_class = GPTNeoXConfig
    embedding_name = "embed_in"
    dropout_name = "emb_dropout"
    layers_name = "layers"
    norm_name = "final_layer_norm"
    interleaved = False
    rotary_class = GPTNeoXRotaryEmbedding

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config = self.config
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(GPTNeoXLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.init_weights()

    def _tables(
        self, hidden: Tensor, position_ids: Tensor | None, start: int
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        if not watched(self.rotary_emb):
            return None, position_ids
        if position_ids is None:
            position_ids = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        cos, sin = (table[..., : table.shape[-1] // 2] for table in self.rotary_emb(hidden, position_ids=position_ids))
        rows = torch.arange(cos.shape[0] * cos.shape[1], device=cos.device).view(cos.shape[:2])
        return (cos.flatten(0, 1), sin.flatten(0, 1)), rows


class _GPTNeoX:
    config_class: ClassVar[type[ModelConfig]] = GPTNeoXConfig
    decoder_class: ClassVar[type[Decoder]] = GPTNeoXModel
    prefix: ClassVar[str] = "gpt_neox"


class GPTNeoXForCausalLM(_GPTNeoX, heads.CausalLM):
    """GPT-NeoX as a language model."""

    head_bias = False


class GPTNeoXForSequenceClassification(_GPTNeoX, heads.SequenceClassification):
    """GPT-NeoX with a classifier on each sequence's last token."""


class GPTNeoXForTokenClassification(_GPTNeoX, heads.TokenClassification):
    """GPT-NeoX with a classifier on every token."""


class GPTNeoXForQuestionAnswering(_GPTNeoX, heads.QuestionAnswering):
    """GPT-NeoX that finds the span of an answer."""
