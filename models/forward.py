"""What all layers of one forward share: positions, masks, cache, and attention on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neox_kernels import PreparedAttention, RotaryEmbedding, apply_rotary_qk, attention, prepare_attention
from neox_kernels.models.cache import KVCache


@dataclass
class Forward:
    """One forward, as every layer sees it.

    Attributes:
        attentions: filled by the layers where ``output_attentions`` asks for them.
    """

    rotary: RotaryEmbedding
    length: int  # positions that the tables must hold
    position_ids: Tensor | None  # None: behind what the cache has
    attention_mask: Tensor | None
    q_len: int
    k_len: int
    head_mask: Tensor | None  # (num_hidden_layers, ...)
    cache: KVCache | None
    implementation: str
    output_attentions: bool
    attentions: dict[int, Tensor] = field(default_factory=dict)
    _seqlens: dict[torch.device, Tensor] = field(default_factory=dict)
    _prepared: dict[torch.device, PreparedAttention] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout_p: float,
        upcast_scores: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate q and k, append to the cache, attend.

        Args:
            q, k, v: (batch, seqlen, nheads, head_dim), of which q and k are not rotated yet.
            upcast_scores: see :func:`neox_kernels.attention`.
            inplace: q and k may be overwritten.

        Returns:
            (batch, seqlen, nheads * head_dim), and the probabilities where they are asked for.
        """
        cos, sin = self.rotary.tables(self.length, q.device)
        interleaved = self.rotary.interleaved
        position_ids = None if self.position_ids is None else self.position_ids.to(q.device)
        if self.cache is None:
            inplace = inplace and not (torch.is_grad_enabled() and q.requires_grad)
            q, k = apply_rotary_qk(q, k, cos, sin, interleaved=interleaved, position_ids=position_ids, inplace=inplace)
        else:
            q, k, v = self.cache.append(
                layer, q, k, v, cos, sin, self._lengths(q), interleaved=interleaved, position_ids=position_ids,
                inplace=inplace,
            )  # fmt: skip
        attended, probabilities = attention(
            q,
            k,
            v,
            head_mask=None if self.head_mask is None else self.head_mask[layer].to(q.device),
            dropout_p=dropout_p,
            output_attentions=self.output_attentions,
            implementation=self.implementation,
            upcast_scores=upcast_scores,
            prepared=self._masks(q.device),
        )
        if probabilities is not None:
            self.attentions[layer] = probabilities
        return attended.flatten(2), probabilities

    def _masks(self, device: torch.device) -> PreparedAttention:
        found = self._prepared.get(device)
        if found is None:
            mask = None if self.attention_mask is None else self.attention_mask.to(device)
            if mask is None:
                found = prepare_attention(self.q_len, self.k_len)
            elif mask.dim() == 4:  # in place of the causal rule
                found = prepare_attention(self.q_len, self.k_len, attn_mask=mask, causal=False)
            else:
                found = prepare_attention(self.q_len, self.k_len, key_padding_mask=mask.bool())
            self._prepared[device] = found
        return found

    def _lengths(self, q: Tensor) -> Tensor:
        assert self.cache is not None
        found = self._seqlens.get(q.device)
        if found is None:
            found = torch.full((q.shape[0],), self.cache.length, dtype=torch.int32, device=q.device)
            self._seqlens[q.device] = found
        return found


def is_observed(module: nn.Module) -> bool:
    """Whether a hook may hold on to what the module gives."""
    return bool(module._forward_hooks or torch.nn.modules.module._global_forward_hooks)


def require_mask(mask: Tensor | None, batch: int, k_len: int) -> Tensor | None:
    if mask is not None and mask.dim() != 4 and tuple(mask.shape) != (batch, k_len):
        raise ValueError(
            f"attention_mask must be (batch, cached + new tokens), ({batch}, {k_len}), or of four dimensions, not of "
            f"shape {tuple(mask.shape)}"
        )
    return mask


def require_head_mask(mask: Tensor | Sequence[Tensor | None] | None, num_layers: int, nheads: int) -> Tensor | None:
    """(num_layers, nheads)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        found = [row for row in mask if row is not None]
        if len(mask) != num_layers:
            raise ValueError(f"head_mask must have a row for each of the {num_layers} layers, not {len(mask)}")
        if not found:
            return None
        mask = torch.stack([found[0].new_ones(nheads) if row is None else row for row in mask])
    if mask.dim() == 1:
        mask = mask.expand(num_layers, -1)
    if tuple(mask.shape) != (num_layers, nheads):
        raise ValueError(f"head_mask must be ({nheads},) or ({num_layers}, {nheads}), not of shape {tuple(mask.shape)}")
    return mask
