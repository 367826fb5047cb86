"""Rotary position embedding: q and k, or one tensor, or q, k and v on their way into a cache, in one launch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from neox_kernels import backends
from neox_kernels.checks import rotary as checks
from neox_kernels.checks.common import refuse
from neox_kernels.reference import rotary as reference

Layout = Literal["bshd", "bhsd"]


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
    layout: Layout = "bshd",
    validate: bool = False,
) -> Tensor:
    """Rotate the first ``rotary_dim`` features of every head by its token's position; the others pass through.

    Args:
        x: (batch, seqlen, nheads, head_dim), or (total, nheads, head_dim) with ``cu_seqlens`` or ``position_ids``;
            float32, bfloat16, float16 or float64, any strides (a last dimension that is not contiguous is copied
            first).
        cos, sin: (max_position, rotary_dim / 2), from :func:`rotary_tables`; or (1 or batch, seqlen, rotary_dim / 2),
            already gathered by position. float32, or the dtype of ``x``.
        interleaved: False pairs feature i with i + rotary_dim / 2 (GPT-NeoX), True pairs 2i with 2i + 1 (GPT-J).
        position_ids: (seqlen,), (1, seqlen) or (batch, seqlen), or (total,); int32 or int64. Default 0, 1, 2, ...
        seqlen_offsets: what is added to the default positions: an int, or (batch,) of int32 or int64.
        cu_seqlens: (batch + 1,), int32 or int64: where each sequence of ``x`` (total, nheads, head_dim) begins, and
            where the last one ends. Tokens past it are padding and pass through.
        max_seqlen: the longest sequence of ``cu_seqlens``, if known: then a table that is too short is refused on every
            device.
        inplace: write into ``x`` and return it.
        layout: "bshd" as above, or "bhsd" for ``x`` of (batch, nheads, seqlen, head_dim).
        validate: also read the positions on a GPU (a sync) and raise for one outside the tables.

    Returns:
        Shape and dtype of ``x``, contiguous; ``x`` itself with ``inplace``.

    Raises:
        ValueError, TypeError: ``rotary_dim > head_dim``, or shapes, dtypes or devices that do not go together.
        IndexError: a position outside the tables. On a GPU this needs ``validate``; without it, and in the reference
            under torch.compile, the token's rotated features become NaN.

    Source: RoFormer, arXiv:2104.09864. Oracle: ``neox_kernels.reference.apply_rotary``.
    """
    try:
        serve, checks_itself = backends.select("apply_rotary", x.device.type, x.dtype)
        if validate or max_seqlen is not None or not checks_itself:
            checks.require_rotary(
                "x", x, cos, sin, interleaved, position_ids, seqlen_offsets, cu_seqlens, max_seqlen, inplace, layout
            )
        if validate:
            _validate(x, cos, position_ids, seqlen_offsets, cu_seqlens, layout)
        result: Tensor = serve(
            x,
            cos,
            sin,
            interleaved=interleaved,
            position_ids=position_ids,
            seqlen_offsets=seqlen_offsets,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            inplace=inplace,
            layout=layout,
        )
        return result
    except Exception as error:
        refuse(
            error,
            checks.require_rotary,
            "x",
            x,
            cos,
            sin,
            interleaved,
            position_ids,
            seqlen_offsets,
            cu_seqlens,
            max_seqlen,
            inplace,
            layout,
        )


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
    layout: Layout = "bshd",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k in one launch, slices of a packed QKV projection as they lie.

    Args:
        q: (batch, seqlen, nheads, head_dim), or (total, nheads, head_dim); see :func:`apply_rotary`.
        k: like ``q``, but for its number of heads, which may differ (grouped queries).
        cos, sin, interleaved, position_ids, seqlen_offsets, cu_seqlens, max_seqlen, inplace, layout, validate: see
            :func:`apply_rotary`.

    Returns:
        q and k, rotated: shapes and dtype of the inputs, contiguous; the inputs themselves with ``inplace``.

    Raises:
        ValueError, TypeError, IndexError: see :func:`apply_rotary`.

    Source: RoFormer, arXiv:2104.09864. Oracle: ``neox_kernels.reference.apply_rotary_qk``.
    """
    try:
        serve, checks_itself = backends.select("apply_rotary_qk", q.device.type, q.dtype)
        if validate or max_seqlen is not None or not checks_itself:
            checks.require_rotary_qk(
                q, k, cos, sin, interleaved, position_ids, seqlen_offsets, cu_seqlens, max_seqlen, inplace, layout
            )
        if validate:
            _validate(q, cos, position_ids, seqlen_offsets, cu_seqlens, layout)
        result: tuple[Tensor, Tensor] = serve(
            q,
            k,
            cos,
            sin,
            interleaved=interleaved,
            position_ids=position_ids,
            seqlen_offsets=seqlen_offsets,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            inplace=inplace,
            layout=layout,
        )
        return result
    except Exception as error:
        refuse(
            error,
            checks.require_rotary_qk,
            q,
            k,
            cos,
            sin,
            interleaved,
            position_ids,
            seqlen_offsets,
            cu_seqlens,
            max_seqlen,
            inplace,
            layout,
        )


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
    layout: Layout = "bshd",
    validate: bool = False,
) -> Tensor:
    """Rotate q and k, and write k and v behind what a preallocated cache already holds, in one launch. For inference.

    Args:
        q: (batch, seqlen, nheads, head_dim), the new tokens.
        k, v: (batch, seqlen, nheads_k, head_dim).
        cos, sin: (max_position, rotary_dim / 2); float32, or the dtype of ``q``.
        k_cache, v_cache: (batch, cache_length, nheads_k, head_dim), of the dtype of ``q``; rows ``cache_seqlens[b]`` to
            ``cache_seqlens[b] + seqlen - 1`` of sequence b are written, nothing else.
        cache_seqlens: (batch,), int32 or int64: the tokens that each sequence already has. Not changed.
        interleaved: see :func:`apply_rotary`.
        position_ids: (seqlen,), (1, seqlen) or (batch, seqlen); default ``cache_seqlens[b] + s``.
        layout: "bshd" as above, or "bhsd": every tensor is (batch, nheads, length, head_dim).
        validate: also read positions and lengths on a GPU (a sync) and raise for one that does not fit.

    Returns:
        q, rotated; shape and dtype of ``q``, contiguous.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together; an input that requires a gradient.
        IndexError: a position outside the tables, or a cache that is full; nothing is written. On a GPU this needs
            ``validate``; without it a row that does not fit is not written.

    Source: RoFormer, arXiv:2104.09864. Oracle: ``neox_kernels.reference.apply_rotary_kv_append``.
    """
    try:
        serve, checks_itself = backends.select("apply_rotary_kv_append", q.device.type, q.dtype)
        if validate or not checks_itself:
            checks.require_kv_append(
                q, k, v, cos, sin, k_cache, v_cache, cache_seqlens, interleaved, position_ids, layout
            )
        if validate:
            _validate(q, cos, position_ids, None if position_ids is not None else cache_seqlens, None, layout)
            _validate_room(q, k_cache, cache_seqlens, layout)
        result: Tensor = serve(
            q,
            k,
            v,
            cos,
            sin,
            k_cache,
            v_cache,
            cache_seqlens,
            interleaved=interleaved,
            position_ids=position_ids,
            layout=layout,
        )
        return result
    except Exception as error:
        refuse(
            error,
            checks.require_kv_append,
            q,
            k,
            v,
            cos,
            sin,
            k_cache,
            v_cache,
            cache_seqlens,
            interleaved,
            position_ids,
            layout,
        )


def _validate(
    x: Tensor,
    cos: Tensor,
    position_ids: Tensor | None,
    seqlen_offsets: int | Tensor | None,
    cu_seqlens: Tensor | None,
    layout: Layout,
) -> None:
    if cos.dim() == 3:
        return
    if cu_seqlens is not None:
        reference.raise_cu_seqlens(cu_seqlens, x.shape[0])
    tokens_first = x.transpose(1, 2) if layout == "bhsd" else x
    positions, padding = reference.rotary_positions(
        tokens_first, position_ids=position_ids, seqlen_offsets=seqlen_offsets, cu_seqlens=cu_seqlens
    )
    reference.raise_rotary_range(positions, padding, cos.shape[0])


def _validate_room(q: Tensor, k_cache: Tensor, cache_seqlens: Tensor, layout: Layout) -> None:
    seqlen_dim = 2 if layout == "bhsd" else 1
    room = k_cache.shape[seqlen_dim] - q.shape[seqlen_dim]
    if bool(((cache_seqlens < 0) | (cache_seqlens > room)).any()):
        raise IndexError(
            f"cache_seqlens must be between 0 and {room} for {q.shape[seqlen_dim]} more tokens in a cache of length "
            f"{k_cache.shape[seqlen_dim]}, not {cache_seqlens.tolist()}"
        )
