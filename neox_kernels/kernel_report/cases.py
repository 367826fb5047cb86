"""The usual calls that the report is about, and what each must read and write at the least.

A case makes CPU tensors and asks the project's own planning code what would be launched on them: ``plan_launch`` and
its like for Triton. For CUDA it names the op of the compiled library, whose launcher decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neox_kernels.kernels import rotary, softmax, softmax_backward, varlen, varlen_autograd

BF16, F32 = torch.bfloat16, torch.float32
# The bits of the compiled ops' `flags` (csrc/schema.cpp).
INTERLEAVED, CONJUGATE, CAUSAL = 1, 4, 1


@dataclass(frozen=True)
class Launch:
    """A Triton kernel with its grid, and all its arguments, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CudaCall:
    """An op of the compiled library, its arguments, and the part of its kernel's name that tells it from others."""

    op: str
    arguments: tuple[Any, ...]
    kernel: str
    own_memory: bool = False  # its kernels read what others of the same call wrote, so that all must run


@dataclass(frozen=True)
class Case:
    kernel: str
    configuration: str
    dtype: torch.dtype
    elements: int  # what figures per element count
    minimum_bytes: int  # that the call must read and write
    triton: Callable[[], Launch]
    cuda: Callable[[], CudaCall]
    width: int = 16  # bytes of an access that the alignment of the tensors allows
    instruction_limit: float | None = None  # SASS instructions per element, on sm_90 in bfloat16


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros: memory that is not touched until a simulated kernel does, and no NaN, which takes another path."""
    return torch.zeros(shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------- rotary

TOKENS = 2048  # one sequence of the length that these models were trained with
# heads, head_dim, rotary_dim, interleaved
PYTHIA, NEOX = (16, 128, 32, False), (64, 96, 24, False)
GPTJ = (16, 256, 64, True)
FULL_HALF, FULL_INTERLEAVED = (32, 128, 128, False), (32, 128, 128, True)


def rotary_case(
    name: str,
    shape: tuple[int, int, int, bool],
    dtype: torch.dtype = BF16,
    *,
    kind: str = "forward",
    width: int = 16,
) -> Case:
    """Rotary of q and k. ``kind``: forward, backward, in place (of a packed QKV projection), varlen, append."""
    heads, head_dim, rotary_dim, interleaved = shape
    conjugate, append = kind == "backward", kind == "append"

    def tensors() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        size = 3 * head_dim if kind == "in place" else head_dim
        packed = [zeros(1, TOKENS, heads, size, dtype=dtype) for _ in range(1 if kind == "in place" else 2 + append)]
        inputs = list(packed[0].chunk(3, -1)[:2]) if kind == "in place" else packed
        outputs = inputs if kind == "in place" else [torch.zeros_like(x) for x in inputs]
        cos, sin = (zeros(TOKENS, rotary_dim // 2, dtype=F32) for _ in range(2))
        if kind == "varlen":
            inputs, outputs = [x[0] for x in inputs], [x[0] for x in outputs]
        return inputs, outputs, cos, sin

    def sequences() -> Tensor | None:
        return torch.arange(0, TOKENS + 1, TOKENS // 4, dtype=torch.int32) if kind == "varlen" else None

    def triton() -> Launch:
        inputs, outputs, cos, sin = tensors()
        used = zeros(1, dtype=torch.int32) if append else None
        table = (cos, sin, None, used, 0, sequences(), interleaved, False, conjugate)
        grid, arguments, constants = rotary.plan_launch(tuple(inputs), tuple(outputs), table, used, TOKENS * append)
        return Launch(rotary._rotary_kernel, grid, {**arguments, **constants})

    def cuda() -> CudaCall:
        inputs, outputs, cos, sin = tensors()
        flags = INTERLEAVED * interleaved + CONJUGATE * conjugate
        if append:
            used = zeros(1, dtype=torch.int32)
            arguments = (*outputs[1:], *inputs, cos, sin, used, None, flags)
            return CudaCall("rotary_kv_append", arguments, "rotary_")
        op = "rotary_qk_" if kind == "in place" else "rotary_qk"
        return CudaCall(op, (*inputs, cos, sin, None, None, sequences(), 0, flags), "rotary_")

    elements = (2 + append) * TOKENS * heads * (rotary_dim if kind == "in place" else head_dim)
    minimum = 2 * elements * dtype.itemsize + TOKENS * rotary_dim * 4  # the float32 tables once
    configuration = f"{name}, {kind}: {heads} heads of {head_dim}, {rotary_dim} rotated, {TOKENS} tokens"
    # In place only rotated features count, which share the finding of positions and tables with no copied ones.
    limit = None if kind == "in place" else 10
    return Case("rotary", configuration, dtype, elements, minimum, triton, cuda, width, limit)


# ------------------------------------------------------------------------------------------------------------ softmax


def softmax_case(
    rows: tuple[int, int, int], k_len: int, dtype: torch.dtype = BF16, *, backward: bool = False, feature: str = ""
) -> Case:
    """``rows``: batch, heads, q_len. ``feature``: not causal, padding mask, added mask, or dropout and head mask, which
    in the forward stores the probabilities too, as for training.
    """
    batch, heads, q_len = rows
    shape, causal, dropout = (*rows, k_len), feature != "not causal", feature == "dropout and head mask"
    scale = 0.125

    def of_feature() -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]:
        """Padding, mask, head mask, rng, dropout_p."""
        padding = torch.ones(batch, k_len, dtype=torch.bool) if feature == "padding mask" else None
        mask = zeros(1, 1, q_len, k_len, dtype=dtype) if feature == "added mask" else None
        head_mask, rng = (torch.ones(heads), zeros(2, dtype=torch.int64)) if dropout else (None, None)
        return padding, mask, head_mask, rng, 0.1 if dropout else 0.0

    def triton() -> Launch:
        x, y = zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype)
        padding, mask, head_mask, rng, p = of_feature()
        if backward:
            plan = softmax_backward.plan_backward(x, y, torch.zeros_like(x), None, scale, causal, head_mask, rng, p)
            kernel: Any = softmax_backward._softmax_backward_kernel
        else:
            probs = torch.zeros_like(x) if dropout else None
            plan = softmax.plan_launch(x, y, probs, scale, causal, padding, mask, head_mask, rng, p)
            kernel = softmax._softmax_kernel
        return Launch(kernel, plan[0], {**plan[1], **plan[2]})

    def cuda() -> CudaCall:
        x = zeros(*shape, dtype=dtype)
        padding, mask, head_mask, rng, p = of_feature()
        if backward:
            arguments: tuple[Any, ...] = (x, torch.zeros_like(x), scale, head_mask, rng, p, CAUSAL * causal)
            return CudaCall("causal_softmax_backward", arguments, "softmax_backward_kernel")
        arguments = (x, scale, padding, mask, head_mask, rng, p, CAUSAL * causal)
        return CudaCall("causal_softmax", arguments, "softmax_kernel")

    elements = batch * heads * q_len * k_len
    visible = sum(q + k_len - q_len + 1 for q in range(q_len)) if causal else q_len * k_len
    minimum = batch * heads * visible * dtype.itemsize * (2 if backward else 1) + elements * dtype.itemsize
    minimum += batch * k_len if feature == "padding mask" else 0
    minimum += visible * dtype.itemsize if feature == "added mask" else 0
    minimum += elements * dtype.itemsize if dropout and not backward else 0
    configuration = f"scores {batch} x {heads} x {q_len} x {k_len}" + (f", {feature}" if feature else "")
    # A padding mask has a byte for each of the 8 elements of an access.
    width = 8 if feature == "padding mask" else 16
    kernel_name = "softmax backward" if backward else "softmax forward"
    limit = 20 if k_len == q_len == 2048 and not feature and not backward else None
    return Case(kernel_name, configuration, dtype, elements, minimum, triton, cuda, width, limit)


# ------------------------------------------------------------------------------------------------------------- varlen

BATCH, SEQLEN, KEPT = 4, 512, 384  # sequences with padding on the right of a quarter of their length


def padding_indices() -> tuple[Tensor, Tensor]:
    """Of tokens in the batch, int64, and of the batch among the tokens, int32, -1 for padding."""
    mask = torch.arange(SEQLEN).expand(BATCH, -1) < KEPT
    inverse = torch.where(mask, mask.flatten().cumsum(0).view_as(mask) - 1, -1).int()
    return mask.flatten().nonzero().flatten(), inverse


def gather_case(kind: str, dtype: torch.dtype, tensors: int, features: int) -> Case:
    """``kind``: unpad of slices of one packed projection, or pad of as many tensors."""

    def inputs() -> list[Tensor]:
        if kind == "unpad":
            return list(zeros(BATCH, SEQLEN, tensors * features, dtype=dtype).chunk(tensors, -1))
        return [zeros(BATCH * KEPT, features, dtype=dtype) for _ in range(tensors)]

    def triton() -> Launch:
        given, (indices, inverse) = inputs(), padding_indices()
        rows, lead = (indices, 2) if kind == "unpad" else (inverse, 1)
        outputs = tuple(zeros(*rows.shape, features, dtype=dtype) for _ in given)
        grid, arguments, constants = varlen.plan_launch(tuple(given), outputs, rows, lead)
        return Launch(varlen._gather_kernel, grid, {**arguments, **constants})

    def cuda() -> CudaCall:
        indices, inverse = padding_indices()
        rows = (indices, inverse) if kind == "unpad" else (inverse, indices)
        return CudaCall("gather_rows", (inputs(), *rows), "gather_kernel")

    tokens, all_rows = BATCH * KEPT, BATCH * SEQLEN
    written, index_bytes = (tokens, tokens * 8) if kind == "unpad" else (all_rows, all_rows * 4)
    size = tensors * features * dtype.itemsize
    configuration = f"{kind}, {tensors} x {features} features, {BATCH} x {SEQLEN} tokens, {KEPT} kept"
    minimum = (tokens + written) * size + index_bytes
    return Case("varlen gather", configuration, dtype, written * tensors * features, minimum, triton, cuda)


def metadata_case(kernel: str) -> Case:
    """``kernel``: count, or metadata, which reads the counts."""
    batch, seqlen = 8, 2048
    elements = batch * seqlen

    def triton() -> Launch:
        mask = torch.ones(batch, seqlen, dtype=torch.bool)
        _, programs, counting, placing = varlen.plan_metadata(mask, elements)
        counting["counts_ptr"].copy_(torch.tensor([seqlen] * batch + [0] * batch))
        constants = {"BLOCK": varlen_autograd._BLOCK, "num_warps": varlen.NUM_WARPS}
        if kernel == "count":
            return Launch(varlen._count_kernel, (programs,), {**counting, **constants})
        return Launch(varlen._metadata_kernel, (programs,), {**placing, **constants})

    def cuda() -> CudaCall:
        mask = torch.ones(batch, seqlen, dtype=torch.bool)
        name = "count_kernel" if kernel == "count" else "place_kernel"
        return CudaCall("varlen_metadata", (mask, elements, seqlen), name, own_memory=True)

    minimum = elements + (8 * batch if kernel == "count" else 8 * batch + elements * (4 + 8) + 4 * (batch + 1) + 3 * 8)
    name = f"varlen {kernel}"
    return Case(name, f"{batch} x {seqlen} tokens, none padding", torch.bool, elements, minimum, triton, cuda, width=1)


def all_cases() -> Iterator[Case]:
    """Every case, in the order of the report."""
    yield rotary_case("Pythia-1.4B", PYTHIA)
    yield rotary_case("Pythia-1.4B", PYTHIA, kind="backward")
    yield rotary_case("Pythia-1.4B", PYTHIA, kind="in place")
    yield rotary_case("Pythia-1.4B", PYTHIA, kind="append")
    # Half of 24 features are 24 bytes, which accesses of 16 do not divide.
    yield rotary_case("GPT-NeoX-20B", NEOX, width=8)
    yield rotary_case("GPT-NeoX-20B", NEOX, kind="backward", width=8)
    yield rotary_case("GPT-J-6B", GPTJ)
    yield rotary_case("full rotary, halves", FULL_HALF)
    yield rotary_case("full rotary, halves", FULL_HALF, kind="backward")
    yield rotary_case("full rotary, halves", FULL_HALF, kind="varlen")
    yield rotary_case("full rotary, halves", FULL_HALF, F32)
    yield rotary_case("full rotary, interleaved", FULL_INTERLEAVED)
    for backward in (False, True):
        yield softmax_case((1, 1, 2048), 2048, backward=backward)
        yield softmax_case((1, 16, 128), 128, backward=backward)
        yield softmax_case((1, 8, 512), 512, backward=backward)
        yield softmax_case((1, 1, 512), 8192, backward=backward)
        yield softmax_case((1, 1, 512), 16384, backward=backward)
        for feature in ("not causal", *(() if backward else ("padding mask", "added mask")), "dropout and head mask"):
            yield softmax_case((1, 1, 2048), 2048, backward=backward, feature=feature)
        yield softmax_case((1, 1, 2048), 2048, F32, backward=backward)
    yield softmax_case((16, 16, 1), 2048)  # decoding
    yield gather_case("unpad", BF16, 3, 768)
    yield gather_case("pad", F32, 1, 768)
    yield metadata_case("count")
    yield metadata_case("metadata")
