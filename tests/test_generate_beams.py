"""Beam search: transformers' sequences and scores, and a beam is what it would be from scratch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from generate_cases import ends, generated, talkers, theirs_generates
from model_cases import FAMILIES, PAD, VOCAB, batch

from neox_kernels.models import KVCache

NEW = 12
ON = dict.fromkeys(("return_dict_in_generate", "output_scores"), True)


def assert_same(ours: Any, theirs: Any, inputs: dict[str, torch.Tensor], **changes: Any) -> torch.Tensor:
    """Sequences, their scores and where they came from; the lengths that came."""
    expected = theirs_generates(theirs, inputs, **changes, **ON)
    output = ours.generate(**inputs, **changes, **ON)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.beam_indices, expected.beam_indices.long())
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    assert len(output.scores) == len(expected.scores)
    return (expected.beam_indices >= 0).sum(1)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_against_transformers(length_penalty: float, early_stopping: bool | str) -> None:
    lengths = set()
    for seed, family in itertools.product(range(2), FAMILIES):
        theirs, ours = talkers(family)
        inputs = batch(("none", "left")[seed], seed, rows=2)
        eos = ends(ours, inputs, num_beams=4)
        for beams, several in ((2, 1), (4, 4)):
            for tokens in (eos[several // 4], [*eos, *range(0, VOCAB - 1, 6)]):
                found = assert_same(
                    ours,
                    theirs,
                    inputs,
                    num_beams=beams,
                    num_return_sequences=several,
                    max_new_tokens=NEW,
                    length_penalty=length_penalty,
                    early_stopping=early_stopping,
                    eos_token_id=tokens,
                )
                lengths.update(found.tolist())
    longest_wins = length_penalty == 2 and early_stopping == "never"
    assert longest_wins or len(lengths) > 3, "beams that end at one length only prove little"


@pytest.mark.parametrize("family", FAMILIES)
def test_with_what_changes_scores(family: str) -> None:
    """Processors see the beams' own tokens, which change places."""
    theirs, ours = talkers(family)
    for seed in range(2):
        inputs = batch("left", seed)
        changes = {"num_beams": 3, "max_new_tokens": NEW, "eos_token_id": [*range(0, VOCAB - 1, 9)]}
        assert_same(ours, theirs, inputs, **changes, min_new_tokens=6, repetition_penalty=1.4)
        assert_same(
            ours, theirs, inputs, **changes, logits_processor=[lambda x, s: s - 0.1 * (x[:, -2:].sum(1) % 7)[:, None]]
        )


def test_drawn_beams() -> None:
    """With torch's global generator they are transformers' own."""
    theirs, ours = talkers("GPTNeoX")
    inputs = batch(rows=2)
    changes = {"num_beams": 3, "do_sample": True, "top_k": 2, "temperature": 1.5, "top_p": 0.9, "min_p": 0.01}
    found = []
    for seed in range(4):
        for run in (lambda **x: theirs_generates(theirs, inputs, **x), lambda **x: ours.generate(**inputs, **x)):
            torch.manual_seed(seed)
            found.append(run(**changes, max_new_tokens=8, eos_token_id=[3, 5]))
        assert torch.equal(*found[-2:])
    assert not torch.equal(found[0][:, 13:], found[2][:, 13:])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_beam_is_what_it_is_from_scratch(family: str, padding: str) -> None:
    """Its score is that of its tokens in one forward without a cache, and a run without a cache finds the same."""
    _, ours = talkers(family)
    for seed in range(2):
        inputs = batch(padding, seed)
        mask = inputs.get("attention_mask", torch.ones(3, 13)).bool()
        eos = [*ends(ours, inputs), *range(0, VOCAB - 1, 9)]
        changes = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": NEW, "eos_token_id": eos}
        output = generated(ours, **inputs, **changes)
        again = generated(ours, **inputs, **changes, use_cache=False)
        assert torch.equal(output.sequences, again.sequences)
        for row, (sequence, score) in enumerate(zip(output.sequences, output.sequences_scores, strict=True)):
            prompt = sequence[:13][mask[row // 4]]
            new = sequence[13:][: int((output.beam_indices[row] >= 0).sum())]
            assert (sequence[13 + len(new) :] == PAD).all() and not torch.isin(new[:-1], torch.tensor(eos)).any()
            with torch.no_grad():
                logits = ours(torch.cat((prompt, new))[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            exact = logits.log_softmax(-1).gather(1, new[:, None]).sum() / len(new)
            torch.testing.assert_close(score, exact, rtol=1e-4, atol=1e-4)


def test_one_beam_is_greedy_and_more_find_better() -> None:
    _, ours = talkers("GPTJ")
    inputs = batch()
    scores = [
        generated(
            ours, **inputs, num_beams=beams, max_new_tokens=NEW, eos_token_id=(), length_penalty=0.0
        ).sequences_scores
        for beams in (2, 8)
    ]
    assert (scores[1] >= scores[0]).all() and (scores[1] > scores[0]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_sequences_end_beams(family: str) -> None:
    """As a stopping criterion of transformers does that looks for them."""
    theirs, ours = talkers(family)
    lengths = set()
    for seed in range(3):
        inputs = batch(seed=seed, rows=2)
        changes = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": NEW, "eos_token_id": [5]}
        free = ours.generate(**inputs, **changes)[:, 13:]
        stops = [free[0, 3:6].tolist(), free[5, 6:8].tolist(), free[2, 9:10].tolist()]

        def found(tokens: torch.Tensor, scores: Any, stops: list[list[int]] = stops) -> torch.Tensor:
            ends_with = [
                tokens.shape[1] - 13 >= len(stop) and row[-len(stop) :] == stop
                for row in tokens.tolist()
                for stop in stops
            ]
            return torch.tensor(ends_with).view(-1, len(stops)).any(1)

        expected = theirs_generates(theirs, inputs, **changes, **ON, stopping_criteria=[found])
        output = ours.generate(**inputs, **changes, **ON, stop_sequences=stops)
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
        lengths.update((output.beam_indices >= 0).sum(1).tolist())
    assert len(lengths) > 2


@pytest.mark.parametrize("max_length", [None, 13, 40])
def test_the_callers_cache_gets_the_prompt(max_length: int | None) -> None:
    _, ours = talkers("GPTJ")
    tokens, cache = batch()["input_ids"], KVCache(max_length)
    expected = ours.generate(tokens, num_beams=3, max_new_tokens=NEW, eos_token_id=())
    with torch.no_grad():
        ours(tokens[:, :5], past_key_values=cache)
    output = generated(ours, input_ids=tokens, past_key_values=cache, num_beams=3, max_new_tokens=NEW, eos_token_id=())
    assert torch.equal(output.sequences, expected) and output.past_key_values is None
    assert cache.length == 13 and cache.batch == 3
    fresh = KVCache()
    with torch.no_grad():
        ours(tokens, past_key_values=fresh)
    for pair_of, same in zip(cache.to_tuple(), fresh.to_tuple(), strict=True):
        for x, y in zip(pair_of, same, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_beams_change_places_in_the_buffers_that_are_there() -> None:
    """What they have in common stays, and so does where they are."""
    _, ours = talkers("GPTJ")
    cache, tokens = KVCache(20), batch()["input_ids"]
    with torch.no_grad():
        ours(tokens[:1].expand(3, -1), past_key_values=cache)
        ours(tokens[:, :3], past_key_values=cache)
    expected = [x[[2, 0, 2]].clone() for pair_of in cache.to_tuple() for x in pair_of]
    places = [x.data_ptr() for pair_of in cache.to_tuple() for x in pair_of]
    cache.reorder(torch.tensor([2, 0, 2]), start=13)
    got = [x for pair_of in cache.to_tuple() for x in pair_of]
    assert [x.data_ptr() for x in got] == places
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
