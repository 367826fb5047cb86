"""GPT-J.

The modules and their names are those of Hugging Face's, so that checkpoints, hooks and tools for these find them.
Source of the architecture: Wang and Komatsuzaki, GPT-J-6B, 2021.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neox_kernels.models import heads
from neox_kernels.models.activations import activated, activation
from neox_kernels.models.configuration import GPTJConfig, ModelConfig
from neox_kernels.models.decoder import Decoder
from neox_kernels.models.forward import Forward, may_overwrite


class GPTJAttention(nn.Module):
    def __init__(self, config: GPTJConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.nheads = config.num_attention_heads
        self.attn_dropout = nn.Dropout(config.attention_dropout)
        self.resid_dropout = nn.Dropout(config.hidden_dropout)
        width = config.hidden_size
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, hidden: Tensor, shared: Forward) -> tuple[Tensor, Tensor | None]:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (projection(hidden).unflatten(-1, (self.nheads, -1)) for projection in projections)
        attended, probabilities = shared.attend(
            self.layer,
            q,
            k,
            v,
            dropout=self.attn_dropout,
            upcast_scores=True,
            inplace=may_overwrite(self.q_proj, self.k_proj),
        )
        return self.resid_dropout(self.out_proj(attended)), probabilities


class GPTJMLP(nn.Module):
    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation(config.hidden_act)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.fc_out(activated(self.fc_in, self.act, hidden)))
        return out


class GPTJBlock(nn.Module):
    def __init__(self, config: GPTJConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = GPTJAttention(config, layer)
        self.mlp = GPTJMLP(config)

    def forward(self, hidden: Tensor, shared: Forward) -> tuple[Tensor, Tensor | None]:
        normed = self.ln_1(hidden)
        attended, probabilities = self.attn(normed, shared)
        return attended + self.mlp(normed) + hidden, probabilities


class GPTJModel(Decoder):
    """GPT-J without a head. Arguments and result of a call: see :meth:`Decoder.forward`."""

    config_class = GPTJConfig
    embedding_name = "wte"
    dropout_name = "drop"
    layers_name = "h"
    norm_name = "ln_f"
    interleaved = True
    adds_token_types = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config = self.config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.embedding_dropout)
        self.h = nn.ModuleList(GPTJBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.init_weights()


class _GPTJ:
    config_class: ClassVar[type[ModelConfig]] = GPTJConfig
    decoder_class: ClassVar[type[Decoder]] = GPTJModel
    prefix: ClassVar[str] = "transformer"


class GPTJForCausalLM(_GPTJ, heads.CausalLM):
    """GPT-J as a language model; its logits are float32."""

    head_bias = True
    logits_dtype = torch.float32


class GPTJForSequenceClassification(_GPTJ, heads.SequenceClassification):
    """GPT-J with a classifier on each sequence's last token."""


class GPTJForTokenClassification(_GPTJ, heads.TokenClassification):
    """GPT-J with a classifier on every token."""


class GPTJForQuestionAnswering(_GPTJ, heads.QuestionAnswering):
    """GPT-J that finds the span of an answer."""
