"""Every op in plain PyTorch: the oracle of the tests, the fallback of every machine, the definition in the docs.

All arithmetic is in float32, or in float64 for float64 inputs. Functions have the signatures of the public ones, and
are differentiable by PyTorch itself.
"""

from __future__ import annotations

import torch

from neox_kernels.reference.attention import causal_attention, serves_causal_attention
from neox_kernels.reference.gelu import gelu_tanh
from neox_kernels.reference.rotary import apply_rotary, apply_rotary_kv_append, apply_rotary_qk
from neox_kernels.reference.softmax import causal_softmax
from neox_kernels.reference.varlen import index_first_axis, pad_input, unpad_input, varlen_metadata

__all__ = [
    "DTYPES",
    "apply_rotary",
    "apply_rotary_kv_append",
    "apply_rotary_qk",
    "causal_attention",
    "causal_softmax",
    "gelu_tanh",
    "index_first_axis",
    "pad_input",
    "serves_causal_attention",
    "unavailable",
    "unpad_input",
    "varlen_metadata",
]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device; the reference serves every one."""
    return None
