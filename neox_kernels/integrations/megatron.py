"""The fused softmax names of Megatron-LM and gpt-neox, served by :func:`neox_kernels.causal_softmax`.

A user of gpt-neox changes one import, and loses the limits: any length, any number of heads, any dtype, with a GPU or
without. As there, a mask is True where a key is hidden. A query that sees no key gets zeros.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neox_kernels import causal_softmax


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
