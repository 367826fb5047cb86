"""What all layers of one forward share: positions, masks, cache, and attention on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neox_kernels import PreparedAttention, RotaryEmbedding, apply_rotary_qk, attention, prepare_attention
from neox_kernels.models.cache import KVCache

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Forward:
    """One forward, as every layer sees it.

    Attributes:
        attentions: filled by the layers where ``output_attentions`` asks for them.
    """

    rotary: RotaryEmbedding
    tables: tuple[Tensor, Tensor] | None  # cos and sin where they are not the module's own
    length: int  # positions that the tables must hold
    position_ids: Tensor | None  # rows of the tables; None: behind what the cache has
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
        dropout: float | nn.Module,
        upcast_scores: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate q and k, append to the cache, attend.

        Args:
            q, k, v: (batch, seqlen, nheads, head_dim), of which q and k are not rotated yet.
            dropout: of the probabilities: how many are dropped, or the family's module for it, which is called where
                anyone watches it, and where it is not PyTorch's.
            upcast_scores: see :func:`neox_kernels.attention`.
            inplace: q and k may be overwritten.

        Returns:
            (batch, seqlen, nheads * head_dim), and the probabilities where they are asked for.
        """
        # eager and fused have the probabilities anyway: hooks on attention see them, as they do in transformers' eager.
        give = self.output_attentions or self.implementation in ("eager", "fused")
        if self.tables is None:
            cos, sin = self.rotary.tables(self.length, q.device)
        else:
            cos, sin = (table.to(q.device) for table in self.tables)
        interleaved = self.rotary.interleaved
        position_ids = None if self.position_ids is None else self.position_ids.to(q.device)
        if self.cache is None:
            inplace = inplace and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
            q, k = apply_rotary_qk(q, k, cos, sin, interleaved=interleaved, position_ids=position_ids, inplace=inplace)
        else:
            q, k, v = self.cache.append(
                layer, q, k, v, cos, sin, self._lengths(q), interleaved=interleaved, position_ids=position_ids,
                inplace=inplace,
            )  # fmt: skip
        head_mask = None if self.head_mask is None else self.head_mask[layer].to(q.device)
        masks = self._masks(q.device)
        probabilities: Tensor | None
        if isinstance(dropout, nn.Module) and (type(dropout) is not nn.Dropout or watched(dropout)):
            by = "eager" if self.implementation == "eager" else "fused"
            attended, probabilities = attend_by_module(q, k, v, dropout, masks, head_mask, upcast_scores, by)
        else:
            if isinstance(dropout, nn.Dropout):
                dropout = dropout.p if dropout.training else 0.0
            attended, probabilities = attention(
                q,
                k,
                v,
                head_mask=head_mask,
                dropout_p=dropout,
                output_attentions=give,
                implementation=self.implementation,
                upcast_scores=upcast_scores,
                prepared=masks,
            )
        if self.output_attentions and probabilities is not None:
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
                found = prepare_attention(self.q_len, self.k_len, key_padding_mask=mask)
            self._prepared[device] = found
        return found

    def _lengths(self, q: Tensor) -> Tensor:
        assert self.cache is not None
        found = self._seqlens.get(q.device)
        if found is None:
            found = torch.full((q.shape[0],), self.cache.length, dtype=torch.int32, device=q.device)
            self._seqlens[q.device] = found
        return found


def attend_by_module(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: nn.Module,
    masks: PreparedAttention,
    head_mask: Tensor | None,
    upcast_scores: bool,
    implementation: str = "fused",
) -> tuple[Tensor, Tensor]:
    """Attention whose probabilities go through a module that someone watches: result and probabilities."""
    _, probabilities = attention(
        q, k, v, output_attentions=True, implementation=implementation, upcast_scores=upcast_scores, prepared=masks
    )
    assert probabilities is not None
    probabilities = dropout(probabilities)
    if head_mask is not None:
        head_mask = head_mask[:, None, None] if head_mask.dim() == 1 else head_mask
        probabilities = probabilities * head_mask.to(probabilities.dtype)
    return torch.matmul(probabilities, v.transpose(1, 2)).transpose(1, 2), probabilities


def watched(module: nn.Module) -> bool:
    """Whether anyone sees or changes a call of the module: by hooks, or by a forward of its own."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or "forward" in module.__dict__ or torch.nn.modules.module._has_any_global_hook())


def may_overwrite(*projections: nn.Module) -> bool:
    """Whether nobody but the caller can hold on to what the modules gave."""
    return all(type(x) is nn.Linear and not watched(x) for x in projections)


def may_stand_for(linear: nn.Linear, x: Tensor) -> bool:
    """Whether other work may take the place of a call on a CPU: no gradient, hook, compiler, cast or other class."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in linear.parameters())):
        return False
    plain = all(type(one) in (Tensor, nn.Parameter) for one in (x, *linear.parameters()))
    return plain and may_overwrite(linear) and x.dtype == linear.weight.dtype


def may_look(x: Tensor) -> bool:
    """Whether values may be read: on a GPU that is a sync, and to torch.compile the end of the graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def require_integers(name: str, x: object, *shapes: tuple[int, ...]) -> Tensor:
    """A tensor of int32 or int64, of one of the shapes where any are given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not a {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {x.dtype}")
    if shapes and tuple(x.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must be of the shape {wanted}, not {tuple(x.shape)}")
    return x


def require_mask(mask: Tensor | None, scores: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor | None:
    """Of two dimensions with 0 and 1 only, or of four.

    Args:
        scores: (batch, nheads, seqlen, cached + seqlen).
        dtype: of the hidden states.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, not a {type(mask).__name__}")
    batch, _, _, k_len = scores
    shape = tuple(mask.shape)
    if mask.dim() == 4:
        if any(size not in (1, full) for size, full in zip(shape, scores, strict=True)):
            raise ValueError(f"attention_mask of four dimensions must be broadcastable to {scores}, not {shape}")
        if mask.dtype != torch.bool and not (mask.is_floating_point() and mask.dtype in (*_NARROW, dtype)):
            raise TypeError(
                f"attention_mask of four dimensions must be bool or floating, for a model of {dtype}, not {mask.dtype}"
            )
        return mask
    if shape != (batch, k_len):
        raise ValueError(
            f"attention_mask must be (batch, cached + new tokens), ({batch}, {k_len}), or of four dimensions, not of "
            f"shape {shape}"
        )
    if mask.dtype != torch.bool and may_look(mask):
        other = mask[(mask != 0) & (mask != 1)]
        if len(other):
            raise ValueError(f"attention_mask of two dimensions must hold only 0 and 1, not {other[0].item()}")
    return mask


def require_head_mask(
    mask: Tensor | Sequence[Tensor | None] | None, num_layers: int, nheads: int, dtype: torch.dtype
) -> Tensor | None:
    """(num_layers, nheads), of ``dtype``."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        if not isinstance(mask, tuple | list) or not all(row is None or isinstance(row, Tensor) for row in mask):
            raise TypeError(f"head_mask must be a tensor, or one or None for each layer, not {mask!r}")
        if len(mask) != num_layers:
            raise ValueError(f"head_mask must have a row for each of the {num_layers} layers, not {len(mask)}")
        found = [row for row in mask if row is not None]
        if not found:
            return None
        for row in found:
            if tuple(row.shape) != (nheads,):
                raise ValueError(f"head_mask must have rows of ({nheads},), not of shape {tuple(row.shape)}")
        mask = torch.stack([found[0].new_ones(nheads) if row is None else row for row in mask])
    if tuple(mask.shape) not in ((nheads,), (num_layers, nheads)):
        raise ValueError(f"head_mask must be ({nheads},) or ({num_layers}, {nheads}), not of shape {tuple(mask.shape)}")
    return mask.to(dtype).expand(num_layers, -1)
