"""Attention by FlashAttention-2: the flash-attn package, or torch's own varlen attention on a GPU.

flash-attn is imported at the first call that could use it. Its causal rule is aligned bottom-right from 2.1 on, as ours
is, and top-left before. torch says nothing of its own, so there, as with 2.0, it serves only where the two agree.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox_kernels.attention_masks import PreparedAttention
from neox_kernels.ops.varlen import pad_input, unpad_input

HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


class Flash(NamedTuple):
    """A FlashAttention that can be called.

    Args:
        dense: (q, k, v, dropout_p, softmax_scale, causal) of (batch, seqlen, nheads, head_dim); None: by varlen.
        varlen: (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal) of
            (total, nheads, head_dim).
        bottom_right: whether its causal rule is known to let the last query see all keys.
        dropout, any_scale: whether it takes them.
    """

    name: str
    dense: Callable[..., Tensor] | None
    varlen: Callable[..., Tensor]
    bottom_right: bool
    dropout: bool
    any_scale: bool


@functools.cache
def find_flash() -> Flash | str:
    """The FlashAttention to call, or the reasons why there is none. Looked for once."""
    found = _package()
    if isinstance(found, str):
        own = _torch_varlen()
        return f"{found}; {own}" if isinstance(own, str) else own
    return found


def _package() -> Flash | str:
    try:
        package = importlib.import_module("flash_attn")
        dense, varlen = package.flash_attn_func, package.flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return "flash-attn is not installed"
        return _broken(error)
    except (ImportError, OSError, AttributeError) as error:
        return _broken(error)
    major, minor = (int(part) for part in package.__version__.split(".")[:2])
    return Flash(f"flash-attn {package.__version__}", dense, varlen, (major, minor) >= (2, 1), True, True)


def _broken(error: Exception) -> str:
    reason = f"flash-attn is installed but cannot be used: {type(error).__name__}: {error}"
    warnings.warn(f"{reason}; attention goes on without it", RuntimeWarning, stacklevel=2)
    return reason


def _torch_varlen() -> Flash | str:
    if not torch.cuda.is_available():
        return "torch's varlen attention needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "torch's varlen attention needs a GPU of compute capability 8.0 or later"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen attention"
    return adapt_torch_varlen(varlen_attn)


def adapt_torch_varlen(varlen_attn: Callable[..., Any]) -> Flash:
    """torch's varlen_attn by flash-attn's arguments: before 2.11 it had is_causal, since then a window and a scale."""
    takes = inspect.signature(varlen_attn).parameters

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        dropout_p: float, softmax_scale: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        rule: dict[str, Any] = (
            {"is_causal": causal} if "is_causal" in takes else {"window_size": (-1, 0 if causal else -1)}
        )
        if "scale" in takes:
            rule["scale"] = softmax_scale
        result: Tensor = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **rule)
        return result

    return Flash("torch's varlen attention", None, varlen, False, False, "scale" in takes)


def half_dtype(q: Tensor, v: Tensor) -> torch.dtype | None:
    """What q, k and v are cast to where they are float32, from an upcast layer norm or rotation: the dtype of v, or
    autocast's. None where there is no such."""
    if v.dtype in HALF:
        return v.dtype
    device_type = q.device.type
    if q.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return dtype if dtype in HALF else None
    return None


@functools.cache
def _warn_of_cast(dtype: torch.dtype) -> None:
    warnings.warn(
        f"attention got float32, as from an upcast layer norm or autocast; FlashAttention computes in {dtype}",
        UserWarning,
        stacklevel=5,
    )


def reason_against(
    q: Tensor,
    v: Tensor,
    masks: PreparedAttention,
    scale: float,
    head_mask: Tensor | None,
    dropout_p: float,
    probabilities: bool,
) -> str | None:
    """Why FlashAttention cannot serve a call, or None. What costs most to find out comes last."""
    if torch.compiler.is_compiling():
        return "under torch.compile sdpa does the same without a break of the graph"
    if q.device.type != "cuda" and not _serves_cpu():
        return f"FlashAttention runs on GPUs, not on {q.device.type}"
    if probabilities:
        return "FlashAttention gives no probabilities"
    if head_mask is not None:
        return "FlashAttention takes no head mask"
    if masks.attn_mask is not None:
        return "FlashAttention takes no attn_mask, only causal and key_padding_mask"
    if half_dtype(q, v) is None:
        return f"FlashAttention computes in float16 and bfloat16, not in {q.dtype}"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"FlashAttention takes a head_dim of up to {MAX_HEAD_DIM}, not {q.shape[3]}"
    if 0 in q.shape or masks.k_len == 0:
        return "there is nothing to compute"
    flash = find_flash()
    if isinstance(flash, str):
        return flash
    if dropout_p == 1 or (dropout_p > 0 and not flash.dropout):
        return f"{flash.name} takes no dropout_p of {dropout_p}"
    if not flash.any_scale and scale != q.shape[3] ** -0.5:
        return f"{flash.name} takes no softmax_scale"
    between = masks.causal and masks.q_len not in (1, masks.k_len)
    if between and not flash.bottom_right:
        return f"{flash.name} may align causal top-left, another rule where q_len is neither 1 nor k_len"
    if masks.key_padding_mask is None:
        return None
    varlen = masks.for_varlen()
    if varlen is None:
        return "with q_len between 1 and k_len, FlashAttention serves padding on the left only"
    return "every token is padding" if varlen.keys.max_seqlen == 0 or varlen.queries.max_seqlen == 0 else None


def _serves_cpu() -> bool:
    """No; the tests' stand-in does."""
    return False


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, masks: PreparedAttention, scale: float, dropout_p: float
) -> Tensor:
    """(batch, q_len, nheads, head_dim) by FlashAttention, where :func:`reason_against` has none. Zeros for queries that
    are padding themselves."""
    flash = find_flash()
    dtype = half_dtype(q, v)
    assert isinstance(flash, Flash) and dtype is not None
    if q.dtype != dtype or v.dtype != dtype:
        _warn_of_cast(dtype)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    # Contiguous heads; other strides are served as they lie.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    causal = masks.causal and masks.q_len > 1
    options = {"dropout_p": dropout_p, "softmax_scale": scale, "causal": causal}
    if masks.key_padding_mask is None:
        if flash.dense is not None:
            return flash.dense(q, k, v, **options)
        cu_q, cu_k = masks.even_cu_seqlens(q.shape[0], q.device)
        total_q, total_k, total_v = (x.flatten(0, 1) for x in (q, k, v))
        result: Tensor = flash.varlen(total_q, total_k, total_v, cu_q, cu_k, masks.q_len, masks.k_len, **options)
        return result.view(q.shape)
    varlen = masks.for_varlen()
    assert varlen is not None
    queries, keys = varlen
    if queries is keys:
        q, k, v = unpad_input((q, k, v), keys)
    else:
        q = unpad_input(q, queries)
        k, v = unpad_input((k, v), keys)
    rows = flash.varlen(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen, **options)
    return pad_input(rows, queries)
