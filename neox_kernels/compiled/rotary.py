"""The compiled rotary ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_kernels.compiled import library
from neox_kernels.compiled.library import find_op, mark_written, needs_grad, same_place

_ROTARY, _ROTARY_QK = find_op("rotary"), find_op("rotary_qk")
_ROTARY_INFERENCE, _ROTARY_QK_INFERENCE = find_op("rotary", "inference"), find_op("rotary_qk", "inference")
_ROTARY_INPLACE, _ROTARY_QK_INPLACE = find_op("rotary_"), find_op("rotary_qk_")
_ROTARY_KV_APPEND = find_op("rotary_kv_append")

# The bits of the rotary ops' `flags` (csrc/rotary_ops.h).
_INTERLEAVED, _HEADS_FIRST, _CONJUGATE = 1, 2, 4
_FLAGS = {
    (interleaved, layout): _INTERLEAVED * interleaved + _HEADS_FIRST * (layout == "bhsd")
    for interleaved in (False, True)
    for layout in ("bshd", "bhsd")
}


def _rotation(
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    seqlen_offsets: int | Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    layout: str,
) -> tuple[Any, ...]:
    """The arguments that every rotary op ends with."""
    flags = _FLAGS[interleaved, layout]
    if isinstance(seqlen_offsets, Tensor):
        return cos, sin, position_ids, seqlen_offsets.contiguous(), cu_seqlens, 0, flags
    return cos, sin, position_ids, None, cu_seqlens, seqlen_offsets or 0, flags


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
    rotation = _rotation(cos, sin, position_ids, seqlen_offsets, cu_seqlens, interleaved, layout)
    with_grad = needs_grad(x, cos, sin)
    if inplace and not with_grad:
        _ROTARY_INPLACE(x, *rotation)
        mark_written(x)
        return x
    y: Tensor = (_ROTARY if with_grad else _ROTARY_INFERENCE)(x, *rotation)
    return x.copy_(y) if inplace else y


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
    rotation = _rotation(cos, sin, position_ids, seqlen_offsets, cu_seqlens, interleaved, layout)
    with_grad = needs_grad(q, k, cos, sin)
    if inplace and not with_grad:
        _ROTARY_QK_INPLACE(q, k, *rotation)
        mark_written(q, k)
        return q, k
    result: tuple[Tensor, Tensor] = (_ROTARY_QK if with_grad else _ROTARY_QK_INFERENCE)(q, k, *rotation)
    # autograd takes no library op that writes into its inputs, and copy_ knows every rule about views and leaves.
    return (q.copy_(result[0]), k.copy_(result[1])) if inplace else result


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
    if needs_grad(q, k, v, cos, sin, k_cache, v_cache):
        raise ValueError("appending to a cache is for inference: no tensor may require a gradient")
    q_out: Tensor = _ROTARY_KV_APPEND(
        k_cache, v_cache, q, k, v, cos, sin, cache_seqlens.contiguous(), position_ids, _FLAGS[interleaved, layout]
    )
    mark_written(k_cache, v_cache)
    return q_out


# The gradient of a rotation is the rotation by the negative angle: each backward is the op with that flag turned.


def _save_rotation(ctx: Any, inputs: tuple[Any, ...], first: int) -> None:
    rotation = inputs[first:]
    if any(ctx.needs_input_grad[first : first + 2]):
        raise ValueError("cos and sin must not require a gradient: tables are constants here")
    *tensors, ctx.offset, ctx.flags = rotation
    ctx.save_for_backward(*tensors)


def _negative_angle(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors, ctx.offset, ctx.flags ^ _CONJUGATE


def _rotary_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _ROTARY(grad, *_negative_angle(ctx)), *(None,) * 7


def _rotary_qk_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    rotation = _negative_angle(ctx)
    needs_q, needs_k = ctx.needs_input_grad[:2]
    dq: Tensor | None
    dk: Tensor | None
    if needs_q and needs_k:
        dq, dk = _ROTARY_QK(grad_q, grad_k, *rotation)
    else:
        dq = _ROTARY(grad_q, *rotation) if needs_q else None
        dk = _ROTARY(grad_k, *rotation) if needs_k else None
    return dq, dk, *(None,) * 7


def _register() -> None:
    @torch.library.register_fake("neox_kernels::rotary")
    @torch.library.register_fake("neox_kernels::rotary.inference")
    def _(x: Tensor, *rotation: Any) -> Tensor:
        same_place(x, *rotation)
        return x.new_empty(x.shape)

    @torch.library.register_fake("neox_kernels::rotary_qk")
    @torch.library.register_fake("neox_kernels::rotary_qk.inference")
    def _(q: Tensor, k: Tensor, *rotation: Any) -> tuple[Tensor, Tensor]:
        same_place(q, k, *rotation)
        return q.new_empty(q.shape), k.new_empty(k.shape)

    @torch.library.register_fake("neox_kernels::rotary_")
    @torch.library.register_fake("neox_kernels::rotary_qk_")
    def _(*args: Any) -> None:
        same_place(*args)

    @torch.library.register_fake("neox_kernels::rotary_kv_append")
    def _(k_cache: Tensor, v_cache: Tensor, q: Tensor, *rest: Any) -> Tensor:
        same_place(k_cache, v_cache, q, *rest)
        return q.new_empty(q.shape)

    torch.library.register_autograd(
        "neox_kernels::rotary",
        _rotary_backward,
        setup_context=lambda ctx, inputs, output: _save_rotation(ctx, inputs, 1),
    )
    torch.library.register_autograd(
        "neox_kernels::rotary_qk",
        _rotary_qk_backward,
        setup_context=lambda ctx, inputs, output: _save_rotation(ctx, inputs, 2),
    )


if library.load_error is None:
    _register()
