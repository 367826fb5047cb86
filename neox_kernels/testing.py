"""Shapes, inputs and the error budget: what tests and benchmarks share."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class RotaryShape:
    """The attention of a known model, as far as rotary sees it."""

    model: str
    nheads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool


ROTARY_SHAPES = (
    RotaryShape("pythia-160m", 12, 64, 16, False),
    RotaryShape("pythia-1.4b", 16, 128, 32, False),
    RotaryShape("gpt-neox-20b", 64, 96, 24, False),
    RotaryShape("gpt-j-6b", 16, 256, 64, True),
)


def packed_qkv(
    batch: int,
    seqlen: int,
    nheads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (batch, seqlen, nheads, head_dim) each, as slices of one projection, as GPT-NeoX lays them out."""
    generator = torch.Generator(device).manual_seed(seed)
    qkv = torch.randn(batch, seqlen, nheads, 3 * head_dim, generator=generator, device=device).to(dtype)
    q, k, v = qkv.chunk(3, dim=-1)
    return q, k, v


def to_float64(value: T) -> T:
    """The same arguments with every floating tensor in float64: what the oracle takes."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value  # type: ignore[return-value]
    if isinstance(value, tuple | list):
        return type(value)(to_float64(item) for item in value)
    if isinstance(value, dict):
        return {name: to_float64(item) for name, item in value.items()}  # type: ignore[return-value]
    return value


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest difference, element by element; infinite where one is NaN or infinite and the other is not the same."""
    b = oracle.detach().double()
    a = actual.detach().to(b.device).double()
    if a.shape != b.shape:
        raise AssertionError(f"shape {tuple(a.shape)} against {tuple(b.shape)}")
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a - b).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def error_budget(same_dtype: Tensor, oracle: Tensor) -> float:
    """Twice the error of plain PyTorch in the same dtype, and a floor of one rounding of the largest value."""
    finite = oracle.detach().double()[oracle.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return 2 * max_error(same_dtype, oracle) + torch.finfo(same_dtype.dtype).eps * largest / 2


def assert_within_budget(actual: Tensor, same_dtype: Tensor, oracle: Tensor, what: str = "result") -> None:
    """The numbers policy: ``|actual - oracle| <= 2 * |same_dtype - oracle| + floor``, element-wise maximum.

    Args:
        actual: what the kernel gave.
        same_dtype: what plain PyTorch gives for the same inputs in the same dtype.
        oracle: what the reference gives for the inputs in float64.
    """
    if actual.dtype != same_dtype.dtype:
        raise AssertionError(f"{what} is {actual.dtype}, not {same_dtype.dtype}")
    error, budget = max_error(actual, oracle), error_budget(same_dtype, oracle)
    if not error <= budget:
        raise AssertionError(f"{what}: error {error:.3g} against the float64 oracle, above the budget of {budget:.3g}")


def eager_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary the way model code writes it, every step rounded to the dtype of ``x``: the yardstick of the budget.

    Args:
        x: (batch, seqlen, nheads, head_dim) or (total, nheads, head_dim).
        cos, sin: gathered by position, (batch, seqlen, rotary_dim / 2) or (total, rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        c, s = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        c, s = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        a, b = turned.chunk(2, dim=-1)
        other = torch.cat((-b, a), dim=-1)
    c, s = c[..., None, :].to(x.dtype), s[..., None, :].to(x.dtype)
    return torch.cat((turned * c + other * s, passed), dim=-1)


def eager_causal_softmax(
    scores: Tensor,
    scale: float = 1.0,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
) -> Tensor:
    """Attention probabilities the way model code computes them, every step rounded to the dtype of ``scores``: the
    yardstick of the budget. The arguments are those of :func:`neox_kernels.causal_softmax`."""
    logits = scores * scale
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits, attn_mask = logits + attn_mask.to(scores.dtype), None
    q_len, k_len = scores.shape[-2:]
    lower = torch.ones(q_len, k_len, dtype=torch.bool, device=scores.device).tril(k_len - q_len) if causal else None
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None]
    for seen in (lower, padding, attn_mask):
        if seen is not None:
            logits = logits.masked_fill(~seen, -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if head_mask is not None:
        probs = probs * (head_mask[:, None, None] if head_mask.dim() == 1 else head_mask).to(scores.dtype)
    return probs


def poison_fresh_memory() -> None:
    """From now on malloc fills what it hands out with 0xFE bytes, huge numbers or NaN in every dtype, so that what a
    kernel does not write shows. Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_perturb = -6
        mallopt(m_perturb, 0x01)  # fresh memory gets the complement
