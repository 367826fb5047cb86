"""The Triton kernels seen as a backend: every GPU that Triton knows, without a compiler at install time."""

from __future__ import annotations

import torch

from neox_kernels.kernels.rotary_autograd import apply_rotary, apply_rotary_kv_append, apply_rotary_qk
from neox_kernels.kernels.softmax_autograd import causal_softmax

__all__ = ["DTYPES", "apply_rotary", "apply_rotary_kv_append", "apply_rotary_qk", "causal_softmax", "unavailable"]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device, or None."""
    if device_type != "cuda":
        return "triton serves GPUs only"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA and without ROCm"
    return None
