"""What attention needs to know of its masks, found once per forward and shared by all layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neox_kernels.checks import attention as checks
from neox_kernels.checks.common import require_flag
from neox_kernels.checks.varlen import may_look
from neox_kernels.ops.varlen import VarlenMetadata, varlen_metadata


class Varlen(NamedTuple):
    """The queries and the keys that FlashAttention gets of a padded batch."""

    queries: VarlenMetadata
    keys: VarlenMetadata


class PreparedAttention:
    """The masks of a forward and what is made of them, each thing at its first use. From :func:`prepare_attention`.

    Args:
        q_len, k_len, causal: as in :func:`neox_kernels.attention`.
        key_padding_mask: (batch, k_len), bool; None where every key may be seen, as far as that is known.
        attn_mask: bool or floating, broadcastable to (batch, nheads, q_len, k_len), or None.
    """

    def __init__(
        self, q_len: int, k_len: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None, causal: bool
    ) -> None:
        self.q_len, self.k_len, self.causal = q_len, k_len, causal
        self.key_padding_mask, self.attn_mask = key_padding_mask, attn_mask
        self._sdpa: tuple[Tensor | None, Tensor | None] | None = None
        self._varlen: tuple[Varlen | None] | None = None
        self._even: tuple[Tensor, Tensor] | None = None

    def visible(self, device: torch.device) -> Tensor | None:
        """Bool, broadcastable to (batch, nheads, q_len, k_len): the keys that a query sees as far as anything but an
        added mask says. None for all."""
        seen: Tensor | None = None
        if self.causal and self.q_len != 1:
            ones = torch.ones(self.q_len, self.k_len, dtype=torch.bool, device=device)
            seen = ones.tril(self.k_len - self.q_len)[None, None]
        padding = None if self.key_padding_mask is None else self.key_padding_mask[:, None, None]
        given = self.attn_mask if self.attn_mask is not None and self.attn_mask.dtype == torch.bool else None
        for mask in (padding, given):
            if mask is not None:
                seen = mask if seen is None else seen & mask
        return seen

    def for_sdpa(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The mask for torch's SDPA, bool or added, None for none; and the queries that see no key, (batch or 1,
        nheads or 1, q_len, 1), None where there is none for certain. To those the mask shows every key: what a softmax
        over nothing gives, and its gradient, is not to be had; their rows are to be zeroed afterwards."""
        if self._sdpa is None:
            self._sdpa = self._make_for_sdpa(device)
        return self._sdpa

    def _make_for_sdpa(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        mask = self.visible(device)
        if self.attn_mask is not None and self.attn_mask.dtype != torch.bool:
            added = self.attn_mask
            mask = added if mask is None else torch.where(mask, added, -torch.inf)
            dead = (mask == -torch.inf).all(-1, keepdim=True)
        elif mask is not None:
            dead = ~mask.any(-1, keepdim=True)
        else:
            return None, None
        if may_look(dead) and not bool(dead.any()):
            return mask, None
        return (mask | dead if mask.dtype == torch.bool else mask.masked_fill(dead, 0.0)), dead

    def for_varlen(self) -> Varlen | None:
        """Which queries and keys of a batch with ``key_padding_mask`` are left without padding, so that causal aligned
        bottom-right in each sequence is the causal of the whole; None where there is no such choice. On a GPU this
        syncs."""
        if self._varlen is None:
            self._varlen = (self._make_varlen(),)
        return self._varlen[0]

    def _make_varlen(self) -> Varlen | None:
        mask = self.key_padding_mask
        assert mask is not None
        keys = varlen_metadata(mask)
        if self.causal and self.q_len == self.k_len:
            return Varlen(keys, keys)  # a query is the token of its own key: padding, or not
        if self.causal and self.q_len > 1:
            # A hole among the keys would shift what earlier queries see, so all padding must be on the left.
            if self.q_len > self.k_len or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
                return None
            return Varlen(varlen_metadata(mask[:, -self.q_len :]), keys)
        # All keys are seen: every query of a sequence that has any.
        return Varlen(varlen_metadata(mask.any(-1, keepdim=True).expand(-1, self.q_len)), keys)

    def even_cu_seqlens(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``cu_seqlens`` of queries and keys of a batch without padding, (batch + 1,), int32."""
        if self._even is None:
            starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
            self._even = starts * self.q_len, starts * self.k_len
        return self._even


def prepare_attention(
    q_len: int,
    k_len: int,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    causal: bool = True,
) -> PreparedAttention:
    """Prepare the masks of a forward, to be given to :func:`neox_kernels.attention` in every layer.

    Args:
        q_len, k_len: the lengths of q and of k and v.
        key_padding_mask: (batch, k_len), 1 or True for the keys that may be seen, 0 or False for padding; bool, or any
            integer or floating dtype.
        attn_mask: bool (True: may be seen) or floating (added to the scaled scores), broadcastable to
            (batch, nheads, q_len, k_len).
        causal: query i sees key j only where ``j <= i + k_len - q_len``: the last query sees all.

    Returns:
        A :class:`PreparedAttention`. What an implementation needs of it is computed at its first use and kept.

    Raises:
        TypeError, ValueError: an argument of another type or shape, or a padding mask that holds anything but 0 and 1
            (seen on a CPU only; elsewhere, and under torch.compile, what is not 0 counts as 1).
    """
    checks.require_lengths(q_len, k_len)
    require_flag("causal", causal)
    checks.require_masks(key_padding_mask, attn_mask, k_len)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.bool()
        # A mask that hides nothing would cost every layer.
        if may_look(key_padding_mask) and bool(key_padding_mask.all()):
            key_padding_mask = None
    return PreparedAttention(q_len, k_len, key_padding_mask, attn_mask, causal)
