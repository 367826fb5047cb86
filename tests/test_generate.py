"""generate against transformers, against itself without a cache, and each row of a batch against its own run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from generate_cases import EOS, ends, generated, prompts, talkers, theirs_generates
from model_cases import FAMILIES, PAD, VOCAB, Errors, batch, in_float64

from neox_kernels.models import GenerateOutput, KVCache

IMPLEMENTATIONS = ("eager", "fused", "sdpa", "auto")
SEEDS = range(4)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_against_transformers(family: str, padding: str) -> None:
    """The same tokens, whatever computes attention, and sequences that end at different lengths."""
    theirs, ours = talkers(family)
    lengths = set()
    for seed, ours.attn_implementation in enumerate(IMPLEMENTATIONS):
        inputs = batch(padding, seed)
        eos = ends(ours, inputs)
        for changes in (
            {"max_new_tokens": 16},
            {"max_new_tokens": 16, "eos_token_id": eos[0]},
            {"max_length": 24, "min_length": 21},
            {"max_new_tokens": 16, "min_new_tokens": 5, "repetition_penalty": 1.7},
            {},
        ):
            changes = {"eos_token_id": eos, **changes}
            expected = theirs_generates(theirs, inputs, **changes)
            assert torch.equal(ours.generate(**inputs, **changes), expected)
            lengths.update((expected[:, 13:] != PAD).sum(1).tolist())
    assert len(lengths) > 4, "sequences that end at one length only prove little"


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_in_bfloat16(family: str) -> None:
    """Tokens may differ there, so the logits of the sequences that came are held against transformers'."""
    theirs, ours = talkers(family, dtype=torch.bfloat16)
    exact, errors = in_float64(theirs), Errors()
    for seed in SEEDS:
        tokens = batch(seed=seed)["input_ids"]
        for ours.attn_implementation in ("eager", "sdpa"):
            output = generated(ours, input_ids=tokens, max_new_tokens=12, eos_token_id=(), output_logits=True)
            with torch.no_grad():
                truth, same = (model(output.sequences[:, :-1]).logits[:, 12:] for model in (exact, theirs))
            errors.add(ours.attn_implementation, torch.stack(output.logits, 1).bfloat16(), same, truth)
            assert torch.equal(output.sequences[:, 13:], torch.stack(output.logits, 1).argmax(-1))
    errors.check()


@pytest.mark.parametrize("padding", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_its_own_run(family: str, padding: str) -> None:
    _, ours = talkers(family)
    for seed in SEEDS[:2]:
        inputs = prompts(padding, seed)
        eos = ends(ours, inputs)
        for changes in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}):
            changes = {"max_new_tokens": 10, "eos_token_id": eos, "repetition_penalty": 1.3, **changes}
            rows = ours.generate(**inputs, **changes)
            of_each = rows.unflatten(0, (3, -1))
            for row, tokens, mask in zip(of_each, inputs["input_ids"], inputs["attention_mask"], strict=True):
                alone = ours.generate(tokens[mask.bool()][None], **changes)[:, int(mask.sum()) :]
                assert torch.equal(row[:, :13], tokens.expand(len(row), -1)), "the prompt stays as it came"
                assert torch.equal(row[:, 13 : 13 + alone.shape[1]], alone)
                assert (row[:, 13 + alone.shape[1] :] == PAD).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache(family: str) -> None:
    _, ours = talkers(family)
    for padding in ("none", "left", "right"):
        inputs = batch(padding)
        changes = {"max_new_tokens": 12, "eos_token_id": EOS, "output_logits": True}
        cached = generated(ours, **inputs, **changes)
        again = generated(ours, **inputs, **changes, use_cache=False)
        assert torch.equal(cached.sequences, again.sequences) and again.past_key_values is None
        for logits, same in zip(cached.logits, again.logits, strict=True):
            torch.testing.assert_close(logits, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_sequences(family: str) -> None:
    """A row ends behind the first of its stop sequences, and not before its minimum; others go on."""
    _, ours = talkers(family)
    for seed in SEEDS:
        inputs = batch(seed=seed)
        free = ours.generate(**inputs, max_new_tokens=16, eos_token_id=())[:, 13:]
        stops = [free[0, 4:7].tolist(), free[1, 9:10].tolist(), [VOCAB - 1, 0]]
        for least in (0, 8):
            got = ours.generate(
                **inputs, max_new_tokens=16, eos_token_id=(), stop_sequences=stops, min_new_tokens=least
            )[:, 13:]
            expected = [end_of(row, stops, least) for row in free.tolist()]
            assert expected[0] < 16 or least
            assert got.shape[1] == max(expected)
            for row, whole, end in zip(got, free, expected, strict=True):
                assert torch.equal(row[:end], whole[:end]) and (row[end:] == PAD).all()


def end_of(row: list[int], stops: list[list[int]], least: int) -> int:
    for end in range(1, len(row) + 1):
        if end >= least and any(len(stop) <= end and row[end - len(stop) : end] == stop for stop in stops):
            return end
    return len(row)


@torch.no_grad()
def test_a_stop_sequence_is_of_new_tokens() -> None:
    """What the prompt ends with is no part of it."""
    _, ours = talkers("GPTNeoX")
    tokens = batch(rows=1)["input_ids"]
    free = ours.generate(tokens, max_new_tokens=5, eos_token_id=())
    stop = free[0, 12:14].tolist()
    assert torch.equal(ours.generate(tokens, max_new_tokens=5, eos_token_id=(), stop_sequences=[stop]), free)
    short = ours.generate(tokens, max_new_tokens=5, eos_token_id=(), stop_sequences=[free[0, 13:15].tolist()])
    assert torch.equal(short, free[:, :15])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_as_prompts(family: str, padding: str) -> None:
    """They give the new tokens only; lengths count them."""
    _, ours = talkers(family)
    inputs = batch(padding)
    embeds = ours.get_input_embeddings()(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    for changes in ({"max_new_tokens": 8}, {"max_length": 21, "min_length": 17}, {"num_beams": 2, "max_length": 20}):
        changes = {"eos_token_id": EOS, **changes}
        expected = ours.generate(**inputs, **changes)[:, 13:]
        assert torch.equal(ours.generate(inputs_embeds=embeds, attention_mask=mask, **changes), expected)
    seen = []
    ours.generate(
        inputs_embeds=embeds,
        max_new_tokens=3,
        eos_token_id=(),
        logits_processor=lambda tokens, scores: (seen.append(tokens.shape[1]), scores)[1],
    )
    assert seen == [0, 1, 2]


def test_processors_of_the_caller() -> None:
    """They come between the penalty and what only draws, see what there is, and may write into their scores."""
    theirs, ours = talkers("GPTJ")
    inputs, seen = batch("left"), []

    def forbid(tokens: Tensor, scores: Tensor) -> Tensor:
        seen.append(tokens.clone())
        scores[:, tokens.shape[1] % 2 :: 2] = -torch.inf
        return scores

    def prefer(tokens: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.arange(VOCAB) % 3

    changes = {"max_new_tokens": 8, "repetition_penalty": 1.5, "eos_token_id": EOS}
    expected = theirs_generates(theirs, inputs, **changes, logits_processor=[forbid, prefer])
    theirs_saw, seen[:] = seen[:], []
    assert torch.equal(ours.generate(**inputs, **changes, logits_processor=[forbid, prefer]), expected)
    assert all(torch.equal(x, y) for x, y in zip(seen, theirs_saw, strict=True))
    assert not torch.equal(ours.generate(**inputs, **changes, logits_processor=prefer), expected)
    changes["repetition_penalty"] = 1.0  # which would copy the scores
    output = generated(ours, **inputs, **changes, logits_processor=forbid, output_logits=True)
    assert all(torch.isfinite(logits).all() for logits in output.logits), "they are as the model gave them"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_given_on_request(family: str) -> None:
    theirs, ours = talkers(family)
    ours.attn_implementation = "eager"
    inputs = batch("left")
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    changes: dict[str, Any] = {"max_new_tokens": 6, "repetition_penalty": 1.5, "eos_token_id": EOS}
    changes |= dict.fromkeys((*asked, "return_dict_in_generate"), True)
    expected = theirs_generates(theirs, inputs, **changes)
    output = ours.generate(**inputs, **changes)
    assert isinstance(output, GenerateOutput) and torch.equal(output.sequences, expected.sequences)
    mask = inputs["attention_mask"].bool()
    for name in ("scores", "logits", "attentions", "hidden_states"):
        got, same = getattr(output, name), getattr(expected, name)
        assert len(got) == len(same) == output.sequences.shape[1] - 13
        for step, (x, y) in enumerate(zip(got, same, strict=True)):
            for a, b in zip(x, y, strict=True) if isinstance(x, tuple) else ((x, y),):
                assert a.shape == b.shape
                if not step and isinstance(x, tuple):  # rows of padding mean nothing
                    a, b = (z.transpose(1, 2)[mask] if name == "attentions" else z[mask] for z in (a, b))
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    plain = ours.generate(**inputs, max_new_tokens=6, eos_token_id=EOS, return_dict_in_generate=True)
    assert [x is None for x in (plain.scores, plain.logits, plain.attentions, plain.hidden_states)] == [True] * 4
    assert isinstance(plain.past_key_values, KVCache)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_stream_is_the_run_in_steps(padding: str) -> None:
    _, ours = talkers("GPTJ")
    inputs, cache = batch(padding), KVCache()
    whole = ours.generate(**inputs, max_new_tokens=12, eos_token_id=EOS)
    stream = ours.stream(**inputs, max_new_tokens=12, eos_token_id=EOS, past_key_values=cache)
    assert cache.length == 0, "nothing runs before it is asked for"
    columns = []
    for tokens in stream:
        assert tokens.shape == (3,) and not tokens.requires_grad and torch.is_grad_enabled()
        columns.append(tokens)
        assert cache.length == 12 + len(columns), "a token is given before the model runs on it"
    assert torch.equal(torch.stack(columns, 1), whole[:, 13:])


def test_nothing_is_left_behind() -> None:
    """Inputs, the model's mode and global state are as they were; no graph is built."""
    _, ours = talkers("GPTNeoX")
    inputs = batch("right")
    before = copy.deepcopy(inputs)
    state = torch.get_rng_state()
    tokens = ours.train().generate(**inputs, max_new_tokens=4, do_sample=True, seed=1, eos_token_id=EOS)
    assert ours.training and not tokens.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())
    assert tokens.dtype == torch.long and torch.equal(tokens[:, :13], inputs["input_ids"])
