"""Bad input to attention, refused with the argument's name, what it was and must be; and the choice explained."""

import inspect
from typing import Any

import pytest
import torch
from attention_checks import NHEADS, qkv

from neox_kernels import AttentionChoice, attention, explain_attention, prepare_attention

VALUE, TYPE = ValueError, TypeError
Q, K, V = qkv(4, 6)
MASK = torch.ones(3, 6, dtype=torch.bool)

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    **{f"{name} of nothing": ({name: None}, TYPE, f"{name} must be a tensor, not NoneType") for name in "qkv"},
    **{f"{name} of 3-D": ({name: Q[0]}, VALUE, f"{name} must be .batch, seqlen, nheads, head_dim.") for name in "qkv"},
    "integers": ({"q": Q.long()}, TYPE, "q must be float32, bfloat16, float16 or float64, not torch.int64"),
    "k of another dtype": ({"k": K.bfloat16()}, TYPE, "k must be torch.float32 like q, not torch.bfloat16"),
    "v of another dtype": ({"v": V.double()}, TYPE, "v must be torch.float32 like q, not torch.float64"),
    "heads": ({"k": K[:, :, :1]}, VALUE, "k must have the shape of q, .*but for its length, not"),
    "batch": ({"v": V[:1]}, VALUE, "v must have the shape of q"),
    "v of another length": ({"v": V[:, :5]}, VALUE, "v must have the length of k, 6, not 5"),
    "device": ({"k": K.to("meta")}, VALUE, "k must be on cpu like q, not on meta"),
    **{f"causal of {x!r}": ({"causal": x}, TYPE, "causal must be True or False") for x in (None, 1, "no")},
    "output_attentions": ({"output_attentions": 1}, TYPE, "output_attentions must be True or False, not 1"),
    "upcast_scores": ({"upcast_scores": None}, TYPE, "upcast_scores must be True or False, not None"),
    "softmax_scale": ({"softmax_scale": "1"}, TYPE, "softmax_scale must be a float, not str"),
    "scale of a tensor": ({"softmax_scale": torch.ones(())}, TYPE, "softmax_scale must be a float, not Tensor"),
    **{f"dropout {p}": ({"dropout_p": p}, VALUE, f"dropout_p must be between 0 and 1, not {p}") for p in (-0.1, 1.5)},
    "dropout of True": ({"dropout_p": True}, TYPE, "dropout_p must be a float, not bool"),
    "padding of a list": ({"key_padding_mask": [1]}, TYPE, "key_padding_mask must be a tensor, not list"),
    "padding of q": (
        {"key_padding_mask": MASK[:, :4]},
        VALUE,
        r"key_padding_mask must be .*\(batch, 6\), not \(3, 4\)",
    ),
    "padding of 1-D": ({"key_padding_mask": MASK[0]}, VALUE, r"must be .*\(batch, 6\), not \(6\)"),
    "padding of a batch": ({"key_padding_mask": ~MASK[:2]}, VALUE, r"must be .*\(3, 6\), not \(2, 6\)"),
    "padding of 2": ({"key_padding_mask": MASK * 2}, VALUE, r"must hold only 0 and 1, not 2 \(at \[0, 0\]\)"),
    "padding of complex": ({"key_padding_mask": MASK.cfloat()}, TYPE, "key_padding_mask must be bool, of an integer"),
    "mask of integers": ({"attn_mask": MASK.long()}, TYPE, "attn_mask must be bool or of a floating dtype"),
    "mask of float64": ({"attn_mask": MASK[0].double()}, TYPE, "attn_mask must be one of .* for q of torch.float32"),
    "mask that does not fit": ({"attn_mask": MASK}, VALUE, r"attn_mask must broadcast to \(3, 3, 4, 6\), which"),
    "head mask of heads": ({"head_mask": torch.ones(2)}, VALUE, r"head_mask must broadcast to \(3,\)"),
    "head mask of bool": ({"head_mask": torch.ones(3).bool()}, TYPE, "head_mask must be one of"),
    "implementation": ({"implementation": "flash"}, VALUE, "implementation must be one of auto, .*, not 'flash'"),
    "implementation of nothing": ({"implementation": None}, VALUE, "implementation must be one of auto, .*, not None"),
    "prepared of another type": (
        {"prepared": MASK},
        TYPE,
        "prepared must be what prepare_attention returns, not Tensor",
    ),
    "prepared for others": ({"prepared": prepare_attention(4, 5)}, VALUE, "4 and 6, not for 4 and 5"),
    "prepared and a mask": (
        {"prepared": prepare_attention(4, 6), "key_padding_mask": MASK},
        VALUE,
        "key_padding_mask, attn_mask and causal must be left out",
    ),
    "sdpa, probabilities": (
        {"implementation": "sdpa", "output_attentions": True},
        VALUE,
        "SDPA gives no probabilities",
    ),
    "sdpa, heads": ({"implementation": "sdpa", "head_mask": torch.ones(3)}, VALUE, "SDPA takes no head mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changed, error, words = BAD[case]
    for function in (attention, explain_attention):
        with pytest.raises(error, match=words):
            function(**{"q": Q, "k": K, "v": V, **changed})


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [((1.0, 2), TYPE, "q_len must be an int, not float"), ((1, -2), VALUE, "k_len must not be negative, not -2")],
)
def test_bad_lengths(lengths: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        prepare_attention(*lengths)


def test_explain_takes_what_attention_takes() -> None:
    of_attention, of_explain = (inspect.signature(one).parameters for one in (attention, explain_attention))
    assert of_attention == of_explain


def test_explain_attention() -> None:
    choice = explain_attention(Q, K, V, output_attentions=True)
    assert choice.implementation == "fused"
    assert choice.reasons["sdpa"] == "PyTorch's SDPA gives no probabilities"
    assert list(choice.reasons) == ["flash_attention_2", "sdpa", "eager"]
    assert str(choice).splitlines()[0] == "attention: fused"
    assert "    not sdpa: PyTorch's SDPA gives no probabilities" in str(choice).splitlines()
    assert explain_attention(Q, K, V, head_mask=torch.ones(NHEADS)).implementation == "fused"
    for name in ("sdpa", "fused", "eager"):
        choice = explain_attention(Q, K, V, implementation=name)
        assert isinstance(choice, AttentionChoice) and choice.implementation == name and len(choice.reasons) == 3
        assert all(reason == f"{name} is asked for" for other, reason in choice.reasons.items() if "flash" not in other)


def test_auto_takes_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    serving: list[torch.dtype] = []
    monkeypatch.setattr(
        "neox_kernels.attention_implementations.serves_causal_attention", lambda dtype: dtype in serving
    )

    def taken(q_len: int, k_len: int, head_dim: int, dtype: torch.dtype, **options: Any) -> str:
        x = torch.empty(2, max(q_len, k_len), 2, head_dim, dtype=dtype)
        return explain_attention(x[:, :q_len], x[:, :k_len], x[:, :k_len], **options).implementation

    f32, bf16 = torch.float32, torch.bfloat16
    padding = {"key_padding_mask": torch.arange(512) >= torch.tensor([[0], [9]])}
    assert taken(512, 512, 64, f32) == taken(512, 512, 128, bf16) == taken(1, 512, 256, f32, **padding) == "sdpa"
    assert taken(512, 512, 128, f32) == taken(512, 512, 256, bf16) == taken(512, 512, 64, bf16, **padding) == "fused"
    assert (
        taken(2048, 2048, 256, f32) == taken(128, 128, 256, bf16) == taken(512, 512, 256, f32, dropout_p=0.1) == "sdpa"
    )
    choice = explain_attention(Q, K, V)
    assert (choice.implementation, choice.reasons["fused"]) == ("sdpa", "sdpa comes first here")

    serving += [f32, bf16]
    for dtype in serving:
        assert taken(32, 32, 64, dtype) == taken(2048, 2048, 256, dtype) == taken(64, 512, 64, dtype) == "fused"
        assert taken(31, 31, 64, dtype) == taken(63, 512, 64, dtype) == taken(1, 512, 64, dtype) == "sdpa"


def test_auto_takes_what_keeps_the_gradient_of_float32_scores() -> None:
    q = torch.randn(1, 16, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    assert explain_attention(q, q, q, upcast_scores=True).implementation == "fused"
    assert explain_attention(q, q, q).implementation == "sdpa"
    with torch.no_grad():
        assert explain_attention(q, q, q, upcast_scores=True).implementation == "sdpa"
