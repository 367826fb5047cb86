"""The implementations of attention: each takes a checked call and gives the result and the probabilities, or None."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from neox_kernels import memory
from neox_kernels.attention_masks import PreparedAttention
from neox_kernels.flash_attention import HALF, flash_attention, reason_against
from neox_kernels.ops.attention import causal_attention, serves_causal_attention
from neox_kernels.ops.softmax import causal_softmax

Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Call:
    """The arguments of a call, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    masks: PreparedAttention
    head_mask: Tensor | None
    dropout_p: float
    output_attentions: bool
    upcast_scores: bool

    def needs_grad(self) -> bool:
        masks = (self.masks.attn_mask, self.head_mask)
        return torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (self.q, self.k, self.v, *masks)
        )


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def eager(call: Call) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    if call.upcast_scores:  # GPT-J's definition; the other is GPT-NeoX's
        q, k = q.to(_compute(q)), k.to(_compute(k))
    scores = torch.matmul(q, k.mT) * call.scale
    masks, head_mask = call.masks, call.head_mask
    if masks.attn_mask is not None and masks.attn_mask.dtype != torch.bool:
        scores = scores + masks.attn_mask
    seen = masks.visible(q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    # A softmax over nothing is NaN, and so is its gradient.
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1, dtype=_compute(scores)).masked_fill(dead, 0.0)
    probs = dropout(probs.to(v.dtype), call.dropout_p)
    if head_mask is not None:
        probs = probs * (head_mask[:, None, None] if head_mask.dim() == 1 else head_mask).to(probs.dtype)
    return torch.matmul(probs, v).transpose(1, 2), probs if call.output_attentions else None


def fused(call: Call) -> Result:
    if _in_one_pass(call):
        return causal_attention(call.q, call.k, call.v, call.scale), None
    rows = _rows_at_a_time(call)
    if rows is not None:
        return _fused_by_rows(call, rows), None
    q, k, v = _operands(call, call.q, call.k, call.v)
    out = None
    if _on_plain_cpu(call):
        out = memory.empty((*q.shape[:3], k.shape[2]), q.dtype)
    probs = _probabilities(call, torch.matmul(q, k.mT, out=out), call.masks.key_padding_mask, call.head_mask)
    return torch.matmul(probs, v).transpose(1, 2), probs if call.output_attentions else None


def _operands(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and (v.dtype in HALF or q.shape[0] > 1):
        # oneDNN multiplies strided bfloat16 at a third of its speed, and a lone query at a tenth; and torch.matmul
        # would itself copy what is no view of (batch * nheads) matrices, with k transposed, which is slower still.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return (q.to(_compute(q)), k.to(_compute(k)), v) if call.upcast_scores else (q, k, v)


def _in_one_pass(call: Call) -> bool:
    """Whether a kernel that holds no scores can serve, and is faster than products and softmax apart.

    By the measurements of ``neox-kernels bench attention`` on one thread: 12 heads of 64 at (4, 512) take 0.55 of the
    time of PyTorch's SDPA, squares of 32 to 2048 tokens 0.35 to 0.95. For few queries it costs too much to sort the
    keys.
    """
    masks = call.masks
    plain = masks.causal and masks.attn_mask is None and masks.key_padding_mask is None and call.head_mask is None
    if not plain or call.output_attentions or call.dropout_p > 0 or call.scale <= 0 or call.q.dtype != call.v.dtype:
        return False
    many = masks.q_len >= (32 if masks.q_len == masks.k_len else 64)
    return many and _on_plain_cpu(call) and serves_causal_attention(call.q.dtype)


def _rows_at_a_time(call: Call) -> int | None:
    """How many queries of one sequence the fused implementation serves together; None for the whole batch at once.

    In parts, half of a long causal square is never multiplied, and scores stay in the cache: 12 heads of 64 in float32
    take 0.8 of the time at (1, 512) and half at (1, 2048). oneDNN prefers larger matrices.
    """
    masks = call.masks
    if not _on_plain_cpu(call) or not masks.causal or masks.attn_mask is not None:
        return None
    rows = 512 if call.v.dtype in HALF else 128
    whole = call.output_attentions or call.dropout_p > 0
    return None if whole or call.q.shape[0] * masks.q_len <= rows else rows


def _on_plain_cpu(call: Call) -> bool:
    """Whether memory on the CPU may be filled part by part: nothing records, traces or casts."""
    if torch.compiler.is_compiling() or call.q.device.type != "cpu":
        return False
    return not (torch.is_autocast_enabled("cpu") or call.needs_grad())


def _fused_by_rows(call: Call, rows: int) -> Tensor:
    q_len, k_len, padding, head_mask = call.masks.q_len, call.masks.k_len, call.masks.key_padding_mask, call.head_mask
    out = torch.empty(call.q.shape, dtype=call.v.dtype)
    for b in range(call.q.shape[0]):
        one = slice(b, b + 1)
        q, k, v = _operands(call, call.q[one], call.k[one], call.v[one])
        heads = head_mask[one] if head_mask is not None and head_mask.dim() == 4 and len(head_mask) > 1 else head_mask
        for start in range(0, q_len, rows):
            end = min(start + rows, q_len)
            seen = max(0, end + k_len - q_len)  # by the last of these queries: again aligned bottom-right
            scores = torch.matmul(q[:, :, start:end], k[:, :, :seen].mT)
            probs = _probabilities(call, scores, None if padding is None else padding[one, :seen], heads)
            out[one, start:end] = torch.matmul(probs, v[:, :, :seen]).transpose(1, 2)
    return out


def _probabilities(call: Call, scores: Tensor, key_padding_mask: Tensor | None, head_mask: Tensor | None) -> Tensor:
    return causal_softmax(
        scores,
        scale=call.scale,
        causal=call.masks.causal,
        key_padding_mask=key_padding_mask,
        attn_mask=call.masks.attn_mask,
        head_mask=head_mask,
        dropout_p=call.dropout_p,
        inplace=scores.dtype == call.v.dtype and not call.needs_grad(),
        dtype=call.v.dtype,
    )


def sdpa(call: Call) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    masks = call.masks
    mask = dead = None
    # torch's is_causal is aligned top-left: the same only for a square.
    square = masks.causal and masks.q_len == masks.k_len and masks.key_padding_mask is None and masks.attn_mask is None
    if not square:
        mask, dead = masks.for_sdpa(q.device)
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
            mask = mask.to(_compute(q))
    out = scaled_dot_product_attention(q, k, v, mask, call.dropout_p, is_causal=square, scale=call.scale)
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2), None


def fused_is_faster(call: Call) -> bool:
    """Than PyTorch's SDPA, on a CPU, where both can serve: by the measurements of ``neox-kernels bench attention``.

    With padding SDPA reads a mask and computes the whole square: fused takes 0.6 to 0.85 of its time. Without, where no
    kernel of ours serves, SDPA is the faster for a lone query, for long squares and for narrow heads; fused for wide
    heads up to about 1024 tokens.
    """
    if _in_one_pass(call):
        return True
    masks, head_dim = call.masks, call.q.shape[3]
    in_parts = not torch.compiler.is_compiling() and call.dropout_p == 0 and masks.attn_mask is None
    if masks.q_len == 1 or not masks.causal or not in_parts or call.needs_grad():
        return False
    if masks.key_padding_mask is not None:
        return True
    square = masks.q_len * masks.k_len
    return square <= 2**20 and (head_dim >= 256 and square >= 2**17 if call.v.dtype in HALF else head_dim >= 128)


def fused_is_truer(call: Call) -> bool:
    """Than PyTorch's SDPA on a CPU, which rounds the gradient of the scores to half precision before it multiplies.

    Where scores are to be float32, that is more than twice the error of plain PyTorch.
    """
    return call.upcast_scores and call.v.dtype in HALF and call.needs_grad()


def sdpa_is_faster_on_gpu(call: Call) -> bool:
    """Than FlashAttention-2: forward where it needs no mask, in half precision, by the measurements in bench/results.

    On an H100 it needs 0.55 to 0.75 of flash-attn's time for squares of 512 tokens and more.
    """
    masks, dtype = call.masks, call.v.dtype
    without_mask = masks.attn_mask is None and masks.key_padding_mask is None
    aligned = not masks.causal or masks.q_len in (1, masks.k_len)
    half = dtype in HALF and call.q.dtype == call.k.dtype == dtype
    return without_mask and aligned and half and not call.needs_grad()


def fused_is_faster_on_gpu(call: Call) -> bool:
    """Than PyTorch's SDPA, for one sequence behind a cache, by the measurements in bench/results.

    A chunk costs SDPA a mask: on an H100, 128 queries of 1024 keys take fused 0.3 to 0.6 of its time. A lone query in
    float32 uses few of a GPU's multiprocessors in SDPA: fused takes 0.7 of its time at 128 keys, 0.05 to 0.1 at 8192.
    """
    masks = call.masks
    alone = call.q.shape[0] == 1 and masks.attn_mask is None and masks.key_padding_mask is None
    if torch.compiler.is_compiling() or not alone or not masks.causal or call.needs_grad():
        return False
    return masks.q_len < masks.k_len and (masks.q_len > 1 or call.v.dtype == torch.float32)


def flash(call: Call) -> Result:
    return flash_attention(call.q, call.k, call.v, call.masks, call.scale, call.dropout_p), None


def not_flash(call: Call) -> str | None:
    return reason_against(
        call.q, call.v, call.masks, call.scale, call.head_mask, call.dropout_p, call.output_attentions
    )


def not_sdpa(call: Call) -> str | None:
    if call.output_attentions:
        return "PyTorch's SDPA gives no probabilities"
    if call.head_mask is not None:
        return "PyTorch's SDPA takes no head mask"
    if call.q.dtype != call.v.dtype:
        return f"PyTorch's SDPA takes one dtype, not {call.q.dtype} and {call.v.dtype}"
    return None


def always(call: Call) -> str | None:
    return None
