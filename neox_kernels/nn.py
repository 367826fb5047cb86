"""Modules around the ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neox_kernels.ops.rotary import Layout, apply_rotary_qk
from neox_kernels.ops.softmax import causal_softmax
from neox_kernels.ops.tables import check_scaling, rotary_tables


class RotaryEmbedding(nn.Module):
    """Rotary embedding that owns its tables.

    The tables are computed at first use on the device of q, in float32 whatever the dtype of the model, and grow when a
    longer sequence comes. They are neither parameters nor buffers: ``.to()``, ``to_empty()``, deep copies, pickles and
    state dicts pass them by.

    Args:
        rotary_dim: features that are rotated, even.
        max_position: positions that the tables hold at first; they grow by doubling.
        base, scaling: see :func:`neox_kernels.rotary_tables`. With "dynamic" scaling, sequences up to the original
            length use the unscaled table, and a longer one the table of just its length.
        interleaved: False for GPT-NeoX's pairing, True for GPT-J's.
    """

    def __init__(
        self,
        rotary_dim: int,
        max_position: int = 2048,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        *,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        kind, parameters = check_scaling(scaling)
        rotary_tables(rotary_dim, 0, base, scaling, device="cpu")  # refuses what forward would refuse
        if max_position < 0:
            raise ValueError(f"max_position must not be negative, not {max_position}")
        self.rotary_dim = rotary_dim
        self.max_position = max_position
        self.base = base
        self.scaling = dict(scaling) if scaling else None
        self.interleaved = interleaved
        self._unscaled_length = parameters["original_max_position_embeddings"] if kind == "dynamic" else None
        self._tables: dict[tuple[torch.device, bool], tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}  # a copy computes its own

    def extra_repr(self) -> str:
        return (
            f"rotary_dim={self.rotary_dim}, max_position={self.max_position}, base={self.base}, "
            f"scaling={self.scaling}, interleaved={self.interleaved}"
        )

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, (at least ``length``, rotary_dim / 2), float32, on ``device``."""
        stretched = self._unscaled_length is not None and length > self._unscaled_length
        found = self._tables.get((device, stretched))
        if found is not None and (found[0].shape[0] == length if stretched else found[0].shape[0] >= length):
            return found
        if stretched:
            size = length
        else:
            size = max(self.max_position, length if found is None else max(length, 2 * found[0].shape[0]))
            if self._unscaled_length is not None:
                size = self._unscaled_length
        with torch.inference_mode(False):  # tables of inference mode could not be used in training later
            made = rotary_tables(self.rotary_dim, size, self.base, self.scaling, device=device)
        self._tables[device, stretched] = made
        return made

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        position_ids: Tensor | None = None,
        seqlen_offsets: int | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        inplace: bool = False,
        layout: Layout = "bshd",
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k; arguments and result as for :func:`neox_kernels.apply_rotary_qk`.

        Where positions come as tensors, ``max_seqlen`` says how far they reach (the largest position plus one). Without
        it they are read, on the CPU; on a GPU, where reading would cost a sync, the tables then keep their length.
        """
        length = self._length(q, position_ids, seqlen_offsets, cu_seqlens, max_seqlen, layout)
        cos, sin = self.tables(length, q.device)
        return apply_rotary_qk(
            q,
            k,
            cos,
            sin,
            interleaved=self.interleaved,
            position_ids=position_ids,
            seqlen_offsets=seqlen_offsets,
            cu_seqlens=cu_seqlens,
            inplace=inplace,
            layout=layout,
        )

    def _length(
        self,
        q: Tensor,
        position_ids: Tensor | None,
        seqlen_offsets: int | Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        layout: Layout,
    ) -> int:
        seqlen = q.shape[2 if layout == "bhsd" else 1] if q.dim() == 4 else q.shape[0]
        if position_ids is None and not isinstance(seqlen_offsets, Tensor):
            longest = max_seqlen if cu_seqlens is not None and max_seqlen is not None else seqlen
            return longest + (seqlen_offsets or 0)
        if max_seqlen is not None:
            return max_seqlen
        values = position_ids if position_ids is not None else seqlen_offsets
        if not isinstance(values, Tensor) or values.device.type != "cpu" or torch.compiler.is_compiling():
            return self.max_position
        largest = int(values.max()) if values.numel() else 0
        return largest + (1 if position_ids is not None else seqlen)


class FusedCausalSoftmax(nn.Module):
    """Causal softmax of attention scores, with dropout while training.

    Args:
        scale, causal, dropout_p, dtype: see :func:`neox_kernels.causal_softmax`.
    """

    def __init__(
        self,
        scale: float = 1.0,
        *,
        causal: bool = True,
        dropout_p: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p must be between 0 and 1, not {dropout_p}")
        self.scale = scale
        self.causal = causal
        self.dropout_p = dropout_p
        self.dtype = dtype

    def extra_repr(self) -> str:
        return f"scale={self.scale}, causal={self.causal}, dropout_p={self.dropout_p}, dtype={self.dtype}"

    def forward(
        self,
        scores: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Probabilities of ``scores``; arguments and result as for :func:`neox_kernels.causal_softmax`."""
        return causal_softmax(
            scores,
            scale=self.scale,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            head_mask=head_mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            inplace=inplace,
            dtype=self.dtype,
        )
