"""Gradients of the causal softmax, element by element: every backend and CPU instruction set against the oracle."""

import itertools
import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from softmax_checks import FLOATS, SCALE, SHAPE, above_diagonal, every, randn, scores_of
from torch import Tensor

from neox_kernels import causal_softmax, reference
from neox_kernels.reference.dropout import dropout_keep
from neox_kernels.testing import assert_within_budget, eager_causal_softmax, to_float64

B, H, Q, K = SHAPE
RNG = torch.tensor([7, 9])
pytestmark = pytest.mark.usefixtures("every_isa")


def gradients(f: Callable[..., Tensor], scores: Tensor, grad: Tensor, **options: Any) -> dict[str, Tensor]:
    """Of the scores and of every mask that has one, by name."""
    given = {"scores": scores, **options}
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in given.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    y = f(**{**given, **leaves})
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


def check(
    scores: Tensor, grad: Tensor, eager: Callable[..., Tensor] = eager_causal_softmax, **options: Any
) -> dict[str, Tensor]:
    """Every gradient within the budget of eager code's; nothing handed over has changed."""
    tensors = [x for x in (scores, grad, *options.values()) if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    ours = gradients(causal_softmax, scores, grad, **options)
    assert all(torch.equal(x, old) for x, old in zip(tensors, before, strict=True)), "an input changed"
    oracle = gradients(reference.causal_softmax, **to_float64({"scores": scores, "grad": grad, **options}))
    shown = {name: x for name, x in options.items() if name not in ("rng", "dropout_p")}
    yardstick = gradients(eager, scores, grad, **shown)
    for name, actual in ours.items():
        assert yardstick[name].isfinite().all(), "the budget would allow everything"
        assert_within_budget(actual, yardstick[name], oracle[name], f"gradient of {name}")
    return ours


PADDING = torch.stack([torch.arange(K) < 50, torch.arange(K) >= 0, torch.arange(K) % 5 > 0])
PADDING[:, :1] = True  # so that no query is without a key, where eager code gives NaN


@every(dtype=FLOATS, lengths=[(19, 67), (1, 67), (33, 33), (64, 128), (40, 1000)], causal=[True, False])
def test_gradient_of_the_scores(causal: bool, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    shape = (3, 16, *lengths) if lengths[1] < 128 else (1, 2, *lengths)
    scores, grad = scores_of(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    dx = check(scores, grad, scale=SCALE, causal=causal)["scores"]
    if causal:
        assert not dx.triu(lengths[1] - lengths[0] + 1).any(), "above the diagonal"


@every(dtype=FLOATS, scale=[1.0, -0.5, 0.0])
def test_gradient_with_a_scale_and_padding(dtype: torch.dtype, scale: float) -> None:
    scores, grad = randn(*SHAPE, dtype=dtype), randn(*SHAPE, dtype=dtype, seed=1)
    dx = check(scores, grad, scale=scale, key_padding_mask=PADDING)["scores"]
    assert not dx[~PADDING[:, None, None].expand(SHAPE)].any()


@every(dtype=FLOATS)
def test_gradients_of_masks_as_large_as_can_be(dtype: torch.dtype) -> None:
    shape = (3, 40, 9, 31)  # the largest error of a few sums is a matter of luck: here are 120
    scores, grad = scores_of(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    got = check(scores, grad, scale=SCALE, attn_mask=randn(*shape, seed=2), head_mask=randn(3, 40, 1, 1, seed=3))
    assert not got["attn_mask"].triu(31 - 9 + 1).any()


# Sums over what a mask was broadcast over, in numbers that no order of adding rounds: probabilities of 1/64, and 64
# times an integer coming in. So every gradient must be the oracle's, rounded once to the dtype of its mask.
MASK_SHAPES = [*itertools.product((1, 3), (1, 2), (1, 5), (1, 64)), (), (64,), (5, 64), (5, 1), (2, 1, 1)]
HEAD_SHAPES = [(), (1,), (2,), (1, 1), (2, 1, 1), (1, 2, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1)]


def exact(scores_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores and gradient of (3, 2, 5, 64)."""
    grad = torch.randint(-3, 4, (3, 2, 5, 64), generator=torch.Generator().manual_seed(0)) * 64
    return torch.zeros(3, 2, 5, 64, dtype=scores_dtype), grad.to(scores_dtype)


def exact_gradients(dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Those of the masks, which are the oracle's."""
    (scores, grad), options = exact(dtype), {"causal": False, "scale": 0.5, "rng": RNG, **options}
    ours = gradients(causal_softmax, scores, grad, **options)
    oracle = gradients(reference.causal_softmax, **to_float64({"scores": scores, "grad": grad, **options}))
    for name, actual in ours.items():
        assert torch.equal(actual, oracle[name].to(actual.dtype)), f"gradient of {name}"
        given = scores if name == "scores" else options[name]
        assert actual.shape == given.shape and actual.dtype == given.dtype
    return ours


@every(dtype=FLOATS, mask_dtype=FLOATS, dropout_p=[0.0, 0.5])
def test_gradients_of_masks_wherever_they_broadcast(
    dtype: torch.dtype, mask_dtype: torch.dtype, dropout_p: float
) -> None:
    for shape in MASK_SHAPES:
        exact_gradients(dtype, attn_mask=torch.full(shape, 0.25, dtype=mask_dtype), dropout_p=dropout_p)
    for shape in HEAD_SHAPES:
        head_mask = torch.tensor([2.0, 0.0, -0.5, 0.0, 1.0, 4.0])[: math.prod(shape)].view(shape).to(mask_dtype)
        got = exact_gradients(dtype, head_mask=head_mask, dropout_p=dropout_p)
        assert got["head_mask"][head_mask == 0].abs().gt(0).all(), "a zero has a gradient too"
        exact_gradients(dtype, attn_mask=torch.full((5, 1), 0.25), head_mask=head_mask, dropout_p=dropout_p)


@every(needs=["scores", "attn_mask", "head_mask"], dropout_p=[0.0, 0.5])
def test_each_gradient_alone_is_what_it_is_among_others(needs: str, dropout_p: float) -> None:
    scores, grad = exact(torch.float32)
    given = {"scores": scores, "attn_mask": torch.full((5, 64), 0.25), "head_mask": torch.tensor([2.0, -0.5])}
    options: dict[str, Any] = {"causal": False, "scale": 0.5, "dropout_p": dropout_p, "rng": RNG}
    among = gradients(causal_softmax, grad=grad, **given, **options)[needs]
    given[needs].requires_grad_()
    (alone,) = torch.autograd.grad(causal_softmax(**given, **options), given[needs], grad)
    assert torch.equal(alone, among) and alone.any()


@every(dtype=FLOATS, result=FLOATS)
def test_gradients_through_everything_at_once(dtype: torch.dtype, result: torch.dtype) -> None:
    keep = dropout_keep(RNG, 0.3, SHAPE)

    def eager(scores: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
        return torch.where(keep, eager_causal_softmax(scores.to(dtype), **options) / 0.7, 0.0)

    options = {"attn_mask": randn(1, H, Q, K), "head_mask": randn(B, H, 1, 1), "key_padding_mask": PADDING}
    grad = randn(*SHAPE, dtype=result, seed=1)
    scores = scores_of(*SHAPE, dtype=dtype)
    check(scores, grad, eager, **options, scale=SCALE, dropout_p=0.3, rng=RNG, dtype=result)


INCOMING: dict[str, Callable[[torch.dtype], Tensor]] = {
    "heads first": lambda dtype: randn(H, B, Q, K, dtype=dtype).transpose(0, 1),
    "last dimension transposed": lambda dtype: randn(B, H, K, Q, dtype=dtype).transpose(2, 3),
    "stride 2": lambda dtype: randn(B, H, Q, 2 * K, dtype=dtype)[..., 1::2],
    "one number for all": lambda dtype: randn(1, dtype=dtype).expand(SHAPE),
    "one query for all": lambda dtype: randn(B, H, 1, K, dtype=dtype).expand(SHAPE),
    "one head for all": lambda dtype: randn(B, 1, Q, K, dtype=dtype).expand(SHAPE),
    "one key for all": lambda dtype: randn(B, H, Q, 1, dtype=dtype).expand(SHAPE),
    "slice with an odd offset": lambda dtype: randn(B, H + 1, Q, K + 9, dtype=dtype)[:, 1:, :, 5:-4],
    "far apart": lambda dtype: torch.empty(0, dtype=dtype),  # filled in by the test
}


@every(case=INCOMING, dtype=FLOATS)
def test_incoming_gradients_of_any_stride(every_isa: str, case: str, dtype: torch.dtype) -> None:
    grad = INCOMING[case](dtype)
    if case == "far apart":  # offsets of 64 bits, in memory of which only what is touched exists
        pages = mmap.mmap(-1, 2**34, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        far = torch.frombuffer(pages, dtype=dtype)
        grad = far.as_strided(SHAPE, (2**31 // 2 + 64, 2**12, 128, 1)).copy_(randn(*SHAPE, dtype=dtype))
    scores = scores_of(*SHAPE, dtype=dtype)
    if case not in (
        "one number for all",
        "one key for all",
    ):  # whose gradient is zero, and its rounding a matter of luck
        check(scores, grad, scale=SCALE)
    if every_isa != "reference":
        options: dict[str, Any] = {"head_mask": randn(H), "attn_mask": randn(Q, K), "dropout_p": 0.3, "rng": RNG}
        dense = gradients(causal_softmax, scores, grad.contiguous(), **options)
        assert all(
            torch.equal(x, dense[name]) for name, x in gradients(causal_softmax, scores, grad, **options).items()
        )


VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "heads first": ((H, B, Q, K), lambda t: t.transpose(0, 1)),
    "last dimension transposed": ((B, H, K, Q), lambda t: t.transpose(2, 3)),
    "slice": ((B, H + 1, Q, K + 9), lambda t: t[:, 1:, :, 5:-4]),
    "expanded": ((B, 1, Q, K), lambda t: t.expand(SHAPE)),
    "stride 2": ((B, H, Q, 2 * K), lambda t: t[..., ::2]),
}


@every(form=VIEWS)
def test_gradients_reach_inputs_of_any_stride(form: str) -> None:
    shape, view = VIEWS[form]
    base, mask, grad = scores_of(*shape), randn(*shape, seed=1), randn(*SHAPE, seed=2)

    def through(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda scores, attn_mask: f(view(scores), scale=SCALE, attn_mask=view(attn_mask))

    ours, yardstick = (
        gradients(through(f), base, grad, attn_mask=mask) for f in (causal_softmax, eager_causal_softmax)
    )
    oracle = gradients(through(reference.causal_softmax), base.double(), grad.double(), attn_mask=mask.double())
    for name, actual in ours.items():
        assert_within_budget(actual, yardstick[name], oracle[name], f"gradient of {name}")


@every(dtype=FLOATS, dropout_p=[0.0, 0.5], value=[1.0, torch.inf, torch.nan])
def test_rows_that_see_no_key_have_no_gradient(dtype: torch.dtype, dropout_p: float, value: float) -> None:
    """Whatever comes in for them, even what is not a number; and none through their masks."""
    scores, mask = scores_of(2, 3, 9, 33, dtype=dtype), torch.zeros(9, 33)
    mask[3], padding = -torch.inf, torch.tensor([[True], [False]]).expand(2, 33)
    scores[0, 0, 5] = -torch.inf
    grad = randn(2, 3, 9, 33, dtype=dtype)
    dead = torch.zeros(2, 3, 9, dtype=torch.bool)
    dead[1], dead[:, :, 3], dead[0, 0, 5] = True, True, True
    grad[dead] = value
    options: dict[str, Any] = {"attn_mask": mask, "key_padding_mask": padding, "head_mask": randn(2, 3, 1, 1)}
    got = gradients(causal_softmax, scores, grad, **options, dropout_p=dropout_p, rng=RNG)
    assert not got["scores"][dead].any() and got["scores"][~dead].isfinite().all() and got["scores"].any()
    assert not got["attn_mask"][3].any() and got["attn_mask"].isfinite().all()
    assert not got["head_mask"][1].any() and got["head_mask"].isfinite().all()
    more_queries = gradients(
        causal_softmax, scores_of(1, 1, 9, 4, dtype=dtype), torch.full((1, 1, 9, 4), value).to(dtype)
    )
    assert not more_queries["scores"][0, 0, :5].any()


@every(dtype=FLOATS)
def test_nothing_above_the_diagonal_is_read(dtype: torch.dtype) -> None:
    scores, grad = scores_of(*SHAPE, dtype=dtype), randn(*SHAPE, dtype=dtype, seed=1)
    expected = gradients(causal_softmax, scores, grad, head_mask=randn(H))
    hidden = above_diagonal(scores)
    got = gradients(
        causal_softmax, scores.masked_fill(hidden, torch.nan), grad.masked_fill(hidden, torch.nan), head_mask=randn(H)
    )
    assert all(torch.equal(got[name], expected[name]) for name in got)


@every(shape=[(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_lengths_of_zero(shape: tuple[int, ...]) -> None:
    options = {"attn_mask": randn(*shape[1:]), "head_mask": randn(shape[1])}
    got = gradients(causal_softmax, randn(*shape), randn(*shape), **options)
    assert got["scores"].shape == shape and not got["attn_mask"].any() and not got["head_mask"].any()
