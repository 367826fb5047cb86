"""The compiled causal softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_kernels.compiled import library
from neox_kernels.compiled.library import find_op, mark_written, needs_grad, same_place

_SOFTMAX, _INFERENCE = find_op("causal_softmax"), find_op("causal_softmax", "inference")
_INPLACE = find_op("causal_softmax_")
_BACKWARD, _BACKWARD_INFERENCE = find_op("causal_softmax_backward"), find_op("causal_softmax_backward", "inference")

# The ops' `flags` (csrc/softmax_ops.h).
_CAUSAL, _ROW_DOTS = 1, 8
_RESULT = {None: 0, torch.float32: 2, torch.bfloat16: 4, torch.float16: 6}
_RESULT_OF = {flags: dtype for dtype, flags in _RESULT.items()}
_FLAGS = {(causal, dtype): flags + _CAUSAL * causal for dtype, flags in _RESULT.items() for causal in (False, True)}
# What a schema would take for a float too.
_TAKEN_FOR_FLOAT = (bool, Tensor)


def causal_softmax(
    scores: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`neox_kernels.causal_softmax`; with ``dropout_p`` it needs ``rng``."""
    if isinstance(scale, _TAKEN_FOR_FLOAT) or isinstance(dropout_p, _TAKEN_FOR_FLOAT) or type(inplace) is not bool:
        raise TypeError("scale and dropout_p must be floats, and inplace True or False")
    if rng is not None:
        rng = rng.contiguous()
    rest = scale, key_padding_mask, attn_mask, head_mask, rng, dropout_p, _FLAGS[causal, dtype]
    with_grad = needs_grad(*[x for x in (scores, attn_mask, head_mask) if x is not None])
    if inplace:
        if with_grad:
            raise ValueError("inplace must be False where a gradient is needed")
        _INPLACE(scores, *rest)
        mark_written(scores)
        return scores
    result: Tensor = _SOFTMAX(scores, *rest)[0] if with_grad else _INFERENCE(scores, *rest)
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, ctx.scale, _, attn_mask, head_mask, rng, ctx.dropout_p, ctx.flags = inputs
    out, probs = output
    separate = head_mask is not None or ctx.dropout_p > 0
    ctx.save_for_backward(probs if separate else out, head_mask, rng)
    ctx.dtype = scores.dtype
    ctx.attn_mask = None if attn_mask is None else (attn_mask.shape, attn_mask.dtype)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    probs, head_mask, rng = ctx.saved_tensors
    needs_scores, _, _, needs_attn_mask, needs_head_mask = ctx.needs_input_grad[:5]
    # The mask is added to the scaled scores: its gradient is theirs before the scale, summed where it was broadcast.
    scale, dtype = (1.0, torch.float32) if needs_attn_mask else (ctx.scale, ctx.dtype)
    flags = _RESULT[dtype] + (ctx.flags & _CAUSAL) + _ROW_DOTS * needs_head_mask
    # Grad mode is on where a second derivative is asked for, which the former refuses.
    backward = _BACKWARD if torch.is_grad_enabled() else _BACKWARD_INFERENCE
    d_scores, dots = backward(grad, probs, scale, head_mask, rng, ctx.dropout_p, flags)
    d_attn_mask = d_head_mask = None
    if needs_attn_mask:
        shape, mask_dtype = ctx.attn_mask
        d_attn_mask = d_scores.sum_to_size(shape).to(mask_dtype)
        d_scores = (d_scores * ctx.scale).to(ctx.dtype) if needs_scores else None
    if needs_head_mask:
        by_head = dots.sum(dim=-1)
        by_head = by_head.sum(dim=0) if head_mask.dim() == 1 else by_head[..., None, None]
        d_head_mask = by_head.sum_to_size(head_mask.shape).to(head_mask.dtype)
    return d_scores, None, None, d_attn_mask, d_head_mask, None, None, None


def _no_second_derivative(*_: Any) -> None:
    raise NotImplementedError(
        "the compiled backend has no second derivative of causal_softmax; use_backend('reference') has"
    )


def _register() -> None:
    def result_of(x: Tensor, flags: int) -> Tensor:
        return x.new_empty(x.shape, dtype=_RESULT_OF[flags & 6])

    @torch.library.register_fake("neox_kernels::causal_softmax")
    def _(
        scores: Tensor, scale: float, key_padding_mask: Any, attn_mask: Any, head_mask: Any, rng: Any,
        dropout_p: float, flags: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        same_place(scores, key_padding_mask, attn_mask, head_mask, rng)
        out = result_of(scores, flags)
        return out, torch.empty_like(out) if head_mask is not None or dropout_p > 0 else out.new_empty(0)

    @torch.library.register_fake("neox_kernels::causal_softmax.inference")
    def _(scores: Tensor, scale: float, *rest: Any) -> Tensor:
        same_place(scores, *rest)
        return result_of(scores, rest[-1])

    @torch.library.register_fake("neox_kernels::causal_softmax_")
    def _(*args: Any) -> None:
        same_place(*args)

    @torch.library.register_fake("neox_kernels::causal_softmax_backward")
    @torch.library.register_fake("neox_kernels::causal_softmax_backward.inference")
    def _(grad: Tensor, probs: Tensor, scale: float, *rest: Any) -> tuple[Tensor, Tensor]:
        same_place(grad, probs, *rest)
        dots = probs.new_empty(probs.shape[:3] if rest[-1] & _ROW_DOTS else 0, dtype=torch.float32)
        return result_of(probs, rest[-1]), dots

    torch.library.register_autograd("neox_kernels::causal_softmax", _backward, setup_context=_save)
    # Without a formula the second derivative would be zero without a word.
    torch.library.register_autograd("neox_kernels::causal_softmax_backward", _no_second_derivative)


if library.load_error is None:
    _register()
