"""The functions of flash-attn 2.8's ``flash_attn.bert_padding`` and ``flash_attn.layers.rotary``, by their names.

One import changes:

    from neox_kernels.integrations.flash_attn import apply_rotary_emb, pad_input, unpad_input

flash-attn itself is not needed. Arguments and results are its own. What differs in the padding: a mask that holds
anything but 0 and 1 raises (also where ``attention_mask`` and ``unused_mask`` both name a token), the gradients of
repeated rows add up, and an empty batch is served.

What differs in the rotary functions, apart from CPUs, float64 and heads above 256:

- cos and sin may be float32 as well as of the dtype of the activations. Tables that require a gradient are refused;
  flash-attn silently gives them none.
- A position outside the tables raises IndexError on a CPU and gives NaN on a GPU. Where a tensor of offsets leads past
  the tables, flash-attn leaves the token as it was, without a word.
- ``max_seqlen`` may be left out. It is compared with the length of the tables and limits nothing else.
- Tokens past the end of ``cu_seqlens`` pass through; flash-attn leaves theirs unwritten.
- Writing in place follows autograd's rules: a leaf that requires a gradient raises RuntimeError, and backward does not
  write into the gradient that comes in.
- Bad arguments raise TypeError, ValueError or IndexError, before anything is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels import apply_rotary, apply_rotary_qk, index_first_axis, index_put_first_axis, varlen_metadata
from neox_kernels import unpad_input as unpad

__all__ = [
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
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


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first ``rotary_dim`` features of every head; the others pass through.

    Args:
        x: (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with ``cu_seqlens``.
        cos, sin: (seqlen_rotary, rotary_dim / 2); float32, or the dtype of ``x``.
        interleaved: False pairs feature i with i + rotary_dim / 2, True pairs 2i with 2i + 1.
        inplace: write into ``x`` and return it.
        seqlen_offsets: the position of each sequence's first token: an int, or (batch,) of int32 or int64.
        cu_seqlens: (batch + 1,), int32 or int64: where each sequence begins, and where the last one ends.
        max_seqlen: the longest sequence of ``cu_seqlens``.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError, TypeError, IndexError: see :func:`neox_kernels.apply_rotary`.
    """
    _require_table("cos", cos)
    return apply_rotary(
        x,
        cos,
        sin,
        interleaved=interleaved,
        seqlen_offsets=seqlen_offsets,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        inplace=inplace,
    )


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of a packed projection where they lie; v stays.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim).
        cos, sin: (seqlen_rotary, rotary_dim / 2); float32, or the dtype of ``qkv``.
        cos_k, sin_k: tables for k alone, of the same kind. Default: those of q.
        interleaved, seqlen_offsets: see :func:`apply_rotary_emb`.
        num_heads_q: the heads of q, for ``qkv`` of four dimensions.

    Returns:
        ``qkv`` itself.

    Raises:
        ValueError, TypeError, IndexError: see :func:`neox_kernels.apply_rotary`; ``qkv`` of another shape.
    """
    q, k = _slices(qkv, num_heads_q)
    _require_table("cos", cos)
    if cos_k is None and sin_k is None:
        apply_rotary_qk(q, k, cos, sin, interleaved=interleaved, seqlen_offsets=seqlen_offsets, inplace=True)
        return qkv
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    _require_table("cos_k", cos_k)
    # Both are computed before either is written: k's tables may be refused where q's are not.
    rotated = (
        apply_rotary(q, cos, sin, interleaved=interleaved, seqlen_offsets=seqlen_offsets),
        apply_rotary(k, cos_k, sin_k, interleaved=interleaved, seqlen_offsets=seqlen_offsets),
    )
    q.copy_(rotated[0])
    k.copy_(rotated[1])
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotate k of a packed projection where it lies; v stays.

    Args:
        kv: (batch, seqlen, 2, nheads, headdim).
        cos, sin: (seqlen_rotary, rotary_dim / 2); float32, or the dtype of ``kv``.
        interleaved, seqlen_offsets: see :func:`apply_rotary_emb`.

    Returns:
        ``kv`` itself.

    Raises:
        ValueError, TypeError, IndexError: see :func:`neox_kernels.apply_rotary`; ``kv`` of another shape.
    """
    _require_floats("kv", kv)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be (batch, seqlen, 2, nheads, headdim), not of the shape {tuple(kv.shape)}")
    _require_table("cos", cos)
    apply_rotary(kv[:, :, 0], cos, sin, interleaved=interleaved, seqlen_offsets=seqlen_offsets, inplace=True)
    return kv


def _slices(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """q and k of a packed projection, as views."""
    _require_floats("qkv", qkv)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return qkv[:, :, 0], qkv[:, :, 1]
    if qkv.dim() != 4:
        raise ValueError(
            "qkv must be (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * num_heads_k, "
            f"headdim), not of the shape {tuple(qkv.shape)}"
        )
    if num_heads_q is None:
        raise ValueError("num_heads_q must be given for qkv of four dimensions")
    if isinstance(num_heads_q, bool) or not isinstance(num_heads_q, int):
        raise TypeError(f"num_heads_q must be an int, not {type(num_heads_q).__name__}")
    num_heads_k, left = divmod(qkv.shape[2] - num_heads_q, 2)
    if left or num_heads_q < 0 or num_heads_k < 0:
        raise ValueError(
            f"num_heads_q must leave an even number of the {qkv.shape[2]} heads of qkv to k and v, not be {num_heads_q}"
        )
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]


def _require_floats(name: str, x: object) -> None:
    # The ops would say this of q or x, which a caller of these functions has not named so.
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {x.dtype}")


def _require_table(name: str, table: object) -> None:
    # The ops take tables of three dimensions too, gathered by position, but not with an offset.
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(table).__name__}")
    if table.dim() != 2:
        raise ValueError(f"{name} must be (seqlen_rotary, rotary_dim / 2), not of the shape {tuple(table.shape)}")
