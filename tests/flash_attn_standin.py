"""A stand-in for the flash-attn package: its two functions by their documented rules, in float64, on the CPU.

It refuses what the package refuses, and something more: a last dimension that is not contiguous, which the package
would copy, and cu_seqlens that do not fit the tensors, where it would read out of bounds. Only the device is not
looked at. ``install`` puts it into sys.modules as one version or another: the causal rule is aligned top-left in 2.0
and bottom-right from 2.1 on, and a query that sees no key is zero since then, NaN here before.
"""

import functools
import itertools
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


class Calls(list[tuple[str, dict[str, Any]]]):
    """What was called, by name, with which causal, dropout_p and lengths."""


def _check(*tensors: Tensor, dims: int) -> None:
    q = tensors[0]
    for x in tensors:
        if x.dim() != dims:
            raise RuntimeError(f"expected {dims} dimensions, got {x.dim()}")
        if x.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("fp16 and bf16 are the only supported data types")
        if x.dtype != q.dtype:
            raise RuntimeError("q, k and v must have one dtype")
        if x.stride(-1) != 1:
            raise RuntimeError("the last dimension must be contiguous")
        if x.shape[-1] != q.shape[-1] or x.shape[-1] > MAX_HEAD_DIM:
            raise RuntimeError(f"the head dimension must be at most {MAX_HEAD_DIM}, and one for all")
        if q.shape[-2] % x.shape[-2]:
            raise RuntimeError("the heads of k and v must divide those of q")


def _check_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int, total: int) -> list[int]:
    if cu_seqlens.dtype != torch.int32:
        raise RuntimeError("cu_seqlens must be int32")
    if cu_seqlens.dim() != 1 or not cu_seqlens.is_contiguous():
        raise RuntimeError("cu_seqlens must be a contiguous vector")
    if type(max_seqlen) is not int:
        raise TypeError("max_seqlen must be an int")
    starts: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != total or min(lengths) < 0 or max(lengths) > max_seqlen:
        raise RuntimeError(f"cu_seqlens {starts} do not describe {total} tokens of sequences up to {max_seqlen}")
    return starts


def make_module(version: str) -> tuple[ModuleType, Calls]:
    """The module ``flash_attn`` of that version, and the list that its calls are written to."""
    bottom_right = tuple(int(part) for part in version.split(".")[:2]) >= (2, 1)
    calls = Calls()

    def one(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float, causal: bool) -> Tensor:
        """(seqlen, nheads, head_dim) of one sequence."""
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
        q_len, k_len = scores.shape[-2:]
        if causal:
            hidden = torch.ones(q_len, k_len, dtype=torch.bool).triu(1 + (k_len - q_len if bottom_right else 0))
            scores = scores.masked_fill(hidden, -torch.inf)
        dead = (scores == -torch.inf).all(-1, keepdim=True)
        if bottom_right:
            scores = scores.masked_fill(dead, 0.0)
        probs = torch.softmax(scores, dim=-1)
        probs = torch.nn.functional.dropout(probs.masked_fill(dead, 0.0) if bottom_right else probs, dropout_p)
        return torch.einsum("hqk,khd->qhd", probs, v.double()).to(q.dtype)

    def check_options(dropout_p: float, window_size: tuple[int, int], rest: dict[str, Any]) -> None:
        if not 0 <= dropout_p < 1:
            raise RuntimeError("dropout_p must be in [0, 1)")
        if tuple(window_size) != (-1, -1) or rest["softcap"] or rest["alibi_slopes"] is not None:
            raise NotImplementedError("the stand-in has no windows, softcap and alibi")
        if rest["return_attn_probs"] or rest.get("block_table") is not None:
            raise NotImplementedError("the stand-in returns the result only, and has no pages")

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Tensor:  # fmt: skip
        check_options(dropout_p, window_size, {k: x for k, x in locals().items() if k in OPTIONS})
        _check(q, k, v, dims=4)
        if q.shape[0] == 0 or k.shape[0] != q.shape[0] or v.shape[:3] != k.shape[:3]:
            raise RuntimeError("q, k and v must have one batch size above 0, and k and v one length")
        calls.append(("dense", {"causal": causal, "dropout_p": dropout_p, "max_seqlens": (q.shape[1], k.shape[1])}))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return torch.stack([one(*qkv, dropout_p, scale, causal) for qkv in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        check_options(dropout_p, window_size, {k: x for k, x in locals().items() if k in OPTIONS})
        _check(q, k, v, dims=3)
        starts_q = _check_cu_seqlens(cu_seqlens_q, max_seqlen_q, q.shape[0])
        starts_k = _check_cu_seqlens(cu_seqlens_k, max_seqlen_k, k.shape[0])
        if len(starts_q) != len(starts_k) or len(starts_q) < 2 or v.shape[:2] != k.shape[:2]:
            raise RuntimeError("q, k and v must have one batch size above 0, and k and v one length")
        calls.append(
            ("varlen", {"causal": causal, "dropout_p": dropout_p, "max_seqlens": (max_seqlen_q, max_seqlen_k)})
        )
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        rows = []
        for b in range(len(starts_q) - 1):
            of_q, of_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
            rows.append(one(q[of_q], k[of_k], v[of_k], dropout_p, scale, causal))
        return torch.cat(rows)

    module = ModuleType("flash_attn")
    module.__version__ = version  # type: ignore[attr-defined]
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module, calls


OPTIONS = ("softcap", "alibi_slopes", "return_attn_probs", "block_table")


def install(patch: Any, version: str) -> Calls:
    """Make this the flash-attn that neox_kernels finds, on the CPU too, until ``patch`` (pytest's monkeypatch) ends."""
    module, calls = make_module(version)
    patch.setitem(sys.modules, "flash_attn", module)
    look_again(patch)
    patch.setattr(sys.modules["neox_kernels.flash_attention"], "_serves_cpu", lambda: True)
    return calls


def look_again(patch: Any) -> None:
    """What was found of flash-attn is forgotten, now and when ``patch`` ends."""
    module = sys.modules["neox_kernels.flash_attention"]
    patch.setattr(module, "find_flash", functools.cache(module.find_flash.__wrapped__))
