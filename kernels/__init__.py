"""The Triton kernels seen as a backend: every GPU that Triton knows, without a compiler at install time."""

from __future__ import annotations

import torch

from neox_kernels.kernels.rotary_autograd import apply_rotary, apply_rotary_kv_append, apply_rotary_qk
from neox_kernels.kernels.softmax_autograd import causal_softmax
from neox_kernels.kernels.varlen_autograd import index_first_axis, pad_input, unpad_input, varlen_metadata

__all__ = [
    "DTYPES",
    "apply_rotary",
    "apply_rotary_kv_append",
    "apply_rotary_qk",
    "causal_softmax",
    "index_first_axis",
    "pad_input",
    "unavailable",
    "unpad_input",
    "varlen_metadata",
]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device, or None."""
    if device_type != "cuda":
        return "triton serves GPUs only"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA and without ROCm"
    return None
