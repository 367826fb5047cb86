"""The models against transformers' on the same weights: every head, implementation, padding and configuration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from model_cases import FAMILIES, HEADED, HEADS, LAYERS, WIDTH, Errors, batch, in_float64, pair

from neox_kernels.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16)
IMPLEMENTATIONS = ("eager", "fused", "sdpa", "auto")
PADDINGS = ("none", "left", "right", "both")
OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits", "loss")
CASES = [*itertools.product(FAMILIES, HEADED)]
CASES.remove(("GPTJ", "ForTokenClassification"))  # transformers has none
SEEDS = range(10)


def inputs_of(head: str, padding: str, seed: int = 1) -> dict[str, Tensor]:
    """With labels, none of which is at a token of padding or, for a language model, right behind one."""
    inputs = batch(padding, seed)
    generator = torch.Generator().manual_seed(seed)
    if head in ("ForCausalLM", "ForTokenClassification"):
        labels = torch.randint(2, (3, 13), generator=generator)
        if padding != "none":
            hidden = inputs["attention_mask"] == 0
            if head == "ForCausalLM":
                hidden[:, 1:] |= hidden[:, :-1].clone()
            labels = labels.masked_fill(hidden, -100)
        inputs["labels"] = labels
    elif head == "ForSequenceClassification":
        inputs["labels"] = torch.randint(2, (3,), generator=generator)
    elif head == "ForQuestionAnswering" and padding not in ("left", "both"):  # the loss is over tokens of padding too
        inputs["start_positions"], inputs["end_positions"] = torch.tensor([1, 4, 30]), torch.tensor([3, 9, 5])
    return inputs


def real(x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Without the rows of padding, which mean nothing, where x is (batch, seqlen, ...)."""
    mask = inputs.get("attention_mask")
    return x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else x


def add(errors: Errors, got: Any, same: Any, truth: Any, inputs: dict[str, Tensor], what: str = "") -> None:
    """Every output that transformers gives."""
    for name in OUTPUTS:
        if getattr(same, name, None) is not None:
            a, b, c = (real(getattr(x, name), inputs) for x in (got, same, truth))
            errors.add(what + name, a.to(b.dtype), b, c)  # GPT-J's logits are float32 here


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "head"), CASES)
@torch.no_grad()
def test_forward(family: str, head: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(family, head, dtype)
    exact, errors = in_float64(theirs), Errors()
    for padding, seed in itertools.product(PADDINGS, SEEDS[:6]):
        inputs = inputs_of(head, padding, seed)
        same, truth = theirs(**inputs), exact(**inputs)
        for ours.attn_implementation in IMPLEMENTATIONS:
            add(errors, ours(**inputs), same, truth, inputs, f"{ours.attn_implementation} ")
    errors.check()


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "head"), [case for case in CASES if case[1] != "Model"])
def test_every_gradient(family: str, head: str, dtype: torch.dtype) -> None:
    # torch's sdpa rounds the gradient of the scores to bfloat16, which GPT-J's definition does not; auto does without.
    truer = ("eager", "fused", "auto")
    implementations = truer if (family, dtype) == ("GPTJ", torch.bfloat16) else IMPLEMENTATIONS
    theirs, ours = pair(family, head, dtype)
    exact, errors = in_float64(theirs), Errors()
    for padding, seed in itertools.product(PADDINGS[:3], SEEDS):
        inputs = inputs_of(head, padding, seed)
        if head == "ForQuestionAnswering" and "start_positions" not in inputs:
            continue
        same, truth = gradients(theirs, inputs), gradients(exact, inputs)
        for ours.attn_implementation in implementations:
            got = gradients(ours, inputs)
            assert got.keys() == truth.keys()
            for name, gradient in got.items():
                errors.add(f"{ours.attn_implementation} {name}", gradient, same[name], truth[name])
    errors.check()


NEOX_CHANGES: dict[str, dict[str, Any]] = {
    "sequential": {"use_parallel_residual": False},
    "half of each head": {"rotary_pct": 0.5},
    "all of each head": {"rotary_pct": 1.0},
    "another base": {"rotary_emb_base": 500.0},
    "no biases": {"attention_bias": False},
    "relu": {"hidden_act": "relu"},
    "quick gelu": {"hidden_act": "quick_gelu"},
    "loose norms": {"layer_norm_eps": 0.1},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 8},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "one head": {"num_attention_heads": 1},
    "past the positions": {"max_position_embeddings": 5},
}
GPTJ_CHANGES: dict[str, dict[str, Any]] = {
    "all of each head": {"rotary_dim": WIDTH // HEADS},
    "narrow inside": {"n_inner": 20},
    "gelu": {"activation_function": "gelu"},
    "tied": {"tie_word_embeddings": True},
    "loose norms": {"layer_norm_epsilon": 0.1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "change"), [("GPTNeoX", name) for name in NEOX_CHANGES] + [("GPTJ", name) for name in GPTJ_CHANGES]
)
@torch.no_grad()
def test_configurations(family: str, change: str, dtype: torch.dtype) -> None:
    changes = (NEOX_CHANGES if family == "GPTNeoX" else GPTJ_CHANGES)[change]
    theirs, ours = pair(family, dtype=dtype, **changes)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == (change == "tied")
    exact, errors = in_float64(theirs), Errors()
    for seed in SEEDS:
        inputs = batch("left", seed)
        add(errors, ours(**inputs), theirs(**inputs), exact(**inputs), inputs)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attentions_and_hidden_states(family: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(family, dtype=dtype)
    exact, errors = in_float64(theirs), Errors()
    for seed in SEEDS:
        inputs, more = batch("left", seed), {"output_attentions": True, "output_hidden_states": True}
        got, same, truth = (model(**inputs, **more) for model in (ours, theirs, exact))
        assert len(got.attentions) == LAYERS and len(got.hidden_states) == LAYERS + 1
        mask = inputs["attention_mask"].bool()
        for i in range(LAYERS + 1):
            errors.add(f"hidden state {i}", *(x.hidden_states[i][mask] for x in (got, same, truth)))
        for i in range(LAYERS):
            errors.add(f"attentions {i}", *(x.attentions[i].transpose(1, 2)[mask] for x in (got, same, truth)))
    errors.check()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_equal_their_unpadded_runs(family: str, implementation: str) -> None:
    _, ours = pair(family)
    ours.attn_implementation = implementation
    for padding in ("left", "right"):
        inputs = batch(padding=padding)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = ours(**inputs, position_ids=positions).logits
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            alone = ours(inputs["input_ids"][row, mask][None]).logits[0]
            torch.testing.assert_close(logits[row, mask], alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masks_of_four_dimensions(family: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(family, dtype=dtype)
    seen = torch.ones(13, 13, dtype=torch.bool).tril() & (torch.arange(13) % 5 != 3)
    seen[:, 0] = True
    lowest = torch.zeros(13, 13, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]
    ids = batch()["input_ids"]
    truth = in_float64(theirs)(ids, attention_mask=lowest.double()).logits
    same = theirs(ids, attention_mask=lowest).logits
    for mask in (lowest, seen[None, None]):
        assert_within_budget(ours(ids, attention_mask=mask).logits.to(dtype), same, truth, str(mask.dtype))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_inputs_embeds_and_token_types(family: str) -> None:
    theirs, ours = pair(family)
    inputs = batch(padding="right")
    embeds = ours.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(ours(**given).logits, ours(**inputs).logits)
    if family == "GPTJ":
        exact, errors = in_float64(theirs), Errors()
        inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
        add(errors, ours(**inputs), theirs(**inputs), exact(**inputs), inputs)
        errors.check()
