"""The arguments of the rotary ops."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels.checks.common import (
    FLOATS,
    not_a_tensor,
    require_flag,
    require_indices,
    require_int,
    require_writable,
    shape_of,
)

LAYOUTS = ("bshd", "bhsd")


def _require_layout(layout: object) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")


def _require_tables(cos: object, sin: object) -> Tensor:
    """cos and sin: one shape, dtype and device, two or three dimensions, no gradient."""
    if not isinstance(cos, Tensor):
        not_a_tensor("cos", cos)
    if not isinstance(sin, Tensor):
        not_a_tensor("sin", sin)
    if cos.dim() not in (2, 3):
        raise ValueError(
            "cos must be (max_position, rotary_dim / 2), or (1 or batch, seqlen, rotary_dim / 2) when gathered, "
            f"not of the shape {shape_of(cos)}"
        )
    if cos.shape != sin.shape:
        raise ValueError(f"sin must have the shape of cos, {shape_of(cos)}, not {shape_of(sin)}")
    dtype = cos.dtype
    if dtype not in FLOATS:
        raise TypeError(f"cos must be of a floating dtype, not {dtype}")
    if sin.dtype != dtype:
        raise TypeError(f"sin must be {dtype} like cos, not {sin.dtype}")
    if sin.device != cos.device:
        raise ValueError(f"sin must be on {cos.device} like cos, not on {sin.device}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos and sin must not require a gradient: tables are constants here")
    return cos


def _require_activations(name: str, x: object, cos: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        not_a_tensor(name, x)
    dtype = x.dtype
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {dtype}")
    if x.dim() not in (3, 4):
        raise ValueError(f"{name} must have 3 or 4 dimensions, not the shape {shape_of(x)}")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"rotary_dim must be at most the head_dim of {name}, {x.shape[-1]}, "
            f"not {2 * cos.shape[-1]} (twice the last dimension of cos)"
        )
    if x.device != cos.device:
        raise ValueError(f"cos must be on {x.device} like {name}, not on {cos.device}")
    if cos.dtype != dtype and cos.dtype != torch.float32:
        raise TypeError(f"cos must be float32 or {dtype} like {name}, not {cos.dtype}")
    return x


def _require_like_q(name: str, x: object, q: Tensor, heads_dim: int) -> Tensor:
    """k or v: the shape of q but for the number of heads."""
    if not isinstance(x, Tensor):
        not_a_tensor(name, x)
    if x.shape != q.shape:
        expected = list(q.shape)
        if x.dim() == q.dim():
            expected[heads_dim] = x.shape[heads_dim]
        if list(x.shape) != expected:
            raise ValueError(f"{name} must have the shape of q, {shape_of(q)}, but for the heads, not {shape_of(x)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must be {q.dtype} like q, not {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, not on {x.device}")
    return x


def _require_position_ids(position_ids: object, batch: int, seqlen: int, flat: bool, device: torch.device) -> None:
    ids = require_indices("position_ids", position_ids, device)
    shape = tuple(ids.shape)
    allowed = ((seqlen,),) if flat else ((seqlen,), (1, seqlen), (batch, seqlen))
    if shape not in allowed:
        shapes = " or ".join(str(one) for one in dict.fromkeys(allowed))
        raise ValueError(f"position_ids must be of the shape {shapes}, not {shape_of(ids)}")


def require_rotary(
    name: str,
    x: object,
    cos: object,
    sin: object,
    interleaved: object,
    position_ids: object,
    seqlen_offsets: object,
    cu_seqlens: object,
    max_seqlen: object,
    inplace: object,
    layout: object,
) -> None:
    """The arguments of :func:`neox_kernels.apply_rotary`; ``name`` is what messages call ``x``."""
    cos = _require_tables(cos, sin)
    x = _require_activations(name, x, cos)
    require_flag("interleaved", interleaved)
    require_flag("inplace", inplace)
    _require_layout(layout)
    device = x.device
    flat = x.dim() == 3
    batch, seqlen = (1, x.shape[0]) if flat else (x.shape[0], x.shape[2 if layout == "bhsd" else 1])
    if flat:
        if layout != "bshd":
            raise ValueError(f"layout must be 'bshd' for {name} of (total, nheads, head_dim), not {layout!r}")
        if cu_seqlens is None and position_ids is None:
            raise ValueError(f"cu_seqlens or position_ids must be given for {name} of (total, nheads, head_dim)")
    if cu_seqlens is not None:
        ends = require_indices("cu_seqlens", cu_seqlens, device)
        if not flat:
            raise ValueError(
                f"cu_seqlens must be None for {name} of {shape_of(x)}: it goes with (total, nheads, head_dim)"
            )
        if ends.dim() != 1 or ends.shape[0] < 1 or not ends.is_contiguous():
            raise ValueError(f"cu_seqlens must be a contiguous (batch + 1,), not of the shape {shape_of(ends)}")
        batch = ends.shape[0] - 1
    if position_ids is not None:
        if seqlen_offsets is not None:
            raise ValueError("seqlen_offsets must be None when position_ids are given: each says all of the positions")
        _require_position_ids(position_ids, batch, seqlen, flat, device)
    if isinstance(seqlen_offsets, Tensor):
        offsets = require_indices("seqlen_offsets", seqlen_offsets, device)
        if tuple(offsets.shape) != (batch,):
            raise ValueError(f"seqlen_offsets must be an int or of the shape ({batch},), not {shape_of(offsets)}")
    elif seqlen_offsets is not None:
        require_int("seqlen_offsets", seqlen_offsets)
    if max_seqlen is not None:
        require_int("max_seqlen", max_seqlen)
    if cos.dim() == 3:
        if flat or position_ids is not None or seqlen_offsets is not None:
            raise ValueError(
                "cos of three dimensions is already gathered by position: it goes with four-dimensional activations, "
                "and without position_ids, seqlen_offsets and cu_seqlens"
            )
        if cos.shape[1] != seqlen or cos.shape[0] not in (1, batch):
            raise ValueError(f"gathered cos must be ({batch} or 1, {seqlen}, rotary_dim / 2), not {shape_of(cos)}")
    elif position_ids is None and not isinstance(seqlen_offsets, Tensor):
        # Known from shapes alone, so said on every device.
        first = seqlen_offsets or 0
        longest = seqlen if cu_seqlens is None else (max_seqlen or 0)
        assert isinstance(first, int | torch.SymInt) and isinstance(longest, int | torch.SymInt)
        if longest and (first < 0 or first + longest > cos.shape[0]):
            raise IndexError(
                f"positions {first} to {first + longest - 1} are outside the tables, "
                f"which hold positions 0 to {cos.shape[0] - 1}"
            )
    if inplace:
        require_writable(name, x)


def require_rotary_qk(
    q: object,
    k: object,
    cos: object,
    sin: object,
    interleaved: object,
    position_ids: object,
    seqlen_offsets: object,
    cu_seqlens: object,
    max_seqlen: object,
    inplace: object,
    layout: object,
) -> None:
    """The arguments of :func:`neox_kernels.apply_rotary_qk`."""
    require_rotary("q", q, cos, sin, interleaved, position_ids, seqlen_offsets, cu_seqlens, max_seqlen, inplace, layout)
    assert isinstance(q, Tensor)
    k = _require_like_q("k", k, q, 1 if layout == "bhsd" or q.dim() == 3 else 2)
    if inplace:
        require_writable("k", k)
        if k is q:
            raise ValueError("k must not be q itself when both are written")


def require_kv_append(
    q: object,
    k: object,
    v: object,
    cos: object,
    sin: object,
    k_cache: object,
    v_cache: object,
    cache_seqlens: object,
    interleaved: object,
    position_ids: object,
    layout: object,
) -> None:
    """The arguments of :func:`neox_kernels.apply_rotary_kv_append`."""
    cos = _require_tables(cos, sin)
    if cos.dim() != 2:
        raise ValueError(f"cos must be (max_position, rotary_dim / 2), not of the shape {shape_of(cos)}")
    q = _require_activations("q", q, cos)
    if q.dim() != 4:
        raise ValueError(f"q must be (batch, seqlen, nheads, head_dim), not of the shape {shape_of(q)}")
    require_flag("interleaved", interleaved)
    _require_layout(layout)
    heads_dim, seqlen_dim = (1, 2) if layout == "bhsd" else (2, 1)
    k = _require_like_q("k", k, q, heads_dim)
    v = _require_like_q("v", v, q, heads_dim)
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {shape_of(k)}, not {shape_of(v)}")
    caches = []
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(cache, Tensor):
            not_a_tensor(name, cache)
        expected = list(k.shape)
        if cache.dim() == 4:
            expected[seqlen_dim] = cache.shape[seqlen_dim]
        if list(cache.shape) != expected:
            raise ValueError(
                f"{name} must have the shape of k, {shape_of(k)}, but for its length, not {shape_of(cache)}"
            )
        if cache.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, not {cache.dtype}")
        if cache.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, not on {cache.device}")
        require_writable(name, cache)
        caches.append(cache)
    if caches[0].shape != caches[1].shape:
        raise ValueError(f"v_cache must have the shape of k_cache, {shape_of(caches[0])}, not {shape_of(caches[1])}")
    used = require_indices("cache_seqlens", cache_seqlens, q.device)
    if tuple(used.shape) != (q.shape[0],):
        raise ValueError(f"cache_seqlens must be of the shape ({q.shape[0]},), not {shape_of(used)}")
    if position_ids is not None:
        _require_position_ids(position_ids, q.shape[0], q.shape[seqlen_dim], False, q.device)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *caches)):
        raise ValueError(
            "q, k, v and the caches must not require a gradient: appending to a cache is for inference (torch.no_grad)"
        )
