"""The swap into transformers' GPT-NeoX and GPT-J: the numbers of the stock model, everywhere that people use one."""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers")

from transformers import (
    DynamicCache,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StaticCache,
)
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

import neox_kernels
from neox_kernels.integrations import transformers_layers
from neox_kernels.testing import assert_within_budget

VOCAB, SEQLEN = 97, 24
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def gpt_neox(nheads: int = 3, **changes: Any) -> GPTNeoXForCausalLM:
    """Three heads of 32 features, 8 of them rotated."""
    sizes = {"hidden_size": 32 * nheads, "num_attention_heads": nheads, "num_hidden_layers": 2, "intermediate_size": 64}
    options = {"rotary_pct": 0.25, "max_position_embeddings": 64, "attn_implementation": "eager"} | changes
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, **sizes, **NO_TOKENS, **options)).eval()


def gptj(nheads: int = 3, **changes: Any) -> GPTJForCausalLM:
    sizes = {"n_embd": 32 * nheads, "n_head": nheads, "n_layer": 2, "n_positions": 64}
    torch.manual_seed(0)
    return GPTJForCausalLM(GPTJConfig(vocab_size=VOCAB, **sizes, **NO_TOKENS, **({"rotary_dim": 8} | changes))).eval()


def parts(model: nn.Module) -> int:
    """How many modules the swap replaces: attention, and GPT-J's activations."""
    return len(attention_modules(model)) * (2 if isinstance(model, GPTJForCausalLM) else 1)


def swapped_copy(stock: nn.Module) -> Any:
    model = copy.deepcopy(stock)
    assert len(neox_kernels.swap(model).replaced) == parts(model)
    return model


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GPTNeoXAttention | GPTJAttention)]


def text(batch: int = 3, seqlen: int = SEQLEN, padding: str = "right") -> dict[str, Tensor]:
    """Sequences of unequal lengths."""
    tokens = torch.randint(1, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(1))
    lengths = seqlen - 5 * torch.arange(batch)[:, None]
    positions = torch.arange(seqlen)[None]
    mask = positions < lengths if padding == "right" else positions >= seqlen - lengths
    return {"input_ids": tokens.where(mask, 0), "attention_mask": mask.long()}


def in_float64(stock: nn.Module) -> Any:
    """The oracle. Of GPT-NeoX by sdpa: its eager softmax is in float32, where float64's lowest number is -inf and a row
    of padding becomes NaN."""
    model: Any = copy.deepcopy(stock).double()
    if isinstance(model, GPTNeoXForCausalLM):
        model.config._attn_implementation = "sdpa"
    return model


def logits(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """(tokens, vocab) of the tokens that are no padding."""
    with torch.no_grad():
        return model(**inputs, **options).logits[inputs["attention_mask"].bool()]


def assert_parity(stock: nn.Module, inputs: dict[str, Tensor]) -> None:
    oracle = logits(in_float64(stock), inputs)
    assert_within_budget(logits(swapped_copy(stock), inputs), logits(stock, inputs), oracle, "logits")


MODELS = [
    pytest.param(gpt_neox, id="gpt_neox-eager"),
    pytest.param(lambda **changes: gpt_neox(attn_implementation="sdpa", **changes), id="gpt_neox-sdpa"),
    pytest.param(gptj, id="gptj"),
]
FAMILIES = [MODELS[0], MODELS[2]]
each_model = pytest.mark.parametrize("build", MODELS)
each_family = pytest.mark.parametrize("build", FAMILIES)
Build = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread: 28 s in place of 135 s on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_model
def test_logits(build: Build, dtype: torch.dtype, padding: str) -> None:
    assert_parity(build().to(dtype), text(padding=padding))


@pytest.mark.parametrize("padding", ["left", "right"])
@each_model
def test_float64(build: Build, padding: str) -> None:
    exact, inputs = in_float64(build()), text(padding=padding)
    torch.testing.assert_close(logits(swapped_copy(exact), inputs), logits(exact, inputs), rtol=0, atol=1e-7)


@each_family
def test_a_wrong_sign_is_seen(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return neox_kernels.apply_rotary_qk(q, k, cos, -sin, **options)

    monkeypatch.setattr(transformers_layers, "apply_rotary_qk", wrong)
    with pytest.raises(AssertionError, match="above the budget"):
        assert_parity(build(), text())


@pytest.mark.parametrize(
    ("build", "options"),
    [
        *((build, {"nheads": nheads}) for build in (gpt_neox, gptj) for nheads in (1, 4)),
        *((gpt_neox, {"rotary_pct": rotary_pct}) for rotary_pct in (0.5, 1.0)),
        *((gptj, {"rotary_dim": rotary_dim}) for rotary_dim in (2, 20, 32)),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_shapes(build: Build, options: dict[str, Any]) -> None:
    assert_parity(build(**options), text())


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_rope_scaling(rope_type: str) -> None:
    scaling = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    if rope_type == "yarn":
        scaling["original_max_position_embeddings"] = 16
    stock = gpt_neox(max_position_embeddings=16, rope_scaling=scaling)
    assert stock.gpt_neox.rotary_emb.rope_type == rope_type
    swapped = swapped_copy(stock)
    for seqlen in (12, 48, 12):  # past max_position: dynamic NTK grows, and comes back
        inputs = text(seqlen=seqlen)
        oracle = logits(in_float64(stock), inputs)
        assert_within_budget(logits(swapped, inputs), logits(stock, inputs), oracle, f"logits of {seqlen} tokens")


@each_family
def test_positions_per_row(build: Build) -> None:
    inputs = text(padding="left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    assert_parity(build(), {**inputs, "position_ids": positions})


@pytest.mark.parametrize("table", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_gptj_table_of_any_dtype(table: torch.dtype) -> None:
    stock = gptj().to(torch.bfloat16)
    for attention in attention_modules(stock):
        attention.embed_positions = attention.embed_positions.to(table)
    assert_parity(stock, text())


@each_model
def test_autocast(build: Build) -> None:
    stock, inputs = build(), text()
    swapped, oracle = swapped_copy(stock), logits(in_float64(stock), inputs)
    cache: dict[nn.Module, Any] = {stock: DynamicCache(), swapped: DynamicCache()}
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (logits(model, inputs, past_key_values=cache[model]) for model in (stock, swapped))
    assert_within_budget(ours, theirs, oracle, "logits")
    assert cache[swapped].layers[0].keys.dtype == cache[stock].layers[0].keys.dtype


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_model
def test_gradients(build: Build, dtype: torch.dtype, checkpointing: bool) -> None:
    stock, inputs = build().to(dtype), text()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients(model: Any) -> dict[str, Tensor]:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    swapped, oracle = swapped_copy(stock), in_float64(stock)
    if checkpointing:
        swapped.gradient_checkpointing_enable()
        for dropout in (module for module in swapped.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        swapped.train()
    ours, theirs, exact = gradients(swapped), gradients(stock), gradients(oracle)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert_within_budget(gradient, theirs[name], exact[name], f"gradient of {name}")


# --------------------------------------------------------------------------------------------- where people use a model


@pytest.mark.parametrize("static", [False, True])
@each_model
def test_decoding_in_chunks(build: Build, static: bool) -> None:
    stock, inputs = build(), text(batch=2, padding="left")

    def decode(model: Any) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
        said, done = [], 0
        for chunk in (11, 1, 7, 1, 4):
            rows = slice(done, done + chunk)
            options = {"past_key_values": cache, "attention_mask": inputs["attention_mask"][:, : done + chunk]}
            said.append(model(input_ids=inputs["input_ids"][:, rows], use_cache=True, **options).logits)
            done += chunk
        return torch.cat(said, dim=1)[inputs["attention_mask"].bool()]

    with torch.no_grad():
        ours, theirs, exact = (decode(m) for m in (swapped_copy(stock), stock, in_float64(stock)))
    assert_within_budget(ours, theirs, exact, "logits")


@each_model
def test_generate(build: Build) -> None:
    stock, inputs = build(), text(padding="left")
    options = {"max_new_tokens": 16, "do_sample": False}
    ours, theirs = (model.generate(**inputs, **options) for model in (swapped_copy(stock), stock))
    assert ours.shape == (3, SEQLEN + 16)
    assert torch.equal(ours, theirs)


@each_family
def test_attentions_and_hidden_states(build: Build) -> None:
    stock, inputs = build(), text()
    swapped, oracle = swapped_copy(stock), copy.deepcopy(stock).double()
    with torch.no_grad():
        ours, theirs, exact = (
            model(**inputs, output_attentions=True, output_hidden_states=True) for model in (swapped, stock, oracle)
        )
    assert (len(ours.attentions), len(ours.hidden_states)) == (2, 3)
    for kind in ("attentions", "hidden_states"):
        for trio in zip(getattr(ours, kind), getattr(theirs, kind), getattr(exact, kind), strict=True):
            assert_within_budget(*trio, kind)
    # transformers 4.57 has now put a forward on every instance that it captured from.
    assert len(neox_kernels.restore(swapped).replaced) == parts(swapped)
    assert torch.equal(logits(swapped, inputs), logits(stock, inputs))
    assert len(neox_kernels.swap(stock).replaced) == parts(stock)


@each_family
def test_hooks_see_what_they_saw(build: Build) -> None:
    model, seen = build(), []
    for attention in attention_modules(model):
        for child in attention.children():
            child.register_forward_hook(lambda *call: seen.append((call[-1], call[-1].clone())))
    logits(model, text())
    before = seen.copy()
    seen.clear()
    neox_kernels.swap(model)
    logits(model, text())
    assert len(seen) == len(before) >= 4
    for output, at_the_hook in seen:
        assert torch.equal(output, at_the_hook)  # the rotary did not write into the projection
    assert torch.equal(seen[0][0], before[0][0])  # behind no rotary yet, so the same to the bit


@each_family
def test_compile(build: Build) -> None:
    stock = build()
    blocks = stock.gpt_neox.layers if build is gpt_neox else stock.transformer.h
    del blocks[1:]
    swapped = copy.deepcopy(stock)
    neox_kernels.swap(swapped)
    graphs = {}
    for model in (stock, swapped):
        torch._dynamo.reset()
        graphs[model] = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=graphs[model], dynamic=True)
        for inputs in (text(), text(batch=2, seqlen=17)):
            logits(compiled, inputs, use_cache=False)
    assert 1 <= graphs[swapped].frame_count <= graphs[stock].frame_count  # no graph break of its own, no recompilation

    torch._dynamo.reset()
    compiled = torch.compile(swapped, backend="aot_eager")
    oracle = logits(in_float64(stock), inputs)
    assert_within_budget(logits(compiled, inputs, use_cache=False), logits(stock, inputs), oracle, "logits")
    neox_kernels.restore(compiled)  # the guards of what was compiled see it
    assert torch.equal(logits(compiled, inputs, use_cache=False), logits(stock, inputs))


@each_family
def test_copies_and_files(build: Build, tmp_path: Path) -> None:
    stock, inputs = build(), text()
    swapped, expected = swapped_copy(stock), logits(swapped_copy(stock), inputs)
    assert list(swapped.state_dict()) == list(stock.state_dict())

    pickled = io.BytesIO()
    torch.save(swapped, pickled)
    pickled.seek(0)
    for clone in (copy.deepcopy(swapped), torch.load(pickled, weights_only=False)):
        assert torch.equal(logits(clone, inputs), expected)
        assert len(neox_kernels.restore(clone).replaced) == parts(clone)

    swapped.save_pretrained(tmp_path)
    assert "kernels" not in (tmp_path / "config.json").read_text()
    loaded = type(stock).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(logits(loaded, inputs), logits(stock, inputs))
    fresh = swapped_copy(build())
    fresh.load_state_dict(stock.state_dict())
    assert torch.equal(logits(fresh, inputs), expected)
