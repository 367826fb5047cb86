"""What the swap replaces and what it leaves, what it says of both, and the way back."""

import copy
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJFlashAttention2

import neox_kernels
from neox_kernels.integrations import transformers as integration

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def gpt_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=64, **SIZES, **NO_TOKENS)).eval()


def gptj(rotary_dim: int = 8) -> GPTJForCausalLM:
    torch.manual_seed(0)
    return GPTJForCausalLM(GPTJConfig(rotary_dim=rotary_dim, n_positions=64, **SIZES, **NO_TOKENS)).eval()


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GPTNeoXAttention | GPTJAttention)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


each_family = pytest.mark.parametrize("build", [gpt_neox, gptj])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread: 28 s in place of 135 s on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@each_family
def test_swap_restore_and_report(build: Any) -> None:
    model, other = build(), build()
    kinds, before = [type(module) for module in model.modules()], logits(model)
    names = [name for name, module in model.named_modules() if module in attention_modules(model)]
    acts = [f"transformer.h.{i}.mlp.act" for i in range(2)] if build is gptj else []

    report = neox_kernels.swap(model)
    expected = [(name, "fused rotary and attention") for name in names] + [(name, "fused GELU") for name in acts]
    assert sorted(report.replaced) == sorted(expected) and report.left == []
    lines = [f"replaced 2: {names[0].replace('0', '0-1')}: fused rotary and attention"]
    lines += ["replaced 2: transformer.h.0-1.mlp.act: fused GELU"] if acts else []
    assert str(report).splitlines() == lines
    again = neox_kernels.swap(model)
    assert again.replaced == [] and again.left == [(name, "swapped already") for name in names]
    assert [type(m) for m in attention_modules(other)] == [m.__class__.__mro__[1] for m in attention_modules(model)]
    assert torch.equal(logits(other), before)  # transformers itself is as it was

    back = neox_kernels.restore(model)
    assert sorted(name for name, _ in back.replaced) == sorted(names + acts)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model), before)
    assert neox_kernels.restore(model).replaced == []
    assert str(neox_kernels.restore(model)) == "nothing was replaced"


def test_report_is_short() -> None:
    replaced = [(f"layers.{i}.attention", "fused rotary") for i in (0, 1, 2, 5, 7, 8)]
    report = integration.SwapReport(replaced, [("", "why"), ("attn", "no")])
    assert repr(report).splitlines() == [
        "replaced 6: layers.0-2,5,7-8.attention: fused rotary",
        "left 1: the model itself: why",
        "left 1: attn: no",
    ]


class OwnAttention(GPTNeoXAttention):
    pass


def test_what_is_not_known_is_left_and_named() -> None:
    neox, j = gpt_neox(), gptj()
    overridden = copy.deepcopy(neox.gpt_neox.layers[0].attention)
    overridden.forward = types.MethodType(lambda self, *args, **options: None, overridden)
    rotaries = {f"rotary_{n}": GPTJAttention(gptj(rotary_dim=n).config, 0) for n in (7, 34)}
    whole = GPTJAttention(j.config, 0)
    whole.rotary_dim = None  # as 4.57's configuration still allows
    model = nn.ModuleDict(
        {
            "known": neox.gpt_neox.layers[1].attention,
            "flash": GPTJFlashAttention2(j.config, 0),
            "subclass": OwnAttention(neox.config, 0),
            "overridden": overridden,
            "rotary_none": whole,
            **rotaries,
            "torch": nn.MultiheadAttention(8, 2),
            "linear": nn.Linear(2, 2),
        }
    )
    kinds = {name: type(module) for name, module in model.items() if name != "known"}
    report = neox_kernels.swap(model)
    assert report.replaced == [("known", "fused rotary and attention")]
    assert dict(report.left) == {
        "flash": "GPTJFlashAttention2 is a subclass of GPTJAttention",
        "subclass": "OwnAttention is a subclass of GPTNeoXAttention",
        "overridden": "its forward is overridden on the instance",
        "rotary_none": "rotary_dim=None is not an even number of up to head_dim=32",
        "rotary_7": "rotary_dim=7 is not an even number of up to head_dim=32",
        "rotary_34": "rotary_dim=34 is not an even number of up to head_dim=32",
        "torch": "MultiheadAttention does not call apply_rotary_pos_emb",
    }
    assert {name: type(module) for name, module in model.items() if name != "known"} == kinds


def test_other_families_get_the_rotary() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 3}))
    assert str(neox_kernels.swap(model)) == "replaced 3: model.layers.0-2.self_attn: fused rotary"
    assert str(neox_kernels.restore(model)) == "replaced 3: model.layers.0-2.self_attn: the stock LlamaAttention"


def test_forward_overridden_after_the_swap_is_not_lost() -> None:
    model = gptj()
    neox_kernels.swap(model)
    attention = attention_modules(model)[0]
    attention.forward = types.MethodType(lambda self, *args, **options: None, attention)
    report = neox_kernels.restore(model)
    assert [name for name, _ in report.replaced if "attn" in name] == ["transformer.h.1.attn"]
    assert "overridden after the swap" in report.left[0][1]


@each_family
def test_for_a_block_only(build: Any) -> None:
    model = build()
    kinds = [type(module) for module in model.modules()]
    with neox_kernels.swapped(model) as report:
        assert (
            len(report.replaced) == (4 if build is gptj else 2)
            and [type(module) for module in model.modules()] != kinds
        )
        with neox_kernels.swapped(model) as again:
            assert again.replaced == []
        assert [type(module) for module in model.modules()] != kinds  # the inner block replaced nothing
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ZeroDivisionError), neox_kernels.swapped(model):
        raise ZeroDivisionError
    assert [type(module) for module in model.modules()] == kinds


def test_a_model_is_wanted() -> None:
    for function in (neox_kernels.swap, neox_kernels.restore):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not str"):
            function("EleutherAI/pythia-160m")  # type: ignore[arg-type]
