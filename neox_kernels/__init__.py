"""Fused kernels for GPT-NeoX and GPT-J: rotary embedding, causal softmax, and the swap into models that people have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from neox_kernels import backends
from neox_kernels.attention import AttentionChoice, attention, explain_attention
from neox_kernels.attention_masks import PreparedAttention, prepare_attention
from neox_kernels.backends import explain, use_backend
from neox_kernels.nn import FusedCausalSoftmax, RotaryEmbedding
from neox_kernels.ops.gelu import gelu_tanh
from neox_kernels.ops.rotary import apply_rotary, apply_rotary_kv_append, apply_rotary_qk
from neox_kernels.ops.softmax import causal_softmax
from neox_kernels.ops.tables import rotary_tables
from neox_kernels.ops.varlen import (
    VarlenMetadata,
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    varlen_metadata,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from neox_kernels.integrations.transformers import SwapReport

__version__ = "0.1.0"

__all__ = [
    "AttentionChoice",
    "FusedCausalSoftmax",
    "PreparedAttention",
    "RotaryEmbedding",
    "VarlenMetadata",
    "apply_rotary",
    "apply_rotary_kv_append",
    "apply_rotary_qk",
    "attention",
    "causal_softmax",
    "explain",
    "explain_attention",
    "gelu_tanh",
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "prepare_attention",
    "restore",
    "rotary_tables",
    "swap",
    "swapped",
    "unpad_input",
    "use_backend",
    "varlen_metadata",
]

# Ahead of the first call, so that torch.compile finds a filled table. Where there is a GPU and no compiled CUDA library
# this imports triton; nowhere else does the import.
backends.fill(("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))


def swap(model: torch.nn.Module, *, attention: bool = True) -> SwapReport:
    """Let the fused ops serve a live transformers model: same numbers, less time.

    GPT-NeoX and GPT-J get rotary embedding and attention; other models whose attention calls a function
    ``apply_rotary_pos_emb`` of their own file (Llama, Mistral, Qwen, Gemma, Cohere, GLM, ...) the rotary embedding,
    where a trial on a small input, with the tables of the model's own, shows that it is the same.

    Attention goes by :func:`attention` where the model is configured for ``eager`` (then by the fused softmax, with
    probabilities as before) or ``sdpa`` (then by the fastest for the call), and always in GPT-J, whose activation is
    exchanged too. Whatever else the model is configured for stays.

    Args:
        model: any module that holds such attention layers; changed in place, per instance: transformers itself and
            other models stay as they are.
        attention: False for the rotary embedding alone.

    Returns:
        What was replaced, and what was left and why; it prints well. Swapping twice changes nothing more.

    Raises:
        TypeError: ``model`` is not a module.
        ModuleNotFoundError: transformers is not installed.
    """
    from neox_kernels.integrations import transformers

    return transformers.swap(model, attention=attention)


def restore(model: torch.nn.Module) -> SwapReport:
    """Put back everything that :func:`swap` replaced in ``model``."""
    from neox_kernels.integrations import transformers

    return transformers.restore(model)


def swapped(model: torch.nn.Module, *, attention: bool = True) -> AbstractContextManager[SwapReport]:
    """``with neox_kernels.swapped(model) as report:`` swaps for the block, and puts back what it replaced.

    Args:
        model, attention: see :func:`swap`.
    """
    from neox_kernels.integrations import transformers

    return transformers.swapped(model, attention=attention)
