"""Unpad and pad in Triton: a gather of the rows of up to three tensors in one launch, and the metadata in two.

The gather moves words of up to 8 bytes whatever the dtype: a program takes BLOCK_M rows of the result, reads their
indices once, and copies or zeroes their words by accesses of up to 16 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neox_kernels.kernels.launch import power_of_2_from

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
MAX_TENSORS = 3  # of one launch


@triton.jit
def _words(pointer, UNIT: tl.constexpr):
    if UNIT >= 8:
        words = pointer.to(tl.pointer_type(tl.int64))
    elif UNIT == 4:
        words = pointer.to(tl.pointer_type(tl.int32))
    elif UNIT == 2:
        words = pointer.to(tl.pointer_type(tl.int16))
    else:
        words = pointer.to(tl.pointer_type(tl.int8))
    return words


@triton.jit
def _gather_tensor(
    x_ptr, out_ptr, seqlen, stride_batch, stride_seqlen, stride_block, blocks, index, row, known, mask,
    UNIT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    # Strides come in units. 16 bytes are two words, and the product tells Triton that every row begins at an even one,
    # without which it would not join two words into one access.
    WORDS: tl.constexpr = 2 if UNIT == 16 else 1
    PARTS: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    x = _words(x_ptr, UNIT)
    out = _words(out_ptr, UNIT)
    x_row = index * stride_seqlen
    if BATCHED:
        x_row = (index // seqlen) * stride_batch + (index % seqlen) * stride_seqlen
    out_row = row * blocks
    # Programs along axis 1 share the blocks and columns of a row.
    for part in range(tl.program_id(1), blocks * PARTS, tl.num_programs(1)):
        block = tl.zeros_like(index) + part // PARTS  # in 64 bits
        column = ((part % PARTS) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        inside = mask
        read = known
        if COLUMNS % BLOCK_C != 0:
            inside = mask & (column < COLUMNS)
            read = known & (column < COLUMNS)
        x_at = ((x_row + block * stride_block) * WORDS)[:, None] + column
        out_at = ((out_row + block) * COLUMNS)[:, None] + column
        tl.store(out + out_at, tl.load(x + x_at, mask=read, other=0), mask=inside)


# Lengths are not specialised: they change from call to call.
_LENGTHS = ["rows_in", "rows_out", "seqlen_0", "seqlen_1", "seqlen_2"]


@triton.jit(do_not_specialize=_LENGTHS)
def _gather_kernel(
    indices_ptr, rows_in, rows_out,
    x_0_ptr, out_0_ptr, seqlen_0, stride_batch_0, stride_seqlen_0, stride_block_0, blocks_0,
    x_1_ptr, out_1_ptr, seqlen_1, stride_batch_1, stride_seqlen_1, stride_block_1, blocks_1,
    x_2_ptr, out_2_ptr, seqlen_2, stride_batch_2, stride_seqlen_2, stride_block_2, blocks_2,
    UNIT_0: tl.constexpr, COLUMNS_0: tl.constexpr, BLOCK_C_0: tl.constexpr, BATCHED_0: tl.constexpr,
    UNIT_1: tl.constexpr, COLUMNS_1: tl.constexpr, BLOCK_C_1: tl.constexpr, BATCHED_1: tl.constexpr,
    UNIT_2: tl.constexpr, COLUMNS_2: tl.constexpr, BLOCK_C_2: tl.constexpr, BATCHED_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = row < rows_out
    index = tl.load(indices_ptr + row, mask=mask, other=-1).to(tl.int64)
    # Nothing is read for an index that is no row: it gives zeros.
    known = ((index >= 0) & (index < rows_in))[:, None]
    mask = mask[:, None]
    _gather_tensor(
        x_0_ptr, out_0_ptr, seqlen_0, stride_batch_0, stride_seqlen_0, stride_block_0, blocks_0, index, row, known,
        mask, UNIT_0, COLUMNS_0, BLOCK_C_0, BATCHED_0,
    )  # fmt: skip
    if x_1_ptr is not None:
        _gather_tensor(
            x_1_ptr, out_1_ptr, seqlen_1, stride_batch_1, stride_seqlen_1, stride_block_1, blocks_1, index, row, known,
            mask, UNIT_1, COLUMNS_1, BLOCK_C_1, BATCHED_1,
        )  # fmt: skip
    if x_2_ptr is not None:
        _gather_tensor(
            x_2_ptr, out_2_ptr, seqlen_2, stride_batch_2, stride_seqlen_2, stride_block_2, blocks_2, index, row, known,
            mask, UNIT_2, COLUMNS_2, BLOCK_C_2, BATCHED_2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "seqlen"])
def _count_kernel(mask_ptr, stride_batch, stride_seqlen, counts_ptr, batch, seqlen, BLOCK: tl.constexpr):
    """Tokens of sequence b to counts[0, b], values that are not 0 or 1 to counts[1, b]."""
    b = tl.program_id(0).to(tl.int64)
    tokens = tl.zeros([BLOCK], tl.int32)
    invalid = tl.zeros([BLOCK], tl.int32)
    for first in range(0, seqlen, BLOCK):
        s = first + tl.arange(0, BLOCK)
        value = tl.load(mask_ptr + b * stride_batch + s.to(tl.int64) * stride_seqlen, mask=s < seqlen, other=0)
        token = value != 0
        tokens += token.to(tl.int32)
        invalid += (token & (value != 1)).to(tl.int32)
    tl.store(counts_ptr + b, tl.sum(tokens))
    tl.store(counts_ptr + batch + b, tl.sum(invalid))


@triton.jit(do_not_specialize=["batch", "seqlen", "capacity"])
def _metadata_kernel(
    mask_ptr, stride_batch, stride_seqlen, counts_ptr, indices_ptr, cu_seqlens_ptr, inverse_ptr, facts_ptr,
    batch, seqlen, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program places the tokens of one sequence; how many stand before it, it adds up itself from all counts."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    longest = tl.zeros([BLOCK], tl.int32)
    invalid = tl.zeros([BLOCK], tl.int32)
    for first in range(0, batch, BLOCK):
        other = first + lane
        count = tl.load(counts_ptr + other, mask=other < batch, other=0)
        total += count
        before += tl.where(other < b, count, 0)
        longest = tl.maximum(longest, count)
        invalid += tl.load(counts_ptr + batch + other, mask=other < batch, other=0)
    last = tl.sum(total)
    if b == 0:
        tl.store(cu_seqlens_ptr, 0)
        tl.store(facts_ptr, last.to(tl.int64))
        tl.store(facts_ptr + 1, tl.max(longest).to(tl.int64))
        tl.store(facts_ptr + 2, tl.sum(invalid).to(tl.int64))
    if b < batch:
        n = tl.sum(before)
        for first in range(0, seqlen, BLOCK):
            s = first + lane
            inside = s < seqlen
            value = tl.load(mask_ptr + b * stride_batch + s.to(tl.int64) * stride_seqlen, mask=inside, other=0)
            token = (value != 0).to(tl.int32)
            order = n + tl.cumsum(token, 0) - token
            placed = (token != 0) & (order < capacity)
            at = b * seqlen + s
            tl.store(inverse_ptr + at, tl.where(placed, order, -1), mask=inside)
            tl.store(indices_ptr + order, at, mask=placed)
            n += tl.sum(token)
        tl.store(cu_seqlens_ptr + b + 1, tl.minimum(n, capacity).to(tl.int32))
    # The programs share the room behind the last token.
    for first in range(last + tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        tl.store(indices_ptr + first + lane, tl.full([BLOCK], -1, tl.int64), mask=first + lane < capacity)


def describe_rows(x: Tensor, lead: int) -> tuple[int, int, int, int, int, int] | None:
    """seqlen, three strides, blocks and the length of a block, in elements, as csrc/varlen_args.h has them in bytes.

    None where the rows of ``x``, whose first ``lead`` dimensions count them, are not evenly spaced pieces of memory, or
    pieces of one element.
    """
    seqlen, stride_seqlen = x.shape[lead - 1], x.stride(lead - 1)
    stride_batch = x.stride(0) if lead == 2 else 0
    if lead == 2 and (x.shape[0] == 1 or stride_batch == seqlen * stride_seqlen):
        seqlen *= x.shape[0]  # one row of tokens
    blocks, stride_block, length = 1, 0, 1
    for d in range(x.dim() - 1, lead - 1, -1):
        size, stride = x.shape[d], x.stride(d)
        if size == 1:
            continue
        if blocks == 1 and stride == length:
            length *= size
        elif blocks == 1 and length > 1:
            blocks, stride_block = size, stride
        elif blocks > 1 and stride == blocks * stride_block:
            blocks *= size
        else:
            return None
    return seqlen, stride_batch, stride_seqlen, stride_block, blocks, length


def _unit(x: Tensor, out: Tensor, distances: tuple[int, ...]) -> int:
    """The most bytes, 16 at most, that every address and distance is a multiple of."""
    known = [x.data_ptr(), out.data_ptr(), *(distance * x.element_size() for distance in distances)]
    unit = 16
    while any([n % unit != 0 for n in known]):
        unit //= 2
    return unit


def plan_launch(
    inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], indices: Tensor, lead: int
) -> tuple[tuple[int, int], dict[str, Any], dict[str, Any]]:
    """The grid, the arguments and the constants that launch ``_gather_kernel`` on one to three tensors; nothing runs.

    Args:
        inputs: (batch, seqlen, ...) with ``lead`` 2, (total, ...) with 1; none empty, each described by describe_rows.
        outputs: contiguous, with the shape of ``indices`` in place of these dimensions.
        indices: contiguous, int32 or int64.
    """
    rows_in = inputs[0].shape[0] * (inputs[0].shape[1] if lead == 2 else 1)
    rows_out = indices.numel()
    args: dict[str, Any] = {"indices_ptr": indices, "rows_in": rows_in, "rows_out": rows_out}
    constants: dict[str, Any] = {}
    parts, widest = 1, 1
    for i in range(MAX_TENSORS):
        x = inputs[i] if i < len(inputs) else None
        args[f"x_{i}_ptr"], args[f"out_{i}_ptr"] = x, outputs[i] if x is not None else None
        seqlen, batch_stride, seqlen_stride, block_stride, blocks, length = (1, 0, 0, 0, 0, 1)
        unit, size = 1, 1
        if x is not None:
            described = describe_rows(x, lead)
            assert described is not None
            seqlen, batch_stride, seqlen_stride, block_stride, blocks, length = described
            size = x.element_size()
            unit = _unit(x, outputs[i], (batch_stride, seqlen_stride, block_stride, length))
        columns = length * size // min(unit, 8)
        # A power of two that divides the columns leaves none to mask, unless it is small.
        block_c = columns & -columns
        block_c = min(block_c if block_c * min(unit, 8) >= 32 else power_of_2_from(columns), 128)
        for name, value in (("batch", batch_stride), ("seqlen", seqlen_stride), ("block", block_stride)):
            args[f"stride_{name}_{i}"] = value * size // unit
        args[f"seqlen_{i}"], args[f"blocks_{i}"] = seqlen, blocks
        constants[f"UNIT_{i}"], constants[f"COLUMNS_{i}"] = unit, columns
        constants[f"BLOCK_C_{i}"], constants[f"BATCHED_{i}"] = block_c, x is not None and seqlen != rows_in
        parts = max(parts, blocks * -(-columns // block_c))
        widest = max(widest, block_c * min(unit, 8))
    # Four accesses of 16 bytes for each thread, by the tensor with the widest block of columns.
    block_m = max(1, min(THREADS * 64 // widest, 256))
    constants.update(BLOCK_M=block_m, num_warps=NUM_WARPS)
    programs = -(-rows_out // block_m)
    # Few rows: their columns are shared out, up to about four programs for each of a large GPU's multiprocessors.
    return (programs, min(parts, max(1, 512 // max(programs, 1)))), args, constants


def plan_metadata(
    attention_mask: Tensor, capacity: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int, dict[str, Any], dict[str, Any]]:
    """The outputs, the number of sequences, and the arguments of ``_count_kernel`` and ``_metadata_kernel``."""
    batch, seqlen = attention_mask.shape
    # Allocated by the mask, which says the device also under torch.compile.
    indices, facts = (attention_mask.new_empty(n, dtype=torch.int64) for n in (capacity, 3))
    cu_seqlens, counts = (attention_mask.new_empty(n, dtype=torch.int32) for n in (batch + 1, 2 * batch))
    inverse = attention_mask.new_empty((batch, seqlen), dtype=torch.int32)
    counting = {
        "mask_ptr": attention_mask,
        "stride_batch": attention_mask.stride(0),
        "stride_seqlen": attention_mask.stride(1),
        "counts_ptr": counts,
        "batch": batch,
        "seqlen": seqlen,
    }
    placing = {
        **counting,
        "indices_ptr": indices,
        "cu_seqlens_ptr": cu_seqlens,
        "inverse_ptr": inverse,
        "facts_ptr": facts,
        "capacity": capacity,
    }
    return (indices, cu_seqlens, inverse, facts), batch, counting, placing
