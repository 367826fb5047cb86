"""Every architecture of transformers that the rotary swap is tried on: a tiny model of random weights, stock, swapped
and in float64. ``python tests/swapped_architectures.py [--markdown] [NAME ...]`` prints which are served, and why not.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from model_cases import VOCAB, Errors, batch
from torch import Tensor, nn

import neox_kernels
from neox_kernels.integrations import rotary_trial
from neox_kernels.integrations.rotary_functions import stock_class

# Of these a configuration takes what it has. Queries are grouped, heads small, windows and experts few.
COMMON = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "head_dim": None}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
CODEGEN = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
MASKED = {"head": "MaskedLM"}
TEXT = {key: COMMON[key] for key in list(COMMON)[:8]} | {"head_dim": 16}


def with_images(text: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """A model of text and images, of which the text is run."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **vision}
    return {"head": "ImageTextToText", "text_config": TEXT | text, "vision_config": vision}


# model_type, or model_type and a variant: what its configuration changes.
SERVED: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "codegen": CODEGEN,
    "cohere": {},
    "cohere2": MIXED,
    "cohere2_moe": {},
    "cwm": MIXED,
    "deepseek_v3 not interleaved": {**LATENT, "rope_interleave": False},
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "esm": {**MASKED, "position_embedding_type": "rotary", "mask_token_id": 1, "token_dropout": False},
    "exaone4": MIXED,
    "exaone_moe": {},
    "falcon": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "gemma3 with images": with_images(MIXED, num_hidden_layers=1, image_size=28, patch_size=14),
    "gemma4_text": {**MIXED, "hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 0},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt_neox_japanese": {},
    "gpt_oss": MIXED,
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "granite_swa": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "jais2": {},
    "jetmoe": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama scaled": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    },
    "minicpm3": LATENT,
    "mimo_v2_flash": {},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert": {**MASKED, "layer_types": ["sliding_attention", "full_attention"]},
    "modernbert-decoder": MIXED,
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen2_vl": with_images({**MROPE, "hidden_size": 64}, depth=1, embed_dim=32, num_heads=4, hidden_size=64),
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {**{f"linear_{n}_head_dim": 8 for n in ("key", "value")}, "linear_num_value_heads": 4}
    | {"linear_num_key_heads": 2, "shared_expert_intermediate_size": 16}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_vl": with_images(MROPE, depth=1, num_heads=4, out_hidden_size=32, deepstack_visual_indexes=[0]),
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": MIXED,
    "youtu not interleaved": {**LATENT, "rope_interleave": False},
}
# And what is said of those that are left.
LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v2": (LATENT, "DeepseekV2Attention does not call apply_rotary_pos_emb"),
    "deepseek_v3": (LATENT, "DeepseekV3Attention calls apply_rotary_pos_emb_interleave"),
    "llama4_text": ({"intermediate_size_mlp": 48}, "Llama4TextAttention does not call apply_rotary_pos_emb"),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model; its weights are large enough that a wrong rotation shows in the logits."""
    model_type = name.split()[0]
    changes = dict(SERVED[name] if name in SERVED else LEFT[name][0])
    head = changes.pop("head", "CausalLM")
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    options = {key: value for key, value in (COMMON | changes).items() if key in known or key in changes}
    options |= {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(tokens, vocab) of the tokens that are no padding."""
    with torch.no_grad():
        said: Tensor = model(**inputs).logits
    return said[inputs["attention_mask"].bool()] if "attention_mask" in inputs else said


@contextlib.contextmanager
def watched_calls() -> Iterator[list[bool]]:
    """Whether the fused op answered, call by call: numbers alone would not tell it from the stock function."""
    answered: list[bool] = []
    fuse = rotary_trial._fuse

    def watched(*args: Any) -> Any:
        result = fuse(*args)
        answered.append(result is not None)
        return result

    with mock.patch.object(rotary_trial, "_fuse", watched):
        yield answered


def check(name: str) -> str:
    """What became of an architecture. Raises AssertionError where the swapped model is not the stock one."""
    stock = build(name)
    swapped, oracle = copy.deepcopy(stock), copy.deepcopy(stock).double()
    report = neox_kernels.swap(swapped)
    replaced, left = report.replaced, report.left
    if not replaced:
        return "left: " + ("; ".join(sorted({reason for _, reason in left})))
    assert list(swapped.state_dict()) == list(stock.state_dict()), "another state dict"
    inputs = [batch(seqlen=13), batch("left", seed=2, rows=2)]
    exact = [logits(oracle, one) for one in inputs]
    for dtype in (torch.float32, torch.bfloat16):
        errors = Errors()
        swapped, stock = swapped.to(dtype), stock.to(dtype)
        for one, truth in zip(inputs, exact, strict=True):
            with watched_calls() as answered:
                ours = logits(swapped, one)
            assert answered and all(answered), f"of {len(answered)} calls the fused op answered {sum(answered)}"
            errors.add(f"logits in {dtype}", ours, logits(stock, one), truth)
        errors.check()
    kinds = sorted({stock_class(type(module)).__name__ for module in swapped.modules() if stock_class(type(module))})
    neox_kernels.restore(swapped)
    assert kinds_of(swapped) == kinds_of(stock), "not restored"
    assert torch.equal(logits(swapped, inputs[0]), logits(stock, inputs[0])), "not the stock model after restoring"
    rest = "; ".join(sorted({reason for _, reason in left}))
    return f"served: {', '.join(kinds)}" + (f"; left: {rest}" if rest else "")


def kinds_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="some architectures; default all")
    parser.add_argument("--markdown", action="store_true", help="a table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if options.markdown:
        print("| architecture | |\n|---|---|")
    for name in options.names or [*SERVED, *LEFT]:
        try:
            said = check(name)
        except Exception as error:
            said = f"FAILED: {type(error).__name__}: {error}"
        print(f"| {name} | {said} |" if options.markdown else f"{name}: {said}", flush=True)


if __name__ == "__main__":
    main()
