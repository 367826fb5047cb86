"""The causal softmax kernels as the function that the registry serves: launched on tensors, and known to autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_kernels.kernels.launch import apart_from, last_dim_contiguous, launch, mark_written, needs_grad
from neox_kernels.kernels.softmax import _softmax_kernel, plan_launch
from neox_kernels.kernels.softmax_backward import _softmax_backward_kernel, plan_backward


def _launch(kernel: Any, x: Tensor, plan: tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]) -> None:
    grid, args, constants = plan
    if x.numel() == 0:
        return
    # Keys are counted in 32 bits, up to the end of a block behind the last; batch * nheads and a block of queries too.
    if x.shape[3] >= 2**31 - 2**14 or x.shape[2] >= 2**31 - 2**14 or x.shape[0] * x.shape[1] >= 2**31 - 2**16:
        raise ValueError(f"the triton backend counts queries, keys and heads in 32 bits, and scores are {x.shape}")
    launch(kernel, grid, x, **args, **constants)


def _forward(scores: Tensor, out: Tensor, probs: Tensor | None, *rest: Any) -> None:
    _launch(_softmax_kernel, scores, plan_launch(scores, out, probs, *rest))


class _CausalSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        attn_mask: Tensor | None,
        head_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        rng: Tensor | None,
        scale: float,
        causal: bool,
        dropout_p: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x = last_dim_contiguous(scores)
        out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
        separate = head_mask is not None or dropout_p > 0
        probs = torch.empty(scores.shape, dtype=dtype, device=scores.device) if separate else None
        _forward(x, out, probs, scale, causal, key_padding_mask, attn_mask, head_mask, rng, dropout_p)
        ctx.save_for_backward(probs if separate else out, head_mask, rng)
        ctx.options = scale, causal, dropout_p, scores.dtype
        ctx.attn_mask = None if attn_mask is None else (attn_mask.shape, attn_mask.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        probs, head_mask, rng = ctx.saved_tensors
        scale, causal, dropout_p, dtype = ctx.options
        needs_scores, needs_attn_mask, needs_head_mask = ctx.needs_input_grad[:3]
        # The mask is added to the scaled scores: its gradient is theirs before the scale, summed where it broadcast.
        result = (1.0, torch.float32) if needs_attn_mask else (scale, dtype)
        rest = causal, dropout_p, needs_head_mask
        d_scores, dots = _Backward.apply(grads[0], probs, head_mask, rng, *result, *rest)
        d_attn_mask = d_head_mask = None
        if needs_attn_mask:
            shape, mask_dtype = ctx.attn_mask
            d_attn_mask = d_scores.sum_to_size(shape).to(mask_dtype)
            d_scores = (d_scores * scale).to(dtype) if needs_scores else None
        if needs_head_mask:
            by_head = dots.sum(dim=-1)
            by_head = by_head.sum(dim=0) if head_mask.dim() == 1 else by_head[..., None, None]
            d_head_mask = by_head.sum_to_size(head_mask.shape).to(head_mask.dtype)
        return d_scores, d_attn_mask, d_head_mask, *(None,) * 6


class _Backward(torch.autograd.Function):
    """A function of its own, for the second derivative, which would be zero without a word, to be refused."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        probs: Tensor,
        head_mask: Tensor | None,
        rng: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        causal: bool,
        dropout_p: float,
        with_dots: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out = torch.empty(probs.shape, dtype=dtype, device=probs.device)
        # Zeros, for where k_len is 0 nothing is launched.
        dots = torch.zeros(probs.shape[:3], dtype=torch.float32, device=probs.device) if with_dots else None
        grad, probs = last_dim_contiguous(grad), last_dim_contiguous(probs)
        plan = plan_backward(grad, probs, out, dots, scale, causal, head_mask, rng, dropout_p)
        _launch(_softmax_backward_kernel, probs, plan)
        return out, dots

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "the triton backend has no second derivative of causal_softmax; use_backend('reference') has"
        )


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
    rng = None if rng is None else rng.contiguous()
    rest = scale, causal, key_padding_mask, attn_mask, head_mask, rng, dropout_p
    with_grad = needs_grad(*[x for x in (scores, attn_mask, head_mask) if x is not None])
    if inplace:
        if with_grad:
            raise ValueError("inplace must be False where a gradient is needed")
        key_padding_mask, attn_mask, head_mask = (
            apart_from(mask, scores) for mask in (key_padding_mask, attn_mask, head_mask)
        )
        _forward(scores, scores, None, scale, causal, key_padding_mask, attn_mask, head_mask, rng, dropout_p)
        mark_written(scores)
        return scores
    dtype = dtype or scores.dtype
    if with_grad:
        result: Tensor = _CausalSoftmax.apply(
            scores, attn_mask, head_mask, key_padding_mask, rng, scale, causal, dropout_p, dtype
        )
        return result
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    _forward(last_dim_contiguous(scores), out, None, *rest)
    return out
