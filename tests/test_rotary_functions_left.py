"""Functions, tables and forwards that the rotary swap must leave, with a reason, and forwards in wrappings."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", "5", "of 4.57 only GPT-NeoX and GPT-J are tried")

from model_cases import batch
from swapped_architectures import build, logits, watched_calls
from transformers.models.llama import modeling_llama as llama

import neox_kernels
from neox_kernels.integrations import rotary_functions
from neox_kernels.integrations.rotary_functions import RotaryFunctions, calls_rotary

FORWARD = llama.LlamaAttention.forward


def attention_of(model: Any) -> Any:
    return model.model.layers[0].self_attn


def model_that_calls(function: Any, forward: Any = FORWARD) -> Any:
    """A Llama whose attention calls another function by the name apply_rotary_pos_emb."""
    model = build("llama")
    kind = type(
        "OtherAttention", (llama.LlamaAttention,), {"forward": rotary_functions._with_global(forward, function)}
    )
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


def rotated(q: Tensor, cos: Tensor, sin: Tensor, a: float = -1.0, b: float = 1.0) -> Tensor:
    one, other = q.chunk(2, dim=-1)
    return q * cos[:, None] + torch.cat((a * other, b * one), dim=-1) * sin[:, None]


def mirrored(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    return rotated(q, cos, sin, a=1.0), rotated(k, cos, sin, a=1.0)


def only_q(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)[0], k


def k_backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    back = llama.apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)[1]
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)[0], back


def coarse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    x = llama.apply_rotary_pos_emb(*(x.bfloat16() for x in (q, k, cos, sin)), unsqueeze_dim)
    return x[0].to(q.dtype), x[1].to(q.dtype)


def heads_first_only(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    return rotated(q, cos, sin), rotated(k, cos, sin)


def last_features(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    kept = q.shape[-1] - cos.shape[-1]
    turned = llama.apply_rotary_pos_emb(q[..., kept:], k[..., kept:], cos, sin, unsqueeze_dim)
    return tuple(torch.cat((x[..., :kept], y), dim=-1) for x, y in zip((q, k), turned, strict=True))


def failing(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    raise KeyError("no")


def other_signature(q: Tensor, k: Tensor, sin: Tensor, cos: Tensor) -> Any:
    return llama.apply_rotary_pos_emb(q, k, cos, sin)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (mirrored, "no rotation that the fused op has"),
        (only_q, "no rotation that the fused op has"),
        (k_backwards, "no rotation that the fused op has"),
        (coarse, "no rotation that the fused op has"),
        (heads_first_only, "no rotation that the fused op has"),
        (last_features, "differs in torch.float32 with 6 features more than the tables: q is"),
        (failing, "could not be tried: KeyError: 'no'"),
        (other_signature, "its function is apply_rotary_pos_emb(q, k, sin, cos)"),
    ],
)
def test_other_functions_are_left(function: Any, reason: str) -> None:
    model = model_that_calls(function)
    report = neox_kernels.swap(model)
    replaced, left = report.replaced, report.left
    assert not replaced and [name for name, _ in left] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert reason in left[0][1]


def test_other_tables_are_left() -> None:
    class Unlike(llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            cos, sin = super().forward(x, position_ids)
            return cos * torch.linspace(1, 2, cos.shape[-1]), sin

    class Flat(llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            return tuple(table[0] for table in super().forward(x, position_ids))

    for kind, reason in (
        (Unlike, "(cos and sin repeat neither halves nor pairs)"),
        (Flat, "Flat gives no cos and sin of (batch, seqlen, rotary_dim)"),
        (nn.Identity, "(no rotary embedding was found)"),
    ):
        model = build("llama")
        model.model.rotary_emb.__class__ = kind
        said = RotaryFunctions(model).class_for(attention_of(model))
        assert isinstance(said, str) and said.endswith(reason)


# ------------------------------------------------------------------------------------------------- other forwards


def decorated(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("old_name", None)
        return forward(self, *args, **kwargs)

    return wrapper


def hidden(forward: Any) -> Any:
    calls = [forward]

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return calls[0](self, *args, **kwargs)

    return wrapper


class WithSuper(llama.LlamaAttention):
    def forward(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        super().extra_repr()
        assert __class__ is WithSuper  # type: ignore[name-defined]
        out, weights = FORWARD(self, *args, **kwargs)
        return out * scale, apply_rotary_pos_emb and weights


apply_rotary_pos_emb = llama.apply_rotary_pos_emb


@pytest.mark.parametrize("forward", [decorated(FORWARD), torch.no_grad()(decorated(FORWARD))])
def test_decorated_forward(forward: Any) -> None:
    model, inputs = model_that_calls(llama.apply_rotary_pos_emb, forward), batch()
    assert calls_rotary(type(attention_of(model)))
    expected = logits(build("llama"), inputs)
    with watched_calls() as answered:
        assert torch.equal(logits(model, inputs), expected)
    assert not answered
    assert len(neox_kernels.swap(model).replaced) == 2
    with watched_calls() as answered:
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert answered == [True, True]


def test_forward_that_cannot_be_rebuilt() -> None:
    model = build("llama")
    kind = type("Hidden", (llama.LlamaAttention,), {"forward": hidden(FORWARD)})
    attention_of(model).__class__ = kind
    assert (
        RotaryFunctions(model).class_for(attention_of(model))
        == "its forward is wrapped by wrapper, which hides what it calls"
    )


def test_super_and_keyword_defaults_stay() -> None:
    model, inputs = build("llama"), batch()
    expected = logits(model, inputs)
    for layer in model.model.layers:
        layer.self_attn.__class__ = WithSuper
    assert len(neox_kernels.swap(model).replaced) == 2
    assert torch.equal(logits(model, inputs), expected)


def test_overridden_forward_is_left() -> None:
    model = build("llama")
    attention = attention_of(model)
    attention.forward = functools.partial(FORWARD, attention)
    assert RotaryFunctions(model).class_for(attention) == "its forward is overridden on the instance"
