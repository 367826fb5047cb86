"""Attention in swapped models and by the name ``neox_kernels``: every mask of transformers, and who sees what."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from test_swap import SEQLEN, VOCAB, attention_modules, gpt_neox, gptj, in_float64, logits, swapped_copy, text
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJForCausalLM,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import neox_kernels
from neox_kernels.integrations import transformers as integration
from neox_kernels.integrations import transformers_attention
from neox_kernels.testing import assert_within_budget

NAME = "neox_kernels"
SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}


def neox_sdpa(**changes: Any) -> GPTNeoXForCausalLM:
    return gpt_neox(attn_implementation="sdpa", **changes)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS)).eval()


def mistral() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, **HEADS, sliding_window=7)).eval()


def renamed(stock: nn.Module) -> Any:
    """A copy whose attention goes by our name."""
    model: Any = copy.deepcopy(stock)
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == NAME
    return model


def gptj_by_name(stock: nn.Module) -> Any:
    model = GPTJForCausalLM._from_config(copy.deepcopy(stock.config), attn_implementation=NAME).eval()
    model.load_state_dict(stock.state_dict())
    return model.to(stock.dtype)


OURS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "gpt_neox eager, swapped": (gpt_neox, swapped_copy),
    "gpt_neox sdpa, swapped": (neox_sdpa, swapped_copy),
    "gpt_neox by name": (neox_sdpa, renamed),
    "gpt_neox by name, swapped": (neox_sdpa, lambda stock: swapped_copy(renamed(stock))),
    "gptj, swapped": (gptj, swapped_copy),
    "gptj by name": (gptj, gptj_by_name),
    "llama by name": (llama, renamed),
    "mistral by name": (mistral, renamed),
}
each = pytest.mark.parametrize("case", OURS)


def trio(case: str) -> tuple[Any, Any, Any]:
    """Ours, stock, and stock in float64."""
    build, ours_of = OURS[case]
    stock = build()
    return ours_of(stock), stock, in_float64(stock)


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@each
def test_padding(case: str, padding: str) -> None:
    models, inputs = trio(case), text(padding="left" if padding == "left" else "right")
    if padding == "none":
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones(3, SEQLEN, dtype=torch.long)}
    elif padding == "holes":
        inputs["attention_mask"][:, 3:5] = 0
    assert_within_budget(*(logits(model, inputs) for model in models), "logits")
    if padding == "none":
        with torch.no_grad():
            assert_within_budget(*(model(inputs["input_ids"]).logits for model in models), "logits without a mask")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@each
def test_chunks(case: str, padding: str, cache: str) -> None:
    inputs = text(padding="left")

    def decode(model: Any) -> Tensor:
        kept = StaticCache(config=model.config, max_cache_len=40) if cache == "static" else DynamicCache()
        said, done = [], 0
        for chunk in (11, 1, 7, 1, 4):
            options: dict[str, Any] = {"past_key_values": kept}
            if padding == "left":
                options["attention_mask"] = inputs["attention_mask"][:, : done + chunk]
            said.append(model(inputs["input_ids"][:, done : done + chunk], use_cache=True, **options).logits)
            done += chunk
        whole = torch.cat(said, dim=1)
        return whole[inputs["attention_mask"].bool()] if padding == "left" else whole

    with torch.no_grad():
        assert_within_budget(*(decode(model) for model in trio(case)), "logits")


@each
def test_generate(case: str) -> None:
    ours, stock, _ = trio(case)
    inputs, options = text(padding="left"), {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), stock.generate(**inputs, **options))
    beams = {**options, "num_beams": 3}
    assert torch.equal(ours.generate(**inputs, **beams), stock.generate(**inputs, **beams))
    static = {**options, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(ours.generate(**inputs, **static), stock.generate(**inputs, **options))


@pytest.mark.parametrize("case", [case for case in OURS if "gptj" not in case])
def test_packed_sequences_do_not_see_each_other(case: str) -> None:
    models, tokens = trio(case), text()["input_ids"][:1]
    positions = torch.cat((torch.arange(9), torch.arange(SEQLEN - 9)))[None]
    with torch.no_grad():
        results = [model(tokens, position_ids=positions, use_cache=False).logits for model in models]
        alone = models[0](tokens[:, 9:]).logits
    assert_within_budget(*results, "logits")
    torch.testing.assert_close(results[0][:, 9:], alone, rtol=1e-4, atol=1e-5)


def test_packed_sequences_by_their_lengths() -> None:
    """As transformers' collators hand them to FlashAttention; positions alone say the same."""
    stock, tokens = neox_sdpa(), text()["input_ids"][:1]
    starts = torch.tensor([0, 9, SEQLEN], dtype=torch.int32)
    for model in (renamed(stock), swapped_copy(renamed(stock))):
        with torch.no_grad():
            positions = torch.cat((torch.arange(9), torch.arange(SEQLEN - 9)))[None]
            expected = model(tokens, position_ids=positions, use_cache=False).logits
            lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 15, "max_length_k": 15}
            both = model(tokens, position_ids=positions, use_cache=False, **lengths).logits
            assert torch.equal(both, expected)
            hidden = torch.randn(1, 3, SEQLEN, 32)
            layer = attention_modules(model)[0]
            call = transformers_attention.neox_kernels_attention
            got, _ = call(layer, hidden, hidden, hidden, None, scaling=0.1, **lengths)
            for part in (slice(0, 9), slice(9, None)):
                alone, _ = call(layer, *[hidden[:, :, part]] * 3, None, scaling=0.1)
                torch.testing.assert_close(got[:, part], alone)
            with pytest.raises(ValueError, match="cu_seq_lens_q must be None behind a cache"):
                call(layer, hidden[:, :, :4], hidden, hidden, None, scaling=0.1, **lengths)


@each
def test_masks_of_four_dimensions(case: str) -> None:
    models, tokens = trio(case), text()["input_ids"]
    rows = torch.rand(3, 1, SEQLEN, SEQLEN, generator=torch.Generator().manual_seed(0)) < 0.6
    rows |= torch.eye(SEQLEN, dtype=torch.bool)
    added = torch.where(rows, torch.randn(3, 1, SEQLEN, SEQLEN, generator=torch.Generator().manual_seed(1)), -1e30)
    for mask in (added, added[:1], added.masked_fill(rows, 0.0)):
        with torch.no_grad():
            results = [model(tokens, attention_mask=mask.to(model.dtype)).logits for model in models]
        assert_within_budget(*results, "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each
def test_gradients(case: str, dtype: torch.dtype) -> None:
    build, ours_of = OURS[case]
    stock = build().to(dtype)
    inputs = text()  # on the left, the first label would be said by padding, of which nothing is promised
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients(model: Any) -> dict[str, Tensor]:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    ours, theirs, exact = (gradients(model) for model in (ours_of(stock), stock, in_float64(stock)))
    for name, gradient in ours.items():
        assert gradient.dtype == dtype
        assert_within_budget(gradient, theirs[name], exact[name], f"gradient of {name}")


@each
def test_probabilities_where_they_are_asked_for(case: str) -> None:
    if case == "gpt_neox by name" and transformers.__version__ < "5":
        pytest.skip("its layer does not tell the attention function")
    ours, stock, _ = trio(case)
    inputs = text(padding="left")
    if "gptj" not in case:
        stock.set_attn_implementation("eager")
    with torch.no_grad():
        got, expected = (model(**inputs, output_attentions=True).attentions for model in (ours, stock))
    assert len(got) == len(expected) == 2
    real = inputs["attention_mask"].bool()
    for ours_of_layer, theirs in zip(got, expected, strict=True):
        assert ours_of_layer.shape == theirs.shape
        # (tokens, heads, keys): what padding sees is nobody's business
        got_rows, expected_rows = (x.transpose(1, 2)[real] for x in (ours_of_layer, theirs))
        torch.testing.assert_close(got_rows, expected_rows, rtol=1e-5, atol=1e-6)


def test_hooks_see_probabilities_as_before() -> None:
    for build, given in ((gpt_neox, True), (neox_sdpa, False), (gptj, True)):
        model, seen = swapped_copy(build()), []
        for attention in attention_modules(model):
            attention.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1][1]))
        logits(model, text())
        assert len(seen) == 2 and all((x is not None) == given for x in seen)


def test_hooks_on_the_dropout_of_gptj() -> None:
    stock, inputs = gptj(), text(padding="left")
    swapped, seen = swapped_copy(stock), []
    for model in (stock, swapped):
        for attention in attention_modules(model):
            attention.attn_dropout.register_forward_hook(lambda *call: seen.append(call[-1]) or call[-1] * 0.5)
    assert_within_budget(logits(swapped, inputs), logits(stock, inputs), logits(in_float64(stock), inputs), "logits")
    assert len(seen) == 6


@pytest.mark.parametrize("build", [gpt_neox, neox_sdpa, gptj])
def test_dropout_in_training(build: Callable[..., Any]) -> None:
    name, others = "attention_dropout", {"hidden_dropout": 0.0}
    if build is gptj:
        name, others = "attn_pdrop", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = build(**{name: 0.5, **others}).train()
    swapped, inputs = swapped_copy(model), text()
    with torch.no_grad():
        mean = torch.stack([swapped(**inputs).logits for _ in range(60)]).mean(0)
        theirs = torch.stack([model(**inputs).logits for _ in range(60)]).mean(0)
        assert not torch.equal(swapped(**inputs).logits, swapped(**inputs).logits)
    assert (mean - theirs).abs().mean() < 0.25 * (theirs - model.eval()(**inputs).logits).abs().mean() + 0.02


@pytest.mark.parametrize("build", [gpt_neox, neox_sdpa, gptj])
def test_the_configuration_is_not_touched(build: Callable[..., Any]) -> None:
    model = build()
    before = copy.deepcopy(model.config)
    with neox_kernels.swapped(model):
        assert model.config.to_dict() == before.to_dict()
        assert model.config._attn_implementation == before._attn_implementation
    if build is neox_sdpa:  # what is chosen after the swap is served too, by transformers' own functions
        swapped = swapped_copy(model)
        swapped.set_attn_implementation("flex_attention")
        torch.testing.assert_close(logits(swapped, text()), logits(model, text()), rtol=1e-4, atol=1e-5)


def test_attention_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for build in (gpt_neox, gptj):
        model = build()
        report = neox_kernels.swap(model, attention=False)
        assert [what for _, what in report.replaced] == ["fused rotary"] * 2
        with monkeypatch.context() as patched:
            patched.setattr(transformers_attention, "attention", None)  # whoever calls it fails
            got = logits(model, text())
        assert_within_budget(got, logits(build(), text()), logits(in_float64(build()), text()), "logits")
        neox_kernels.restore(model)
        assert "fuses_attention" not in vars(attention_modules(model)[0])


def test_gptj_made_by_name_stays_so(tmp_path: Any) -> None:
    stock = gptj()
    stock.save_pretrained(tmp_path)
    model = GPTJForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    assert all(isinstance(module, integration.FusedGPTJAttention) for module in attention_modules(model))
    report = neox_kernels.swap(model)
    assert [what for _, what in report.replaced] == ["fused GELU"] * 2
    report = neox_kernels.restore(model)
    assert (
        [what for _, what in report.replaced] == ["the stock NewGELUActivation"] * 2
        and len(report.left) == 2
        and "made with attn_implementation" in str(report)
    )
    assert_within_budget(logits(model, text()), logits(stock, text()), logits(in_float64(stock), text()), "logits")


def test_what_is_not_served_is_refused() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, head_dim=16)).eval()
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="softcap must be None"):
        model(torch.arange(5)[None])
