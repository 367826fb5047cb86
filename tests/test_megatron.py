"""The names of Megatron and gpt-neox: their arguments and their meaning, without their limits."""

import enum

import pytest
import torch
from torch import Tensor

from neox_kernels import FusedCausalSoftmax, causal_softmax, reference
from neox_kernels.integrations.megatron import (
    FusedScaleMaskSoftmax,
    ScaledMaskedSoftmax,
    ScaledSoftmax,
    ScaledUpperTriangMaskedSoftmax,
    SoftmaxFusionTypes,
)
from neox_kernels.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scores_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)


def hidden_above_diagonal(length: int) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


def fill(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -10000.0)


def eager(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = scores * scale
    return torch.softmax(scores if mask is None else fill(scores, mask), dim=-1)


# Lengths and heads that the fused kernels of Megatron refuse among them: 5, 33 and 2050 keys, 3 heads.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [5, 33, 64, 2050])
def test_functions(length: int, dtype: torch.dtype) -> None:
    scores = scores_of(1, 3, length, length, dtype=dtype)[..., -70:, :] if length > 70 else scores_of(
        1, 3, length, length, dtype=dtype
    )  # fmt: skip
    q_len = scores.shape[2]
    mask = hidden_above_diagonal(length)[:, :, -q_len:]
    truth = eager(scores.double(), mask, 0.5)
    same_dtype = eager(scores, mask, 0.5)
    assert_within_budget(ScaledUpperTriangMaskedSoftmax.apply(scores[0], 0.5)[None], same_dtype, truth)
    assert_within_budget(ScaledMaskedSoftmax.apply(scores, mask, 0.5), same_dtype, truth)
    assert_within_budget(ScaledMaskedSoftmax.apply(scores, mask.to(torch.uint8), 0.5), same_dtype, truth)
    everything = eager(scores.double(), None, 0.5)
    assert_within_budget(ScaledSoftmax.apply(scores, 0.5), eager(scores, None, 0.5), everything)
    assert_within_budget(ScaledMaskedSoftmax.apply(scores, None, 0.5), eager(scores, None, 0.5), everything)


@pytest.mark.parametrize("kind", SoftmaxFusionTypes)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module(kind: SoftmaxFusionTypes, dtype: torch.dtype) -> None:
    half = dtype == torch.float16, dtype == torch.bfloat16
    softmax = FusedScaleMaskSoftmax(*half, kind, fill, True, 0.3)
    scores, mask = scores_of(2, 3, 17, 17, dtype=dtype), hidden_above_diagonal(17)
    truth = eager(scores.double(), mask, 0.3)
    assert_within_budget(softmax(scores, mask), eager(scores, mask, 0.3), truth, str(softmax))
    # No mask hides nothing, the causal fusion's too.
    assert_within_budget(softmax(scores, None), eager(scores, None, 0.3), eager(scores.double(), None, 0.3))
    assert softmax(scores.float(), mask).dtype == dtype


def test_module_sees_one_query_of_a_cache() -> None:
    softmax = FusedScaleMaskSoftmax(False, False, SoftmaxFusionTypes.upper_triang, fill, True, None)
    scores = scores_of(1, 3, 4, 9)
    mask = hidden_above_diagonal(9)[:, :, -4:]
    assert_within_budget(softmax(scores, mask), eager(scores, mask, 1.0), eager(scores.double(), mask, 1.0))


def test_the_mask_function_is_called_where_nothing_is_fused() -> None:
    calls = []

    def mask_func(scores: Tensor, mask: Tensor) -> Tensor:
        calls.append(scores.dtype)
        return scores + mask

    scores, mask = scores_of(1, 2, 3, 3, dtype=torch.bfloat16), scores_of(3, 3)
    for kind in SoftmaxFusionTypes:
        hides = mask if kind is SoftmaxFusionTypes.none else mask > 0
        y = FusedScaleMaskSoftmax(False, True, kind, mask_func, True, 2.0)(scores, hides)
        if kind is SoftmaxFusionTypes.none:
            truth = torch.softmax(scores.double() * 2 + mask.double(), dim=-1)
            assert_within_budget(y, torch.softmax(scores * 2 + mask.bfloat16(), dim=-1), truth)
    assert calls == [torch.float32], "once, and in float32"


def test_gradients() -> None:
    scores = scores_of(8, 12, 7, 7).requires_grad_()
    mask = torch.rand(8, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.6
    mask[..., 0, :] = True  # hides everything
    grad = scores_of(8, 12, 7, 7)
    (actual,) = torch.autograd.grad(ScaledMaskedSoftmax.apply(scores, mask, 0.5), scores, grad)
    exact = scores.detach().double().requires_grad_()
    y = reference.causal_softmax(exact, scale=0.5, causal=False, attn_mask=~mask)
    (truth,) = torch.autograd.grad(y, exact, grad.double())
    (same_dtype,) = torch.autograd.grad(eager(scores, mask, 0.5), scores, grad)
    assert_within_budget(actual[..., 1:, :], same_dtype[..., 1:, :], truth[..., 1:, :])
    assert actual[..., 0, :].eq(0).all(), "a query that sees nothing"


def test_an_enumeration_of_the_same_names_will_do() -> None:
    theirs = enum.Enum("SoftmaxFusionTypes", ["upper_triang", "general", "none"])
    assert FusedScaleMaskSoftmax(True, False, theirs.general, fill, True, 1.0).fusion_type.name == "general"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion_type": "general"}, "fusion_type must be a SoftmaxFusionTypes, not 'general'"),
        ({"input_in_bf16": True}, "input_in_bf16 must be False where input_in_fp16 is True"),
        ({"softmax_in_fp32": False}, "softmax_in_fp32 must be True where scale is given"),
        ({"mask_func": None}, "mask_func must be given where fusion_type is none"),
    ],
)
def test_what_the_module_refuses(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "input_in_fp16": True,
        "input_in_bf16": False,
        "fusion_type": SoftmaxFusionTypes.none,
        "mask_func": fill,
        "softmax_in_fp32": True,
        "scale": 1.0,
    }
    FusedScaleMaskSoftmax(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        FusedScaleMaskSoftmax(**{**good, **change})  # type: ignore[arg-type]


def test_the_module_of_this_package() -> None:
    softmax = FusedCausalSoftmax(0.5, dropout_p=0.5, dtype=torch.bfloat16)
    scores, padding = scores_of(2, 3, 8, 8), torch.ones(2, 8, dtype=torch.bool)
    padding[0, :3] = False
    dropped = softmax(scores, key_padding_mask=padding)
    whole = softmax.eval()(scores, key_padding_mask=padding)
    assert dropped.dtype == whole.dtype == torch.bfloat16
    assert torch.equal(whole, causal_softmax(scores, scale=0.5, key_padding_mask=padding, dtype=torch.bfloat16))
    assert (dropped == 0).sum() > (whole == 0).sum(), "dropout while training alone"
    masks = {"attn_mask": scores_of(8, 8), "head_mask": torch.tensor([0.0, 1.0, 2.0])}
    plain = FusedCausalSoftmax(0.5, causal=False).eval()
    assert torch.equal(plain(scores, **masks), causal_softmax(scores, scale=0.5, causal=False, **masks))
    assert plain(scores, inplace=True) is scores
    assert "scale=0.5" in repr(softmax)
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1, not 2"):
        FusedCausalSoftmax(dropout_p=2)
