"""Unpad and pad: from (batch, seqlen, ...) with padding to (total, ...) without, and back.

Both are one gather of rows: where a token of the batch lies in the unpadded tensor is known (``inverse``), and so is
the other way round (``indices``). So each writes every row of its result once, copied or zeroed, and each is the
other's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

from torch import Tensor

from neox_kernels import backends
from neox_kernels.checks import varlen as checks
from neox_kernels.checks.common import refuse
from neox_kernels.reference import varlen as reference


class VarlenMetadata(NamedTuple):
    """Which tokens of a batch are not padding, and where each of them lies with and without padding.

    Args:
        indices: (total,), int64: the tokens of the flattened (batch * seqlen,) that are kept, in order; with a
            ``capacity``, (capacity,) with -1 behind the last.
        cu_seqlens: (batch + 1,), int32: where each sequence begins among the kept tokens, and where the last one ends.
        max_seqlen: the length of the longest sequence, or what the caller gave for it.
        inverse: (batch, seqlen), int32: where in ``indices`` a token stands, -1 for padding.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    inverse: Tensor


def varlen_metadata(
    attention_mask: Tensor, *, capacity: int | None = None, max_seqlen: int | None = None
) -> VarlenMetadata:
    """Find the tokens of a batch that are not padding, in one pass over the mask.

    On a GPU the sizes are read in one sync; with ``capacity`` and ``max_seqlen`` there is none, all shapes are fixed,
    and the call can be captured in a CUDA graph and in torch.compile's.

    Args:
        attention_mask: (batch, seqlen), 1 for a token and 0 for padding, anywhere; bool, or any integer or floating
            dtype; any strides. Fewer than 2**31 tokens.
        capacity: how many tokens ``indices`` has room for; default as many as there are.
        max_seqlen: an upper bound on the length of every sequence; default the longest one's.

    Returns:
        A :class:`VarlenMetadata`: ``indices, cu_seqlens, max_seqlen, inverse``.

    Raises:
        TypeError: an argument of another type, or a complex mask.
        ValueError: a mask that is not (batch, seqlen) or holds anything but 0 and 1, more tokens than ``capacity``, a
            sequence longer than ``max_seqlen``. Without a sync a GPU cannot say the last three: what is not 0 then
            counts as a token, and tokens beyond ``capacity`` are dropped (padding to ``inverse``, and ``cu_seqlens``
            ends at ``capacity``).

    Source: NVIDIA's MLPerf BERT, https://github.com/mlcommons/training_results_v1.1. Oracle:
    ``neox_kernels.reference.varlen_metadata``.
    """
    try:
        serve, checks_itself = backends.select("varlen_metadata", attention_mask.device.type, None)
        checks.require_lengths(capacity, max_seqlen)
        if not checks_itself:
            checks.require_varlen_metadata(attention_mask, capacity, max_seqlen)
        indices, cu_seqlens, inverse, facts = serve(attention_mask, capacity, max_seqlen)
        if capacity is None or max_seqlen is None:
            total, longest, invalid = facts.tolist()  # the one sync
            if invalid:
                raise ValueError(f"attention_mask must hold only 0 and 1, not {invalid} other values")
            checks.require_room(total, longest, capacity, max_seqlen)
            indices = indices[:total] if capacity is None else indices
            max_seqlen = longest if max_seqlen is None else max_seqlen
        return VarlenMetadata(indices, cu_seqlens, max_seqlen, inverse)
    except Exception as error:
        refuse(error, checks.require_varlen_metadata, attention_mask, capacity, max_seqlen)


def _gather(
    op: str,
    check: Callable[[object, object], None],
    tensors: Tensor | Sequence[Tensor],
    metadata: VarlenMetadata,
) -> Tensor | tuple[Tensor, ...]:
    try:
        serve, checks_itself = backends.select(op, metadata.indices.device.type, None)
        if not checks_itself:
            check(tensors, metadata)
        if isinstance(tensors, Tensor):
            result: Tensor = serve([tensors], metadata.indices, metadata.inverse)[0]
            return result
        if tensors:
            return tuple(serve(list(tensors), metadata.indices, metadata.inverse))
        raise ValueError("tensors must not be empty")
    except Exception as error:
        refuse(error, check, tensors, metadata)


@overload
def unpad_input(tensors: Tensor, metadata: VarlenMetadata) -> Tensor: ...
@overload
def unpad_input(tensors: Sequence[Tensor], metadata: VarlenMetadata) -> tuple[Tensor, ...]: ...
def unpad_input(tensors: Tensor | Sequence[Tensor], metadata: VarlenMetadata) -> Tensor | tuple[Tensor, ...]:
    """Take the padding out of one tensor, or of several (q, k and v) in one launch.

    Args:
        tensors: (batch, seqlen, ...), or a tuple or list of such; trailing shapes and dtypes may differ, any dtype, any
            strides. Read as they lie where a token's features are one block of memory or evenly spaced blocks (slices
            of packed QKV, transposed heads); otherwise copied first.
        metadata: from :func:`varlen_metadata`.

    Returns:
        (total, ...), contiguous; a tuple for several. Zeros where ``metadata.indices`` is -1 (``capacity`` that is not
        used). Differentiable: the gradient is :func:`pad_input`'s result.

    Raises:
        TypeError, ValueError: batch, seqlen, shapes or devices that do not go together.
        IndexError: an index outside the batch, on a CPU. On a GPU, where looking costs a sync, its row is zero.

    Source: NVIDIA's MLPerf BERT, https://github.com/mlcommons/training_results_v1.1. Oracle:
    ``neox_kernels.reference.unpad_input``.
    """
    return _gather("unpad_input", checks.require_unpad, tensors, metadata)


@overload
def pad_input(tensors: Tensor, metadata: VarlenMetadata) -> Tensor: ...
@overload
def pad_input(tensors: Sequence[Tensor], metadata: VarlenMetadata) -> tuple[Tensor, ...]: ...
def pad_input(tensors: Tensor | Sequence[Tensor], metadata: VarlenMetadata) -> Tensor | tuple[Tensor, ...]:
    """Put the padding back, as zeros: into one tensor, or into several in one launch. Every row is written once.

    Args:
        tensors: (total, ...), or a tuple or list of such; as for :func:`unpad_input`.
        metadata: from :func:`varlen_metadata`.

    Returns:
        (batch, seqlen, ...), contiguous; a tuple for several. Differentiable: the gradient is :func:`unpad_input`'s
        result.

    Raises:
        TypeError, ValueError: a total, shapes or devices that do not go together.
        IndexError: an index outside ``tensors``, on a CPU. On a GPU, where looking costs a sync, its row is zero.

    Source: NVIDIA's MLPerf BERT, https://github.com/mlcommons/training_results_v1.1. Oracle:
    ``neox_kernels.reference.pad_input``.
    """
    return _gather("pad_input", checks.require_pad, tensors, metadata)


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Take rows of the first axis, which may repeat.

    Args:
        x: (rows, ...), any dtype, any strides (see :func:`unpad_input`).
        indices: (total,), int32 or int64, between 0 and rows - 1.

    Returns:
        (total, ...), contiguous. Differentiable: the gradients of repeated rows add up.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together.
        IndexError: an index outside ``x``, on a CPU. On a GPU, where looking costs a sync, the kernels read nothing
            there and its row is zero (the reference on a GPU does as PyTorch's ``index_select``).

    Source: NVIDIA's MLPerf BERT, https://github.com/mlcommons/training_results_v1.1. Oracle:
    ``neox_kernels.reference.index_first_axis``.
    """
    try:
        serve, checks_itself = backends.select("index_first_axis", x.device.type, None)
        if not checks_itself:
            checks.require_index_first_axis(x, indices)
        result: Tensor = serve(x, indices)
        return result
    except Exception as error:
        refuse(error, checks.require_index_first_axis, x, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Put rows to places of a tensor of zeros: :func:`index_first_axis` the other way round.

    Args:
        values: (total, ...), any dtype, any strides (see :func:`unpad_input`).
        indices: (total,), int32 or int64, between 0 and first_axis_dim - 1; none twice (which one would win is open).
        first_axis_dim: the number of rows of the result.

    Returns:
        (first_axis_dim, ...), contiguous. Differentiable.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together.
        IndexError: an index outside the result, on a CPU. On a GPU, where looking costs a sync, it is left out.

    Source: NVIDIA's MLPerf BERT, https://github.com/mlcommons/training_results_v1.1. Oracle:
    ``neox_kernels.reference.pad_input``.
    """
    checks.require_index_put(values, indices, first_axis_dim)
    serve, _ = backends.select("pad_input", values.device.type, None)
    inverse = reference.invert_indices(indices, first_axis_dim)
    result: Tensor = serve([values], indices, inverse[None])[0]
    return result[0]
