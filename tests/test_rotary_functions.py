"""The fused rotary in other architectures of transformers: their numbers, and nothing changed but what was swapped."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers", "5", "of 4.57 only GPT-NeoX and GPT-J are tried")

import transformers
from model_cases import Errors, batch
from swapped_architectures import LEFT, SERVED, build, check, logits, watched_calls
from transformers import DynamicCache
from transformers.models.llama import modeling_llama as llama

import neox_kernels
from neox_kernels.integrations import rotary_functions, rotary_trial
from neox_kernels.integrations.rotary_functions import calls_rotary
from neox_kernels.testing import assert_within_budget

PAIRINGS = ("llama", "cohere", "glm", "codegen", "gemma4_text")  # halves, pairs, halves as pairs, and one tensor each


def known(name: str) -> str:
    """The architecture, if this transformers has it."""
    if name.split()[0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return name


def swapped_copy(stock: nn.Module) -> Any:
    model = copy.deepcopy(stock)
    report = neox_kernels.swap(model)
    assert [what for _, what in report.replaced] == ["fused rotary"] * 2 and not report.left
    return model


def attention_of(model: Any) -> Any:
    return model.model.layers[0].self_attn


# ------------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    assert check(known(name)).startswith("served: ")


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    assert check(known(name)) == f"left: {LEFT[name][1]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRINGS)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    stock = build(known(name), dtype)
    models = (swapped_copy(stock), stock, copy.deepcopy(stock).double())
    errors = Errors()
    for seed in range(1, 9):
        inputs = batch(seed=seed)
        for model in models:
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        for (of, ours), theirs, exact in zip(*(model.named_parameters() for model in models), strict=True):
            assert (ours.grad is None) == (theirs[1].grad is None)
            if ours.grad is not None:
                of = re.sub(r"\d+", "n", of)  # of all layers together: one alone may be right by chance
                errors.add(of, ours.grad, theirs[1].grad, exact[1].grad)
    errors.check()


@pytest.mark.parametrize("name", PAIRINGS)
def test_generate(name: str) -> None:
    stock, inputs = build(known(name)), batch("left")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with watched_calls() as answered:
        ours = swapped_copy(stock).generate(**inputs, **options)
    assert all(answered) and len(answered) >= 2 * 8
    assert torch.equal(ours, stock.generate(**inputs, **options))


@pytest.mark.parametrize("name", PAIRINGS)
def test_a_wrong_sign_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, inputs = build(known(name)), batch()
    swapped, exact = swapped_copy(stock), logits(copy.deepcopy(stock).double(), inputs)
    stock_logits = logits(stock, inputs)
    assert_within_budget(logits(swapped, inputs), stock_logits, exact)
    for op in ("apply_rotary", "apply_rotary_qk"):
        right = getattr(rotary_trial, op)
        monkeypatch.setattr(rotary_trial, op, lambda *x, right=right, **options: right(*x[:-1], -x[-1], **options))
    with pytest.raises(AssertionError, match="above the budget"):
        assert_within_budget(logits(swapped, inputs), stock_logits, exact)


def test_compile() -> None:
    stock = build("llama")
    del stock.model.layers[1:]
    swapped = copy.deepcopy(stock)
    neox_kernels.swap(swapped)
    exact, graphs = copy.deepcopy(stock).double(), {}
    inputs = [batch(), batch(seed=2, rows=2, seqlen=9)]
    for model in (stock, swapped):
        torch._dynamo.reset()
        graphs[model] = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=graphs[model], fullgraph=True, dynamic=True)
        for one in inputs:
            ours, theirs, truth = (logits(kind, {**one, "use_cache": False}) for kind in (compiled, stock, exact))
            assert_within_budget(ours, theirs, truth, "logits")
    assert graphs[swapped].frame_count <= graphs[stock].frame_count  # no recompilation of its own
    neox_kernels.restore(compiled)  # the guards of what was compiled see it
    assert torch.equal(logits(compiled, inputs[0]), logits(stock, inputs[0]))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", PAIRINGS)
def test_compile_one_module(name: str) -> None:
    """The forward alone, which has globals of its own: not those of the stock module, which have its name."""
    stock = build(known(name))
    path, attention = next((path, one) for path, one in stock.named_modules() if calls_rotary(type(one)))
    calls: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    logits(stock, batch())
    hook.remove()
    (args, kwargs) = calls[0]
    kwargs = {**kwargs, **dict.fromkeys({"past_key_values", "layer_past"} & set(kwargs))}
    swapped = swapped_copy(stock).get_submodule(path)
    torch._dynamo.reset()
    with torch.no_grad(), watched_calls() as answered:
        expected, compiled = swapped(*args, **kwargs)[0], torch.compile(swapped, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args, **kwargs)[0], expected)
    assert answered and all(answered)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "cohere", "olmo"])
def test_autocast(name: str) -> None:
    stock, inputs = build(name), batch()
    swapped, exact = swapped_copy(stock), logits(copy.deepcopy(stock).double(), inputs)
    cache: dict[nn.Module, Any] = {stock: DynamicCache(), swapped: DynamicCache()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        theirs, ours = (model(**inputs, past_key_values=cache[model]).logits for model in (stock, swapped))
    assert_within_budget(ours, theirs, exact, "logits")
    assert cache[swapped].layers[0].keys.dtype == cache[stock].layers[0].keys.dtype


# ----------------------------------------------------------------------------------------------- what may not change


def test_nothing_else_changes() -> None:
    model, other, inputs = build("llama"), build("llama"), batch()
    rotary, called = model.model.rotary_emb, []
    rotary.register_forward_hook(lambda *call: called.append(call))
    of_module, of_class = dict(vars(llama)), dict(vars(llama.LlamaAttention))
    tables, before, random = rotary.inv_freq.clone(), logits(other, inputs), torch.get_rng_state()
    neox_kernels.swap(model)
    assert torch.equal(torch.get_rng_state(), random) and not called and torch.equal(rotary.inv_freq, tables)
    assert vars(llama) == of_module and dict(vars(llama.LlamaAttention)) == of_class
    assert type(attention_of(other)) is llama.LlamaAttention
    with watched_calls() as answered:
        assert torch.equal(logits(other, inputs), before)
    assert not answered

    kind = type(attention_of(model))
    assert issubclass(kind, llama.LlamaAttention) and repr(attention_of(model)).startswith("RotaryLlamaAttention(\n")
    assert type(attention_of(swapped_copy(other))) is kind  # one class for all of its kind
    assert neox_kernels.swap(model).left == [(f"model.layers.{n}.self_attn", "swapped already") for n in (0, 1)]


def test_copies_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, inputs = build("llama"), batch()
    swapped = swapped_copy(stock)
    expected, file = logits(swapped, inputs), io.BytesIO()
    torch.save(swapped, file)
    with monkeypatch.context() as another_process:
        another_process.setattr(rotary_functions, "_CLASSES", {})
        file.seek(0)
        afresh = torch.load(file, weights_only=False)
    file.seek(0)
    for clone in (copy.deepcopy(swapped), torch.load(file, weights_only=False), afresh):
        with watched_calls() as answered:
            assert torch.equal(logits(clone, inputs), expected)
        assert len(answered) == 2 and all(answered)
        neox_kernels.restore(clone)
        assert type(attention_of(clone)) is llama.LlamaAttention


def test_other_calls_are_answered_by_the_stock_function() -> None:
    model = swapped_copy(build("llama"))
    fused = type(attention_of(model)).forward.__globals__["apply_rotary_pos_emb"]
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = model.model.rotary_emb(q, torch.arange(5)[None])
    constant = (torch.ones(2, 1, 8), torch.zeros(2, 1, 8))
    calls = {
        "a position for all tokens": (q, k, *constant),
        "other lengths": (q, k[:, :, :1], *(table[:, :1] for table in (cos, sin))),
        "other dtypes": (q, k.double(), cos, sin),
        "no batch": (q[0], k[0], cos[0], sin[0], 0),
        "another width": (q[..., :4], k[..., :4], cos[..., :4], sin[..., :4]),
        "tables of two dimensions": (q, k, cos[0], sin[0], 0),
        "tables that learn": (q, k, cos.clone().requires_grad_(), sin),
    }
    for what, call in calls.items():
        with watched_calls() as answered:
            ours = fused(*call)
        assert answered == [False], what
        assert all(map(torch.equal, ours, llama.apply_rotary_pos_emb(*call))), what
    for unsqueezed, heads in ((1, (q, k)), (2, (q.transpose(1, 2), k.transpose(1, 2)))):
        with watched_calls() as answered:
            ours = fused(*heads, cos, sin, unsqueeze_dim=unsqueezed)
        assert answered == [True]
        torch.testing.assert_close(ours, llama.apply_rotary_pos_emb(*heads, cos, sin, unsqueezed))
    with pytest.raises(RuntimeError):  # heads that are wider than the tables are the stock function's to refuse
        fused(*(torch.cat((x, x), -1) for x in (q, k)), cos, sin)
