"""What every model of the package has: configuration, initial weights, embeddings, checkpoints, attention by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from neox_kernels.attention import IMPLEMENTATIONS
from neox_kernels.models import checkpoint
from neox_kernels.models.configuration import ModelConfig

Model = TypeVar("Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """Base of both families' models.

    Args:
        config: of the family; a mapping, a folder with a ``config.json``, or transformers' configuration object do too.
    """

    config_class: ClassVar[type[ModelConfig]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config: Any = self.config_class.of(config)

    # Filled by Decoder and by the heads.
    @property
    def decoder(self) -> Any:
        raise NotImplementedError

    @property
    def attn_implementation(self) -> str:
        """What computes attention: see ``implementation`` of :func:`neox_kernels.attention`; may be set."""
        name: str = self.decoder._attn_implementation
        return name

    @attn_implementation.setter
    def attn_implementation(self, name: str) -> None:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {name!r}")
        self.decoder._attn_implementation = name

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def init_weights(self, part: nn.Module | None = None) -> None:
        """Fill linear layers and embeddings, of ``part`` only where it is given, from a normal distribution of the
        configuration's ``initializer_range``; biases with zeros."""
        for module in (part or self).modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the language model's head be the input embedding, where the configuration says so."""
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight

    def get_input_embeddings(self) -> nn.Embedding:
        embedding: nn.Embedding = self.decoder.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.decoder.set_input_embeddings(embedding)

    def get_output_embeddings(self) -> nn.Linear | None:
        return None

    def resize_token_embeddings(self, num_tokens: int) -> nn.Embedding:
        """Cut or lengthen the embeddings of input and output; new tokens begin as :meth:`init_weights` has them."""
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {num_tokens}")
        old, head = self.get_input_embeddings(), self.get_output_embeddings()
        tied = head is not None and head.weight is old.weight
        std = self.config.initializer_range
        embedding = nn.Embedding(num_tokens, old.embedding_dim, _weight=_resized(old.weight, num_tokens, std))
        embedding.weight.requires_grad_(old.weight.requires_grad)
        self.set_input_embeddings(embedding)
        if head is not None:
            head.weight = embedding.weight if tied else _resized(head.weight, num_tokens, std)
            if head.bias is not None:
                head.bias = _resized(head.bias, num_tokens, 0.0)
            head.out_features = num_tokens
        self.config.vocab_size = num_tokens
        return embedding

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep what goes into each layer only, and run it again for its gradient."""
        self.decoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.decoder.gradient_checkpointing = False

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        strict: bool = True,
    ) -> Model:
        """See :func:`neox_kernels.models.checkpoint.load`."""
        return checkpoint.load(cls, folder, dtype=dtype, device=device, strict=strict)

    @classmethod
    def from_transformers(cls: type[Model], model: nn.Module) -> Model:
        """See :func:`neox_kernels.models.checkpoint.share`."""
        return checkpoint.share(cls, model)

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """See :func:`neox_kernels.models.checkpoint.save`."""
        checkpoint.save(self, folder, max_shard_bytes)


def _resized(x: Tensor, rows: int, std: float) -> nn.Parameter:
    made = x.new_empty(rows, *x.shape[1:]).normal_(std=std) if std else x.new_zeros(rows, *x.shape[1:])
    kept = min(rows, x.shape[0])
    made[:kept] = x.detach()[:kept]
    return nn.Parameter(made, requires_grad=x.requires_grad)
