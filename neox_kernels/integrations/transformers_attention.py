"""Attention for transformers' models: under its attention interface as ``neox_kernels``, and in swapped layers.

    import neox_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="neox_kernels")

A mask may come in every form that transformers makes: None, of two dimensions (the keys that are no padding), or of
four. What those of four say is looked at on a CPU, once for all layers: mostly it is the causal rule and padding, which
need no mask. A query that sees no key, such as padding on the left, gets zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import masking_utils
from transformers.modeling_utils import AttentionInterface

from neox_kernels import PreparedAttention, attention, prepare_attention
from neox_kernels.models.forward import attend_by_module, may_look, watched

NAME = "neox_kernels"
# Arguments of other models' attention that change its result and are not served.
_REFUSED = ("softcap", "s_aux", "position_bias", "cache")

# The mask that was read last, what it was read for, and what it says: layers share a mask.
_last: tuple[Tensor, tuple[int, ...], tuple[PreparedAttention, int]] | None = None
# The same of packed sequences: where they begin, and the mask.
_last_packed: tuple[Tensor, Tensor] | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float | nn.Module,
    implementation: str = "auto",
    output_attentions: bool = False,
    is_causal: bool | None = None,
    head_mask: Tensor | None = None,
    upcast_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention on what a layer of transformers has.

    Args:
        query: (batch, nheads, q_len, head_dim), rotated.
        key, value: (batch, nheads_k, k_len, head_dim), those of the cache included; ``nheads`` is a multiple of
            ``nheads_k``.
        mask: as the model made it for the layer.
        dropout: of the probabilities: how many are dropped, or a module, which is called where anyone watches it.
        is_causal: whether ``mask=None`` stands for a causal mask; default: what the module says.

    Returns:
        (batch, q_len, nheads, head_dim), and the probabilities where they are asked for.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    plain = mask is None and head_mask is None and not output_attentions and not upcast_scores
    if plain and query.shape[2] == 1 and query.device.type == "cpu" and implementation == "auto" and dropout == 0.0:
        # What attention() would take for a lone query: its checks and choice cost 40 us, a third of the work.
        return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    prepared, k_len = _read(mask, query.shape[0], query.shape[2], key.shape[2], causal)
    if k_len < key.shape[2]:
        key, value = key[:, :, :k_len], value[:, :, :k_len]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if isinstance(dropout, nn.Module):
        if type(dropout) is not nn.Dropout or watched(dropout):
            return attend_by_module(q, k, v, dropout, prepared, head_mask, upcast_scores)
        dropout = dropout.p if dropout.training else 0.0
    return attention(
        q,
        k,
        v,
        softmax_scale=scaling,
        head_mask=head_mask,
        dropout_p=dropout,
        output_attentions=output_attentions,
        implementation=implementation,
        upcast_scores=upcast_scores,
        prepared=prepared,
    )


def neox_kernels_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    head_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for ``attn_implementation="neox_kernels"``; see :func:`attend`.

    Raises:
        ValueError: an argument of another model's attention that is not served.
    """
    for name in _REFUSED:
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None: attention by {NAME!r} does not serve it")
    cu_seqlens = options.get("cu_seq_lens_q")
    if cu_seqlens is not None and attention_mask is None:  # else position_ids told the sequences apart already
        attention_mask = _packed(cu_seqlens, query.shape[2], key.shape[2])
    return attend(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        output_attentions=bool(output_attentions),
        is_causal=is_causal,
        head_mask=head_mask,
    )


def neox_kernels_mask(**given: Any) -> Tensor | None:
    """The mask for ``attn_implementation="neox_kernels"``, with the arguments of transformers' own mask functions.

    Returns:
        None where the causal rule is all; bool of (batch, kv_length) where padding is all beside it; else bool of
        four dimensions.
    """
    padding, kv_length, offset = given.get("attention_mask"), given["kv_length"], given.get("q_offset")
    plain = given.get("mask_function") is masking_utils.causal_mask_function and not given.get("kv_offset")
    # A static cache is longer than what it holds, and counts on the device; 4.57 counts there always.
    if plain and isinstance(offset, int) and given["q_length"] + offset == kv_length:
        if padding is not None:
            short = kv_length - padding.shape[-1]
            return torch.nn.functional.pad(padding.bool(), (0, short)) if short > 0 else padding[:, :kv_length].bool()
        if offset == 0 or given["q_length"] == 1:
            return None
        return torch.ones(given["batch_size"], kv_length, dtype=torch.bool, device=given.get("device", "cpu"))
    mask: Tensor | None = masking_utils.sdpa_mask(**{**given, "allow_is_causal_skip": False})
    return mask


def _packed(cu_seqlens: Tensor, q_len: int, k_len: int) -> Tensor:
    """(1, 1, q_len, k_len), bool, for sequences one behind the other, which do not see each other."""
    global _last_packed
    if q_len != k_len:
        raise ValueError(f"cu_seq_lens_q must be None behind a cache: {q_len} queries, {k_len} keys")
    last = _last_packed
    if last is None or last[0] is not cu_seqlens or last[1].shape[-1] != k_len or torch.compiler.is_compiling():
        places = torch.arange(k_len, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens, places, right=True, out_int32=True)
        mask = (sequence[:, None] == sequence) & (places[:, None] >= places)
        last = cu_seqlens, mask[None, None]
        if not torch.compiler.is_compiling():
            _last_packed = last
    return last[1]


def _read(mask: Tensor | None, batch: int, q_len: int, k_len: int, causal: bool) -> tuple[PreparedAttention, int]:
    """What a mask says, and how many of the keys it is about."""
    global _last
    if mask is None:
        # As for torch's SDPA, query i sees key j <= i: of a static cache, the keys that are filled.
        k_len = q_len if causal and 1 < q_len < k_len else k_len
        return prepare_attention(q_len, k_len, causal=causal and q_len > 1), k_len
    if torch.compiler.is_compiling():
        return _read_now(mask, batch, q_len, k_len, causal)
    key = (-1 if mask.is_inference() else mask._version, batch, q_len, k_len, causal)
    last = _last  # another thread may change it
    if last is None or last[0] is not mask or last[1] != key:
        _last = last = (mask, key, _read_now(mask, batch, q_len, k_len, causal))
    return last[2]


def _read_now(mask: Tensor, batch: int, q_len: int, k_len: int, causal: bool) -> tuple[PreparedAttention, int]:
    if mask.dim() == 2:
        return prepare_attention(q_len, k_len, key_padding_mask=mask, causal=causal), k_len
    mask = mask[..., :k_len]
    if may_look(mask) and mask.shape[1:] == (1, q_len, k_len) and not mask.requires_grad:
        seen = _seen(mask)
        if seen is not None and seen.numel():
            last = seen[:, -1]
            filled = max(1, int((last.any(0) * torch.arange(1, k_len + 1)).max()))  # behind, a static cache is empty
            for length in dict.fromkeys((filled, k_len)):
                rule = torch.ones(q_len, length, dtype=torch.bool).tril(length - q_len)
                if not seen[..., length:].any() and torch.equal(seen[..., :length], rule & last[:, None, :length]):
                    padding = last[:, :length].expand(batch, -1)
                    return prepare_attention(q_len, length, key_padding_mask=padding), length
    return prepare_attention(q_len, k_len, attn_mask=mask, causal=False), k_len


def _seen(mask: Tensor) -> Tensor | None:
    """(batch, q_len, k_len), where the mask lets through, if it does nothing but let through and hide."""
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    return seen if bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()) else None


def register() -> None:
    """Let transformers know the name."""
    AttentionInterface.register(NAME, neox_kernels_attention)
    masking_utils.AttentionMaskInterface.register(NAME, neox_kernels_mask)
