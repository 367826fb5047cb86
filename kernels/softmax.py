"""Causal softmax in Triton: scale, masks, softmax, head mask and dropout in one pass over what a query sees.

A program takes BLOCK_M neighbouring queries of one head. Rows of up to MAX_BLOCK_K keys stay in registers, so that each
element is read once and written once. Longer rows go by in blocks, twice: for their maximum and their sum at once (what
was summed is rescaled where the maximum grows), and to be written. Maximum, sum and result one after the other would
read a third time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neox_kernels.kernels.launch import power_of_2_from

MAX_BLOCK_K = 8192
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(nbatch, nheads, q_len, k_len, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Batch, head and queries (BLOCK_M, 1) of this program, which of these there are, and how many keys each sees."""
    # The second and third dimensions of a grid end at 65535, so many heads take both.
    batch_head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    batch = batch_head // nheads
    q = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    inside = q < tl.where(batch < nbatch, q_len, 0)
    visible = tl.maximum(q + (k_len - q_len) + 1, 0) if CAUSAL else k_len
    return batch.to(tl.int64), (batch_head - batch * nheads).to(tl.int64), q, inside, tl.where(inside, visible, 0)


@triton.jit
def _rows(batch, head, q, stride_batch, stride_head, stride_q, VEC: tl.constexpr):
    # Every row begins at a multiple of VEC elements: the division says so to the compiler.
    return (batch * stride_batch + head * stride_head + q.to(tl.int64) * stride_q) // VEC * VEC


@triton.jit
def _seen(k, visible, VEC: tl.constexpr):
    # What is read: the visible part, up to the end of its last access. A condition that tells neighbours apart would
    # break one access of 16 bytes into 8 of 2.
    return k < (visible + VEC - 1) // VEC * VEC


@triton.jit
def _kept(rng_ptr, dropout_threshold, row, first, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which elements of (BLOCK_M, BLOCK_K) from column ``first`` on dropout keeps: the reference says by which rule."""
    # Four words serve four neighbours: a generator for each of them would be four times the work.
    group = first // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_K // 4], tl.int32)
    low, high = row.to(tl.int32), (row >> 32).to(tl.int32)
    offset = tl.load(rng_ptr + 1).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(rng_ptr), zero + group, zero + low, zero + high, zero + offset)
    threshold = dropout_threshold.to(tl.uint32, bitcast=True)
    even = tl.join((w0 >= threshold).to(tl.int8), (w2 >= threshold).to(tl.int8))
    odd = tl.join((w1 >= threshold).to(tl.int8), (w3 >= threshold).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_K]) != 0


@triton.jit
def _logits(inputs, k, visible, VEC: tl.constexpr):
    """scale * scores + masks, (BLOCK_M, BLOCK_K), and -inf where a key is not visible."""
    x_ptr, x_rows, scale, padding_ptr, padding_row, stride_padding_k, mask_ptr, mask_rows, stride_mask_k = inputs
    x = tl.load(x_ptr + x_rows + k, mask=_seen(k, visible, VEC), other=0.0).to(tl.float32)
    logits = x * scale
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + mask_rows + k.to(tl.int64) * stride_mask_k, mask=_seen(k, visible, VEC), other=0)
        if mask.dtype == tl.uint8:
            logits = tl.where(mask != 0, logits, -float("inf"))
        else:
            logits = tl.fma(x, scale, mask.to(tl.float32))
    if padding_ptr is not None:
        at = padding_ptr + padding_row + k.to(tl.int64) * stride_padding_k
        unmasked = tl.load(at, mask=_seen(k, tl.max(visible), VEC), other=0)
        logits = tl.where(unmasked != 0, logits, -float("inf"))
    return tl.where(k < visible, logits, -float("inf"))


@triton.jit
def _exponential(logits, most, ACCURATE: tl.constexpr):
    # A row of -inf alone counts as having the maximum 0, so that all its exponentials are 0. The difference comes
    # before the product, for logits of -3.4e38, as masks have them, would overflow in it.
    x = logits - tl.where(most == -float("inf"), 0.0, most)
    if not ACCURATE:
        return tl.exp2(x * LOG2_E)
    # The rounding of that product alone would take a float32 result out of the error budget. e^x = 2^n e^r, ln 2 in two
    # parts of which the first has few bits, and e^r = 1 + r + r^2 q(r) to 4e-9. Below -87 it never shows beside 1.
    x = tl.maximum(x, -100.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(tl.fma(x, LOG2_E, 0.5))
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))
    q = tl.fma(r, 0.0013814540, 0.0083687454)
    q = tl.fma(tl.fma(tl.fma(q, r, 0.041668389), r, 0.16666521), r, 0.49999994)
    return tl.where(x < -87.0, 0.0, tl.fma(q, r * r, r + 1.0) * tl.exp2(n))


@triton.jit
def _quotient(factor, total, ACCURATE: tl.constexpr):
    factor += tl.zeros_like(total)
    quotient = tl.div_rn(factor, total) if ACCURATE else factor / total
    return tl.where(total == 0.0, 0.0, quotient)


@triton.jit
def _store(outputs, first, visible, exponentials, total, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    out_ptr, probs_ptr, rows, inside, k_len, rng_ptr, dropout_threshold, row, factor = outputs
    ACCURATE: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    k = first + tl.arange(0, BLOCK_K)[None, :]
    probs = exponentials * _quotient(1.0, total, ACCURATE)
    out = exponentials * _quotient(factor, total, ACCURATE)
    if tl.max((total != total).to(tl.int32)) != 0:
        # In a row of NaN, what is hidden is 0 * NaN by now. This says k < visible in words that the compiler does not
        # know again: kept from where they were first needed, its results would take 24 registers of 72, and 3
        # instructions per element in every row.
        known = (k ^ -1) >= (visible ^ -1) + 1
        probs = tl.where(known, probs, 0.0)
        out = tl.where(known, out, 0.0)
    if probs_ptr is not None:
        tl.store(probs_ptr + rows + k, probs.to(probs_ptr.dtype.element_ty), mask=inside & (k < k_len))
    if rng_ptr is not None:
        out = tl.where(_kept(rng_ptr, dropout_threshold, row, first, BLOCK_M, BLOCK_K), out, 0.0)
    tl.store(out_ptr + rows + k, out.to(out_ptr.dtype.element_ty), mask=inside & (k < k_len))


@triton.jit
def _store_zeros(ptr, rows, inside, first, k_len, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    if ptr is not None:
        k = first + tl.arange(0, BLOCK_K)[None, :]
        zeros = tl.zeros([BLOCK_M, BLOCK_K], ptr.dtype.element_ty)
        tl.store(ptr + rows + k, zeros, mask=inside & (k < k_len))


@triton.jit
def _short_rows(
    inputs, outputs, visible, ACCURATE: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Rows of which nothing is visible behind the first BLOCK_K keys."""
    logits = _logits(inputs, tl.arange(0, BLOCK_K)[None, :], visible, VEC)
    exponentials = _exponential(logits, tl.max(logits, 1, keep_dims=True), ACCURATE)
    _store(outputs, 0, visible, exponentials, tl.sum(exponentials, 1, keep_dims=True), BLOCK_M, BLOCK_K)


@triton.jit
def _long_rows(
    inputs, outputs, visible, ACCURATE: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    end = tl.max(visible)
    most = tl.full([BLOCK_M, 1], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)  # added up behind the loop
    for first in range(0, end, BLOCK_K):
        logits = _logits(inputs, first + tl.arange(0, BLOCK_K)[None, :], visible, VEC)
        before = most
        most = tl.maximum(most, tl.max(logits, 1, keep_dims=True))
        totals = tl.fma(totals, _exponential(before, most, ACCURATE), _exponential(logits, most, ACCURATE))
    total = tl.sum(totals, 1, keep_dims=True)
    for first in range(0, end, BLOCK_K):
        logits = _logits(inputs, first + tl.arange(0, BLOCK_K)[None, :], visible, VEC)
        _store(outputs, first, visible, _exponential(logits, most, ACCURATE), total, BLOCK_M, BLOCK_K)
    for first in range((end + BLOCK_K - 1) // BLOCK_K * BLOCK_K, outputs[4], BLOCK_K):
        _store_zeros(outputs[0], outputs[2], outputs[3], first, outputs[4], BLOCK_M, BLOCK_K)
        _store_zeros(outputs[1], outputs[2], outputs[3], first, outputs[4], BLOCK_M, BLOCK_K)


# Lengths and strides are not specialised: they change from call to call, and each change between 1, a multiple of 16
# and the rest would be a compilation. VEC says what accesses of 16 bytes need to know of them. Strides along the keys
# of a mask are: if it is 1, several keys are read at once.
_NUMBERS = ["dropout_threshold", "nbatch", "nheads", "q_len", "k_len"]
_NUMBERS += [f"stride_{name}_{axis}" for name in ("x", "out", "mask") for axis in ("batch", "head", "q")]
_NUMBERS += ["stride_padding_batch", "stride_head_mask_batch", "stride_head_mask_head"]


@triton.jit(do_not_specialize=_NUMBERS)
def _softmax_kernel(
    x_ptr, stride_x_batch, stride_x_head, stride_x_q,
    out_ptr, probs_ptr, stride_out_batch, stride_out_head, stride_out_q,
    padding_ptr, stride_padding_batch, stride_padding_k,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_q, stride_mask_k,
    head_mask_ptr, stride_head_mask_batch, stride_head_mask_head,
    rng_ptr, dropout_threshold, keep_scale, scale, nbatch, nheads, q_len, k_len,
    CAUSAL: tl.constexpr, ACCURATE: tl.constexpr, VEC: tl.constexpr, VEC_MASK: tl.constexpr, LOOP: tl.constexpr,
    HALVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # torch.compile hands over floats in 64 bits.
    scale = tl.cast(scale, tl.float32)
    keep_scale = tl.cast(keep_scale, tl.float32)
    k_len = k_len // VEC * VEC
    batch, head, q, inside, visible = _locate(nbatch, nheads, q_len, k_len, CAUSAL, BLOCK_M)
    x_rows = _rows(batch, head, q, stride_x_batch, stride_x_head, stride_x_q, VEC)
    out_rows = _rows(batch, head, q, stride_out_batch, stride_out_head, stride_out_q, VEC)
    padding_row = batch * stride_padding_batch // VEC_MASK * VEC_MASK
    mask_rows = _rows(batch, head, q, stride_mask_batch, stride_mask_head, stride_mask_q, VEC_MASK)
    factor = keep_scale
    if head_mask_ptr is not None:
        of_head = tl.load(head_mask_ptr + batch * stride_head_mask_batch + head * stride_head_mask_head)
        factor *= of_head.to(tl.float32)
    row = (batch * nheads + head) * q_len + q
    inputs = (x_ptr, x_rows, scale, padding_ptr, padding_row, stride_padding_k, mask_ptr, mask_rows, stride_mask_k)
    outputs = (out_ptr, probs_ptr, out_rows, inside, k_len, rng_ptr, dropout_threshold, row, factor)
    if LOOP:
        _long_rows(inputs, outputs, visible, ACCURATE, VEC, BLOCK_M, BLOCK_K)
    elif not HALVE:
        _short_rows(inputs, outputs, visible, ACCURATE, VEC, BLOCK_M, BLOCK_K)
    # A tile's width is fixed at compile time. A second, half as wide, spares the upper rows most of what is hidden.
    elif tl.max(visible) <= BLOCK_K // 2:
        _short_rows(inputs, outputs, visible, ACCURATE, VEC, BLOCK_M, BLOCK_K // 2)
        _store_zeros(out_ptr, out_rows, inside, BLOCK_K // 2, k_len, BLOCK_M, BLOCK_K // 2)
        _store_zeros(probs_ptr, out_rows, inside, BLOCK_K // 2, k_len, BLOCK_M, BLOCK_K // 2)
    else:
        _short_rows(inputs, outputs, visible, ACCURATE, VEC, BLOCK_M, BLOCK_K)


def block_sizes(q_len: int, k_len: int, heads: int, causal: bool, per_thread: int) -> dict[str, Any]:
    """Queries and keys that a program holds at once, whether it loops over keys, and its warps.

    Args:
        heads: of all sequences together.
        per_thread: elements for a thread to hold, such that 64 registers do, with which half of all warps run at once.
    """
    block_k = max(64, power_of_2_from(k_len))
    loop = block_k > MAX_BLOCK_K
    if loop:
        block_k = 128 * per_thread
    # Short rows share a program, unless there are as few as in decoding.
    block_m = max(1, 32 * per_thread // block_k) if q_len >= 16 else 1
    if loop or heads * -(-q_len // block_m) < 512:
        # Rows that would leave most of a large GPU idle get more warps each, and take less time.
        per_thread = 8
    return {
        "LOOP": loop,
        "HALVE": causal and not loop and block_k >= 1024 and per_thread > 8,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "num_warps": max(1, min(16, block_m * block_k // (32 * per_thread))),
    }


def grid_of(heads: int, q_len: int, blocks: dict[str, Any]) -> tuple[int, int, int]:
    return -(-q_len // blocks["BLOCK_M"]), min(heads, 65535), -(-heads // 65535)


def strides_over(x: Tensor, shape: tuple[int, ...] | torch.Size) -> list[int]:
    """Strides of x as a tensor over ``shape``, 0 where it broadcasts."""
    missing = len(shape) - x.dim()
    return [0] * missing + [x.stride(d) if x.shape[d] > 1 else 0 for d in range(x.dim())]


def vector(k_len: int, *rows: tuple[Tensor, Sequence[int]]) -> int:
    """How many elements every row, its length and its distance to the others are multiples of: 16 bytes, or 1."""
    size = max([16 // x.element_size() for x, _ in rows])
    return size if all([n % size == 0 for _, strides in rows for n in (k_len, *strides)]) else 1


def _bytes_of(mask: Tensor) -> Tensor:
    # inductor cannot view a bool as a byte; it copies
    return mask.to(torch.uint8) if torch.compiler.is_compiling() else mask.view(torch.uint8)


def head_mask_and_dropout(
    scores: Tensor, head_mask: Tensor | None, rng: Tensor | None, dropout_p: float
) -> dict[str, Any]:
    batch, nheads, q_len, k_len = scores.shape
    strides = [0, 0]
    if head_mask is not None:
        strides = (
            [0, *strides_over(head_mask, (nheads,))] if head_mask.dim() == 1 else strides_over(head_mask, scores.shape)
        )
    threshold = min(int(dropout_p * 2.0**32), 2**32 - 1)
    return {
        "head_mask_ptr": head_mask,
        "stride_head_mask_batch": strides[0],
        "stride_head_mask_head": strides[1],
        "rng_ptr": rng if dropout_p > 0 else None,
        # As a signed number: whether Triton takes it as 32 or 64 bits would hang on its size.
        "dropout_threshold": threshold - 2**32 * (threshold >= 2**31),
        "keep_scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        "nbatch": batch,
        "nheads": nheads,
        "q_len": q_len,
        "k_len": k_len,
    }


def plan_launch(
    scores: Tensor,
    out: Tensor,
    probs: Tensor | None,
    scale: float,
    causal: bool,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    head_mask: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
) -> tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]:
    """The grid, the arguments and the constants that launch ``_softmax_kernel``; nothing runs here.

    Args:
        scores, out: (batch, nheads, q_len, k_len), last dimension contiguous; the same tensor for a result in place.
        probs: like ``out``, for the probabilities before head mask and dropout.
    """
    batch, nheads, q_len, k_len = scores.shape
    x_strides, out_strides = strides_over(scores, scores.shape)[:3], strides_over(out, scores.shape)[:3]
    padding_strides: Sequence[int] = (0, 0)
    mask_strides: Sequence[int] = (0, 0, 0, 0)
    masks: list[tuple[Tensor, Sequence[int]]] = []
    if key_padding_mask is not None:
        key_padding_mask = _bytes_of(key_padding_mask)
        padding_strides = key_padding_mask.stride()
        masks.append((key_padding_mask, padding_strides[:1]))
    if attn_mask is not None:
        attn_mask = _bytes_of(attn_mask) if attn_mask.dtype == torch.bool else attn_mask
        mask_strides = strides_over(attn_mask, scores.shape)
        masks.append((attn_mask, mask_strides[:3]))
    args: dict[str, Any] = {"x_ptr": scores, "out_ptr": out, "probs_ptr": probs}
    args |= {"padding_ptr": key_padding_mask, "mask_ptr": attn_mask, "scale": float(scale)}
    for name, strides in (("x", x_strides), ("out", out_strides), ("mask", mask_strides)):
        args |= {f"stride_{name}_{axis}": n for axis, n in zip(("batch", "head", "q", "k"), strides, strict=False)}
    args |= {"stride_padding_batch": padding_strides[0], "stride_padding_k": padding_strides[1]}
    args |= head_mask_and_dropout(scores, head_mask, rng, dropout_p)
    vec = vector(k_len, (scores, x_strides), (out, out_strides))
    plain = not masks and probs is None and args["rng_ptr"] is None and vec == 8 and scores.element_size() == 2
    blocks = block_sizes(q_len, k_len, batch * nheads, causal, 32 if plain and k_len > 1024 else 16)
    constants = {
        "CAUSAL": causal,
        "ACCURATE": out.dtype == torch.float32,
        "VEC": vec,
        "VEC_MASK": vec if all(stride % vec == 0 for _, strides in masks for stride in strides) else 1,
        **blocks,
    }
    return grid_of(batch * nheads, q_len, blocks), args, constants
