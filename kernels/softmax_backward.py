"""The backward of the causal softmax in Triton: scale * p * (g - sum(g * p)), where g is the gradient of p.

p are the probabilities that the forward kept, before head mask and dropout. Rows go by as in the forward (softmax.py):
short ones stay in registers, so that p and the incoming gradient are read once; long ones go by twice.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from neox_kernels.kernels.softmax import (
    _kept,
    _locate,
    _rows,
    _seen,
    _store_zeros,
    block_sizes,
    grid_of,
    head_mask_and_dropout,
    strides_over,
    vector,
)


@triton.jit
def _load_gradient(inputs, first, visible, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Probabilities (BLOCK_M, BLOCK_K), and their gradient before the head mask, 0 where a key is not visible."""
    grad_ptr, grad_rows, probs_ptr, probs_rows, rng_ptr, dropout_threshold, keep_scale, row = inputs
    k = first + tl.arange(0, BLOCK_K)[None, :]
    grad = tl.load(grad_ptr + grad_rows + k, mask=_seen(k, visible, VEC), other=0.0).to(tl.float32)
    probs = tl.load(probs_ptr + probs_rows + k, mask=_seen(k, visible, VEC), other=0.0).to(tl.float32)
    if rng_ptr is not None:
        kept = _kept(rng_ptr, dropout_threshold, row, first, BLOCK_M, BLOCK_K)
        grad = tl.where(kept, grad * keep_scale, 0.0)
    return probs, tl.where(k < visible, grad, 0.0)


@triton.jit
def _any_nan(x):
    return tl.max((x != x).to(tl.int32)) != 0


@triton.jit
def _store_gradient(outputs, first, visible, probs, grad, dot, BLOCK_K: tl.constexpr):
    out_ptr, out_rows, inside, k_len, factor = outputs
    k = first + tl.arange(0, BLOCK_K)[None, :]
    gradient = tl.where(k < visible, probs * factor * (grad - dot), 0.0)
    tl.store(out_ptr + out_rows + k, gradient.to(out_ptr.dtype.element_ty), mask=inside & (k < k_len))


@triton.jit
def _short_rows_backward(inputs, outputs, visible, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    probs, grad = _load_gradient(inputs, 0, visible, VEC, BLOCK_M, BLOCK_K)
    # A product that is rounded: fused into the sum's first step, it would give each lane a slightly different sum.
    dot = tl.sum(tl.fma(probs, grad, 0.0), 1, keep_dims=True)
    if _any_nan(dot):
        # A row without a visible key has no gradient, whatever comes in for it: here infinity or NaN.
        dead = tl.sum(probs, 1, keep_dims=True) == 0.0
        dot = tl.where(dead, 0.0, dot)
        grad = tl.where(dead, 0.0, grad)
    _store_gradient(outputs, 0, visible, probs, grad, dot, BLOCK_K)
    return dot


@triton.jit
def _long_rows_backward(inputs, outputs, visible, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    end = tl.max(visible)
    dots = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(0, end, BLOCK_K):
        probs, grad = _load_gradient(inputs, first, visible, VEC, BLOCK_M, BLOCK_K)
        dots = tl.fma(probs, grad, dots)
    dot = tl.sum(dots, 1, keep_dims=True)
    if _any_nan(dot):  # as above
        totals = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for first in range(0, end, BLOCK_K):
            probs, _ = _load_gradient(inputs, first, visible, VEC, BLOCK_M, BLOCK_K)
            totals += probs
        dead = tl.sum(totals, 1, keep_dims=True) == 0.0
        dot = tl.where(dead, 0.0, dot)
        visible = tl.where(dead, 0, visible)
    for first in range(0, end, BLOCK_K):
        probs, grad = _load_gradient(inputs, first, visible, VEC, BLOCK_M, BLOCK_K)
        _store_gradient(outputs, first, visible, probs, grad, dot, BLOCK_K)
    for first in range((end + BLOCK_K - 1) // BLOCK_K * BLOCK_K, outputs[3], BLOCK_K):
        _store_zeros(outputs[0], outputs[1], outputs[2], first, outputs[3], BLOCK_M, BLOCK_K)
    return dot


# As in the forward.
_NUMBERS = ["dropout_threshold", "nbatch", "nheads", "q_len", "k_len"]
_NUMBERS += ["stride_head_mask_batch", "stride_head_mask_head"]
_NUMBERS += [f"stride_{name}_{axis}" for name in ("grad", "probs", "out") for axis in ("batch", "head", "q")]


@triton.jit(do_not_specialize=_NUMBERS)
def _softmax_backward_kernel(
    grad_ptr, stride_grad_batch, stride_grad_head, stride_grad_q,
    probs_ptr, stride_probs_batch, stride_probs_head, stride_probs_q,
    out_ptr, stride_out_batch, stride_out_head, stride_out_q, dots_ptr,
    head_mask_ptr, stride_head_mask_batch, stride_head_mask_head,
    rng_ptr, dropout_threshold, keep_scale, scale, nbatch, nheads, q_len, k_len,
    CAUSAL: tl.constexpr, VEC: tl.constexpr, LOOP: tl.constexpr, HALVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores: scale * p * (g - sum(g * p)), g that of the probabilities p."""
    k_len = k_len // VEC * VEC
    batch, head, q, inside, visible = _locate(nbatch, nheads, q_len, k_len, CAUSAL, BLOCK_M)
    grad_rows = _rows(batch, head, q, stride_grad_batch, stride_grad_head, stride_grad_q, VEC)
    probs_rows = _rows(batch, head, q, stride_probs_batch, stride_probs_head, stride_probs_q, VEC)
    out_rows = _rows(batch, head, q, stride_out_batch, stride_out_head, stride_out_q, VEC)
    row = (batch * nheads + head) * q_len + q
    # torch.compile hands over floats in 64 bits.
    keep_scale = tl.cast(keep_scale, tl.float32)
    factor = tl.cast(scale, tl.float32)
    if head_mask_ptr is not None:
        of_head = tl.load(head_mask_ptr + batch * stride_head_mask_batch + head * stride_head_mask_head)
        factor *= of_head.to(tl.float32)
    inputs = (grad_ptr, grad_rows, probs_ptr, probs_rows, rng_ptr, dropout_threshold, keep_scale, row)
    outputs = (out_ptr, out_rows, inside, k_len, factor)
    if LOOP:
        dot = _long_rows_backward(inputs, outputs, visible, VEC, BLOCK_M, BLOCK_K)
    elif not HALVE:
        dot = _short_rows_backward(inputs, outputs, visible, VEC, BLOCK_M, BLOCK_K)
    elif tl.max(visible) <= BLOCK_K // 2:
        dot = _short_rows_backward(inputs, outputs, visible, VEC, BLOCK_M, BLOCK_K // 2)
        _store_zeros(out_ptr, out_rows, inside, BLOCK_K // 2, k_len, BLOCK_M, BLOCK_K // 2)
    else:
        dot = _short_rows_backward(inputs, outputs, visible, VEC, BLOCK_M, BLOCK_K)
    if dots_ptr is not None:
        tl.store(dots_ptr + row, dot, mask=inside)


def plan_backward(
    grad: Tensor,
    probs: Tensor,
    out: Tensor,
    dots: Tensor | None,
    scale: float,
    causal: bool,
    head_mask: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
) -> tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]:
    """The grid, the arguments and the constants that launch ``_softmax_backward_kernel``; nothing runs here.

    Args:
        grad: of the result, (batch, nheads, q_len, k_len), last dimension contiguous.
        probs: what the forward kept.
        out: for the gradient of the scores.
        dots: (batch, nheads, q_len), float32, for the sums that the gradient of the head mask is made of.
    """
    batch, nheads, q_len, k_len = probs.shape
    args: dict[str, Any] = {"dots_ptr": dots, "scale": float(scale)}
    rows = []
    for name, x in (("grad", grad), ("probs", probs), ("out", out)):
        args[f"{name}_ptr"] = x
        strides = strides_over(x, probs.shape)[:3]
        args |= {f"stride_{name}_{axis}": stride for axis, stride in zip(("batch", "head", "q"), strides, strict=True)}
        rows.append((x, strides))
    args |= head_mask_and_dropout(probs, head_mask, rng, dropout_p)
    blocks = block_sizes(q_len, k_len, batch * nheads, causal, 16)
    constants = {"CAUSAL": causal, "VEC": vector(k_len, *rows), **blocks}
    return grid_of(batch * nheads, q_len, blocks), args, constants
