"""KVCache: what continues equals what runs at once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from cache_cases import assert_same, contents, filled, gradients, in_chunks, positioned
from model_cases import FAMILIES, HEADS, LAYERS, WIDTH, Errors, batch, in_float64, pair
from transformers import DynamicCache

from neox_kernels.models import KVCache

DTYPES = (torch.float32, torch.bfloat16)
IMPLEMENTATIONS = ("eager", "fused", "sdpa", "auto")
CHUNKS: dict[str, tuple[int, ...]] = {
    "one by one": (1,) * 13,
    "prompt, then tokens": (9, 1, 1, 1, 1),
    "ragged": (2, 5, 1, 4, 1),
    "halves": (6, 7),
}
HEAD_DIM = WIDTH // HEADS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_chunks_against_transformers(family: str, chunks: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(family, dtype=dtype)
    exact, errors = in_float64(theirs), Errors()
    for padding, seed in itertools.product(("none", "left", "both"), range(2)):
        inputs = positioned(padding, seed)
        seen = inputs.get("attention_mask", torch.ones(3, 13)).bool()
        truth = exact(**inputs).logits[seen]
        same = in_chunks(theirs, inputs, CHUNKS[chunks], DynamicCache())[0][seen]
        for implementation in IMPLEMENTATIONS:
            ours.attn_implementation = implementation
            got, cache = in_chunks(ours, inputs, CHUNKS[chunks], KVCache(None if seed else 13))
            errors.add(implementation, got[seen].to(dtype), same, truth)
            assert cache.get_seq_length() == cache.length == 13
    errors.check()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_way_to_hold_a_cache_changes_no_bit(family: str) -> None:
    """Growing, preallocated, preallocated for more, with graph, as a tuple each time: the same numbers exactly."""
    _, ours = pair(family)
    ours.attn_implementation = "sdpa"  # auto takes another without a graph
    inputs, sizes = positioned("left"), CHUNKS["ragged"]
    first, cache = in_chunks(ours, inputs, sizes, KVCache())
    others = [in_chunks(ours, inputs, sizes, KVCache(length)) for length in (13, 40)]
    others.append(in_chunks(ours, inputs, sizes, None))
    with torch.enable_grad():
        others += [in_chunks(ours, inputs, sizes, KVCache(length)) for length in (None, 13)]
    assert others[-1][0].requires_grad and not first.requires_grad
    for logits, other in others:
        assert torch.equal(logits, first)
        for x, y in zip(itertools.chain(*other.to_tuple()), itertools.chain(*cache.to_tuple()), strict=True):
            assert torch.equal(x, y)
    again = ours(**batch(), past_key_values=None).past_key_values
    assert isinstance(again, KVCache) and again is not cache
    assert ours(**batch(), use_cache=False).past_key_values is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tuples_both_ways(family: str, dtype: torch.dtype) -> None:
    """Our cache continues in transformers, and transformers' in ours, as the tuple of its layers."""
    theirs, ours = pair(family, dtype=dtype)
    exact, errors = in_float64(theirs), Errors()
    for seed in range(6):
        tokens = batch(seed=seed)["input_ids"]
        head, tail = tokens[:, :9], tokens[:, 9:]
        truth, past = exact(tokens).logits[:, 9:], theirs(head).past_key_values
        pairs = tuple((layer.keys.clone(), layer.values.clone()) for layer in past.layers)
        kept = copy.deepcopy(pairs)
        same = theirs(tail, past_key_values=past).logits
        made = ours(head).past_key_values.to_tuple()
        assert len(made) == LAYERS and {x.shape for x in itertools.chain(*made)} == {(3, HEADS, 9, HEAD_DIM)}
        for x, y in zip(itertools.chain(*made), itertools.chain(*pairs), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
        there = theirs(tail, past_key_values=DynamicCache(made)).logits
        errors.add("ours in theirs", there, same, truth)
        for given in (pairs, list(pairs), KVCache.from_tuple(pairs), KVCache.from_tuple(pairs, max_length=20)):
            output = ours(tail, past_key_values=given)
            errors.add("theirs in ours", output.logits.to(dtype), same, truth)
            assert output.past_key_values.length == 13
        for x, y in zip(itertools.chain(*pairs), itertools.chain(*kept), strict=True):
            assert torch.equal(x, y)  # what was given is not written
    errors.check()
    assert KVCache.from_tuple(()).length == 0 and KVCache().to_tuple() == ()


@pytest.mark.parametrize("max_length", [None, 30])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_crop_and_reset(family: str, max_length: int | None) -> None:
    theirs, ours = pair(family)
    exact, errors = in_float64(theirs), Errors()
    tokens, other = batch()["input_ids"], batch(seed=2)["input_ids"][:, :5]
    for length, left in ((6, 6), (-7, 6), (13, 13), (1, 1), (-1, 12), (0, 0), (-13, 0)):
        cache = filled(ours, tokens, max_length)
        cache.crop(length)
        assert cache.length == left
        whole = torch.cat((tokens[:, :left], other), dim=1)
        same, truth = theirs(whole).logits[:, left:], exact(whole).logits[:, left:]
        for _ in range(2):  # and again from the same place
            errors.add(f"crop({length})", ours(other, past_key_values=cache).logits, same, truth)
            cache.crop(-5)
    errors.check()
    cache = filled(ours, tokens, max_length)
    for rows in (3, 2):  # another batch too
        cache.reset()
        assert (cache.length, cache.num_layers, cache.batch, cache.to_tuple()) == (0, 0, None, ())
        fresh = KVCache(max_length)
        for _ in range(2):
            assert torch.equal(*(ours(other[:rows], past_key_values=x).logits for x in (cache, fresh)))
    for bad in (11, -11):
        with pytest.raises(ValueError, match=rf"length must be between -10 and 10, not {bad}"):
            cache.crop(bad)
        assert cache.length == 10


@pytest.mark.parametrize("max_length", [None, 30])
@torch.no_grad()
def test_reorder_and_repeat(max_length: int | None) -> None:
    """Against caches of tokens that were reordered and repeated from the start."""
    _, ours = pair("GPTJ")
    tokens, more = batch()["input_ids"], batch(seed=2, rows=6)["input_ids"][:, :2]
    cases: list[tuple[Callable[[KVCache], None], list[int]]] = [
        (lambda cache: cache.reorder(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.reorder(torch.tensor([1], dtype=torch.int32)), [1]),
        (lambda cache: cache.repeat(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.repeat(1), [0, 1, 2]),
    ]
    for change, rows in cases:
        cache = filled(ours, tokens, max_length)
        change(cache)
        assert cache.batch == len(rows) and cache.length == 13
        for changed, fresh in zip(cache.to_tuple(), filled(ours, tokens).to_tuple(), strict=True):
            assert all(torch.equal(x, y[rows]) for x, y in zip(changed, fresh, strict=True))
        expected = ours(more[: len(rows)], past_key_values=filled(ours, tokens[rows], max_length)).logits
        assert torch.equal(ours(more[: len(rows)], past_key_values=cache).logits, expected)
    before = contents(cache)
    for call, error in (
        (lambda: cache.reorder(torch.tensor([3])), IndexError),
        (lambda: cache.reorder(torch.tensor([[0]])), ValueError),
        (lambda: cache.reorder(torch.tensor([0.0])), ValueError),
        (lambda: cache.repeat(0), ValueError),
    ):
        with pytest.raises(error):
            call()
        assert_same(contents(cache), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_chunks(family: str, implementation: str) -> None:
    theirs, ours = pair(family)
    exact, errors = in_float64(theirs), Errors()
    ours.attn_implementation = implementation
    for seed in range(3):
        tokens = batch(seed=seed)["input_ids"]
        truth, same = gradients_of_theirs(exact, tokens), gradients_of_theirs(theirs, tokens)
        for max_length, sizes in itertools.product((None, 13), ((13,), (6, 7), (6, 1, 6))):
            for name, gradient in gradients(ours, tokens, sizes, max_length).items():
                errors.add(name, gradient, same[name], truth[name])
    errors.check()


def gradients_of_theirs(theirs: Any, tokens: Tensor) -> dict[str, Tensor]:
    theirs.zero_grad()
    logits = theirs(tokens).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: x.grad.clone() for name, x in theirs.named_parameters()}


@pytest.mark.parametrize("max_length", [None, 13])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_prefix_before_a_frozen_model(family: str, max_length: int | None) -> None:
    """Prefix tuning: only the past requires a gradient."""
    theirs, ours = pair(family)
    exact, errors = in_float64(theirs), Errors()
    for model in (theirs, ours, exact):
        model.requires_grad_(False)
    for seed in range(4):
        tokens, generator = batch(seed=seed)["input_ids"][:, :9], torch.Generator().manual_seed(seed)
        prefix = torch.randn(LAYERS, 2, 3, HEADS, 4, HEAD_DIM, generator=generator)
        found = []
        for model, x in ((ours, prefix), (theirs, prefix), (exact, prefix.double())):
            x = x.clone().requires_grad_()
            pairs = tuple((layer[0], layer[1]) for layer in x)
            past = KVCache.from_tuple(pairs, max_length) if model is ours else DynamicCache(pairs)
            model(tokens, past_key_values=past).logits.square().sum().backward()
            found.append(x.grad)
        errors.add("prefix", *found)
    errors.check()
