"""The compiled varlen ops: unpad, pad and index are one gather of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neox_kernels.compiled import library
from neox_kernels.compiled.library import find_op, needs_grad, same_place

_GATHER_ROWS, _GATHER_ROWS_INFERENCE = find_op("gather_rows"), find_op("gather_rows", "inference")
_VARLEN_METADATA = find_op("varlen_metadata")


def varlen_metadata(
    attention_mask: Tensor, capacity: int | None = None, max_seqlen: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`neox_kernels.reference.varlen_metadata`."""
    batch, seqlen = attention_mask.shape
    room = batch * seqlen if capacity is None else capacity
    made: tuple[Tensor, Tensor, Tensor, Tensor] = _VARLEN_METADATA(
        attention_mask, room, seqlen if max_seqlen is None else max_seqlen
    )
    return made


def _gather(tensors: list[Tensor], indices: Tensor, inverse: Tensor | None) -> list[Tensor]:
    op = _GATHER_ROWS if needs_grad(*tensors) else _GATHER_ROWS_INFERENCE
    rows: list[Tensor] = op(tensors, indices, inverse)
    return rows


def unpad_input(tensors: list[Tensor], indices: Tensor, inverse: Tensor) -> list[Tensor]:
    """See :func:`neox_kernels.unpad_input`."""
    return _gather(tensors, indices, inverse)


def pad_input(tensors: list[Tensor], indices: Tensor, inverse: Tensor) -> list[Tensor]:
    """See :func:`neox_kernels.pad_input`."""
    return _gather(tensors, inverse, indices)


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """See :func:`neox_kernels.index_first_axis`."""
    return _gather([x], indices, None)[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, inverse: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(indices, inverse)
        ctx.set_materialize_grads(False)
        ctx.rows = tensors[0].shape[0] if tensors else 0
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_GATHER_ROWS_INFERENCE(list(tensors), indices, inverse))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        indices, inverse = ctx.saved_tensors
        needed = {i: g for i, g in enumerate(grads) if g is not None and ctx.needs_input_grad[2 + i]}
        if inverse is None:  # rows may repeat: their gradients add up
            at, room = indices, ctx.rows
            if indices.is_cuda:
                # An index that is no row read nothing, and adds nothing: index_add would end the process's use of the
                # GPU. On a CPU the forward has refused it.
                at, room = indices.where((indices >= 0) & (indices < room), room), room + 1
            rows = [g.new_zeros(room, *g.shape[1:]).index_add(0, at, g)[: ctx.rows] for g in needed.values()]
        else:
            rows = _GATHER_ROWS(list(needed.values()), inverse, indices)
        found = dict(zip(needed, rows, strict=True))
        return None, None, *(found.get(i) for i in range(len(grads)))


def _register() -> None:
    @torch.library.register_fake("neox_kernels::gather_rows")
    @torch.library.register_fake("neox_kernels::gather_rows.inference")
    def _(tensors: list[Tensor], indices: Tensor, inverse: Tensor | None) -> list[Tensor]:
        same_place(*tensors, indices, inverse)
        lead = 1 if inverse is None else inverse.dim()
        return [x.new_empty((*indices.shape, *x.shape[lead:])) for x in tensors]

    @torch.library.register_fake("neox_kernels::varlen_metadata")
    def _(attention_mask: Tensor, capacity: int, max_seqlen: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, _ = attention_mask.shape
        indices, facts = (attention_mask.new_empty(n, dtype=torch.int64) for n in (capacity, 3))
        cu_seqlens = attention_mask.new_empty(batch + 1, dtype=torch.int32)
        return indices, cu_seqlens, attention_mask.new_empty(attention_mask.shape, dtype=torch.int32), facts

    # In place of torch.library.register_autograd, whose way with lists costs a call 70 us.
    @torch.library.impl("neox_kernels::gather_rows", "Autograd")
    def _(tensors: list[Tensor], indices: Tensor, inverse: Tensor | None) -> list[Tensor]:
        return list(_GatherRows.apply(indices, inverse, *tensors))


if library.load_error is None:
    _register()
