"""Every bad argument of a forward is named, with what it was and what it must be, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from model_cases import FAMILIES, HEADS, LAYERS, VOCAB, WIDTH, batch, pair

from neox_kernels import models
from neox_kernels.models import KVCache

IDS = batch()["input_ids"]  # (3, 13)
EMBEDS = torch.zeros(3, 13, WIDTH)
ONES = torch.ones

# By what is wrong: the arguments, the error, and what its message must have.
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tokens": ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "tokens twice": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, ValueError, "exactly one of input_ids and inputs"),
    "a list of tokens": ({"input_ids": IDS.tolist()}, TypeError, "input_ids must be a tensor, not a list"),
    "one dimension": ({"input_ids": IDS[0]}, ValueError, r"input_ids must be \(batch, seqlen\), not of shape \(13,\)"),
    "three dimensions": ({"input_ids": IDS[None]}, ValueError, r"input_ids must be .*\(1, 3, 13\)"),
    "floating tokens": ({"input_ids": IDS.float()}, TypeError, "input_ids must be int32 or int64, not torch.float32"),
    "bytes": ({"input_ids": IDS.to(torch.uint8)}, TypeError, "input_ids must be int32 or int64, not torch.uint8"),
    "an unknown token": ({"input_ids": IDS + VOCAB}, IndexError, f"input_ids must be between 0 and {VOCAB - 1}, not"),
    "a negative token": ({"input_ids": IDS - 100}, IndexError, f"input_ids must be between 0 and {VOCAB - 1}, not"),
    "flat embeddings": (
        {"inputs_embeds": EMBEDS[0]},
        ValueError,
        r"inputs_embeds must be .*48\), not of shape \(13, 48",
    ),
    "narrow embeddings": ({"inputs_embeds": EMBEDS[..., 1:]}, ValueError, r"inputs_embeds must be .*\(3, 13, 47\)"),
    "embeddings of integers": (
        {"inputs_embeds": EMBEDS.long()},
        TypeError,
        "inputs_embeds must be torch.float32 like the model, not torch.int64",
    ),
    "embeddings of another dtype": (
        {"inputs_embeds": EMBEDS.bfloat16()},
        TypeError,
        "inputs_embeds must be torch.float32 like the model, not torch.bfloat16",
    ),
    "a list as mask": ({"attention_mask": [[1] * 13] * 3}, TypeError, "attention_mask must be a tensor, not a list"),
    "a short mask": (
        {"attention_mask": ONES(3, 12)},
        ValueError,
        r"attention_mask must be .*\(3, 13\).*not.*\(3, 12\)",
    ),
    "a mask of other rows": ({"attention_mask": ONES(2, 13)}, ValueError, r"attention_mask must be .*not.*\(2, 13\)"),
    "a mask of one dimension": ({"attention_mask": ONES(13)}, ValueError, r"attention_mask must be .*not of.*\(13,\)"),
    "a mask of three": (
        {"attention_mask": ONES(3, 13, 13)},
        ValueError,
        r"attention_mask must be .*not.*\(3, 13, 13\)",
    ),
    "an added mask of two": ({"attention_mask": ONES(3, 13) * -1e9}, ValueError, "attention_mask .* 0 and 1, not -1"),
    "a mask with twos": (
        {"attention_mask": ONES(3, 13).long() * 2},
        ValueError,
        "attention_mask .* only 0 and 1, not 2",
    ),
    "a mask of four for more": (
        {"attention_mask": ONES(3, 1, 13, 14)},
        ValueError,
        r"attention_mask .*\(3, 1, 13, 14\)",
    ),
    "of four and integers": (
        {"attention_mask": ONES(3, 1, 13, 13).long()},
        TypeError,
        "attention_mask of four dimensions must be bool or floating.*not torch.int64",
    ),
    "of four and float64": (
        {"attention_mask": ONES(3, 1, 13, 13).double()},
        TypeError,
        "attention_mask of four dimensions .* for a model of torch.float32, not torch.float64",
    ),
    "a list of positions": ({"position_ids": [[0]]}, TypeError, "position_ids must be a tensor, not a list"),
    "floating positions": (
        {"position_ids": ONES(3, 13)},
        TypeError,
        "position_ids must be int32 or int64, not torch.fl",
    ),
    "flat positions": (
        {"position_ids": torch.arange(13)},
        ValueError,
        r"position_ids must .*\(3, 13\) or \(1, 13\), not",
    ),
    "short positions": ({"position_ids": IDS[:, 1:]}, ValueError, r"position_ids must .* not \(3, 12\)"),
    "a negative position": ({"position_ids": IDS - 100}, IndexError, "position_ids must not be negative, not -"),
    "a number as head mask": (
        {"head_mask": 1.0},
        TypeError,
        "head_mask must be a tensor, or one or None for each layer",
    ),
    "too many heads": (
        {"head_mask": ONES(HEADS + 1)},
        ValueError,
        r"head_mask must be \(3,\) or \(2, 3\), not.*\(4,\)",
    ),
    "too many layers": (
        {"head_mask": ONES(LAYERS + 1, HEADS)},
        ValueError,
        r"head_mask must be .*not of shape \(3, 3\)",
    ),
    "a row too few": (
        {"head_mask": [ONES(HEADS)]},
        ValueError,
        "head_mask must have a row for each of the 2 layers, not 1",
    ),
    "a row too long": ({"head_mask": [None, ONES(4)]}, ValueError, r"head_mask must have rows of \(3,\), not .*\(4,\)"),
    "a string as cache": ({"past_key_values": "cache"}, TypeError, "past_key_values must be a KVCache, .* not a str"),
    "a tuple of numbers": ({"past_key_values": (1, 2)}, TypeError, "past_key_values must be .* not a tuple of int"),
}


def unchanged(arguments: dict[str, Any]) -> Any:
    copies = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    return lambda: all(torch.equal(arguments[name], copied) for name, copied in copies.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_of_the_decoder(family: str, case: str) -> None:
    arguments, error, message = CASES[case]
    if not arguments.keys() & {"input_ids", "inputs_embeds"} and case != "no tokens":
        arguments = {"input_ids": IDS, **arguments}
    same = unchanged(arguments)
    for head in ("Model", "ForCausalLM", "ForSequenceClassification"):
        _, ours = pair(family, head)
        with pytest.raises(error, match=message):
            ours(**arguments)
        assert same()


def test_arguments_of_one_family() -> None:
    gptj, neox = pair("GPTJ")[1], pair("GPTNeoX")[1]
    for types, error, message in (
        (IDS + VOCAB, IndexError, "token_type_ids must be between 0 and 60, not between"),
        (IDS.float(), TypeError, "token_type_ids must be int32 or int64, not torch.float32"),
        (IDS[:, 1:], ValueError, r"token_type_ids must be of the shape \(3, 13\) or \(1, 13\), not \(3, 12\)"),
    ):
        with pytest.raises(error, match=message):
            gptj(IDS, token_type_ids=types)
        assert torch.equal(neox(IDS, token_type_ids=types).logits, neox(IDS).logits)
    with pytest.raises(ValueError, match=r"65 positions are more than the 64 of .* max_position_embeddings"):
        gptj(IDS, position_ids=torch.full((1, 13), 64))
    with pytest.raises(ValueError, match="65 positions are more than the 64"):
        gptj(torch.zeros(1, 65, dtype=torch.long))
    assert neox(torch.zeros(1, 65, dtype=torch.long)).logits.isfinite().all()


LABELS: dict[str, dict[str, tuple[dict[str, Any], type[Exception], str]]] = {
    "ForCausalLM": {
        "of another length": (
            {"labels": IDS[:, 1:]},
            ValueError,
            r"labels must be of the shape \(3, 13\), not \(3, 12\)",
        ),
        "floating": ({"labels": IDS.float()}, TypeError, "labels must be int32 or int64, not torch.float32"),
        "unknown": ({"labels": IDS + VOCAB}, IndexError, "labels must be between 0 and 60, or -100, not"),
        "negative": ({"labels": IDS * 0 - 1}, IndexError, "labels must be between 0 and 60, or -100, not -1"),
    },
    "ForTokenClassification": {
        "one of each sequence": ({"labels": IDS[:, 0] * 0}, ValueError, r"labels must be of .*\(3, 13\), not \(3,\)"),
        "unknown": ({"labels": IDS * 0 + 2}, IndexError, "labels must be between 0 and 1, or -100, not 2"),
    },
    "ForSequenceClassification": {
        "of each token": (
            {"labels": IDS * 0},
            ValueError,
            r"labels must be \(3,\) for single_label.*not of shape \(3, 13",
        ),
        "unknown": ({"labels": IDS[:, 0] * 0 + 2}, IndexError, "labels must be between 0 and 1, or -100, not 2"),
        "floating, of one": (
            {"labels": ONES(3)},
            ValueError,
            r"labels must be \(3, 2\) for multi_label_.*not of shape \(3,",
        ),
        "a number": ({"labels": 1}, TypeError, "labels must be a tensor, not a int"),
    },
    "ForQuestionAnswering": {
        "of each token": (
            {"start_positions": IDS},
            ValueError,
            r"start_positions must .*\(3,\) or \(3, 1\), not \(3, 13\)",
        ),
        "floating": ({"end_positions": ONES(3)}, TypeError, "end_positions must be int32 or int64, not torch.float32"),
    },
}


@pytest.mark.parametrize(("head", "case"), [(head, case) for head, cases in LABELS.items() for case in cases])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels(family: str, head: str, case: str) -> None:
    arguments, error, message = LABELS[head][case]
    ours = getattr(models, family + head)(pair(family)[0].config)
    ran: list[Any] = []
    ours.decoder.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=message):
        ours(IDS, past_key_values=KVCache(), **arguments)
    assert not ran  # so that no cache can have changed


def test_a_batch_without_padding_token_or_mask() -> None:
    ours = pair("GPTNeoX", "ForSequenceClassification", pad_token_id=None)[1]
    with pytest.raises(ValueError, match=r"pad_token_id of the configuration must be set, .* for a batch of 3"):
        ours(IDS)
    assert ours(IDS[:1]).logits.shape == (1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_settings(family: str) -> None:
    _, ours = pair(family)
    for name in ("flash", "", None, 3):
        with pytest.raises(ValueError, match=r"attn_implementation must be one of auto, .*, not "):
            ours.attn_implementation = name
        assert ours.attn_implementation == "auto"
    for asked in ({"output_attentions": True}, {"head_mask": ONES(HEADS)}):
        ours.attn_implementation = "sdpa"
        cache = KVCache()
        with pytest.raises(ValueError, match="'sdpa' cannot serve this call"):
            ours(IDS, past_key_values=cache, **asked)
        assert cache.num_layers == 0
    for device_map, message in (
        ({"cpu": [0]}, r"device_map must name each of the 2 layers once, not \[0\]"),
        ({"cpu": [0, 1], "meta": [1]}, r"device_map must name each of the 2 layers once, not \[0, 1, 1\]"),
        ({"cpu": [0, 1, 2]}, r"device_map must name each of the 2 layers once, not \[0, 1, 2\]"),
        ({}, r"device_map must name each of the 2 layers once, not \[\]"),
        ({"nowhere": [0, 1]}, "nowhere"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            ours.parallelize(device_map)
        assert {x.device.type for x in ours.parameters()} == {"cpu"}
    for tokens in (0, -3):
        with pytest.raises(ValueError, match=f"num_tokens must be at least 1, not {tokens}"):
            ours.resize_token_embeddings(tokens)
    for keep in (-1, 1.5):
        with pytest.raises((ValueError, TypeError), match=f"logits_to_keep must .* not {keep}"):
            ours(IDS, logits_to_keep=keep)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cache_position'"):
        ours(IDS, cache_position=torch.arange(13))
