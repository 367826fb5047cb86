"""Rotary embedding in Triton: q, k and v of one call in one launch.

A program takes BLOCK_M tokens. It finds their positions, reads their cos and sin once, and walks over the heads of q, k
and v in blocks of BLOCK_H. The work is memory traffic: every element is read once and written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from neox_kernels.kernels.launch import power_of_2_from

# Two warps a program: each thread then turns two heads or more by the cos and sin that it holds. For 16 heads of 128
# bfloat16 features that is 9 instructions per element on sm_90, against 12 with four warps.
NUM_WARPS = 2
THREADS = 32 * NUM_WARPS


@triton.jit
def _copy_columns(x_rows, out_rows, mask, out_mask, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    for start in tl.static_range(FIRST, LAST, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, None, :]
        x = tl.load(x_rows + column, mask=mask & (column < LAST))
        tl.store(out_rows + column, x, mask=out_mask & (column < LAST))


@triton.jit
def _rotate_columns(
    x_rows, out_rows, mask, out_mask, c, s, padding,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, VARLEN: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = ROTARY_DIM // 2
    dtype = x_rows.dtype.element_ty
    if INTERLEAVED:
        # Pairs are neighbours: both come in one access, and are taken apart in registers.
        column = tl.arange(0, 2 * BLOCK_F)[None, None, :]
        x = tl.load(x_rows + column, mask=mask & (column < ROTARY_DIM), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], BLOCK_F, 2]))
    else:
        column = tl.arange(0, BLOCK_F)[None, None, :]
        a = tl.load(x_rows + column, mask=mask & (column < HALF), other=0.0).to(tl.float32)
        b = tl.load(x_rows + HALF + column, mask=mask & (column < HALF), other=0.0).to(tl.float32)
    # Explicitly: whether Triton fuses a * c + d by itself depends on its version and on an environment variable.
    a_out = tl.fma(a, c, -(b * s))
    b_out = tl.fma(b, c, a * s)
    if VARLEN:
        a_out = tl.where(padding, a, a_out)
        b_out = tl.where(padding, b, b_out)
    if INTERLEAVED:
        y = tl.reshape(tl.join(a_out, b_out), [x.shape[0], x.shape[1], 2 * BLOCK_F])
        tl.store(out_rows + column, y.to(dtype), mask=out_mask & (column < ROTARY_DIM))
    else:
        tl.store(out_rows + column, a_out.to(dtype), mask=out_mask & (column < HALF))
        tl.store(out_rows + HALF + column, b_out.to(dtype), mask=out_mask & (column < HALF))


@triton.jit
def _turn_columns(
    x_rows, out_rows, mask, out_mask, c, s, padding,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, VARLEN: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The first BLOCK_F columns, those that are only copied too, in one store.

    A sector of memory that two stores write in parts costs the GPU a read and often a second write of it. So a thread
    turns columns by their partners, half of the rotated columns further up or down, and not pairs.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    column = tl.arange(0, BLOCK_F)[None, None, :]
    rotated = column < ROTARY_DIM
    x = tl.load(x_rows + column, mask=mask & (column < HEAD_DIM))
    partner = column + HALF * (1 - 2 * (column // HALF))
    other = tl.load(x_rows + partner, mask=mask & rotated, other=0.0).to(tl.float32)
    y = tl.fma(x.to(tl.float32), c, other * s).to(x.dtype)
    if VARLEN:
        rotated = rotated & ~padding
    tl.store(out_rows + column, tl.where(rotated, y, x), mask=out_mask & (column < HEAD_DIM))


@triton.jit
def _rotary_heads(
    x_ptr, out_ptr, stride_x_batch, stride_x_seqlen, stride_x_head,
    stride_out_batch, stride_out_seqlen, stride_out_head, nheads,
    batch, row, out_row, mask, out_mask, c, s, padding,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, VARLEN: tl.constexpr,
    ROTATE: tl.constexpr, INPLACE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    x_token = x_ptr + (batch * stride_x_batch + row * stride_x_seqlen)[:, None, None]
    out_token = out_ptr + (batch * stride_out_batch + out_row * stride_out_seqlen)[:, None, None]
    # Programs along axis 1 share the heads of a token where tokens are few.
    for first in range(tl.program_id(1) * BLOCK_H, nheads, tl.num_programs(1) * BLOCK_H):
        head = (first + tl.arange(0, BLOCK_H))[None, :, None]
        x_rows = x_token + head.to(tl.int64) * stride_x_head
        out_rows = out_token + head.to(tl.int64) * stride_out_head
        inside = head < nheads
        if not ROTATE:
            _copy_columns(x_rows, out_rows, mask & inside, out_mask & inside, 0, HEAD_DIM, BLOCK_C)
        elif WHOLE:
            _turn_columns(
                x_rows, out_rows, mask & inside, out_mask & inside, c, s, padding,
                HEAD_DIM, ROTARY_DIM, VARLEN, BLOCK_F,
            )  # fmt: skip
            _copy_columns(x_rows, out_rows, mask & inside, out_mask & inside, BLOCK_F, HEAD_DIM, BLOCK_C)
        else:
            if ROTARY_DIM > 0:
                _rotate_columns(
                    x_rows, out_rows, mask & inside, out_mask & inside, c, s, padding,
                    ROTARY_DIM, INTERLEAVED, VARLEN, BLOCK_F,
                )  # fmt: skip
            if not INPLACE:
                _copy_columns(x_rows, out_rows, mask & inside, out_mask & inside, ROTARY_DIM, HEAD_DIM, BLOCK_C)


# Lengths are not specialised: they change from call to call, and each change between 1, a multiple of 16 and the rest
# would be a compilation. Strides of features are: a multiple of 16 is what allows accesses of 16 bytes.
_LENGTHS = ["ntokens", "seqlen", "max_position", "offset", "nseqs", "cache_length", "stride_position_batch"]


@triton.jit(do_not_specialize=_LENGTHS)
def _rotary_kernel(
    q_ptr, q_out_ptr, stride_q_batch, stride_q_seqlen, stride_q_head,
    stride_q_out_batch, stride_q_out_seqlen, stride_q_out_head, nheads_q,
    k_ptr, k_out_ptr, stride_k_batch, stride_k_seqlen, stride_k_head,
    stride_k_out_batch, stride_k_out_seqlen, stride_k_out_head, nheads_k,
    v_ptr, v_out_ptr, stride_v_batch, stride_v_seqlen, stride_v_head,
    stride_v_out_batch, stride_v_out_seqlen, stride_v_out_head, nheads_v,
    cos_ptr, sin_ptr, stride_cos_batch, stride_cos_position, stride_sin_batch, stride_sin_position, max_position,
    position_ids_ptr, stride_position_batch, stride_position_seqlen, seqlen_offsets_ptr, offset,
    cu_seqlens_ptr, nseqs, cache_seqlens_ptr, cache_length, ntokens, seqlen,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    INPLACE: tl.constexpr, WHOLE: tl.constexpr, BATCHED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    VARLEN: tl.constexpr = cu_seqlens_ptr is not None
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < ntokens
    if BATCHED:
        batch = (token // seqlen).to(tl.int64)
        row = (token % seqlen).to(tl.int64)
    else:
        batch = tl.zeros_like(token).to(tl.int64)
        row = token.to(tl.int64)

    # Position of each token. `sequence` is what seqlen_offsets and tables count by.
    sequence = batch
    position = row
    padding = token < 0
    if VARLEN:
        # The last sequence that begins at or before the token, by bisection: those without tokens are stepped over.
        low = tl.zeros_like(token)
        high = low + nseqs + 1
        left = nseqs + 1
        while left > 1:
            left = (left + 1) // 2
            middle = (low + high) // 2
            before = tl.load(cu_seqlens_ptr + middle, mask=mask, other=0).to(tl.int64) <= row
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        padding = low == nseqs
        position = row - tl.load(cu_seqlens_ptr + low, mask=mask, other=0).to(tl.int64)
        sequence = low.to(tl.int64)
    known = mask & ~padding
    if position_ids_ptr is not None:
        at = position_ids_ptr + batch * stride_position_batch + row * stride_position_seqlen
        position = tl.load(at, mask=known, other=0).to(tl.int64)
    else:
        position += offset
        if seqlen_offsets_ptr is not None:
            position += tl.load(seqlen_offsets_ptr + sequence, mask=known, other=0).to(tl.int64)

    # cos and sin of the tokens: NaN outside the tables, which are not read there.
    c = 0.0
    s = 0.0
    if ROTARY_DIM > 0:
        column = tl.arange(0, BLOCK_F)[None, None, :]
        inside = (known & (position >= 0) & (position < max_position))[:, None, None]
        if WHOLE:
            inside = inside & (column < ROTARY_DIM)
            sign = tl.where(column < ROTARY_DIM // 2, -1.0, 1.0)
            column = column % (ROTARY_DIM // 2)
        else:
            inside = inside & (column < ROTARY_DIM // 2)
        cos_rows = cos_ptr + (sequence * stride_cos_batch + position * stride_cos_position)[:, None, None]
        sin_rows = sin_ptr + (sequence * stride_sin_batch + position * stride_sin_position)[:, None, None]
        c = tl.load(cos_rows + column, mask=inside, other=float("nan")).to(tl.float32)
        s = tl.load(sin_rows + column, mask=inside, other=float("nan")).to(tl.float32)
        if CONJUGATE:
            s = -s
        if WHOLE:
            s = s * sign

    out_row = row
    out_mask = mask
    if cache_seqlens_ptr is not None:
        out_row = row + tl.load(cache_seqlens_ptr + batch, mask=mask, other=0).to(tl.int64)
        out_mask = mask & (out_row >= 0) & (out_row < cache_length)
    mask = mask[:, None, None]
    out_mask = out_mask[:, None, None]
    padding = padding[:, None, None]
    _rotary_heads(
        q_ptr, q_out_ptr, stride_q_batch, stride_q_seqlen, stride_q_head,
        stride_q_out_batch, stride_q_out_seqlen, stride_q_out_head, nheads_q,
        batch, row, row, mask, mask, c, s, padding,
        HEAD_DIM, ROTARY_DIM, INTERLEAVED, VARLEN, True, INPLACE, WHOLE, BLOCK_H, BLOCK_F, BLOCK_C,
    )  # fmt: skip
    if k_ptr is not None:
        _rotary_heads(
            k_ptr, k_out_ptr, stride_k_batch, stride_k_seqlen, stride_k_head,
            stride_k_out_batch, stride_k_out_seqlen, stride_k_out_head, nheads_k,
            batch, row, out_row, mask, out_mask, c, s, padding,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, VARLEN, True, INPLACE, WHOLE, BLOCK_H, BLOCK_F, BLOCK_C,
        )  # fmt: skip
    if v_ptr is not None:
        _rotary_heads(
            v_ptr, v_out_ptr, stride_v_batch, stride_v_seqlen, stride_v_head,
            stride_v_out_batch, stride_v_out_seqlen, stride_v_out_head, nheads_v,
            batch, row, out_row, mask, out_mask, c, s, padding,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, VARLEN, False, False, WHOLE, BLOCK_H, BLOCK_F, BLOCK_C,
        )  # fmt: skip


def block_sizes(head_dim: int, rotary_dim: int, nheads: tuple[int, ...], itemsize: int, whole: bool) -> dict[str, int]:
    """Tokens, heads, pairs of features (of ``whole`` rows the first columns) and copied columns that a program holds at
    once.

    Nothing here depends on a length, so that a new length compiles nothing.
    """
    width = power_of_2_from(rotary_dim // 2)
    if whole:  # the rotated columns, and as many more as make a sector of memory, 32 bytes
        width = min(max(power_of_2_from(rotary_dim), 32 // itemsize), power_of_2_from(head_dim))
    # Two accesses of 16 bytes for each thread, and no more than 64 features.
    rows = min(2 * THREADS * 16 // (width * itemsize), THREADS * 64 // power_of_2_from(head_dim))
    rows = max(1, rows)
    # The largest block of heads that leaves at most an eighth of the rows without a head: 64 heads fill 16 at a time,
    # 12 fill 4, and 71 fill 8.
    block_h = rows
    while block_h > 1 and sum(-h % block_h for h in nheads) * 8 > sum(nheads):
        block_h //= 2
    # A power of two that divides the copied columns leaves none to mask; 16 are a sector of memory or more.
    copied = max(0, head_dim - (width if whole else rotary_dim)) or head_dim
    block_c = min(max(16, copied & -copied), 64, power_of_2_from(copied))
    return {"BLOCK_M": rows // block_h, "BLOCK_H": block_h, "BLOCK_F": width, "BLOCK_C": block_c}


# cos, sin, position_ids, seqlen_offsets, offset, cu_seqlens, interleaved, heads_first, conjugate
Table = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", int, "Tensor | None", bool, bool, bool]


def _strides(x: Tensor, heads_first: bool) -> tuple[int, int, int]:
    """Of batch, seqlen and heads."""
    if x.dim() == 3:
        return 0, x.stride(0), x.stride(1)
    return (x.stride(0), x.stride(2), x.stride(1)) if heads_first else (x.stride(0), x.stride(1), x.stride(2))


def plan_launch(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    table: Table,
    cache_seqlens: Tensor | None = None,
    cache_length: int = 0,
) -> tuple[tuple[int, int], dict[str, Any], dict[str, Any]]:
    """The grid, the arguments and the constants that launch ``_rotary_kernel`` on q, k and v; nothing runs here.

    Args:
        inputs, outputs: one to three of q, k, v, each (batch, seqlen, nheads, head_dim), with ``heads_first`` (batch,
            nheads, seqlen, head_dim), or (total, nheads, head_dim); last dimension contiguous.
        cache_seqlens: (batch,), with outputs that are caches of ``cache_length`` rows for k and v.
    """
    cos, sin, position_ids, seqlen_offsets, offset, cu_seqlens, interleaved, heads_first, conjugate = table
    q = inputs[0]
    heads_dim = 1 if heads_first or q.dim() == 3 else 2
    seqlen = q.shape[0] if q.dim() == 3 else q.shape[3 - heads_dim]
    ntokens = seqlen if q.dim() == 3 else q.shape[0] * seqlen
    nheads = tuple(x.shape[heads_dim] for x in inputs)
    args: dict[str, Any] = {}
    for i, name in enumerate("qkv"):
        given = i < len(inputs)
        args[f"{name}_ptr"] = inputs[i] if given else None
        args[f"{name}_out_ptr"] = outputs[i] if given else None
        for tensor, kind in ((inputs, name), (outputs, f"{name}_out")):
            strides = _strides(tensor[i], heads_first) if given else (0, 0, 0)
            for axis, stride in zip(("batch", "seqlen", "head"), strides, strict=True):
                args[f"stride_{kind}_{axis}"] = stride
        args[f"nheads_{name}"] = nheads[i] if given else 0
    args["cos_ptr"], args["sin_ptr"] = cos, sin
    for name, rows in (("cos", cos), ("sin", sin)):
        # Tables of batch size 1 serve every sequence.
        args[f"stride_{name}_batch"] = rows.stride(0) if rows.dim() == 3 and rows.shape[0] > 1 else 0
        args[f"stride_{name}_position"] = rows.stride(-2)
    args["max_position"] = cos.shape[-2]
    args["position_ids_ptr"] = position_ids
    args["stride_position_batch"] = args["stride_position_seqlen"] = 0
    if position_ids is not None:
        args["stride_position_seqlen"] = position_ids.stride(-1)
        if position_ids.dim() == 2 and position_ids.shape[0] > 1:
            args["stride_position_batch"] = position_ids.stride(0)
    args["seqlen_offsets_ptr"], args["offset"] = seqlen_offsets, offset
    args["cu_seqlens_ptr"], args["nseqs"] = cu_seqlens, cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 0
    args["cache_seqlens_ptr"], args["cache_length"] = cache_seqlens, cache_length
    args["ntokens"], args["seqlen"] = ntokens, seqlen

    head_dim, rotary_dim = q.shape[-1], 2 * cos.shape[-1]
    in_place = outputs[0] is q
    # In place, threads that read columns of others would find them written; and halves of whole sectors need no care.
    cut = rotary_dim < head_dim or rotary_dim // 2 * q.element_size() % 32 != 0
    whole = rotary_dim > 0 and not interleaved and not in_place and cut
    blocks = block_sizes(head_dim, rotary_dim, nheads, q.element_size(), whole)
    constants = {
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": interleaved,
        "CONJUGATE": conjugate,
        "INPLACE": in_place,
        "WHOLE": whole,
        "BATCHED": q.dim() == 4,
        **blocks,
        "num_warps": NUM_WARPS,
    }
    programs = -(-ntokens // blocks["BLOCK_M"])
    # Few tokens: their heads are shared out, up to about four programs for each of a large GPU's multiprocessors.
    splits = min(-(-max(nheads) // blocks["BLOCK_H"]), max(1, 512 // max(programs, 1)))
    return (programs, splits), args, constants
