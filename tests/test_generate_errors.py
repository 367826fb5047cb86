"""Every bad argument of generate is named, with what it was and what it must be, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from generate_cases import talkers
from model_cases import PAD, VOCAB, WIDTH, batch

from neox_kernels.models import GenerationConfig, GPTJForCausalLM, KVCache

IDS = batch()["input_ids"]  # (3, 13)
MASK = torch.ones(3, 13)
EMBEDS = torch.zeros(3, 13, WIDTH)
DRAW = {"do_sample": True}

# By what is wrong: the arguments, the error, and what its message must have.
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown name": ({"temprature": 1.0}, TypeError, "generate has no argument temprature"),
    "two unknown names": ({"foo": 1, "bar": 2}, TypeError, "generate has no argument foo, bar"),
    "a cold temperature": ({"temperature": -0.5, **DRAW}, ValueError, "temperature must be above 0, not -0.5"),
    "no temperature": ({"temperature": 0, **DRAW}, ValueError, "temperature must be above 0, not 0"),
    "a hot temperature": ({"temperature": float("inf"), **DRAW}, ValueError, "temperature must be above 0, not inf"),
    "a string as temperature": ({"temperature": "hot"}, TypeError, "temperature must be a float, not 'hot'"),
    "None as temperature": ({"temperature": None}, TypeError, "temperature must be a float, not None"),
    "a negative top_k": ({"top_k": -1, **DRAW}, ValueError, "top_k must be at least 0, not -1"),
    "half a top_k": ({"top_k": 1.5, **DRAW}, TypeError, "top_k must be an int, not 1.5"),
    "no top_p": ({"top_p": 0.0, **DRAW}, ValueError, "top_p must be above 0 and at most 1, not 0.0"),
    "a large top_p": ({"top_p": 1.1, **DRAW}, ValueError, "top_p must be above 0 and at most 1, not 1.1"),
    "a negative min_p": ({"min_p": -0.1, **DRAW}, ValueError, "min_p must be between 0 and 1, not -0.1"),
    "a large min_p": ({"min_p": 2, **DRAW}, ValueError, "min_p must be between 0 and 1, not 2"),
    "no penalty": ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be above 0, not 0.0"),
    "nan as penalty": ({"length_penalty": float("nan"), "num_beams": 2}, ValueError, "length_penalty must be finite"),
    "no beams": ({"num_beams": 0}, ValueError, "num_beams must be at least 1, not 0"),
    "True beams": ({"num_beams": True}, TypeError, "num_beams must be an int, not True"),
    "too many of the beams": (
        {"num_beams": 2, "num_return_sequences": 3},
        ValueError,
        "num_return_sequences must be at most num_beams, 2, not 3",
    ),
    "several greedy ones": ({"num_return_sequences": 2}, ValueError, "num_return_sequences must be 1 without .* not 2"),
    "no sequences": ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1, not 0"),
    "early": ({"early_stopping": "soon", "num_beams": 2}, ValueError, "early_stopping must be .* not 'soon'"),
    "a number as flag": ({"do_sample": 1}, TypeError, "do_sample must be True or False, not 1"),
    "no new tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, not 0"),
    "a length of the prompt": ({"max_length": 13}, ValueError, "max_length must be above the 13 tokens .* not 13"),
    "a minimum above": (
        {"min_new_tokens": 9, "max_new_tokens": 8},
        ValueError,
        "minimum of 9 new tokens must not be above the maximum of 8",
    ),
    "a length above": ({"min_length": 40, "max_length": 30}, ValueError, "minimum of 27 .* the maximum of 17"),
    "a negative length": ({"min_length": -1}, ValueError, "min_length must be at least 0, not -1"),
    "an end outside": ({"eos_token_id": VOCAB}, ValueError, f"eos_token_id must be .* 0 and {VOCAB - 1}, not {VOCAB}"),
    "one end outside": ({"eos_token_id": [3, -1]}, ValueError, "eos_token_id must be between 0 and 60, not -1"),
    "a word as end": ({"eos_token_id": "</s>"}, TypeError, "eos_token_id must hold tokens, which are ints, not '</s>'"),
    "padding outside": ({"pad_token_id": 61}, ValueError, "pad_token_id must be between 0 and 60, not 61"),
    "negative padding": ({"pad_token_id": -1}, ValueError, "pad_token_id must be at least 0, not -1"),
    "a word to stop at": ({"stop_sequences": "stop"}, TypeError, "stop_sequences must be a list .* not 'stop'"),
    "words to stop at": ({"stop_sequences": ["stop"]}, TypeError, "stop_sequences must hold lists .* not 'stop'"),
    "tokens to stop at": ({"stop_sequences": [3]}, TypeError, "stop_sequences must hold lists .* not 3"),
    "nothing to stop at": ({"stop_sequences": [[]]}, TypeError, r"stop_sequences must hold lists .* not \[\]"),
    "stops outside": ({"stop_sequences": [[3, 99]]}, ValueError, "stop_sequences must be between 0 and 60, not 99"),
    "half a seed": ({"seed": 0.5, **DRAW}, TypeError, "seed must be an int, not 0.5"),
    "a dictionary": ({"generation_config": {}}, TypeError, "generation_config must be a GenerationConfig, not a dict"),
    "no callable": ({"logits_processor": 3}, TypeError, "logits_processor must be callable, or .* not 3"),
    "no callables": ({"logits_processor": [3]}, TypeError, r"logits_processor must be callable, or .* not \[3\]"),
    "no prompt": ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "two prompts": ({"inputs_embeds": EMBEDS}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "a list": ({"input_ids": IDS.tolist()}, TypeError, "input_ids must be a tensor, not a list"),
    "floating tokens": ({"input_ids": MASK}, TypeError, "input_ids must be int32 or int64, not torch.float32"),
    "one dimension": ({"input_ids": IDS[0]}, ValueError, r"input_ids must be \(batch, length\), not of shape \(13,\)"),
    "empty prompts": ({"input_ids": IDS[:, :0]}, ValueError, r"input_ids must hold at least one token, not .*\(3, 0\)"),
    "an unknown token": ({"input_ids": IDS + 61}, IndexError, "input_ids must be between 0 and 60, not"),
    "flat embeddings": (
        {"input_ids": None, "inputs_embeds": EMBEDS[0]},
        ValueError,
        r"inputs_embeds must be \(batch, length, hidden_size\), not \(13, 48\)",
    ),
    "other embeddings": (
        {"input_ids": None, "inputs_embeds": EMBEDS.bfloat16()},
        TypeError,
        "inputs_embeds must be torch.float32 like the model, not torch.bfloat16",
    ),
    "embeddings alone": (
        {"input_ids": None, "inputs_embeds": EMBEDS, "use_cache": False},
        ValueError,
        "use_cache must be True with inputs_embeds",
    ),
    "a short mask": ({"attention_mask": MASK[:, 1:]}, ValueError, r"attention_mask must be .*\(3, 13\).*\(3, 12\)"),
    "a mask of other rows": ({"attention_mask": MASK[:2]}, ValueError, r"attention_mask must be .*not.*\(2, 13\)"),
    "a mask of four": (
        {"attention_mask": MASK[:, None, None]},
        ValueError,
        r"attention_mask must .*\(3, 1, 1, 13\)",
    ),
    "a mask with twos": ({"attention_mask": MASK * 2}, ValueError, "attention_mask .* only 0 and 1, not 2"),
    "a row of padding": (
        {"attention_mask": MASK.tril(-1)},
        ValueError,
        "attention_mask must show a token of each row, and shows none of row 0",
    ),
    "a string as cache": ({"past_key_values": "x"}, TypeError, "past_key_values must be a KVCache, .* not a str"),
    "a cache and none": ({"past_key_values": KVCache(), "use_cache": False}, ValueError, "use_cache must be True with"),
    "a small cache": ({"past_key_values": KVCache(20)}, ValueError, "at most max_length=20 tokens: 32 more do not fit"),
    "small for beams": (
        {"past_key_values": KVCache(12), "num_beams": 2},
        ValueError,
        "max_length=12 .* 13 more do",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_arguments(case: str, stream: bool) -> None:
    """A stream raises when it is made, unless only the model itself can tell."""
    changes, error, message = CASES[case]
    _, ours = talkers("GPTNeoX", eos_token_id=2)
    arguments = {"input_ids": IDS, **changes}
    ran = []
    ours.lm_head.register_forward_hook(lambda *_: ran.append(1))
    if stream and "num_beams" in changes and "must" not in message:
        return
    with pytest.raises(error, match=message):
        made = ours.stream(**arguments) if stream else ours.generate(**arguments)
        if case in ("an unknown token", "other embeddings"):
            next(made)
    assert not ran


def test_caches_of_something_else() -> None:
    _, ours = talkers("GPTJ", eos_token_id=2)
    whole, few = KVCache(), KVCache()
    with torch.no_grad():
        ours(IDS, past_key_values=whole)
        ours(IDS[:2, :5], past_key_values=few)
    mask = MASK.clone()
    with pytest.raises(ValueError, match=r"input_ids must be the whole sequence, more than the 13 .* not 13"):
        ours.generate(IDS, past_key_values=whole)
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, and the input has 3"):
        ours.generate(IDS, past_key_values=few)
    whole.crop(10)
    mask[1, 10:] = 0
    with pytest.raises(ValueError, match=r"a token of each row behind the 10 of past_key_values, .* none of row 1"):
        ours.generate(IDS, mask, past_key_values=whole)
    assert (whole.length, few.length) == (10, 5)


def test_padding_that_is_needed() -> None:
    """Where rows can end at different times, something must follow; an end token does where no padding is known."""
    _, ours = talkers("GPTNeoX", eos_token_id=2, pad_token_id=None)
    ours.config.pad_token_id = None
    free = ours.generate(IDS, max_new_tokens=8, eos_token_id=())[:, 13:]
    stops = {"max_new_tokens": 8, "eos_token_id": (), "stop_sequences": [[int(free[0, 2])]]}
    with pytest.raises(ValueError, match="pad_token_id must be given, to follow in sequences that end before others"):
        ours.generate(IDS, **stops)
    with pytest.raises(ValueError, match="pad_token_id must be given"):
        ours.generate(IDS[:1], num_beams=2, **stops)
    assert torch.equal(ours.generate(IDS[:1], **stops)[0, 13:], free[0, :3])
    assert ours.generate(IDS, pad_token_id=PAD, **stops)[0, 16:].eq(PAD).all()
    end = int(free[0, 2])
    assert ours.generate(IDS, max_new_tokens=8, eos_token_id=end)[0, 15:].eq(end).all()


def test_a_stream_has_no_beams() -> None:
    _, ours = talkers("GPTNeoX", eos_token_id=2)
    with pytest.raises(ValueError, match="num_beams must be 1 to stream tokens, not 2"):
        ours.stream(IDS, num_beams=2)


@pytest.mark.parametrize("bad", [lambda tokens, scores: None, lambda tokens, scores: scores[:, 1:]])
def test_what_a_processor_returns(bad: Any) -> None:
    _, ours = talkers("GPTNeoX", eos_token_id=2)
    with pytest.raises(ValueError, match=r"logits_processor must return scores of the shape \(3, 61\), not"):
        ours.generate(IDS, logits_processor=bad)


def test_what_has_no_effect_is_said_once() -> None:
    _, ours = talkers("GPTNeoX", eos_token_id=2)
    with pytest.warns(UserWarning, match="without do_sample=True there is no effect of temperature and top_k") as found:
        ours.generate(IDS, temperature=0.5, top_k=3)
    with pytest.warns(UserWarning, match="without num_beams above 1 there is no effect of length_penalty"):
        ours.generate(IDS, length_penalty=2.0)
    assert len(found) == 1 and found[0].filename == __file__


def test_the_models_own_end_token() -> None:
    """The configuration's is checked too: a model that can never say it would not stop."""
    ours = GPTJForCausalLM({"vocab_size": 61, "n_embd": 48, "n_layer": 1, "n_head": 3, "rotary_dim": 8})
    with pytest.raises(ValueError, match="eos_token_id must be between 0 and 60, not 50256"):
        ours.generate(IDS)
    assert ours.generate(IDS, eos_token_id=2, max_new_tokens=2).shape == (3, 15)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        GenerationConfig(foo=1)  # type: ignore[call-arg]
