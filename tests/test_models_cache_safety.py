"""KVCache: what is refused or fails changes nothing, copies are apart, and what others hold is never written."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from cache_cases import assert_same, contents, filled, gradients, in_chunks
from model_cases import FAMILIES, HEADS, WIDTH, batch, pair
from transformers import DynamicCache

from neox_kernels.models import KVCache


@pytest.mark.parametrize("max_length", [None, 13])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_refused_changes_nothing(family: str, max_length: int | None) -> None:
    _, ours = pair(family)
    tokens = batch()["input_ids"]
    more = tokens[:, 9:]
    bad: list[dict[str, Any]] = [
        {"input_ids": more[:2]},
        {"input_ids": more, "attention_mask": torch.ones(3, 4)},
        {"input_ids": more, "attention_mask": torch.full((3, 13), 2)},
        {"input_ids": more, "attention_mask": torch.ones(3, 1, 4, 4)},
        {"input_ids": more, "attention_mask": torch.ones(3, 1, 4, 13, dtype=torch.long)},
        {"input_ids": more, "head_mask": torch.ones(HEADS + 1)},
        {"input_ids": more, "head_mask": [torch.ones(HEADS)]},
        {"input_ids": more, "position_ids": torch.zeros(3, 13, dtype=torch.long)},
        {"input_ids": more, "position_ids": torch.full((3, 4), -1)},
        {"input_ids": more, "labels": torch.zeros(3, 5, dtype=torch.long)},
        {"input_ids": more, "labels": torch.full((3, 4), 1000)},
        {"input_ids": more + 100},
        {"input_ids": more.double()},
        {"inputs_embeds": torch.zeros(3, 4, WIDTH + 1)},
        {"inputs_embeds": torch.zeros(3, 4, WIDTH, dtype=torch.float64)},
    ]
    if max_length is not None:
        bad += [{"input_ids": tokens[:, :5]}, {"input_ids": tokens}]
    for length in (9, 0):  # of a cache with tokens, and of a new one
        for arguments in bad if length else bad[4:11]:  # the others are right for a new one, or say other tokens
            cache = filled(ours, tokens[:, :length], max_length) if length else KVCache(max_length)
            before = contents(cache)
            with pytest.raises((ValueError, TypeError, IndexError)):
                ours(**arguments, past_key_values=cache)
            assert_same(contents(cache), before)
            if length:
                undisturbed = ours(more, past_key_values=filled(ours, tokens[:, :length], max_length)).logits
                assert torch.equal(ours(more, past_key_values=cache).logits, undisturbed)
            else:  # and it takes another batch
                assert ours(more[:2], past_key_values=cache).past_key_values.batch == 2


@pytest.mark.parametrize("max_length", [None, 13])
@torch.no_grad()
def test_a_failure_within_the_layers_changes_nothing(max_length: int | None) -> None:
    _, ours = pair("GPTNeoX")
    tokens = batch()["input_ids"]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for length in (0, 9):
        cache = filled(ours, tokens[:, :length], max_length) if length else KVCache(max_length)
        before = contents(cache)
        handle = ours.gpt_neox.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            ours(tokens[:, length:], past_key_values=cache)
        handle.remove()
        assert_same(contents(cache), before)
        fresh = filled(ours, tokens[:, :length], max_length) if length else KVCache(max_length)
        rest = tokens[:, length:]
        assert torch.equal(ours(rest, past_key_values=cache).logits, ours(rest, past_key_values=fresh).logits)


@pytest.mark.parametrize("max_length", [None, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cropped_cache_writes_only_what_is_its_own(family: str, max_length: int | None) -> None:
    """Not what hooks have kept, not a tuple that was given, not what autograd needs."""
    _, ours = pair(family)
    tokens, other = batch()["input_ids"], batch(seed=2)["input_ids"]
    kept: list[tuple[Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda *given: kept.append((given[2], given[2].detach().clone())))
        for name, module in ours.named_modules()
        if name.endswith(("query_key_value", "q_proj", "k_proj", "v_proj"))
    ]
    with torch.no_grad():
        cache = filled(ours, tokens, max_length)
        given = tuple((k.clone(), v.clone()) for k, v in cache.to_tuple())
        for past in (cache, KVCache.from_tuple(given)):
            past.crop(3)
            ours(other[:, :4], past_key_values=past)
    assert kept and all(torch.equal(x, copied) for x, copied in kept)
    for x, y in zip(itertools.chain(*given), itertools.chain(*filled(ours, tokens).to_tuple()), strict=True):
        assert torch.equal(x, y)
    for handle in handles:
        handle.remove()

    expected = gradients(ours, tokens, (13,), max_length)
    ours.zero_grad()
    cache = KVCache(13 if max_length else None)
    logits = ours(tokens, past_key_values=cache).logits
    with torch.no_grad():
        cache.crop(3)
        ours(other[:, :4], past_key_values=cache)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("max_length", [None, 30])
@pytest.mark.parametrize("with_graph", [False, True])
def test_copies_go_their_own_ways(max_length: int | None, with_graph: bool) -> None:
    _, ours = pair("GPTNeoX")
    tokens, other = batch()["input_ids"], batch(seed=2)["input_ids"]
    with torch.set_grad_enabled(with_graph):
        cache = filled(ours, tokens, max_length)
    with torch.no_grad():
        forks = [copy.deepcopy(cache) for _ in range(2)]
        before = contents(cache)
        for start in range(0, 9, 3):  # turn by turn
            rows = [tokens[:, start : start + 3], other[:, start : start + 3]]
            got = [ours(x, past_key_values=fork).logits for x, fork in zip(rows, forks, strict=True)]
        assert_same(contents(cache), before)
        for x, logits in ((tokens, got[0]), (other, got[1])):
            alone = filled(ours, tokens, max_length)
            expected = [ours(x[:, start : start + 3], past_key_values=alone).logits for start in range(0, 9, 3)]
            assert torch.equal(logits, expected[-1])


def test_a_cache_of_inference_mode_goes_on_outside() -> None:
    _, ours = pair("GPTJ")
    tokens = batch()["input_ids"]
    for max_length in (None, 13):
        with torch.inference_mode():
            cache = KVCache(max_length)
            for part in (tokens[:, :4], tokens[:, 4:9]):
                ours(part, past_key_values=cache)
        with torch.no_grad():
            alone = in_chunks(ours, {"input_ids": tokens}, (4, 5, 4), KVCache(max_length))[0][:, 9:]
            assert torch.equal(ours(tokens[:, 9:], past_key_values=copy.deepcopy(cache)).logits, alone)
        logits = ours(tokens[:, 9:], past_key_values=cache).logits  # with a gradient
        assert torch.equal(logits, alone)
        logits.sum().backward()
        assert all(x.grad.isfinite().all() for x in ours.parameters())


@torch.no_grad()
def test_caches_of_other_models_are_refused() -> None:
    _, ours = pair("GPTNeoX")
    tokens = batch()["input_ids"]
    pairs = filled(ours, tokens).to_tuple()
    cases: list[tuple[Any, type[Exception], str]] = [
        (pairs[:1], ValueError, "past_key_values holds 1 layers, and the model has 2"),
        (tuple((k[:, :2], v[:, :2]) for k, v in pairs), ValueError, r"\(nheads, head_dim\) of \(2, 16\)"),
        (tuple((k.double(), v.double()) for k, v in pairs), TypeError, "past_key_values holds torch.float64"),
        (tuple((k[:, :, 1:], v) for k, v in pairs), ValueError, "past_key_values must be of one shape"),
        (tuple((k[0], v[0]) for k, v in pairs), ValueError, "past_key_values must be of one shape"),
        (tuple((k, v, v) for k, v in pairs), TypeError, r"past_key_values must hold \(key, value\)"),
        (DynamicCache(), TypeError, "past_key_values must be a KVCache.*DynamicCache"),
        (torch.zeros(2), TypeError, "past_key_values must be a KVCache"),
    ]
    for past, error, message in cases:
        with pytest.raises(error, match=message):
            ours(tokens, past_key_values=past)
    with pytest.raises(ValueError, match="max_length must be at least the 13 tokens of past_key_values, not 5"):
        KVCache.from_tuple(pairs, max_length=5)
    with pytest.raises(ValueError, match="max_length must not be negative"):
        KVCache(-1)
