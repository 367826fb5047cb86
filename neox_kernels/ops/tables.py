"""cos and sin of every position, and the ways to stretch them over longer sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What each scaling type reads from its mapping: required keys, then optional ones.
_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor", "original_max_position_embeddings"}), frozenset()),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
}


def check_scaling(scaling: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The type and the parameters of a scaling, or ValueError naming what is wrong with it."""
    parameters = dict(scaling or {})
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)  # configurations of old carry both names
    if scaling and kind == "default" and "rope_type" not in scaling and "type" not in scaling:
        raise ValueError(f"scaling must name its rope_type, one of {', '.join(_KEYS)}: {dict(scaling)!r}")
    if kind not in _KEYS:
        raise ValueError(f"scaling['rope_type'] must be one of {', '.join(_KEYS)}, not {kind!r}")
    required, optional = _KEYS[kind]
    missing, unknown = required - parameters.keys(), parameters.keys() - required - optional
    if missing or unknown:
        raise ValueError(
            f"scaling of type {kind!r} must have {', '.join(sorted(required)) or 'nothing'} and may have "
            f"{', '.join(sorted(optional)) or 'nothing more'}, not {', '.join(sorted(parameters)) or 'nothing'}"
        )
    return kind, parameters


def _yarn(frequencies: Tensor, rotary_dim: int, base: float, p: dict[str, Any]) -> tuple[Tensor, float]:
    """Fast features keep their frequency, slow ones are stretched, with a ramp between (YaRN, arXiv:2309.00071)."""
    factor, original = float(p["factor"]), p["original_max_position_embeddings"]

    def feature_of(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = feature_of(p.get("beta_fast") or 32), feature_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu") - low) / ((high - low) or 0.001)
    ramp = ramp.clamp(0, 1)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = p.get("attention_factor")
    if attention is None:
        mscale, mscale_all = p.get("mscale"), p.get("mscale_all_dim")
        attention = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(attention)


def _llama3(frequencies: Tensor, p: dict[str, Any]) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended (as in Llama 3.1)."""
    original, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    stretched: Tensor = (1 - blend) * frequencies / p["factor"] + blend * frequencies
    return stretched


def rotary_tables(
    rotary_dim: int,
    max_position: int,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of positions 0 to ``max_position - 1``, in float64, and round them to float32.

    Args:
        rotary_dim: features that are rotated, even.
        max_position: number of positions.
        base: the slowest feature turns once in about ``2 * pi * base`` positions.
        scaling: None, or a mapping with ``rope_type`` and the parameters of that type, by the names that transformers'
            configurations use: "linear" (factor), "dynamic" (factor, original_max_position_embeddings: NTK scaling as
            soon as ``max_position`` exceeds the original), "yarn" (factor, original_max_position_embeddings, and
            optionally attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate), "llama3" (factor,
            low_freq_factor, high_freq_factor, original_max_position_embeddings).
        device: where the tables go; the default device by default.

    Returns:
        cos, sin: (max_position, rotary_dim / 2), float32.

    Raises:
        ValueError: an odd or negative ``rotary_dim``, a negative ``max_position``, a base at or below 1, or a scaling
            of unknown type or parameters.

    Source: RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071.
    """
    if rotary_dim < 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and not negative, not {rotary_dim}")
    if max_position < 0:
        raise ValueError(f"max_position must not be negative, not {max_position}")
    if not base > 1:
        raise ValueError(f"base must be above 1, not {base}")
    kind, parameters = check_scaling(scaling)
    attention = 1.0
    if kind == "dynamic":
        original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
        stretch = factor * max(max_position, original) / original - (factor - 1)
        if rotary_dim > 2:
            base = base * stretch ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / max(rotary_dim, 1)
    frequencies = base**-exponents
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    elif kind == "yarn":
        frequencies, attention = _yarn(frequencies, rotary_dim, base, parameters)
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    angles = torch.arange(max_position, dtype=torch.float64, device="cpu")[:, None] * frequencies
    target = torch.get_default_device() if device is None else device
    return (angles.cos() * attention).float().to(target), (angles.sin() * attention).float().to(target)
