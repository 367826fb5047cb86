"""The fused softmax and the fused rotary embedding of Megatron-LM and gpt-neox, by their names.

A user of gpt-neox changes one import each, for ``megatron.model.fused_softmax`` and ``megatron.model.fused_rope``, and
loses the limits: any length, any number of heads, any dtype, with a GPU or without.

The softmax names are served by :func:`neox_kernels.causal_softmax`. As there, a mask is True where a key is hidden. A
query that sees no key gets zeros.

The rotary names are served by :func:`neox_kernels.apply_rotary`: pairs of feature i with i + rotary_dim / 2, features
past ``rotary_dim`` pass through. What differs from gpt-neox and Apex:

- The tables hold every angle twice, and only their first half is used. Halves that differ raise on a CPU; on a GPU,
  where looking costs a sync, they are taken to be alike.
- Tables that require a gradient are refused; there they silently get none.
- Tokens past the end of ``cu_seqlens`` pass through; there they are left unwritten. A sequence longer than ``freqs``
  raises IndexError on a CPU and gives NaN on a GPU; there memory outside the table is read.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neox_kernels import apply_rotary, causal_softmax


class ScaledUpperTriangMaskedSoftmax:
    """Scale, causal mask, softmax."""

    @staticmethod
    def apply(inputs: Tensor, scale: float) -> Tensor:
        """Probabilities of scores of (batch * nheads, q_len, k_len): shape and dtype of ``inputs``."""
        return causal_softmax(inputs[None], scale=float(scale))[0]


class ScaledMaskedSoftmax:
    """Scale, mask, softmax."""

    @staticmethod
    def apply(inputs: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Probabilities of scores of (batch, nheads, q_len, k_len): shape and dtype of ``inputs``.

        ``mask`` broadcasts to the scores, bool or an integer type; nonzero hides.
        """
        visible = None if mask is None else mask == 0
        return causal_softmax(inputs, scale=float(scale), causal=False, attn_mask=visible)


class ScaledSoftmax:
    """Scale, softmax."""

    @staticmethod
    def apply(inputs: Tensor, scale: float) -> Tensor:
        """Probabilities of scores of (batch, nheads, q_len, k_len): shape and dtype of ``inputs``."""
        return causal_softmax(inputs, scale=float(scale), causal=False)


class SoftmaxFusionTypes(enum.Enum):
    """What :class:`FusedScaleMaskSoftmax` fuses."""

    upper_triang = 1  # scale, causal mask and softmax
    general = 2  # scale, the given mask and softmax
    none = 3  # softmax alone: scale and mask function come before it


class FusedScaleMaskSoftmax(nn.Module):
    """Scale, mask and softmax, as gpt-neox calls it.

    Args:
        input_in_fp16, input_in_bf16: the result is in that dtype; with neither, in the dtype of the scores.
        fusion_type: a :class:`SoftmaxFusionTypes`.
        mask_func: ``mask_func(scores, mask)``, called where ``fusion_type`` is none, and there alone.
        softmax_in_fp32: accepted; the arithmetic is in float32 either way.
        scale: what scores are multiplied with, or None for 1; goes with ``softmax_in_fp32``.

    Raises:
        ValueError: an unknown fusion type, both input dtypes, or a scale without ``softmax_in_fp32``.
    """

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        fusion_type: SoftmaxFusionTypes,
        mask_func: Callable[[Tensor, Tensor], Tensor] | None,
        softmax_in_fp32: bool,
        scale: float | None,
    ) -> None:
        super().__init__()
        # gpt-neox has an enumeration of its own with the same names.
        name = str(getattr(fusion_type, "name", None))
        if name not in SoftmaxFusionTypes.__members__:
            raise ValueError(f"fusion_type must be a SoftmaxFusionTypes, not {fusion_type!r}")
        if input_in_fp16 and input_in_bf16:
            raise ValueError("input_in_bf16 must be False where input_in_fp16 is True")
        if scale is not None and not softmax_in_fp32:
            raise ValueError("softmax_in_fp32 must be True where scale is given")
        if name == "none" and mask_func is None:
            raise ValueError("mask_func must be given where fusion_type is none")
        self.fusion_type = SoftmaxFusionTypes[name]
        self.dtype = torch.float16 if input_in_fp16 else torch.bfloat16 if input_in_bf16 else None
        self.mask_func = mask_func
        self.softmax_in_fp32 = softmax_in_fp32
        self.scale = scale

    def extra_repr(self) -> str:
        return f"{self.fusion_type.name}, scale={self.scale}, dtype={self.dtype}"

    def forward(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """Probabilities of scores of (batch, nheads, q_len, k_len).

        With upper_triang, ``mask`` stands for the causal one and is not read; None means, with every fusion type, that
        all keys are visible.
        """
        scale = 1.0 if self.scale is None else float(self.scale)
        if mask is None or self.fusion_type is SoftmaxFusionTypes.upper_triang:
            return causal_softmax(input, scale=scale, causal=mask is not None, dtype=self.dtype)
        if self.fusion_type is SoftmaxFusionTypes.general:
            return causal_softmax(input, scale=scale, causal=False, attn_mask=mask == 0, dtype=self.dtype)
        assert self.mask_func is not None
        scores = input.float() if self.dtype is not None and self.softmax_in_fp32 else input
        return causal_softmax(self.mask_func(scores * scale, mask), causal=False, dtype=self.dtype)


def fused_apply_rotary_pos_emb(t: Tensor, freqs: Tensor, transpose_output_memory: bool = False) -> Tensor:
    """Rotate by angles, whose cosines and sines are taken in float32.

    Args:
        t: (seqlen, batch, nheads, head_dim), any strides.
        freqs: (seqlen, 1, 1, rotary_dim), float32 or float64: the angles of each position, twice side by side.
        transpose_output_memory: the result lies in memory as (batch, seqlen, nheads, head_dim), so that its
            ``transpose(0, 1)`` is contiguous.

    Returns:
        Shape and dtype of ``t``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together; see the module.
    """
    _require_activations(t, "seqlen, batch, nheads, head_dim")
    cos, sin = _cos_sin(freqs, t, t.shape[0])
    return _rotate(t, cos, sin, transpose_output_memory)


def fused_apply_rotary_pos_emb_cached(
    t: Tensor, cos_: Tensor, sin_: Tensor, transpose_output_memory: bool = False
) -> Tensor:
    """Rotate by cosines and sines.

    Args:
        t: (seqlen, batch, nheads, head_dim), any strides.
        cos_, sin_: (seqlen, 1, 1, rotary_dim), float32 or the dtype of ``t``: of each position, twice side by side.
        transpose_output_memory: see :func:`fused_apply_rotary_pos_emb`.

    Returns:
        Shape and dtype of ``t``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together; see the module.
    """
    _require_activations(t, "seqlen, batch, nheads, head_dim")
    cos, sin = (_first_half(name, table, t, t.shape[0]) for name, table in (("cos_", cos_), ("sin_", sin_)))
    if cos.dtype not in (torch.float32, t.dtype):
        raise TypeError(f"cos_ must be float32 or {t.dtype} like t, not {cos.dtype}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"sin_ must be {cos.dtype} like cos_, not {sin.dtype}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin_ must have the shape of cos_, {tuple(cos_.shape)}, not {tuple(sin_.shape)}")
    return _rotate(t, cos, sin, transpose_output_memory)


def fused_apply_rotary_pos_emb_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor) -> Tensor:
    """Rotate sequences that lie one behind the other, each from position 0 on. Apex's; gpt-neox has none.

    Args:
        t: (total, nheads, head_dim), any strides.
        cu_seqlens: (batch + 1,), int32 or int64: where each sequence begins, and where the last one ends.
        freqs: (longest sequence or more, 1, 1, rotary_dim); see :func:`fused_apply_rotary_pos_emb`.

    Returns:
        Shape and dtype of ``t``.

    Raises:
        ValueError, TypeError, IndexError: shapes, dtypes or devices that do not go together; see the module.
    """
    _require_activations(t, "total, nheads, head_dim")
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, not {type(cu_seqlens).__name__}")
    cos, sin = _cos_sin(freqs, t, None)
    return apply_rotary(t, cos, sin, cu_seqlens=cu_seqlens)


class FusedRoPEFunc:
    """:func:`fused_apply_rotary_pos_emb`, by the name that gpt-neox imports."""

    apply = staticmethod(fused_apply_rotary_pos_emb)


class FusedRoPECachedFunc:
    """:func:`fused_apply_rotary_pos_emb_cached`, by the name of gpt-neox's autograd function."""

    apply = staticmethod(fused_apply_rotary_pos_emb_cached)


def _rotate(t: Tensor, cos: Tensor, sin: Tensor, transpose_output_memory: bool) -> Tensor:
    """Rotate t of (seqlen, batch, ...); results of the ops are contiguous, so the view decides how theirs lies."""
    if transpose_output_memory or t.shape[1] == 1:
        return apply_rotary(t.transpose(0, 1), cos, sin).transpose(0, 1)
    # To the op each position is a sequence of its own, of `batch` tokens that share a row of the tables.
    shape = (-1, t.shape[1], -1)
    return apply_rotary(t, cos[:, None].expand(shape), sin[:, None].expand(shape))


def _cos_sin(freqs: Tensor, t: Tensor, seqlen: int | None) -> tuple[Tensor, Tensor]:
    angles = _first_half("freqs", freqs, t, seqlen)
    if angles.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"freqs must be float32 or float64, not {angles.dtype}: fewer bits lose far positions")
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    angles = angles.to(torch.promote_types(angles.dtype, dtype))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _require_activations(t: object, axes: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, not {type(t).__name__}")
    if t.dim() != axes.count(",") + 1:
        raise ValueError(f"t must be ({axes}), not of the shape {tuple(t.shape)}")
    if t.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"t must be float32, bfloat16, float16 or float64, not {t.dtype}")


def _first_half(name: str, table: object, t: Tensor, seqlen: int | None) -> Tensor:
    """The first half of a table of (seqlen, 1, 1, rotary_dim), (seqlen, rotary_dim / 2); None for any length."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(table).__name__}")
    if table.dim() != 4 or tuple(table.shape[1:3]) != (1, 1) or table.shape[3] % 2:
        raise ValueError(f"{name} must be (seqlen, 1, 1, rotary_dim), of even width, not {tuple(table.shape)}")
    # With more rows one could not tell which of them are meant: behind a cache the first are the wrong ones.
    if seqlen is not None and table.shape[0] != seqlen:
        raise ValueError(f"{name} must have a row for each of the {seqlen} positions of t, not {table.shape[0]} rows")
    if table.shape[3] > t.shape[-1]:
        raise ValueError(f"{name} must be at most as wide as the head_dim of t, {t.shape[-1]}, not {table.shape[3]}")
    if table.device != t.device:
        raise ValueError(f"{name} must be on {t.device} like t, not on {table.device}")
    if torch.is_grad_enabled() and table.requires_grad:
        raise ValueError(f"{name} must not require a gradient: tables are constants here")
    half = table.shape[3] // 2
    first, second = table[:, 0, 0, :half], table[:, 0, 0, half:]
    if table.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.equal(first, second):
        raise ValueError(f"{name} must be the same in its first and its second half")
    return first
