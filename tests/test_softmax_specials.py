"""NaN, infinities and numbers at the ends of their range in the causal softmax."""

import itertools

import pytest
import torch
from softmax_checks import FLOATS, SCALE, SHAPE, above_diagonal, chance, every, randn, same_bits, scores_of, softmax
from torch import Tensor

from neox_kernels import causal_softmax, reference
from neox_kernels.testing import assert_within_budget, eager_causal_softmax

B, H, Q, K = SHAPE
INF, NAN = torch.inf, torch.nan


@every(dtype=FLOATS, masked=["", "padding", "bool"])
def test_what_is_hidden_is_not_looked_at(every_isa: str, dtype: torch.dtype, masked: str) -> None:
    scores = scores_of(*SHAPE, dtype=dtype)
    padding, mask = chance(B, K), chance(B, 1, Q, K)
    options: dict[str, Tensor] = {"padding": {"key_padding_mask": padding}, "bool": {"attn_mask": mask}}.get(masked, {})
    hidden = above_diagonal(scores) | {"padding": ~padding[:, None, None], "bool": ~mask}.get(
        masked, torch.tensor(False)
    )
    if masked == "-inf":  # the scores themselves: no mask is needed
        hidden = above_diagonal(scores)
        scores[chance(*SHAPE)] = -INF
    expected = softmax(scores, scale=SCALE, **options)
    for value in (NAN, INF, -INF, torch.finfo(dtype).max):
        assert same_bits(causal_softmax(scores.masked_fill(hidden, value), scale=SCALE, **options), expected)


@every(dtype=FLOATS, causal=[True, False], padded=[False, True])
def test_nan_and_infinity_that_a_query_sees(every_isa: str, padded: bool, causal: bool, dtype: torch.dtype) -> None:
    padding = torch.ones(B, K, dtype=torch.bool)
    if padded:  # both ends, and a hole
        padding[0, :7], padding[1, 18:50:30], padding[2, 34:] = False, False, False
    for value, at in itertools.product((NAN, INF), (0, 17, 34, 48, 66)):
        scores = scores_of(*SHAPE, dtype=dtype)
        scores[:, :, 3::2, at] = value
        y = softmax(scores, causal=causal, **({"key_padding_mask": padding} if padded else {}))
        looks = padding[:, None, None, at].expand(B, H, Q) & (torch.arange(Q) % 2 == 1) & (torch.arange(Q) >= 3)
        looks = looks & ~above_diagonal(scores)[..., at] if causal else looks
        seen = ~above_diagonal(scores) if causal else torch.ones(SHAPE, dtype=torch.bool)
        assert torch.equal(y.isnan(), looks[..., None] & seen), "NaN up to the diagonal, and nowhere else"


@every(dtype=FLOATS, causal=[True, False])
def test_infinity_of_either_sign_among_scores(every_isa: str, dtype: torch.dtype, causal: bool) -> None:
    scores = scores_of(*SHAPE, dtype=dtype)
    scores[chance(*SHAPE, p=0.3)] = -INF
    scores[:, :, 5], scores[:, :, 7], scores[:, :, 7, 0], scores[0, :, 9, :-1] = -INF, -INF, 1.0, NAN
    scores[1, :, 9] = torch.tensor([-INF, NAN]).repeat(K)[:K]  # a maximum that a NaN hides
    y = softmax(scores, scale=SCALE, causal=causal)
    assert not y[:, :, 5].any() and bool((y[:, :, 7, 0] == 1).all()) and y[1, :, 9, 0].isnan().all()
    softmax(scores, scale=-SCALE, causal=causal)
    softmax(scores, scale=0.0, causal=causal)  # 0 times infinity is NaN


@every(dtype=FLOATS, scale=[0.0, -0.0, -SCALE, 1.0, 1e-30, 1e30, 2**-149])
def test_scales(every_isa: str, dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float16 and scale > 1:
        pytest.skip("beyond float16, where eager code gives NaN")
    softmax(scores_of(*SHAPE, dtype=dtype), scale=scale)


@every(dtype=FLOATS, scale=[0.3, 80**-0.5, -0.3, 1.0], masked=[False, True])
def test_huge_scores(every_isa: str, masked: bool, scale: float, dtype: torch.dtype) -> None:
    """Rows whose every score is as low as can be, which is how model code hides keys, are uniform: the rounding of
    their product with the scale, far above 1, must cancel."""
    lowest, k_len = torch.finfo(dtype).min, 67
    rows = [torch.full((k_len,), lowest), torch.full((k_len,), -lowest), randn(k_len).sign() * -lowest]
    rows += [torch.where(chance(k_len), torch.tensor(1e10).clamp(max=-lowest), torch.tensor(3.0))]
    scores = torch.stack(rows).to(dtype).expand(2, 1, 4, k_len)
    options = {"key_padding_mask": torch.ones(2, k_len, dtype=torch.bool)} if masked else {}
    if masked:
        options["key_padding_mask"][1, 5] = False
    y = causal_softmax(scores, scale=scale, causal=False, **options)
    # In float32, as the contract has it: eager code in float16 would round the product.
    expected = eager_causal_softmax(scores.float(), scale=scale, causal=False, **options).to(dtype)
    oracle = reference.causal_softmax(scores.float(), scale=scale, causal=False, **options).double()
    assert oracle.isfinite().all() and bool((oracle.sum(-1) > 0.99).all())
    assert_within_budget(y, expected, oracle)


def test_a_product_beyond_float32_is_infinite(every_isa: str) -> None:
    scores = torch.tensor([[3e38, 1.0, -3e38], [-3e38, -3e38, -3e38], [-3e38, 2.0, 2.0]])[None, None]
    y = causal_softmax(scores, scale=10.0, causal=False)[0, 0]
    assert y[0].isnan().all() and torch.equal(y[1:], torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5]]))
    assert causal_softmax(scores, scale=-10.0, causal=False)[0, 0, 1].isnan().all()


@every(dtype=FLOATS)
def test_a_lowest_mask_on_lowest_scores(every_isa: str, dtype: torch.dtype) -> None:
    """Twice the lowest number is -inf in float32, where all is added up: hidden, and no NaN; of float16 it is not."""
    lowest = torch.finfo(dtype).min
    scores, mask = torch.full((1, 2, 6, 9), lowest, dtype=dtype), torch.full((9,), lowest, dtype=dtype)
    y = causal_softmax(scores, attn_mask=mask, causal=False)
    expected = 1 / 9 if dtype == torch.float16 else 0.0
    assert torch.equal(y, torch.full_like(scores, expected))
    scores[..., 4] = 1.0
    y = causal_softmax(scores, attn_mask=mask, causal=False)
    assert torch.equal(y, torch.nn.functional.one_hot(torch.tensor(4), 9).to(dtype).expand_as(y))
