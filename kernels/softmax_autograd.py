"""The causal softmax kernels as the function that the registry serves: launched on tensors, and known to autograd."""

from __future__ import annotations

from functools import partial
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


def _empty(
    scores: Tensor, attn_mask: Tensor | None, head_mask: Tensor | None, key_padding_mask: Tensor | None,
    rng: Tensor | None, scale: float, causal: bool, dropout_p: float, dtype: torch.dtype, with_probs: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    separate = with_probs and (head_mask is not None or dropout_p > 0)
    made = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    return made, torch.empty(scores.shape if separate else 0, dtype=dtype, device=scores.device)


def _softmax(scores: Tensor, attn_mask: Tensor | None, head_mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """The result, and where head mask or dropout change it, with ``with_probs``, the probabilities before them; else no
    elements."""
    key_padding_mask, rng, scale, causal, dropout_p, _, with_probs = rest
    out, probs = _empty(scores, attn_mask, head_mask, *rest)
    separate = probs if with_probs and (head_mask is not None or dropout_p > 0) else None
    masks = key_padding_mask, attn_mask, head_mask
    _forward(last_dim_contiguous(scores), out, separate, scale, causal, *masks, rng, dropout_p)
    return out, probs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, attn_mask, head_mask, _, rng, scale, causal, dropout_p, _, _ = inputs
    out, probs = output
    ctx.save_for_backward(probs if head_mask is not None or dropout_p > 0 else out, head_mask, rng)
    ctx.options = scale, causal, dropout_p, scores.dtype
    ctx.attn_mask = None if attn_mask is None else (attn_mask.shape, attn_mask.dtype)


def _gradient(backward: Any, ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    probs, head_mask, rng = ctx.saved_tensors
    scale, causal, dropout_p, dtype = ctx.options
    needs_scores, needs_attn_mask, needs_head_mask = ctx.needs_input_grad[:3]
    # The mask is added to the scaled scores: its gradient is theirs before the scale, summed where it broadcast.
    result = (1.0, torch.float32) if needs_attn_mask else (scale, dtype)
    d_scores, dots = backward(grad, probs, head_mask, rng, *result, causal, dropout_p, needs_head_mask)
    d_attn_mask = d_head_mask = None
    if needs_attn_mask:
        shape, mask_dtype = ctx.attn_mask
        d_attn_mask = d_scores.sum_to_size(shape).to(mask_dtype)
        d_scores = (d_scores * scale).to(dtype) if needs_scores else None
    if needs_head_mask:
        by_head = dots.sum(dim=-1)
        by_head = by_head.sum(dim=0) if head_mask.dim() == 1 else by_head[..., None, None]
        d_head_mask = by_head.sum_to_size(head_mask.shape).to(head_mask.dtype)
    return d_scores, d_attn_mask, d_head_mask, *(None,) * 7


def _empty_gradient(
    grad: Tensor, probs: Tensor, head_mask: Tensor | None, rng: Tensor | None, scale: float, dtype: torch.dtype,
    causal: bool, dropout_p: float, with_dots: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty(probs.shape, dtype=dtype, device=probs.device)
    # Zeros, for where k_len is 0 nothing is launched.
    return out, torch.zeros(probs.shape[:3] if with_dots else 0, dtype=torch.float32, device=probs.device)


def _backward(grad: Tensor, probs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the scores, and with ``with_dots`` what the gradient of the head mask is made of."""
    head_mask, rng, scale, _, causal, dropout_p, with_dots = rest
    out, dots = _empty_gradient(grad, probs, *rest)
    grad, probs = last_dim_contiguous(grad), last_dim_contiguous(probs)
    plan = plan_backward(grad, probs, out, dots if with_dots else None, scale, causal, head_mask, rng, dropout_p)
    _launch(_softmax_backward_kernel, probs, plan)
    return out, dots


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "the triton backend has no second derivative of causal_softmax; use_backend('reference') has"
    )


class _Backward(torch.autograd.Function):
    """A function of its own, for the second derivative, which would be zero without a word, to be refused."""

    forward, backward = staticmethod(_backward), staticmethod(_no_second_derivative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...


class _CausalSoftmax(torch.autograd.Function):
    forward, backward = staticmethod(_softmax), staticmethod(partial(_gradient, _Backward.apply))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])


# For torch.compile, which cannot trace launches and their gradients where strides are symbols.
_softmax_op = torch.library.custom_op(
    "neox_kernels_triton::causal_softmax",
    _softmax,
    mutates_args=(),
    schema="(Tensor scores, Tensor? attn_mask, Tensor? head_mask, Tensor? key_padding_mask, Tensor? rng, float scale, "
    "bool causal, float dropout_p, ScalarType dtype, bool with_probs) -> (Tensor, Tensor)",
)
_softmax_op.register_fake(_empty)
_backward_op = torch.library.custom_op(
    "neox_kernels_triton::causal_softmax_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor probs, Tensor? head_mask, Tensor? rng, float scale, ScalarType dtype, bool causal, "
    "float dropout_p, bool with_dots) -> (Tensor, Tensor)",
)
_backward_op.register_fake(_empty_gradient)
_backward_op.register_autograd(_no_second_derivative)
_softmax_op.register_autograd(partial(_gradient, _backward_op), setup_context=_save)


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
    serve = _softmax_op if torch.compiler.is_compiling() else _CausalSoftmax.apply if with_grad else _softmax
    dtype = dtype or scores.dtype
    result: Tensor = serve(
        scores, attn_mask, head_mask, key_padding_mask, rng, scale, causal, dropout_p, dtype, with_grad
    )[0]
    return result
