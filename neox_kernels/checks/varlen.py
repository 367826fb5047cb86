"""The arguments of unpad and pad."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_kernels.checks.common import FLOATS, not_a_tensor, require_indices, require_int, shape_of

MASKS = frozenset(
    {
        *FLOATS,
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
    }
)


def may_look(x: Tensor) -> bool:
    """Whether values may be read: on a GPU that is a sync, and to torch.compile the end of the graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _require_length(name: str, value: object) -> None:
    require_int(name, value)
    assert isinstance(value, int | torch.SymInt)
    if value < 0:
        raise ValueError(f"{name} must not be negative, not {value}")


def require_lengths(capacity: object, max_seqlen: object) -> None:
    """An int, not negative, or None: the dispatcher would take a tensor for an int."""
    if capacity is not None:
        _require_length("capacity", capacity)
    if max_seqlen is not None:
        _require_length("max_seqlen", max_seqlen)


def require_varlen_metadata(attention_mask: object, capacity: object, max_seqlen: object) -> None:
    """The arguments of :func:`neox_kernels.varlen_metadata`."""
    mask = attention_mask
    if not isinstance(mask, Tensor):
        not_a_tensor("attention_mask", mask)
    if mask.dtype not in MASKS:
        raise TypeError(f"attention_mask must be bool, of an integer dtype or of a floating one, not {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be (batch, seqlen), not of the shape {shape_of(mask)}")
    if mask.numel() >= 2**31:
        raise ValueError(f"attention_mask must have fewer than 2**31 tokens (cu_seqlens is int32), not {mask.numel()}")
    require_lengths(capacity, max_seqlen)
    if may_look(mask):
        other = ((mask != 0) & (mask != 1)).nonzero()
        if len(other):
            b, s = other[0].tolist()
            raise ValueError(f"attention_mask must hold only 0 and 1, not {mask[b, s].item()} (at [{b}, {s}])")
        seqlens = mask.long().sum(-1)
        require_room(int(seqlens.sum()), max(seqlens.tolist(), default=0), capacity, max_seqlen)


def require_room(total: int, longest: int, capacity: object, max_seqlen: object) -> None:
    """``capacity`` and ``max_seqlen`` against what the mask really holds."""
    if isinstance(capacity, int) and total > capacity:
        raise ValueError(f"capacity must be at least {total}, the number of tokens in attention_mask, not {capacity}")
    if isinstance(max_seqlen, int) and longest > max_seqlen:
        raise ValueError(f"max_seqlen must be at least {longest}, the longest sequence's, not {max_seqlen}")


def _require_list(tensors: object, name: str) -> list[tuple[str, Tensor]]:
    if not isinstance(tensors, Tensor | list | tuple):
        raise TypeError(f"{name} must be a tensor, or a tuple or list of tensors, not {type(tensors).__name__}")
    if isinstance(tensors, Tensor):
        return [(name, tensors)]
    if not tensors:
        raise ValueError(f"{name} must have at least one tensor, not be empty")
    named = []
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            not_a_tensor(f"{name}[{i}]", x)
        named.append((f"{name}[{i}]", x))
    return named


def _require_metadata(metadata: object) -> tuple[Tensor, Tensor]:
    indices, inverse = getattr(metadata, "indices", None), getattr(metadata, "inverse", None)
    if not isinstance(indices, Tensor) or not isinstance(inverse, Tensor):
        raise TypeError(f"metadata must be what varlen_metadata returns, not {type(metadata).__name__}")
    require_indices("metadata.indices", indices, inverse.device)
    require_indices("metadata.inverse", inverse, inverse.device)
    if indices.dim() != 1:
        raise ValueError(f"metadata.indices must be (total,), not of the shape {shape_of(indices)}")
    if inverse.dim() != 2:
        raise ValueError(f"metadata.inverse must be (batch, seqlen), not of the shape {shape_of(inverse)}")
    return indices, inverse


def _require_inside(name: str, indices: Tensor, first: int, rows: int) -> None:
    if may_look(indices):
        outside = ((indices < first) | (indices >= rows)).flatten().nonzero()
        if len(outside):
            at = int(outside[0])
            raise IndexError(
                f"{name} must be between {first} and {rows - 1}, not {int(indices.flatten()[at])} (at [{at}])"
            )


def require_unpad(tensors: object, metadata: object) -> None:
    """The arguments of :func:`neox_kernels.unpad_input`."""
    named = _require_list(tensors, "tensors")
    indices, inverse = _require_metadata(metadata)
    for name, x in named:
        if x.shape[:2] != inverse.shape:
            raise ValueError(
                f"{name} must be (batch, seqlen, ...) with the batch and seqlen of metadata, {shape_of(inverse)}, "
                f"not of the shape {shape_of(x)}"
            )
        if x.device != inverse.device:
            raise ValueError(f"{name} must be on {inverse.device} like metadata, not on {x.device}")
    _require_inside("metadata.indices", indices, -1, inverse.numel())


def require_pad(tensors: object, metadata: object) -> None:
    """The arguments of :func:`neox_kernels.pad_input`."""
    named = _require_list(tensors, "tensors")
    indices, inverse = _require_metadata(metadata)
    for name, x in named:
        if x.shape[:1] != indices.shape:
            raise ValueError(
                f"{name} must be (total, ...) with the total of metadata, {indices.shape[0]}, "
                f"not of the shape {shape_of(x)}"
            )
        if x.device != inverse.device:
            raise ValueError(f"{name} must be on {inverse.device} like metadata, not on {x.device}")
    _require_inside("metadata.inverse", inverse, -1, indices.shape[0])


def require_index_first_axis(x: object, indices: object) -> None:
    """The arguments of :func:`neox_kernels.index_first_axis`."""
    if not isinstance(x, Tensor):
        not_a_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x must have at least one dimension, not the shape {shape_of(x)}")
    indices = require_indices("indices", indices, x.device)
    if indices.dim() != 1:
        raise ValueError(f"indices must be (total,), not of the shape {shape_of(indices)}")
    _require_inside("indices", indices, 0, x.shape[0])


def require_index_put(values: object, indices: object, first_axis_dim: object) -> None:
    """The arguments of :func:`neox_kernels.index_put_first_axis`."""
    if not isinstance(values, Tensor):
        not_a_tensor("values", values)
    indices = require_indices("indices", indices, values.device)
    if indices.dim() != 1 or values.shape[:1] != indices.shape:
        raise ValueError(
            f"values must be (total, ...) and indices (total,), not of the shapes {shape_of(values)} and "
            f"{shape_of(indices)}"
        )
    _require_length("first_axis_dim", first_axis_dim)
    assert isinstance(first_axis_dim, int)
    _require_inside("indices", indices, 0, first_axis_dim)
