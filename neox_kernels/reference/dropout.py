"""Which elements dropout keeps: a counter-based generator, so that every backend, device and pass gives the same."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32-bit product."""
    product = a * b  # wraps beyond 63 bits, which the shift and the mask undo
    return (product >> 32) & _MASK32, product & _MASK32


def _philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four 32-bit words (in int64) of Philox 4x32-10 (Salmon et al., Parallel Random Numbers, SC 2011)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high_0, low_0 = _multiply(0xD2511F53, c0)
        high_2, low_2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """Words below it are dropped."""
    return min(int(dropout_p * 2.0**32), _MASK32)


def dropout_keep(rng: Tensor, dropout_p: float, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Which elements of (..., k_len) are kept.

    Element (row, column), rows counted over all leading dimensions, is decided by word ``column % 4`` of the block with
    the counter (column / 4, low and high word of row, low word of the offset) under the seed as the key.

    Args:
        rng: (2,) int64: seed and offset.
    """
    *rows, k_len = shape
    nrows = 1
    for size in rows:
        nrows *= size
    seed, offset = rng[0], rng[1] & _MASK32
    row = torch.arange(nrows, device=rng.device)[:, None]
    group = torch.arange((k_len + 3) // 4, device=rng.device)[None]
    counter = torch.broadcast_tensors(group, row & _MASK32, row >> 32, offset)
    words = torch.stack(_philox((seed & _MASK32, (seed >> 32) & _MASK32), counter), dim=-1).flatten(1)[:, :k_len]
    return (words >= dropout_threshold(dropout_p)).view(shape)
