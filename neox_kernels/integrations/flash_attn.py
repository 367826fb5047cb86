"""The functions of flash-attn 2.8's ``flash_attn.bert_padding``, by their names, arguments and results.

One import changes:

    from neox_kernels.integrations.flash_attn import pad_input, unpad_input

flash-attn itself is not needed. What differs: a mask that holds anything but 0 and 1 raises (also where
``attention_mask`` and ``unused_mask`` both name a token), the gradients of repeated rows add up, and an empty batch is
served.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels import index_first_axis, index_put_first_axis, varlen_metadata
from neox_kernels import unpad_input as unpad

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Take the padding out.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), 1 for a token and 0 for padding.
        unused_mask: (batch, seqlen), 1 for what is kept although it is no token (room that is allocated).

    Returns:
        The kept rows (total, ...), their ``indices`` (total,), ``cu_seqlens`` (batch + 1,), the longest length, and how
        many tokens of each sequence are used (batch,), int32.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    metadata = varlen_metadata(kept)
    used = metadata.cu_seqlens.diff() if unused_mask is None else attention_mask.sum(-1, dtype=torch.int32)
    return unpad(hidden_states, metadata), metadata.indices, metadata.cu_seqlens, metadata.max_seqlen, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Take the padding out of rows that each hold several sequences, one behind the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), integers: the lengths of a row's sequences, then zeros;
            [2, 3, 0, 0, 0, 0] is two sequences and one token of padding.

    Returns:
        The tokens (total, ...), their ``indices`` (total,), ``cu_seqlens`` (sequences + 1,), and the longest length.
    """
    lengths = attention_mask_in_length
    tokens = torch.arange(lengths.shape[-1], device=lengths.device) < lengths.sum(-1, keepdim=True)
    # Of a row, its tokens by the one mask, and its sequences by the lengths.
    metadata = varlen_metadata(tokens)
    each = lengths[lengths != 0]
    cu_seqlens = torch.nn.functional.pad(each.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(each.max()) if len(each) else 0
    return unpad(hidden_states, metadata), metadata.indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put the padding back, as zeros.

    Args:
        hidden_states: (total, ...).
        indices: (total,), from :func:`unpad_input`.
        batch, seqlen: of the result.

    Returns:
        (batch, seqlen, ...).
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])
