"""Keys and values of the tokens that a model has seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neox_kernels import apply_rotary_kv_append, apply_rotary_qk


class KVCache:
    """Keys and values of every layer, (batch, length, nheads, head_dim) each, as one buffer a layer.

    A cache belongs to one batch: all its sequences have the same length, padding included. Rotation and writing are one
    launch.

    Args:
        max_length: tokens that each layer's buffer holds, allocated when the layer first comes; more are refused before
            anything is written. None: buffers grow by doubling, and the first tokens are kept as they come, uncopied.
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 0:
            raise ValueError(f"max_length must not be negative, not {max_length}")
        self.max_length = max_length
        self.length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __repr__(self) -> str:
        return f"KVCache(layers={len(self._keys)}, length={self.length}, max_length={self.max_length})"

    def get_seq_length(self) -> int:
        return self.length

    @property
    def num_layers(self) -> int:
        return len(self._keys)

    @property
    def batch(self) -> int | None:
        """Sequences; None before the first token."""
        return self._keys[0].shape[0] if self._keys else None

    def keys(self, layer: int) -> Tensor:
        """(batch, length, nheads, head_dim), a view."""
        return self._keys[layer][:, : self.length]

    def values(self, layer: int) -> Tensor:
        return self._values[layer][:, : self.length]

    def require_room(self, batch: int, seqlen: int) -> None:
        """Raise ValueError unless ``seqlen`` more tokens of ``batch`` sequences fit; nothing is changed."""
        if self.batch is not None and self.batch != batch:
            raise ValueError(f"past_key_values holds {self.batch} sequences, and the input has {batch}")
        if self.max_length is not None and self.length + seqlen > self.max_length:
            raise ValueError(
                f"past_key_values holds {self.length} of at most max_length={self.max_length} tokens: "
                f"{seqlen} more do not fit"
            )

    def append(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        seqlens: Tensor,
        *,
        interleaved: bool,
        position_ids: Tensor | None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate q and k, and put k and v behind what the layer has. The length changes by :meth:`advance`.

        Args:
            q, k, v: (batch, seqlen, nheads, head_dim), of which q and k are not rotated yet.
            cos, sin: see :func:`neox_kernels.apply_rotary`.
            seqlens: (batch,), the length of this cache.
            position_ids: of the new tokens; default: behind what the cache has.
            inplace: q and k may be overwritten.

        Returns:
            q rotated, and all keys and values, the new ones included, (batch, length + seqlen, nheads, head_dim).
        """
        total = self.length + k.shape[1]
        with_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if with_grad or (layer == len(self._keys) and self.max_length is None):
            offset = None if position_ids is not None else self.length
            q, k = apply_rotary_qk(
                q,
                k,
                cos,
                sin,
                interleaved=interleaved,
                position_ids=position_ids,
                seqlen_offsets=offset,
                inplace=inplace and not with_grad,
            )
            if layer < len(self._keys):  # autograd's graph holds on to what is there: nothing may be written
                k, v = torch.cat((self.keys(layer), k), dim=1), torch.cat((self.values(layer), v), dim=1)
            self._put(layer, k, v)
            return q, k, v
        if layer == len(self._keys) or self._keys[layer].shape[1] < total:
            self._grow(layer, k, total)
        keys, values = self._keys[layer], self._values[layer]
        q = apply_rotary_kv_append(
            q, k, v, cos, sin, keys, values, seqlens, interleaved=interleaved, position_ids=position_ids
        )
        return q, keys[:, :total], values[:, :total]

    def advance(self, seqlen: int) -> None:
        """Count ``seqlen`` tokens that every layer has appended."""
        self.length += seqlen

    def _put(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._keys[layer : layer + 1] = [k]
        self._values[layer : layer + 1] = [v]

    def _grow(self, layer: int, k: Tensor, total: int) -> None:
        batch, _, nheads, head_dim = k.shape
        have = self._keys[layer].shape[1] if layer < len(self._keys) else 0
        room = max(total, 2 * have) if self.max_length is None else self.max_length
        made = k.new_empty(batch, room, nheads, head_dim), k.new_empty(batch, room, nheads, head_dim)
        if have:
            made[0][:, : self.length], made[1][:, : self.length] = self.keys(layer), self.values(layer)
        self._put(layer, *made)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens only; a negative ``length`` drops as many from the end."""
        if not -self.length <= length <= self.length:
            raise ValueError(f"length must be between {-self.length} and {self.length}, not {length}")
        self.length = length if length >= 0 else self.length + length

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.length = 0

    def reorder(self, index: Tensor) -> None:
        """Let sequence b be what sequence ``index[b]`` was, for beam search; ``index`` (batch,) of any length."""
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"index must be one-dimensional and of integers, not {tuple(index.shape)} {index.dtype}")
        self._keys = [x.index_select(0, index.to(x.device)) for x in self._keys]
        self._values = [x.index_select(0, index.to(x.device)) for x in self._values]

    def repeat(self, times: int) -> None:
        """Let ``times`` sequences continue each one."""
        if times < 1:
            raise ValueError(f"times must be at least 1, not {times}")
        self._keys = [x.repeat_interleave(times, dim=0) for x in self._keys]
        self._values = [x.repeat_interleave(times, dim=0) for x in self._values]

    def to_tuple(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(key, value) of each layer, (batch, nheads, length, head_dim), views: the way of older code."""
        return tuple((self.keys(i).transpose(1, 2), self.values(i).transpose(1, 2)) for i in range(len(self._keys)))

    @classmethod
    def from_tuple(cls, pairs: Sequence[tuple[Tensor, Tensor]], max_length: int | None = None) -> KVCache:
        """A cache of (key, value) of each layer, (batch, nheads, length, head_dim). Without ``max_length`` uncopied."""
        lengths = {k.shape[2] for k, _ in pairs} | {v.shape[2] for _, v in pairs}
        if len(lengths) > 1:
            raise ValueError(f"pairs must be of one length, not of {sorted(lengths)}")
        cache = cls(max_length)
        length = lengths.pop() if lengths else 0
        if max_length is not None and length > max_length:
            raise ValueError(f"max_length must be at least the {length} tokens of pairs, not {max_length}")
        cache.length = length
        for layer, (k, v) in enumerate(pairs):
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            if max_length is None:
                cache._put(layer, k, v)
                continue
            cache._grow(layer, k, length)
            cache.keys(layer).copy_(k)
            cache.values(layer).copy_(v)
        return cache
