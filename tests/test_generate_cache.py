"""Caches that outlive a run: turns, crops, forks; and positions behind the trained ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from cache_cases import assert_same, contents
from generate_cases import ends, generated, prompts, talkers, theirs_generates
from model_cases import FAMILIES, LAYERS, batch

from neox_kernels.models import KVCache

NEW: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": ()}


def after(sequences: Tensor, seed: int = 9) -> Tensor:
    """The next turn's prompt: the sequences so far, and four tokens more."""
    return torch.cat((sequences, batch(seed=seed, rows=len(sequences))["input_ids"][:, :4]), 1)


@pytest.mark.parametrize("max_length", [None, 60, "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_one_run(family: str, max_length: Any) -> None:
    """Of three turns each runs its new tokens only."""
    _, ours = talkers(family)
    tokens, run = batch()["input_ids"], []
    cache = None if max_length == "own" else KVCache(max_length)
    ours.register_forward_pre_hook(lambda _, args, kwargs: run.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    for turn in range(3):
        fresh = ours.generate(tokens, **NEW)
        run.clear()
        output = generated(ours, input_ids=tokens, past_key_values=cache, **NEW)
        assert torch.equal(output.sequences, fresh)
        assert run == [tokens.shape[1] if not turn else 5, *[1] * 5]
        assert cache is None or output.past_key_values is cache
        cache = output.past_key_values
        assert isinstance(cache, KVCache) and cache.length == fresh.shape[1] - 1
        tokens = after(fresh)


@pytest.mark.parametrize("padding", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_padded_batch(family: str, padding: str) -> None:
    """Rows that ended before others have padding between the turns; each row is what it is alone."""
    _, ours = talkers(family)
    inputs = prompts(padding)
    eos = ends(ours, inputs)
    first = generated(ours, **inputs, max_new_tokens=9, eos_token_id=eos)
    new = first.sequences[:, 13:]
    before = torch.isin(new, torch.tensor(eos)).cumsum(1) - torch.isin(new, torch.tensor(eos)).long()
    extra = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])  # the second prompts are padded too
    mask = torch.cat((inputs["attention_mask"], (before == 0).long(), extra), 1)
    assert (before > 0).any()
    tokens = after(first.sequences)
    cache = copy.deepcopy(first.past_key_values)
    for changes in ({}, {"num_beams": 3}):
        expected = ours.generate(tokens, mask, max_new_tokens=7, eos_token_id=eos, **changes)
        got = ours.generate(
            tokens, mask, past_key_values=copy.deepcopy(cache), max_new_tokens=7, eos_token_id=eos, **changes
        )
        assert torch.equal(got, expected)
        for row in range(3):
            seen = tokens[row][mask[row].bool()][None]
            alone = ours.generate(seen, max_new_tokens=7, eos_token_id=eos, **changes)[0, seen.shape[1] :]
            assert torch.equal(got[row, tokens.shape[1] :][: len(alone)], alone)


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_crop_and_go_on(family: str, max_length: int | None) -> None:
    """Back to within the first turn, and another way from there."""
    _, ours = talkers(family)
    cache, tokens = KVCache(max_length), batch()["input_ids"]
    ours.generate(tokens, past_key_values=cache, **NEW)
    for keep in (13, 9, 1, 0):
        cache.crop(keep)
        other = torch.cat((tokens[:, :keep], batch(seed=5)["input_ids"][:, keep:]), 1) if keep < 13 else after(tokens)
        assert torch.equal(ours.generate(other, past_key_values=cache, **NEW), ours.generate(other, **NEW))
        cache.crop(keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_forks(family: str) -> None:
    """Two ways from one prompt: neither sees the other, and the prompt's cache stays as it was."""
    _, ours = talkers(family)
    tokens = batch()["input_ids"]
    first = generated(ours, input_ids=tokens, **NEW)
    kept = contents(first.past_key_values)
    ways = [after(first.sequences, seed) for seed in (3, 4)]
    forks = [copy.deepcopy(first.past_key_values) for _ in ways]
    streams = [ours.stream(way, past_key_values=fork, **NEW) for way, fork in zip(ways, forks, strict=True)]
    columns = list(zip(*streams, strict=True))  # step by step in turns
    for way, column in zip(ways, zip(*columns, strict=True), strict=True):
        assert torch.equal(torch.stack(column, 1), ours.generate(way, **NEW)[:, way.shape[1] :])
    assert_same(contents(first.past_key_values), kept)
    many = ours.generate(
        ways[0], past_key_values=first.past_key_values, do_sample=True, seed=1, num_return_sequences=4, **NEW
    )
    assert torch.equal(many, ours.generate(ways[0], do_sample=True, seed=1, num_return_sequences=4, **NEW))
    drawn = generated(ours, input_ids=tokens, do_sample=True, seed=1, num_return_sequences=4, **NEW)
    further = after(drawn.sequences)
    expected = ours.generate(further, max_new_tokens=20, eos_token_id=())
    assert torch.equal(
        ours.generate(further, past_key_values=drawn.past_key_values, max_new_tokens=20, eos_token_id=()), expected
    )
    first.past_key_values.crop(kept[0])
    assert_same(contents(first.past_key_values), kept)


def test_older_caches_and_embeddings() -> None:
    """(key, value) of each layer are continued uncopied and unwritten; embeddings are whole prompts, too."""
    _, ours = talkers("GPTJ")
    tokens, cache = batch()["input_ids"], KVCache()
    with torch.no_grad():
        ours(tokens[:, :8], past_key_values=cache)
    pairs = cache.to_tuple()
    kept = contents(cache)
    expected = ours.generate(tokens, **NEW)
    assert torch.equal(ours.generate(tokens, past_key_values=pairs, **NEW), expected)
    assert_same(contents(cache), kept)
    embeds = ours.get_input_embeddings()(tokens)
    assert torch.equal(ours.generate(inputs_embeds=embeds, past_key_values=cache, **NEW), expected[:, 13:])


@torch.no_grad()
def test_the_cache_is_made_once() -> None:
    """One buffer a layer for the whole run; a later turn may grow it."""
    _, ours = talkers("GPTNeoX")
    tokens, places = batch()["input_ids"], []
    stream = ours.stream(tokens, max_new_tokens=30, eos_token_id=(), past_key_values=(cache := KVCache(42)))
    for _ in stream:
        places.append([x.data_ptr() for i in range(LAYERS) for x in (cache.keys(i), cache.values(i))])
    assert len(places) == 30 and all(place == places[0] for place in places) and cache.length == 42
    output = generated(ours, input_ids=tokens, max_new_tokens=30, eos_token_id=())
    own = output.past_key_values
    assert [own._keys[i].shape[1] for i in range(LAYERS)] == [42] * LAYERS and own.max_length is None


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_positions_go_on(name: str, padding: str) -> None:
    """Behind max_position_embeddings, as in transformers."""
    theirs, ours = talkers("GPTNeoX", rope_scaling=SCALINGS[name], max_position_embeddings=16)
    inputs = batch(padding)
    changes = {"max_new_tokens": 24, "eos_token_id": [5]}
    assert torch.equal(ours.generate(**inputs, **changes), theirs_generates(theirs, inputs, **changes))
    assert torch.equal(
        ours.generate(**inputs, eos_token_id=()), ours.generate(**inputs, eos_token_id=(), max_length=33)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_unscaled_positions_end(family: str) -> None:
    """The last token is not run, and padding has no position; the default goes as far as it can."""
    name = "max_position_embeddings" if family == "GPTNeoX" else "n_positions"
    theirs, ours = talkers(family, **{name: 16})
    tokens, left = batch()["input_ids"], batch("left", rows=6)
    assert ours.generate(tokens, max_new_tokens=4, eos_token_id=()).shape[1] == 17
    default = theirs_generates(theirs, {"input_ids": tokens}, eos_token_id=None)
    assert torch.equal(ours.generate(tokens, eos_token_id=()), default) and default.shape[1] == 16
    only = {name: x[1:3] for name, x in left.items()}  # nine tokens and six
    assert ours.generate(**only, max_new_tokens=8, eos_token_id=()).shape[1] == 21
    cache = KVCache()
    for inputs, new in (({"input_ids": tokens}, 5), (only, 9), (left, 5)):
        for changes in ({}, {"num_beams": 2}):
            with pytest.raises(
                ValueError, match=r"17 positions, more than the 16 of .* max_position_embeddings, which"
            ):
                ours.generate(**inputs, max_new_tokens=new, past_key_values=cache, eos_token_id=(), **changes)
    assert cache.length == 0


def test_dynamic_scaling() -> None:
    """Its tables change with the length: only a run without a cache is what transformers has without one."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    theirs, ours = talkers("GPTNeoX", rope_scaling=scaling, max_position_embeddings=16)
    inputs = batch()
    changes: dict[str, Any] = {"max_new_tokens": 14, "eos_token_id": ()}
    expected = theirs_generates(theirs, inputs, **{**changes, "eos_token_id": None}, use_cache=False)
    assert torch.equal(ours.generate(**inputs, **changes, use_cache=False), expected)
    short = theirs_generates(theirs, inputs, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=4, eos_token_id=()), short)
    with pytest.raises(ValueError, match=r"26 positions, .*16 of .* only be run with use_cache=False .* dynamic"):
        ours.generate(**inputs, **changes)
    with pytest.raises(ValueError, match="only be run without padding"):
        ours.generate(**batch("left"), **changes, use_cache=False)
