"""Dropout of the causal softmax: which elements are kept is one function of seed, offset and place, everywhere."""

import itertools
import math
from typing import Any

import pytest
import torch
from softmax_checks import FLOATS, SCALE, chance, every, expect, randn, same_bits, scores_of, softmax
from torch import Tensor

from neox_kernels import causal_softmax, reference, use_backend
from neox_kernels.reference.dropout import _philox, dropout_keep
from neox_kernels.testing import assert_within_budget, eager_causal_softmax, to_float64

RNG = torch.tensor([0x0123456789ABCDEF, 0x0F1E2D3C4B5A6978])

# Counter, key and result of Random123's published vectors for philox4x32-10.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@every(counter_key_result=KNOWN)
def test_philox_gives_the_published_numbers(counter_key_result: tuple[str, str, str]) -> None:
    counter, key, result = (words(text) for text in counter_key_result)
    k0, k1, *numbers = map(torch.tensor, (*key, *counter))
    assert [int(word) for word in _philox((k0, k1), tuple(numbers))] == result


def kept(p: float, rng: Tensor, *shape: int, **options: Any) -> Tensor:
    """What is not dropped of probabilities that are all above zero."""
    return causal_softmax(torch.zeros(shape), causal=False, dropout_p=p, rng=rng, **options) != 0


def test_the_first_words_are_the_published_ones(every_isa: str) -> None:
    """A word is dropped by the next higher threshold, not by its own: so every bit of it is seen."""
    for column, word in enumerate(words(KNOWN[0][2])):
        for threshold, keeps in ((word, True), (word + 1, False)):
            assert bool(kept(threshold / 2**32, torch.zeros(2, dtype=torch.int64), 1, 1, 1, 4)[..., column]) == keeps


SEEDS = ((0, 0), (1, 0), (0, 1), (-1, -1), (2**63 - 1, 2**63 - 1), (-(2**63), 2**32), (2**32, 2**31), (-5, 3))


@every(p=[0.1, 0.5, 0.9, 2**-32, 1 - 2**-32, 1 - 2**-53])
def test_every_backend_keeps_the_same(every_isa: str, p: float) -> None:
    for seed, shape in itertools.product(SEEDS, ((2, 3, 5, 67), (1, 1, 1, 1), (3, 1, 2, 63), (1, 2, 1, 130))):
        rng = torch.tensor(seed)
        expected = dropout_keep(rng, p, shape)
        assert torch.equal(kept(p, rng, *shape), expected)
        assert torch.equal(kept(p, rng, *shape, dtype=torch.bfloat16), expected)


def test_seed_offset_and_place_decide() -> None:
    masks = [dropout_keep(torch.tensor(seed), 0.5, (2, 3, 5, 67)).flatten() for seed in SEEDS[:5]]
    masks += [masks[0].view(-1, 67)[1:].flatten(), masks[0].view(-1, 67)[:, 4:].flatten()]  # other rows, other columns
    for a, b in itertools.combinations(masks, 2):
        n = min(len(a), len(b))
        assert abs(int((a[:n] == b[:n]).sum()) - n / 2) < 5 * math.sqrt(n / 4), "two that should be independent"
    # The seed's 64 bits count, and of the offset the lower 32.
    rngs = [torch.tensor(pair) for pair in ((1, 7), (1 + 2**32, 7), (1, 7 + 2**32), (1, 7 + 2**31))]
    first, other_seed, same, other_offset = (dropout_keep(rng, 0.5, (1, 1, 9, 99)) for rng in rngs)
    assert torch.equal(first, same) and not torch.equal(first, other_seed) and not torch.equal(first, other_offset)


@every(p=[0.05, 0.3, 0.5, 0.95])
def test_the_rate_is_the_probability(every_isa: str, p: float) -> None:
    keep = kept(p, RNG, 2, 4, 64, 1000)
    deviation = 5 * math.sqrt(p * (1 - p))
    assert abs(float(keep.double().mean()) - (1 - p)) < deviation / math.sqrt(keep.numel())
    for dim in (2, 3):  # no row or column is special
        n = keep.numel() // keep.shape[dim]
        rates = keep.double().mean([d for d in range(4) if d != dim])
        assert float((rates - (1 - p)).abs().max()) < deviation / math.sqrt(n)


def test_it_follows_the_generator_and_differs_between_calls(every_isa: str) -> None:
    x = scores_of(2, 3, 9, 33)

    def three_calls() -> list[Tensor]:
        torch.manual_seed(5)
        return [causal_softmax(x, dropout_p=0.5) for _ in range(3)]

    first, again = three_calls(), three_calls()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))
    with use_backend("reference"):
        there = three_calls()
    assert all(torch.equal(a != 0, b != 0) for a, b in zip(first, there, strict=True)), "another mask elsewhere"


@every(dtype=FLOATS)
def test_no_dropout_is_the_plain_op(every_isa: str, dtype: torch.dtype) -> None:
    x = scores_of(2, 3, 9, 33, dtype=dtype)
    expected, state = causal_softmax(x), torch.get_rng_state()
    for p in (0.0, 0, -0.0):
        assert same_bits(causal_softmax(x, dropout_p=p), expected)
        assert same_bits(causal_softmax(x, dropout_p=p, rng=RNG), expected)
    assert torch.equal(torch.get_rng_state(), state), "the generator was asked for nothing"
    for p in (5e-324, 1e-300, 2**-33):  # less than a word's last bit drops nothing
        softmax(x, expect(x), dropout_p=p)


@every(dtype=FLOATS)
def test_all_dropped_is_zero(every_isa: str, dtype: torch.dtype) -> None:
    x = scores_of(2, 3, 9, 33, dtype=dtype)
    x[0, 0, 3, 2] = torch.nan
    x.requires_grad_()
    for p in (1.0, 1):
        y = causal_softmax(x, dropout_p=p)
        assert not y.any(), "of a row of NaN too"
        assert not torch.autograd.grad(y, x, randn(*x.shape, dtype=dtype))[0][1].any()


PADDING = torch.stack([torch.arange(67) >= 0, torch.arange(67) > 4, (torch.arange(67) > 17) & (torch.arange(67) < 51)])
PADDINGS = {"none": None, "from odd columns": PADDING, "with holes": PADDING & chance(3, 67)}


@every(dtype=FLOATS, padding=PADDINGS, lengths=[(9, 67), (1, 67), (67, 31)])
def test_the_kept_are_scaled(every_isa: str, lengths: tuple[int, int], padding: str, dtype: torch.dtype) -> None:
    scores, p = scores_of(3, 8, *lengths, dtype=dtype), 0.3
    options: dict[str, Any] = {"scale": SCALE, "head_mask": randn(8) + 3, "attn_mask": randn(*lengths)}
    if padding != "none":
        options["key_padding_mask"] = PADDINGS[padding][:, : lengths[1]]  # type: ignore[index]
    keep = dropout_keep(RNG, p, scores.shape)
    whole = reference.causal_softmax(scores.double(), **to_float64(options))
    oracle = torch.where(keep, whole / (1 - p), 0)
    eager = eager_causal_softmax(scores, **options).nan_to_num()  # rows that see nothing
    eager = torch.where(keep, eager / (1 - p), 0)
    y = causal_softmax(scores, **options, dropout_p=p, rng=RNG)
    assert_within_budget(y, eager, oracle)
    assert torch.equal(y != 0, (causal_softmax(scores, **options) != 0) & keep)
    assert same_bits(causal_softmax(scores.clone(), **options, dropout_p=p, rng=RNG, inplace=True), y)


@every(padding=["none", "from odd columns"], head_mask=[None, randn(2) + 2])
def test_backward_drops_the_same(every_isa: str, padding: str, head_mask: Tensor | None) -> None:
    scores = scores_of(3, 2, 9, 67).requires_grad_()
    options = {"key_padding_mask": PADDINGS[padding], "head_mask": head_mask, "dropout_p": 0.4, "rng": RNG}
    y = causal_softmax(scores, **options)
    keep, grad = dropout_keep(RNG, 0.4, scores.shape), randn(*scores.shape)
    dropped, kept_only, whole = (
        torch.autograd.grad(y, scores, g, retain_graph=True)[0] for g in (grad * ~keep, grad * keep, grad)
    )
    assert not dropped.any(), "the gradient of what was dropped has come through"
    assert whole.any() and torch.equal(whole, kept_only)


def test_rng_of_any_stride_is_only_read(every_isa: str) -> None:
    x, strided = scores_of(2, 3, 9, 33), torch.stack((RNG, RNG + 1), 1)[:, 0]
    expected, before = causal_softmax(x, dropout_p=0.5, rng=RNG), RNG.clone()
    assert torch.equal(causal_softmax(x, dropout_p=0.5, rng=strided), expected)
    assert torch.equal(RNG, before)


def test_one_thread_or_two_drop_the_same(every_isa: str) -> None:
    if every_isa == "reference":
        pytest.skip("it is PyTorch's own")
    x, threads, results = scores_of(2, 3, 65, 201).requires_grad_(), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y = causal_softmax(x, dropout_p=0.5, rng=RNG)
            results.append((y, *torch.autograd.grad(y, x, x.detach())))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*results, strict=True))
