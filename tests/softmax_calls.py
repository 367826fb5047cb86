"""Calls of causal_softmax with everything that they may hold, and the check of whatever serves them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from to_device import move
from torch import Tensor

from neox_kernels import reference
from neox_kernels.reference.dropout import dropout_keep
from neox_kernels.testing import assert_within_budget, error_budget, max_error, to_float64


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    causal: bool = True
    scale: float = 0.125
    padding: str = ""  # "rows", "strided", or "hidden": a sequence of which nothing is seen
    mask: str = ""  # "bool" or "float" and how it lies: "_full", "_queries", "_keys", "_strided"; or "lowest"
    head_mask: str = ""  # "flat", "full" or "row"
    dropout_p: float = 0.0
    view: str = "contiguous"  # "heads_last", "slice", "unaligned", "strided", "expanded"
    special: str = ""  # what some scores are: "nan", "inf", "-inf"


def make_scores(case: Case, generator: torch.Generator) -> Tensor:
    batch, nheads, q_len, k_len = case.shape

    def randn(*shape: int) -> Tensor:
        return (4 * torch.randn(shape, generator=generator)).to(case.dtype)

    if case.view == "heads_last":
        return randn(batch, q_len, nheads, k_len).transpose(1, 2)
    if case.view == "slice":
        return randn(batch, nheads, q_len, k_len + 16)[..., 8 : 8 + k_len]
    if case.view == "unaligned":
        return randn(batch, nheads, q_len, k_len + 1)[..., 1:]
    if case.view == "strided":
        return randn(batch, nheads, q_len, 2 * k_len)[..., ::2]
    if case.view == "expanded":
        return randn(batch, 1, q_len, k_len).expand(case.shape)
    return randn(*case.shape)


def make_inputs(case: Case, seed: int = 0) -> tuple[list[Tensor | None], dict[str, Any], Tensor]:
    """Scores, attn_mask and head_mask; the other arguments; the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    batch, nheads, q_len, k_len = case.shape
    scores = make_scores(case, generator)
    if case.special and scores.numel():
        at = torch.rand(case.shape, generator=generator) < 0.02
        scores = scores.masked_fill(at, float(case.special))
        scores[:, :, q_len // 2 : q_len // 2 + 1] = -torch.inf
    mask: Tensor | None = None
    if case.mask:
        kind, _, lie = case.mask.partition("_")
        shape = {"full": (batch, nheads, q_len, k_len), "queries": (q_len, 1), "keys": (batch, 1, 1, k_len)}
        mask = torch.randn(shape.get(lie, (1, 1, q_len, k_len)), generator=generator)
        if lie == "strided":
            mask = torch.randn(1, nheads, k_len, q_len, generator=generator).transpose(2, 3)
        if kind == "bool":
            mask = mask > -0.5
        elif kind == "lowest":
            mask = torch.where(mask > 0, 0.0, torch.finfo(case.dtype).min).to(case.dtype)
            mask[..., q_len // 2 : q_len // 2 + 1, :] = torch.finfo(case.dtype).min
        else:
            mask = mask.masked_fill(mask > 1.5, -torch.inf).to(case.dtype)
    padding = None
    if case.padding:
        padding = torch.rand(batch, 2 * k_len, generator=generator) > 0.3
        padding = padding[:, ::2] if case.padding == "strided" else padding[:, :k_len]
        if case.padding == "hidden":
            padding[:1] = False
    head_mask: Tensor | None = None
    if case.head_mask:
        shape = {"flat": (nheads,), "full": (batch, nheads, 1, 1), "row": (1, nheads, 1, 1)}[case.head_mask]
        head_mask = torch.randn(shape, generator=generator).to(case.dtype)
    options = {"scale": case.scale, "causal": case.causal, "key_padding_mask": padding, "dropout_p": case.dropout_p}
    options["rng"] = torch.tensor([2**62 + 12345, 2**33 + 7]) if case.dropout_p > 0 else None
    options["dtype"] = case.out_dtype
    grad = torch.randn(batch, nheads, q_len, 2 * k_len, generator=generator).to(case.out_dtype or case.dtype)
    return [scores, mask, head_mask], options, grad[..., ::2] if case.view == "strided" else grad[..., :k_len]


def run(
    function: Callable[..., Tensor], inputs: list[Tensor | None], options: dict[str, Any], grad: Tensor
) -> list[Tensor]:
    """The result, and the gradients of the scores and of the floating masks."""
    leaves = [None if x is None else x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    scores, attn_mask, head_mask = leaves
    out = function(scores, attn_mask=attn_mask, head_mask=head_mask, **options)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [x.detach() for x in (out, *torch.autograd.grad(out, wanted, grad))]


class _Softmax(torch.autograd.Function):
    """As PyTorch's own softmax of a dtype: the gradient is computed from the result as it was rounded."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, attn_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        probs = reference.causal_softmax(scores, attn_mask=attn_mask, **options)
        ctx.save_for_backward(scores, attn_mask, probs)
        ctx.scale = options["scale"]
        return probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, attn_mask, probs = ctx.saved_tensors
        p, g = probs.float(), grads[0].float()
        d_logits = p * (g - (g * p).sum(-1, keepdim=True))
        d_scores = (d_logits * ctx.scale).to(scores.dtype)
        if attn_mask is None or not attn_mask.is_floating_point():
            return d_scores, None, None
        return d_scores, d_logits.sum_to_size(attn_mask.shape).to(attn_mask.dtype), None


def eager(
    scores: Tensor, *, attn_mask: Tensor | None, head_mask: Tensor | None, dropout_p: float, rng: Any, **options: Any
) -> Tensor:
    """As model code does it, the yardstick: probabilities are rounded before dropout and head mask."""
    probs: Tensor = _Softmax.apply(scores, attn_mask, options)
    if dropout_p > 0:
        keep = dropout_keep(rng, dropout_p, scores.shape)
        probs = torch.where(keep, probs * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0.0)
    if head_mask is not None:
        probs = probs * (head_mask.view(-1, 1, 1) if head_mask.dim() == 1 else head_mask).to(probs.dtype)
    return probs


def check(case: Case, function: Callable[..., Tensor], device: str = "cpu") -> None:
    """Forward, backward and in place, by the numbers policy; what is hidden exactly zero; no input changed."""
    results: list[list[tuple[Tensor, ...]]] = [[], [], []]
    # The gradient of a head mask has few elements, and the error of few is chance: several times as many.
    for seed in range(4 if case.head_mask else 1):
        inputs, options, grad = make_inputs(case, seed)
        exact = run(reference.causal_softmax, to_float64(inputs), {**options, "dtype": None}, grad.double())
        same = run(eager, inputs, options, grad)
        there, there_options, there_grad = move(inputs, device), move(options, device), move(grad, device)
        before = [None if x is None else x.clone() for x in [*there, there_grad]]
        actual = run(function, there, there_options, there_grad)
        for x, old in zip([*there, there_grad], before, strict=True):
            assert x is None or torch.equal(x.nan_to_num(7.0), old.nan_to_num(7.0)), f"an input was changed: {case}"
        assert [x.shape for x in actual] == [x.shape for x in exact] and actual[0].is_contiguous()
        if case.causal:
            hidden = torch.ones(case.shape[2:], dtype=torch.bool, device=device).triu(case.shape[3] - case.shape[2] + 1)
            assert not actual[0][..., hidden].any() and not actual[1][..., hidden].any(), f"above the diagonal: {case}"
        for result, values in zip(results, (actual, same, exact), strict=True):
            result.append(tuple(values))
    columns = [[torch.stack(x) for x in zip(*result, strict=True)] for result in results]
    for name, x, expected, oracle in zip(["out", "d_scores", "d_first", "d_second"], *columns, strict=False):
        if name == "d_first" and case.mask == "float_queries" and x.dtype == torch.float16:
            # A sum over all keys that is zero in truth: what is left of its terms may round to float16's smallest step.
            assert max_error(x, oracle) <= max(2**-24, error_budget(expected, oracle)), f"{name} of {case}"
            continue
        assert_within_budget(x, expected, oracle, f"{name} of {case}")
    if case.view not in ("strided", "expanded"):
        check_inplace(case, function, there, there_options)


def check_inplace(
    case: Case, function: Callable[..., Tensor], inputs: list[Tensor | None], options: dict[str, Any]
) -> None:
    scores, attn_mask, head_mask = inputs
    assert scores is not None
    base = torch.full((*scores.shape[:-1], scores.shape[-1] + 16), 3.0, dtype=case.dtype, device=scores.device)
    target = base[..., 8:-8].copy_(scores) if case.view == "slice" else scores.clone()
    masks = {"attn_mask": attn_mask, "head_mask": head_mask, **options, "dtype": None}
    with torch.no_grad():
        # Of what lies in the same way: that decides the order of the sums.
        expected = function(scores if case.view == "slice" else target.clone(), **masks)
        version = target._version
        assert function(target, inplace=True, **masks) is target
    assert target._version > version
    assert torch.equal(target.nan_to_num(7.0), expected.nan_to_num(7.0)), f"in place: {case}"
    assert (base[..., :8] == 3).all() and (base[..., -8:] == 3).all(), f"beside the slice: {case}"
