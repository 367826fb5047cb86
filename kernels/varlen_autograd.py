"""The varlen kernels as the functions that the registry serves: launched on tensors, and known to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neox_kernels.kernels.launch import launch, needs_grad
from neox_kernels.kernels.varlen import (
    MAX_TENSORS,
    NUM_WARPS,
    _count_kernel,
    _gather_kernel,
    _metadata_kernel,
    describe_rows,
    plan_launch,
    plan_metadata,
)

_BLOCK = 1024  # values of a mask that a program holds at once


def varlen_metadata(
    attention_mask: Tensor, capacity: int | None = None, max_seqlen: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`neox_kernels.reference.varlen_metadata`."""
    room = attention_mask.numel() if capacity is None else capacity
    made, batch, counting, placing = plan_metadata(attention_mask, room)
    if batch > 0:
        launch(_count_kernel, (batch,), attention_mask, **counting, BLOCK=_BLOCK, num_warps=NUM_WARPS)
    launch(_metadata_kernel, (max(batch, 1),), attention_mask, **placing, BLOCK=_BLOCK, num_warps=NUM_WARPS)
    return made


def _bytes(x: Tensor, lead: int) -> Tensor:
    """What the kernel may read as bytes: conjugated for real, of a dtype that Triton knows, in evenly spaced pieces."""
    x = x.resolve_conj().resolve_neg()
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool) or x.dtype.itemsize == 1:
        x = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])
    return x if describe_rows(x, lead) is not None else x.contiguous()


def _results(tensors: Sequence[Tensor], indices: Tensor, lead: int) -> list[Tensor]:
    return [x.new_empty((*indices.shape, *x.shape[lead:])) for x in tensors]


def _launch(tensors: Sequence[Tensor], indices: Tensor, lead: int) -> list[Tensor]:
    indices, results = indices.contiguous(), _results(tensors, indices, lead)
    pairs = [(_bytes(x, lead), _bytes(out, indices.dim())) for x, out in zip(tensors, results, strict=True)]
    pairs = [(x, out) for x, out in pairs if out.numel() > 0]
    for first in range(0, len(pairs), MAX_TENSORS):
        inputs, outputs = zip(*pairs[first : first + MAX_TENSORS], strict=True)
        grid, args, constants = plan_launch(inputs, outputs, indices, lead)
        launch(_gather_kernel, grid, indices, **args, **constants)
    return results


# torch.compile has no addresses, and how wide an access may be hangs on them: there the launch is an op of its own.
_launch_op = torch.library.custom_op(
    "neox_kernels_triton::gather", _launch, mutates_args=(), schema="(Tensor[] x, Tensor indices, int lead) -> Tensor[]"
)
_launch_op.register_fake(_results)


def _gather(tensors: tuple[Tensor, ...], indices: Tensor, inverse: Tensor | None) -> tuple[Tensor, ...]:
    gather = _launch_op if torch.compiler.is_compiling() else _launch
    return tuple(gather(tensors, indices, 1 if inverse is None else inverse.dim()))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, inverse: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(indices, inverse)
        ctx.rows = tensors[0].shape[0]
        return _gather(tensors, indices, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        indices, inverse = ctx.saved_tensors
        needed = {i: g for i, g in enumerate(grads) if ctx.needs_input_grad[2 + i]}
        if inverse is None:  # rows may repeat: their gradients add up
            # An index that is no row read nothing, and adds nothing: index_add would end the process's use of the GPU.
            at = indices.where((indices >= 0) & (indices < ctx.rows), ctx.rows)
            rows = [g.new_zeros(ctx.rows + 1, *g.shape[1:]).index_add(0, at, g)[: ctx.rows] for g in needed.values()]
        else:
            rows = list(_GatherRows.apply(inverse, indices, *needed.values())) if needed else []
        found = dict(zip(needed, rows, strict=True))
        return None, None, *(found.get(i) for i in range(len(grads)))


def _apply(tensors: list[Tensor], indices: Tensor, inverse: Tensor | None) -> list[Tensor]:
    if needs_grad(*tensors):
        return list(_GatherRows.apply(indices, inverse, *tensors))
    return list(_gather(tuple(tensors), indices, inverse))


def unpad_input(tensors: list[Tensor], indices: Tensor, inverse: Tensor) -> list[Tensor]:
    """See :func:`neox_kernels.unpad_input`."""
    return _apply(tensors, indices, inverse)


def pad_input(tensors: list[Tensor], indices: Tensor, inverse: Tensor) -> list[Tensor]:
    """See :func:`neox_kernels.pad_input`."""
    return _apply(tensors, inverse, indices)


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """See :func:`neox_kernels.index_first_axis`."""
    return _apply([x], indices, None)[0]
