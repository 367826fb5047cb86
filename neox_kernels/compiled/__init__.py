"""The compiled library seen as a backend: C++ on CPU, CUDA on GPU.

Its ops are ``torch.ops.neox_kernels.*``. Their fakes and gradients are registered here, at import, so that
torch.compile, torch.export and users of the raw ops find them.
"""

from __future__ import annotations

import torch

from neox_kernels.compiled.attention import causal_attention, serves_causal_attention
from neox_kernels.compiled.gelu import gelu_tanh
from neox_kernels.compiled.library import build_config, load_error
from neox_kernels.compiled.rotary import apply_rotary, apply_rotary_kv_append, apply_rotary_qk
from neox_kernels.compiled.softmax import causal_softmax
from neox_kernels.compiled.varlen import index_first_axis, pad_input, unpad_input, varlen_metadata

__all__ = [
    "CHECKS_ITSELF",
    "CPU_ONLY",
    "DTYPES",
    "apply_rotary",
    "apply_rotary_kv_append",
    "apply_rotary_qk",
    "build_config",
    "causal_attention",
    "causal_softmax",
    "cpu_isa",
    "gelu_tanh",
    "index_first_axis",
    "load_error",
    "pad_input",
    "serves_causal_attention",
    "unavailable",
    "unpad_input",
    "varlen_metadata",
]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
CHECKS_ITSELF = ("cpu",)
CPU_ONLY = frozenset({"causal_attention", "gelu_tanh"})


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve a device, or None."""
    if load_error is not None:
        return load_error
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"it has no kernels for {device_type}"
    if not build_config.get("cuda"):
        return f"it was built without CUDA ({build_config.get('cuda_reason') or 'nvcc was not found'})"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None


def cpu_isa(name: str = "") -> str:
    """The CPU instruction set in use: default, avx2, avx512 or avx512_bf16. With a name, or "best", choose it."""
    isa: str = torch.ops.neox_kernels.cpu_isa(name)
    return isa
