"""Unpad and pad in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def varlen_metadata(
    attention_mask: Tensor, capacity: int | None = None, max_seqlen: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`neox_kernels.varlen_metadata` is made of, found without reading a value on the host.

    Returns:
        indices: (capacity,), int64: which tokens of the flattened mask are kept, then -1. Without ``capacity`` there is
            room for all.
        cu_seqlens: (batch + 1,), int32.
        inverse: (batch, seqlen), int32: where in ``indices`` a token stands, -1 for padding.
        facts: (3,), int64: the number of tokens, the length of the longest sequence, how many values are not 0 or 1.
    """
    room = attention_mask.numel() if capacity is None else capacity
    kept = attention_mask != 0
    seqlens = kept.sum(-1)
    cu_seqlens = pad(seqlens.cumsum(0), (1, 0))
    invalid = (kept & (attention_mask != 1)).sum()
    longest = torch.cat((seqlens, seqlens.new_zeros(1))).amax()
    facts = torch.stack((cu_seqlens[-1], longest, invalid))

    order = kept.flatten().cumsum(0) - 1
    inverse = torch.where(kept.flatten() & (order < room), order, -1)
    # Padding, and tokens that find no room, all go to one more row, which is then cut off.
    indices = inverse.new_full((room + 1,), -1)
    indices = indices.scatter(0, inverse.where(inverse >= 0, room), torch.arange(kept.numel(), device=kept.device))
    return indices[:room], cu_seqlens.clamp(max=room).int(), inverse.view(kept.shape).int(), facts


def unpad_input(tensors: Sequence[Tensor], indices: Tensor, inverse: Tensor) -> list[Tensor]:
    """See :func:`neox_kernels.unpad_input`: of every tensor (batch, seqlen, ...) the rows at ``indices``."""
    at = indices.where(indices >= 0, inverse.numel())
    # A row of zeros behind the last, for the indices that are -1.
    return [torch.cat((x.flatten(0, 1), x.new_zeros(1, *x.shape[2:]))).index_select(0, at) for x in tensors]


def pad_input(tensors: Sequence[Tensor], indices: Tensor, inverse: Tensor) -> list[Tensor]:
    """See :func:`neox_kernels.pad_input`: every (total, ...) put to ``indices`` of zeros (batch, seqlen, ...)."""
    at = indices.where(indices >= 0, inverse.numel()).long()
    padded = (x.new_zeros(inverse.numel() + 1, *x.shape[1:]).index_copy(0, at, x)[:-1] for x in tensors)
    return [x.view(*inverse.shape, *x.shape[1:]) for x in padded]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """See :func:`neox_kernels.index_first_axis`."""
    return x.index_select(0, indices)


def invert_indices(indices: Tensor, rows: int) -> Tensor:
    """(rows,), int32: where in ``indices`` a row stands, -1 where it does not. What is outside the rows is left out."""
    at = indices.where((indices >= 0) & (indices < rows), rows)
    order = torch.arange(at.shape[0], device=at.device, dtype=torch.int32)
    return order.new_full((rows + 1,), -1).scatter(0, at.long(), order)[:rows]
