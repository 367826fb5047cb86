"""Rotary embedding in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _may_look(x: Tensor) -> bool:
    """Whether values may be read: on a GPU that is a sync, and to torch.compile the end of the graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def raise_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    """Refuse sequence ends that are none. Reads the values: a sync on a GPU."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] > total or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens must start at 0, never fall, and end at or below {total}, not be {ends}")


def rotary_positions(
    x: Tensor,
    *,
    position_ids: Tensor | None = None,
    seqlen_offsets: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Positions of the tokens of ``x``, (batch or 1, seqlen) or (total,), and which are padding, (total,) or None."""
    if x.dim() == 4:
        if position_ids is not None:
            return torch.atleast_2d(position_ids).long(), None
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if isinstance(seqlen_offsets, Tensor):
            return positions + seqlen_offsets[:, None], None
        return positions + (seqlen_offsets or 0), None
    token = torch.arange(x.shape[0], device=x.device)
    if cu_seqlens is None:
        assert position_ids is not None
        return position_ids.long(), None
    nseqs = cu_seqlens.shape[0] - 1
    # Bisection on the right ends: a token past the last one belongs to no sequence.
    sequence = torch.searchsorted(cu_seqlens[1:].long().contiguous(), token, right=True)
    padding = sequence == nseqs
    if position_ids is not None:
        return position_ids.long(), padding
    sequence = sequence.clamp(max=max(nseqs - 1, 0))
    positions = token - cu_seqlens.long()[sequence]
    if isinstance(seqlen_offsets, Tensor):
        positions = positions + (seqlen_offsets[sequence] if nseqs else 0)
    else:
        positions = positions + (seqlen_offsets or 0)
    return positions.masked_fill(padding, 0), padding


def _gather(table: Tensor, positions: Tensor, padding: Tensor | None, pass_through: float) -> Tensor:
    """Rows of a table: NaN for a position outside it, ``pass_through`` for padding."""
    max_position = table.shape[0]
    inside = (positions >= 0) & (positions < max_position)
    if max_position == 0:
        rows = table.new_full((*positions.shape, table.shape[1]), torch.nan)
    else:
        rows = table[positions.clamp(0, max_position - 1)].masked_fill(~inside[..., None], torch.nan)
    return rows if padding is None else rows.masked_fill(padding[..., None], pass_through)


def raise_rotary_range(positions: Tensor, padding: Tensor | None, max_position: int) -> None:
    """Refuse positions outside the tables. Reads the values: a sync on a GPU."""
    outside = (positions < 0) | (positions >= max_position)
    if padding is not None:
        outside &= ~padding
    if bool(outside.any()):
        where = tuple(int(i) for i in outside.nonzero()[0])
        raise IndexError(
            f"position {int(positions[where])} of token {where} is outside the tables, which hold positions 0 to "
            f"{max_position - 1}"
        )


def _cos_sin(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    seqlen_offsets: int | Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin of every token in the dtype of the arithmetic, and which are padding, each with a heads axis."""
    padding = None
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if cu_seqlens is not None and _may_look(x):
        raise_cu_seqlens(cu_seqlens, x.shape[0])
    if cos.dim() == 2:
        positions, padding = rotary_positions(
            x, position_ids=position_ids, seqlen_offsets=seqlen_offsets, cu_seqlens=cu_seqlens
        )
        if _may_look(x):
            raise_rotary_range(positions, padding, cos.shape[0])
        cos, sin = _gather(cos, positions, padding, 1.0), _gather(sin, positions, padding, 0.0)
    kept = None if padding is None else padding[..., None, None]
    return cos[..., None, :].to(compute), sin[..., None, :].to(compute), kept


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, padding: Tensor | None, interleaved: bool) -> Tensor:
    rotary_dim = 2 * cos.shape[-1]
    turned, passed = x[..., :rotary_dim].to(cos.dtype), x[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    y = torch.cat((turned.to(x.dtype), passed), dim=-1)
    return y if padding is None else torch.where(padding, x, y)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    seqlen_offsets: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    inplace: bool = False,
    layout: str = "bshd",
) -> Tensor:
    """See :func:`neox_kernels.apply_rotary`."""
    tokens_first = x.transpose(1, 2) if layout == "bhsd" else x
    c, s, padding = _cos_sin(tokens_first, cos, sin, position_ids, seqlen_offsets, cu_seqlens)
    y = _rotate(tokens_first, c, s, padding, interleaved)
    if layout == "bhsd":
        y = y.transpose(1, 2)
    return x.copy_(y) if inplace else y.contiguous()


def apply_rotary_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    seqlen_offsets: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    inplace: bool = False,
    layout: str = "bshd",
) -> tuple[Tensor, Tensor]:
    """See :func:`neox_kernels.apply_rotary_qk`."""
    tokens_first = q.transpose(1, 2) if layout == "bhsd" else q
    c, s, padding = _cos_sin(tokens_first, cos, sin, position_ids, seqlen_offsets, cu_seqlens)
    if layout == "bhsd":
        c, s = c.transpose(1, 2), s.transpose(1, 2)
    q_out, k_out = _rotate(q, c, s, padding, interleaved), _rotate(k, c, s, padding, interleaved)
    return (q.copy_(q_out), k.copy_(k_out)) if inplace else (q_out.contiguous(), k_out.contiguous())


def apply_rotary_kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    layout: str = "bshd",
) -> Tensor:
    """See :func:`neox_kernels.apply_rotary_kv_append`."""
    seqlen_dim = 2 if layout == "bhsd" else 1
    batch, seqlen, cache_length = q.shape[0], q.shape[seqlen_dim], k_cache.shape[seqlen_dim]
    start = cache_seqlens.long()
    if _may_look(q) and batch and seqlen:
        for b, used in enumerate(start.tolist()):
            if used < 0 or used + seqlen > cache_length:
                raise IndexError(
                    f"cache_seqlens[{b}] is {used}, and {seqlen} more tokens do not fit a cache of length "
                    f"{cache_length}"
                )
    q_out, k_out = apply_rotary_qk(
        q,
        k,
        cos,
        sin,
        interleaved=interleaved,
        position_ids=position_ids,
        seqlen_offsets=None if position_ids is not None else start,
        layout=layout,
    )
    rows = start[:, None] + torch.arange(seqlen, device=q.device)
    sequence = torch.arange(batch, device=q.device)[:, None].expand_as(rows)
    fits = (rows >= 0) & (rows < cache_length)
    for cache, new in ((k_cache, k_out), (v_cache, v)):
        if layout == "bhsd":
            cache, new = cache.transpose(1, 2), new.transpose(1, 2)
        cache[sequence[fits], rows[fits]] = new[fits]
    return q_out
