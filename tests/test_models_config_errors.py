"""Configurations that are refused: every error names the field."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from neox_kernels.models import GPTJConfig, GPTNeoXConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}

NUMBERS = [field.name for field in dataclasses.fields(GPTNeoXConfig) if str(field.type) in ("int", "float")]
J_NUMBERS = [field.name for field in dataclasses.fields(GPTJConfig) if str(field.type) in ("int", "float")]


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((GPTNeoXConfig, name) for name in NUMBERS), *((GPTJConfig, name) for name in J_NUMBERS)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_numbers(kind: Any, name: str) -> None:
    for value in (None, "1e-5", True, [1], {}):
        with pytest.raises(TypeError, match=f"^{name} must be (int|float), not {re.escape(repr(value))}"):
            kind.from_dict({name: value})
    for value in (-1, math.nan, math.inf, -math.inf):
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
            kind.from_dict({name: value})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type must be 'gpt_neox'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"per_layer_config": {"0": {}}}, "per_layer_config"),
    ({"head_dim": 32}, "head_dim must be"),
    ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers must be int"),
    ({"hidden_size": 100}, "hidden_size must be a multiple of the 64"),
    ({"hidden_act": "laplace"}, "hidden_act must be one of"),
    ({"hidden_act": None}, "hidden_act must be str"),
    ({"attention_dropout": 1.5}, "attention_dropout must be at most 1"),
    ({"use_parallel_residual": "yes"}, "use_parallel_residual must be bool"),
    ({"attention_bias": None}, "attention_bias must be bool"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool"),
    ({"eos_token_id": "2"}, "eos_token_id must be int | list"),
    ({"problem_type": "other"}, "problem_type must be one of"),
    ({"problem_type": "single_label_classification", "num_labels": 1}, "problem_type"),
    ({"id2label": {"0": "a"}, "num_labels": 2}, "num_labels must be that of id2label, 1, not 2"),
    ({"id2label": {"zero": "a"}}, "id2label must have numbers as keys"),
    ({"rotary_pct": 1.1}, "rotary_pct must be at most 1"),
    ({"rotary_pct": 0.22}, "rotary_pct must make an even number"),  # int(96 * 0.22) is 21
    ({"rotary_emb_base": 1}, "rotary_emb_base must be above 1"),
    ({"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "rotary_pct=0.5 and partial_rotary_factor=0.25 contradict"),
    ({"rotary_emb_base": 10, "rope_theta": 20}, "rotary_emb_base=10 and rope_theta=20 contradict"),
    ({"rope_parameters": {"rope_theta": "10000"}}, "rotary_emb_base must be float"),
    ({"rope_parameters": {"partial_rotary_factor": math.nan}}, "rotary_pct must be at least 0 and finite"),
    ({"rope_parameters": [2.0]}, "rope_parameters must be dict"),
    ({"rope_scaling": "linear"}, "rope_scaling must be dict"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling must be of one rope_type"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope_scaling must be of one rope_type"),
    (
        {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2}},
        "rope_scaling must be of one rope_type",
    ),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_scaling must be of one rope_type"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling is not supported: .*factor"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is not supported: .*factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, r"rope_scaling\['factor'\] must be float"),
    ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, r"rope_scaling\['factor'\] must be at least 0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, r"rope_scaling\['factor'\] must be above 0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2, "speed": 3}}, "rope_scaling is not supported: .*speed"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, r"\['low_freq_factor'\] must be below"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 32.5}}, r"embeddings'\] must be int"),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 7}},
        "must be max_position_embeddings, 2048, not 7",
    ),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 9}}, "contradict"),
]


@pytest.mark.parametrize(("values", "text"), REFUSED)
def test_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        GPTNeoXConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model_type": "gpt_neox"}, "model_type must be 'gptj'"),
        ({"n_embd": 100}, "n_embd must be a multiple of the 16"),
        ({"n_embd": 64, "hidden_size": 32}, "n_embd=64 and hidden_size=32 contradict"),
        ({"activation_function": "prelu"}, "activation_function must be one of"),
        ({"rotary_dim": 7}, "rotary_dim must make an even number"),
        ({"rotary_dim": 0}, "rotary_dim must be at least 1"),
        ({"rotary_dim": 512}, "rotary_dim must make .* of up to head_dim=256, not 512"),
        ({"n_inner": 0}, "n_inner must be at least 1"),
        ({"embd_pdrop": 2}, "embd_pdrop must be at most 1"),
    ],
)
def test_refused_of_gptj(values: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        GPTJConfig.from_dict(values)


def test_sources(tmp_path: Path) -> None:
    for source in (None, 3, GPTJConfig(), ["a"]):
        with pytest.raises(TypeError, match="config must be a GPTNeoXConfig"):
            GPTNeoXConfig.of(source)
    path = tmp_path / "config.json"
    for data in (b"{", b"", b"\xff\xfe"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not JSON"):
            GPTNeoXConfig.of(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config.json must hold an object, not list"):
        GPTNeoXConfig.of(tmp_path)
