"""Configurations: files of all vintages, transformers' objects both ways, and values that are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neox_kernels.models import GPTJConfig, GPTNeoXConfig

# The fields of the published files; those that these classes do not know are among them on purpose.
NEOX_20B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_probs_dropout_prob": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 50432,
}
PYTHIA_70M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GPTJ_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "use_cache": True,
    "vocab_size": 50400,
}
# Everything away from its default.
NEOX_OTHER = {
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "hidden_act": "relu",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.2,
    "classifier_dropout": 0.3,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "layer_norm_eps": 1e-6,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": [3, 4],
    "pad_token_id": 5,
    "tie_word_embeddings": True,
    "use_parallel_residual": False,
    "attention_bias": False,
    "problem_type": "regression",
    "id2label": {0: "a", 1: "b", 2: "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "output_hidden_states": True,
    "return_dict": False,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}
GPTJ_OTHER = {
    "vocab_size": 100,
    "n_positions": 128,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 3,
    "rotary_dim": 8,
    "n_inner": 80,
    "activation_function": "gelu_10",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.2,
    "attn_pdrop": 0.3,
    "layer_norm_epsilon": 1e-6,
    "initializer_range": 0.05,
    "use_cache": False,
    "bos_token_id": None,
    "eos_token_id": 7,
    "pad_token_id": 5,
    "tie_word_embeddings": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16, "mscale": 0.7}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
SMALL = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 128}  # head_dim 32


def written(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# --------------------------------------------------------------------------------------------------------------- files


def test_published_files(tmp_path: Path) -> None:
    neox = GPTNeoXConfig.from_pretrained(written(tmp_path, NEOX_20B))
    assert (neox.head_dim, neox.rotary_dim_of_head, neox.rotary_base, neox.hidden_act) == (96, 24, 10000, "gelu_fast")
    assert neox.use_parallel_residual and neox.attention_bias and neox.rope_scaling is None
    pythia = GPTNeoXConfig.from_pretrained(written(tmp_path, PYTHIA_70M))
    assert (pythia.head_dim, pythia.rotary_dim_of_head, pythia.eos_token_id, pythia.vocab_size) == (64, 16, 0, 50304)
    gptj = GPTJConfig.from_pretrained(written(tmp_path, GPTJ_6B))
    assert (gptj.head_dim, gptj.rotary_dim_of_head, gptj.intermediate_size, gptj.layer_norm_eps) == (
        256,
        64,
        16384,
        1e-5,
    )
    for config, values in ((neox, NEOX_20B), (pythia, PYTHIA_70M), (gptj, GPTJ_6B)):
        assert {name: value for name, value in config.to_dict().items() if value != values.get(name, value)} == {}


@pytest.mark.parametrize(("kind", "values"), [(GPTNeoXConfig, NEOX_OTHER), (GPTJConfig, GPTJ_OTHER)])
def test_a_saved_file_gives_the_same(kind: Any, values: dict[str, Any], tmp_path: Path) -> None:
    config = kind.from_dict(values)
    for name in values.keys() - {"rope_parameters"}:
        assert getattr(config, name) == values[name], name
    config.save_pretrained(tmp_path / "new", "Model", torch.bfloat16)
    assert (
        kind.from_pretrained(tmp_path / "new") == config == kind.of(tmp_path / "new") == kind.of(str(tmp_path / "new"))
    )
    file = json.loads((tmp_path / "new" / "config.json").read_text())
    assert file["architectures"] == ["Model"] and file["torch_dtype"] == "bfloat16"
    assert kind.of(config) is config and dataclasses.replace(config) == config


# ------------------------------------------------------------------------------------------------------------- rotary


def test_every_vintage_of_rotary() -> None:
    expected = GPTNeoXConfig(rotary_pct=0.5, rotary_emb_base=500.0)
    for values in (
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"partial_rotary_factor": 0.5, "rope_theta": 500},
        {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 500, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 500.0}},
        {"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_theta": 500.0},
        # of two, rope_parameters: so it is in version 5
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500.0}, "rotary_pct": 1.0, "rope_theta": 7.0},
    ):
        assert GPTNeoXConfig.from_dict(values) == expected, values
    linear = {"rope_type": "linear", "factor": 2.0}
    for values in (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": linear},
        {"rope_parameters": {**linear, "rope_theta": None, "beta_fast": None}},
        {"rope_parameters": linear, "rope_scaling": linear},
    ):
        config = GPTNeoXConfig.from_dict(values)
        assert config.rope_scaling == linear and config.rope_parameters is None
        assert (config.rotary_pct, config.rotary_emb_base) == (0.25, 10000.0)


def test_what_a_scaling_has_by_default() -> None:
    def scaling(**rope: Any) -> Any:
        return GPTNeoXConfig(**SMALL, rope_scaling=rope).rope_scaling

    assert scaling(rope_type="dynamic", factor=2.0)["original_max_position_embeddings"] == 128
    assert scaling(**LLAMA3)["original_max_position_embeddings"] == 128
    assert scaling(**YARN)["original_max_position_embeddings"] == 32
    assert scaling(**{**YARN, "factor": None})["factor"] == 4.0  # 128 / 32


def test_rotary_dim_of_gptj() -> None:
    assert GPTJConfig(n_embd=32, n_head=1, rotary_dim=None).rotary_dim_of_head == 32
    with pytest.raises(ValueError, match=r"rotary_dim must make .* of up to head_dim=16, not 32"):
        GPTJConfig(n_embd=32, n_head=2, rotary_dim=None)
    assert GPTJConfig.from_dict({"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2}).n_embd == 64


# -------------------------------------------------------------------------------------------------------- transformers


def defaults_and_changes() -> list[Any]:
    scalings = [
        {"rope_type": "dynamic", "factor": 2.0},
        {**YARN, "attention_factor": 0.9},
        {**LLAMA3, "original_max_position_embeddings": 64},
    ]
    neox = [{}, PYTHIA_70M, NEOX_20B, NEOX_OTHER, *({**SMALL, "rope_parameters": rope} for rope in scalings)]
    return [("GPTNeoX", values) for values in neox] + [("GPTJ", values) for values in ({}, GPTJ_6B, GPTJ_OTHER)]


@pytest.mark.parametrize(("family", "values"), defaults_and_changes())
def test_transformers_both_ways(family: str, values: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind = {"GPTNeoX": GPTNeoXConfig, "GPTJ": GPTJConfig}[family]
    values = {name: value for name, value in values.items() if name not in ("model_type", "architectures")}
    theirs = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(values)))
    ours = kind.of(theirs)
    for name in [field.name for field in dataclasses.fields(kind)] + ["head_dim", "num_hidden_layers"]:
        if hasattr(theirs, name) and not name.startswith("rope_") and name != "head_dim":
            assert getattr(ours, name) == getattr(theirs, name), name
    ours.save_pretrained(tmp_path)
    read = getattr(transformers, f"{family}Config").from_pretrained(tmp_path)
    assert kind.of(read) == ours
    theirs.save_pretrained(tmp_path)
    assert unlabelled(kind.from_pretrained(tmp_path)) == unlabelled(ours)
    if values.get("rope_parameters", {}).get("rope_type") == "dynamic":  # which transformers takes no notice of
        del read.rope_parameters["original_max_position_embeddings"]
    ignored = {"dtype", "_name_or_path", "classifier_dropout"} | (values.keys() - theirs.__class__().to_dict().keys())
    before, after = theirs.to_dict(), read.to_dict()
    assert {name for name in before.keys() - ignored if before[name] != after[name]} == set()


def unlabelled(config: Any) -> Any:
    """Without the labels that transformers makes up for an object and leaves out of a file."""
    made_up = config.id2label == {i: f"LABEL_{i}" for i in range(config.num_labels)}
    return dataclasses.replace(config, id2label=None, label2id=None) if made_up else config


def test_changed_in_a_live_object() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPTNeoXConfig(num_labels=5)
    theirs.output_attentions = True
    theirs.hidden_dropout = 0.5
    ours = GPTNeoXConfig.of(theirs)
    assert (ours.num_labels, ours.output_attentions, ours.embedding_dropout) == (5, True, 0.5)
    theirs.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantization_config is not supported"):
        GPTNeoXConfig.of(theirs)
