"""Keys and values of the tokens that a model has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neox_kernels import apply_rotary_kv_append, apply_rotary_qk


class KVCache:
    """Keys and values of every layer, (batch, length, nheads, head_dim) each, as one buffer a layer.

    A cache belongs to one batch: all its sequences have the same length, padding included; without a token it is as
    good as new, for any batch. Rotation and writing are one launch. What was counted is written over only behind a
    ``crop`` or ``reset``, and only in the cache's own buffers; ``copy.deepcopy`` makes a second cache to go on from.

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
        self._own: list[bool] = []  # of each layer: whether nobody else holds its buffers, so that they may be written

    def __repr__(self) -> str:
        return f"KVCache(layers={self.num_layers}, length={self.length}, max_length={self.max_length})"

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        made = KVCache(self.max_length)
        made.length = self.length
        for layer in range(self.num_layers):
            made._put(layer, self.keys(layer).clone(), self.values(layer).clone(), own=True)
        return made

    def get_seq_length(self) -> int:
        return self.length

    @property
    def num_layers(self) -> int:
        """Layers; 0 before the first token."""
        return len(self._keys) if self.length else 0

    @property
    def batch(self) -> int | None:
        """Sequences; None before the first token."""
        return self._keys[0].shape[0] if self.num_layers else None

    def keys(self, layer: int) -> Tensor:
        """(batch, length, nheads, head_dim), a view."""
        return self._keys[layer][:, : self.length]

    def values(self, layer: int) -> Tensor:
        return self._values[layer][:, : self.length]

    def require_room(self, batch: int, seqlen: int, num_layers: int) -> None:
        """Raise ValueError unless ``seqlen`` more tokens of ``batch`` sequences fit; nothing is changed."""
        if self.num_layers not in (0, num_layers):
            raise ValueError(f"past_key_values holds {self.num_layers} layers, and the model has {num_layers}")
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
        held = self._held(layer, k)
        with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *held))
        if with_grad or not (held or self.max_length is not None):
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
            if held:  # autograd's graph holds on to what is there: nothing may be written
                k, v = torch.cat((held[0], k), dim=1), torch.cat((held[1], v), dim=1)
            self._put(layer, k, v, own=False)
            return q, k, v
        if not self._may_write(layer, k, total):
            self._grow(layer, k, total)
        keys, values = self._keys[layer], self._values[layer]
        q = apply_rotary_kv_append(
            q, k, v, cos, sin, keys, values, seqlens, interleaved=interleaved, position_ids=position_ids
        )
        return q, keys[:, :total], values[:, :total]

    def advance(self, seqlen: int) -> None:
        """Count ``seqlen`` tokens that every layer has appended."""
        self.length += seqlen

    def _held(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor] | tuple[()]:
        """Keys and values of the tokens that the layer has, which go together with those that come."""
        if not self.length:
            return ()
        keys, values = self.keys(layer), self.values(layer)
        if keys.shape[2:] != k.shape[2:]:
            raise ValueError(
                f"past_key_values holds (nheads, head_dim) of {tuple(keys.shape[2:])}, and the model has "
                f"{tuple(k.shape[2:])}"
            )
        if keys.dtype != k.dtype or values.dtype != k.dtype:
            raise TypeError(f"past_key_values holds {keys.dtype} and {values.dtype}, and the model computes {k.dtype}")
        if keys.device != k.device or values.device != k.device:
            raise ValueError(
                f"past_key_values holds layer {layer} on {keys.device}, and the model has it on {k.device}"
            )
        return keys, values

    def _may_write(self, layer: int, k: Tensor, total: int) -> bool:
        if layer >= len(self._keys) or not self._own[layer]:
            return False
        keys = self._keys[layer]
        fits = keys.shape[0] == k.shape[0] and keys.shape[1] >= total and keys.shape[2:] == k.shape[2:]
        same = keys.dtype == k.dtype and keys.device == k.device
        return fits and same and (not keys.is_inference() or torch.is_inference_mode_enabled())

    def _put(self, layer: int, k: Tensor, v: Tensor, *, own: bool) -> None:
        self._keys[layer : layer + 1] = [k]
        self._values[layer : layer + 1] = [v]
        self._own[layer : layer + 1] = [own and not (k.requires_grad or v.requires_grad)]

    def _grow(self, layer: int, k: Tensor, total: int) -> None:
        batch, _, nheads, head_dim = k.shape
        have = self._keys[layer].shape[1] if self.length else 0
        room = max(total, 2 * have) if self.max_length is None else self.max_length
        made = k.new_empty(batch, room, nheads, head_dim), k.new_empty(batch, room, nheads, head_dim)
        if have:
            made[0][:, : self.length], made[1][:, : self.length] = self.keys(layer), self.values(layer)
        self._put(layer, *made, own=True)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens only; a negative ``length`` drops as many from the end."""
        if not -self.length <= length <= self.length:
            raise ValueError(f"length must be between {-self.length} and {self.length}, not {length}")
        self.length = length if length >= 0 else self.length + length

    def reset(self) -> None:
        """Forget every token; the buffers of a cache with ``max_length`` stay."""
        self.length = 0

    def reorder(self, index: Tensor, start: int = 0) -> None:
        """Let sequence b be what sequence ``index[b]`` was, for beam search; ``index`` (batch,) of any length.

        Args:
            start: tokens that the sequences which change places have in common. Behind them the cache's own buffers are
                written in place, as long as ``index`` is as long as the batch.
        """
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"index must be one-dimensional and of integers, not {tuple(index.shape)} {index.dtype}")
        in_place = start > 0 and all(self._own[: self.num_layers]) and len(index) == self.batch
        if in_place:
            for x in (x[:, start : self.length] for pair in self._pairs() for x in pair):
                x.copy_(x.index_select(0, index.to(x.device)))
            return
        pairs = [
            (k.index_select(0, index.to(k.device)), v.index_select(0, index.to(v.device))) for k, v in self._pairs()
        ]
        for layer, (k, v) in enumerate(pairs):
            self._put(layer, k, v, own=True)

    def repeat(self, times: int) -> None:
        """Let ``times`` sequences continue each one."""
        if times < 1:
            raise ValueError(f"times must be at least 1, not {times}")
        for layer, pair in enumerate(self._pairs()):
            self._put(layer, *(x.repeat_interleave(times, dim=0) for x in pair), own=True)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._keys, self._values, strict=True))[: self.num_layers]

    def to_tuple(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(key, value) of each layer, (batch, nheads, length, head_dim): the way of older code. They are views, which
        change where the cache goes on after a ``crop`` or ``reset``."""
        pairs = ((self.keys(i), self.values(i)) for i in range(self.num_layers))
        return tuple((k.transpose(1, 2), v.transpose(1, 2)) for k, v in pairs)

    @classmethod
    def from_tuple(cls, past_key_values: Sequence[tuple[Tensor, Tensor]], max_length: int | None = None) -> KVCache:
        """A cache of (key, value) of each layer, (batch, nheads, length, head_dim). Without ``max_length`` uncopied;
        the tensors are never written."""
        cache = cls(max_length)
        cache.length = length = _length_of(past_key_values)
        if max_length is not None and length > max_length:
            raise ValueError(f"max_length must be at least the {length} tokens of past_key_values, not {max_length}")
        for layer, (k, v) in enumerate(past_key_values):
            cache._put(layer, k.transpose(1, 2), v.transpose(1, 2), own=False)
            if max_length is not None and not (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)):
                cache._grow(layer, cache._keys[layer], length)
        return cache


def _length_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Tokens of (key, value) of each layer; raises unless all are of one shape, and tensors."""
    if not isinstance(pairs, tuple | list) or not all(isinstance(pair, tuple | list) for pair in pairs):
        raise TypeError(f"past_key_values must be a KVCache, or (key, value) of each layer, not {_described(pairs)}")
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
            raise TypeError(f"past_key_values must hold (key, value) of each layer, not {_described(pair)}")
    shapes = {tuple(x.shape) for pair in pairs for x in pair}
    if len(shapes) > 1 or any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            "past_key_values must be of one shape in all layers, (batch, nheads, length, head_dim), not of "
            f"{', '.join(map(str, sorted(shapes)))}"
        )
    return shapes.pop()[2] if shapes else 0


def _described(x: object) -> str:
    inside = f" of {', '.join(dict.fromkeys(type(item).__name__ for item in x))}" if isinstance(x, tuple | list) else ""
    return f"a {type(x).__name__}{inside}"
