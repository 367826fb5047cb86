"""The rotary kernel as the functions that the registry serves: launched on tensors, and known to autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_kernels.kernels.launch import last_dim_contiguous, launch, mark_written, needs_grad
from neox_kernels.kernels.rotary import THREADS, Table, _rotary_kernel, plan_launch


def _launch(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    table: Table,
    cache_seqlens: Tensor | None = None,
    cache_length: int = 0,
) -> None:
    grid, args, constants = plan_launch(inputs, outputs, table, cache_seqlens, cache_length)
    if grid[0] == 0 or grid[1] == 0 or constants["HEAD_DIM"] == 0:
        return
    if args["ntokens"] >= 2**31 - THREADS:
        raise ValueError(f"the triton backend counts tokens in 32 bits, and these are {args['ntokens']}")
    launch(_rotary_kernel, grid, inputs[0], **args, **constants)


def _table(
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    seqlen_offsets: int | Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    layout: str,
) -> Table:
    offsets, offset = seqlen_offsets, 0
    if isinstance(offsets, Tensor):
        offsets = offsets.contiguous()
    else:
        offsets, offset = None, offsets or 0
    cos, sin = last_dim_contiguous(cos), last_dim_contiguous(sin)
    return cos, sin, position_ids, offsets, offset, cu_seqlens, interleaved, layout == "bhsd", False


def _rotated(inputs: tuple[Tensor, ...], table: Table) -> tuple[Tensor, ...]:
    inputs = tuple(last_dim_contiguous(x) for x in inputs)
    outputs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    _launch(inputs, outputs, table)
    return outputs


# The gradient of a rotation is the rotation by the negative angle.


def _save_table(ctx: Any, table: Table) -> None:
    cos, sin, position_ids, seqlen_offsets, offset, cu_seqlens, interleaved, heads_first, conjugate = table
    ctx.save_for_backward(cos, sin, position_ids, seqlen_offsets, cu_seqlens)
    ctx.flags = offset, interleaved, heads_first, conjugate


def _negative_angle(ctx: Any) -> Table:
    cos, sin, position_ids, seqlen_offsets, cu_seqlens = ctx.saved_tensors
    offset, interleaved, heads_first, conjugate = ctx.flags
    return cos, sin, position_ids, seqlen_offsets, offset, cu_seqlens, interleaved, heads_first, not conjugate


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *table: Any) -> Tensor:
        _save_table(ctx, table)
        (y,) = _rotated((x,), table)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotary.apply(grads[0], *_negative_angle(ctx)), *(None,) * 9


class _RotaryQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *table: Any) -> tuple[Tensor, Tensor]:
        _save_table(ctx, table)
        q_out, k_out = _rotated((q, k), table)
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        table = _negative_angle(ctx)
        needs_q, needs_k = ctx.needs_input_grad[:2]
        if needs_q and needs_k:
            dq, dk = _RotaryQK.apply(*grads, *table)
        else:
            dq = _Rotary.apply(grads[0], *table) if needs_q else None
            dk = _Rotary.apply(grads[1], *table) if needs_k else None
        return dq, dk, *(None,) * 9


def _apply(inputs: tuple[Tensor, ...], table: Table, inplace: bool) -> tuple[Tensor, ...]:
    if not needs_grad(*inputs):
        if not inplace:
            return _rotated(inputs, table)
        _launch(inputs, inputs, table)
        mark_written(*inputs)
        return inputs
    outputs = (_Rotary.apply(*inputs, *table),) if len(inputs) == 1 else _RotaryQK.apply(*inputs, *table)
    # copy_ knows every rule of autograd about writing into views and leaves.
    return tuple(x.copy_(y) for x, y in zip(inputs, outputs, strict=True)) if inplace else outputs


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
    table = _table(cos, sin, position_ids, seqlen_offsets, cu_seqlens, interleaved, layout)
    return _apply((x,), table, inplace)[0]


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
    table = _table(cos, sin, position_ids, seqlen_offsets, cu_seqlens, interleaved, layout)
    q_out, k_out = _apply((q, k), table, inplace)
    return q_out, k_out


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
    cache_seqlens = cache_seqlens.contiguous()
    offsets = cache_seqlens if position_ids is None else None
    table = _table(cos, sin, position_ids, offsets, None, interleaved, layout)
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cache_length = k_cache.shape[2 if layout == "bhsd" else 1]
    _launch((q, k, v), (q_out, k_cache, v_cache), table, cache_seqlens, cache_length)
    mark_written(k_cache, v_cache)
    return q_out
