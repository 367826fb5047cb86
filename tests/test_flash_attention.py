"""FlashAttention's path against a stand-in for the package, by its 2.0 and 2.8 rules, and what happens without it."""

import importlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from attention_checks import HEAD_DIM, NHEADS, padding, qkv, randn
from flash_attn_standin import install, look_again, make_module
from softmax_checks import every
from torch import Tensor

from neox_kernels import attention, explain_attention, flash_attention, prepare_attention
from neox_kernels.testing import assert_within_budget

HALF = (torch.bfloat16, torch.float16)
VERSIONS = ("2.0.9", "2.1.0", "2.8.3")


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    look_again(monkeypatch)


def serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> bool:
    """Whether FlashAttention does; if so it agrees with eager, in every query that is no padding, and the gradients."""
    asked = {"key_padding_mask": mask, "implementation": "flash_attention_2", **options}
    if explain_attention(q, k, v, **asked).implementation != "flash_attention_2":
        return False
    square = q.shape[1] == k.shape[1] and options.get("causal", True)
    real = mask[:, :, None, None] if mask is not None and square else torch.ones((), dtype=torch.bool, device=q.device)
    seed = randn(*q.shape, seed=3).to(q).masked_fill(~real, 0.0)

    def run(implementation: str, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, probs = attention(*leaves, key_padding_mask=mask, implementation=implementation, **options)
        assert probs is None or implementation == "eager"
        if implementation != "eager":
            assert not out.masked_fill(real, 0.0).any(), "padding is not zero"
        return [out.masked_fill(~real, 0.0), *torch.autograd.grad(out, leaves, seed.to(out.dtype))]

    truth = run("eager", *(x.double() for x in (q, k, v)))
    for name, one in (("auto", run("auto", q, k, v)), ("flash", run("flash_attention_2", q, k, v))):
        for x, same, oracle in zip(one, run("eager", q, k, v), truth, strict=True):
            assert not x.isnan().any()
            assert_within_budget(x, same, oracle, f"{name}, {tuple(q.shape)}, {options}")
    return True


@every(version=VERSIONS, dtype=HALF, causal=(True, False))
def test_without_padding(monkeypatch: pytest.MonkeyPatch, version: str, dtype: torch.dtype, causal: bool) -> None:
    calls = install(monkeypatch, version)
    for q_len, k_len in ((7, 7), (1, 9), (4, 9), (9, 4)):
        agreeing = q_len in (1, k_len) or not causal or version != "2.0.9"
        assert serves(*qkv(q_len, k_len, dtype), None, causal=causal) == agreeing
    assert {name for name, _ in calls} == {"dense"}
    assert not any(call["causal"] for _, call in calls if call["max_seqlens"][0] == 1)  # 2.0 would show one key


@every(version=VERSIONS, dtype=HALF, kind=("left", "right", "mixed", "holes", "dead"))
def test_padding(monkeypatch: pytest.MonkeyPatch, version: str, dtype: torch.dtype, kind: str) -> None:
    calls = install(monkeypatch, version)
    for q_len, k_len in ((8, 8), (1, 9), (4, 9), (9, 4)):
        mask = padding(kind, k_len)
        between = q_len not in (1, k_len)
        left = kind in ("left", "dead") and q_len < k_len
        expected = not between or (left and version != "2.0.9")
        assert serves(*qkv(q_len, k_len, dtype), mask) == expected, (q_len, k_len)
        assert serves(*qkv(q_len, k_len, dtype), mask, causal=False)
    assert {name for name, _ in calls} == {"varlen"}


def test_metadata_is_made_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.8.3")
    from neox_kernels import attention_masks

    made: list[Tensor] = []
    make = attention_masks.varlen_metadata
    monkeypatch.setattr(attention_masks, "varlen_metadata", lambda mask: made.append(mask) or make(mask))
    launches: list[Any] = []
    unpad = flash_attention.unpad_input
    monkeypatch.setattr(flash_attention, "unpad_input", lambda x, meta: launches.append(x) or unpad(x, meta))
    q, k, v = qkv(8, 8, torch.bfloat16)
    prepared = prepare_attention(8, 8, padding("left", 8))
    for _layer in range(4):
        attention(q, k, v, prepared=prepared, implementation="flash_attention_2")
    assert len(made) == 1
    assert [len(x) for x in launches] == [3] * 4  # q, k and v in one


def test_options_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, "2.8.3")
    q, k, v = qkv(6, 6, torch.bfloat16)
    assert serves(q, k, v, None, softmax_scale=0.5)
    assert serves(q.transpose(1, 3).contiguous().transpose(1, 3), k, v, None)  # heads that are not contiguous
    out, _ = attention(q, k, v, dropout_p=0.5)
    assert calls[-1][1]["dropout_p"] == 0.5 and out.shape == q.shape


def test_float32_goes_to_the_right_half_type_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.8.3")
    q, k, v = qkv(6, 6)
    flash_attention._warn_of_cast.cache_clear()
    with pytest.warns(UserWarning, match="attention got float32.*torch.float16") as caught:
        for _layer in range(3):
            assert attention(q, k, v.half())[0].dtype == torch.float16
    assert len(caught) == 1
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="torch.bfloat16") as caught:
        for _layer in range(3):
            out, _ = attention(q, k, v, implementation="flash_attention_2")
            assert out.dtype == torch.bfloat16
    assert len(caught) == 1
    torch.testing.assert_close(out.float(), attention(q, k, v, implementation="eager")[0], atol=0.05, rtol=0.05)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({"dtype": torch.float32}, "not in torch.float32"),
    "float64": ({"dtype": torch.float64}, "not in torch.float64"),
    "wide heads": ({"head_dim": 264}, "head_dim of up to 256, not 264"),
    "probabilities": ({"output_attentions": True}, "no probabilities"),
    "head mask": ({"head_mask": torch.ones(NHEADS)}, "no head mask"),
    "mask": ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, "no attn_mask"),
    "no batch": ({"batch": 0}, "nothing to compute"),
    "only padding": ({"key_padding_mask": torch.zeros(3, 6)}, "every token is padding"),
    "all dropped": ({"dropout_p": 1.0}, "no dropout_p of 1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_goes_to_the_next(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    from neox_kernels import attention as public

    calls = install(monkeypatch, "2.8.3")
    changed, words = dict(REFUSED[case][0]), REFUSED[case][1]
    q, k, v = qkv(6, 6, changed.pop("dtype", torch.bfloat16), **{
        name: changed.pop(name) for name in ("head_dim", "batch") if name in changed
    })  # fmt: skip
    choice = explain_attention(q, k, v, **changed)
    assert choice.implementation in ("sdpa", "fused") and words in choice.reasons["flash_attention_2"]
    sys.modules["neox_kernels.attention"]._warn_of_fall.cache_clear()
    with pytest.warns(UserWarning, match=words) as caught:
        for _layer in range(2):
            named = public(q, k, v, implementation="flash_attention_2", **changed)[0]
    assert len(caught) == 1 and not calls
    torch.testing.assert_close(named, public(q, k, v, **changed)[0])


def test_the_cpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", make_module("2.8.3")[0])
    q, k, v = qkv(6, 6, torch.bfloat16)
    assert "runs on GPUs, not on cpu" in explain_attention(q, k, v).reasons["flash_attention_2"]


def find_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Any:
    real = importlib.import_module

    def importing(name: str) -> Any:
        if name == "flash_attn":
            raise error
        return real(name)

    monkeypatch.setattr(flash_attention.importlib, "import_module", importing)
    return flash_attention.find_flash()


def test_an_absent_package_is_a_reason_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_with(monkeypatch, ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn"))
    assert "flash-attn is not installed" in found
    if not torch.cuda.is_available():
        assert "torch's varlen attention needs a CUDA device" in found


@pytest.mark.parametrize("error", [
    ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"),
    OSError("libcudart.so.11.0: cannot open shared object file"),
    ModuleNotFoundError("No module named 'einops'", name="einops"),
    AttributeError("module 'flash_attn' has no attribute 'flash_attn_func'"),
])  # fmt: skip
def test_a_broken_package_is_skipped_with_one_warning(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.warns(RuntimeWarning, match=f"{type(error).__name__}: ") as caught:
        found = find_with(monkeypatch, error)
        assert found == flash_attention.find_flash()
    assert len(caught) == 1 and str(error) in str(caught[0].message) and str(error) in found


def test_torch_varlen_by_both_of_its_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own function runs on GPUs only: its arguments, on the stand-in's arithmetic."""
    seen: list[dict[str, Any]] = []
    varlen = make_module("2.8.3")[0].flash_attn_varlen_func

    def torch_2_10(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
                   is_causal: bool = False, return_aux: Any = None) -> Tensor:  # fmt: skip
        seen.append({"is_causal": is_causal})
        return varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, causal=is_causal)

    def torch_2_11(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
                   scale: float | None = None, window_size: Any = (-1, -1)) -> Tensor:  # fmt: skip
        seen.append({"scale": scale, "window_size": window_size})
        assert window_size in ((-1, 0), (-1, -1))
        return varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=window_size == (-1, 0))

    monkeypatch.setattr(flash_attention, "_serves_cpu", lambda: True)
    for function in (torch_2_10, torch_2_11):
        flash = flash_attention.adapt_torch_varlen(function)
        monkeypatch.setattr(flash_attention, "find_flash", lambda flash=flash: flash)
        for q_len, k_len in ((7, 7), (1, 9), (4, 9)):
            known = q_len in (1, k_len)  # nothing is documented about the others
            assert serves(*qkv(q_len, k_len, torch.bfloat16), None) == known
            assert serves(*qkv(q_len, k_len, torch.bfloat16), padding("left", k_len)) == known
        square = qkv(7, 7, torch.bfloat16)
        assert serves(*square, None, softmax_scale=0.5) == (function is torch_2_11)
        assert "takes no dropout_p" in explain_attention(*square, dropout_p=0.1).reasons["flash_attention_2"]
    assert {"is_causal": True} in seen and {"scale": HEAD_DIM**-0.5, "window_size": (-1, 0)} in seen


def test_the_installed_varlen_attention_has_one_of_them() -> None:
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    assert flash_attention.adapt_torch_varlen(varlen).any_scale  # torch here is later than 2.10


def test_importing_the_package_does_not_import_flash_attn() -> None:
    code = """
import sys, torch
sys.modules["flash_attn"] = None  # what would be imported now raises
import neox_kernels
x = torch.ones(1, 2, 1, 8)
neox_kernels.attention(x, x, x)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_stand_in_is_strict() -> None:
    module, _ = make_module("2.8.3")
    q = randn(2, 4, 3, 8, dtype=torch.bfloat16)
    rows, cu = q.flatten(0, 1), torch.tensor([0, 4, 8], dtype=torch.int32)
    wide = randn(2, 4, 3, 264, dtype=torch.bfloat16)
    for bad in ((q.float(),) * 3, (q, q.half(), q), (wide,) * 3, (q.mT,) * 3, (q[:0],) * 3, (rows,) * 3):
        with pytest.raises(RuntimeError):
            module.flash_attn_func(*bad)
    for lengths in ((cu.long(), cu, 4, 4), (cu, cu, 4, 3), (cu[:2], cu, 4, 4), (cu, cu * 2, 4, 8)):
        with pytest.raises(RuntimeError):
            module.flash_attn_varlen_func(rows, rows, rows, *lengths)
    with pytest.raises(TypeError):
        module.flash_attn_varlen_func(rows, rows, rows, cu, cu, torch.tensor(4), 4)
    with pytest.raises(TypeError):
        module.flash_attn_func(q, q, q, is_causal=True)
    # The alignments, in the documented example: two queries, five keys.
    k = torch.eye(5, dtype=torch.bfloat16)[None, :, None]
    for version, seen in (("2.0.9", (1, 2)), ("2.1.0", (4, 5))):
        out = make_module(version)[0].flash_attn_func(torch.zeros_like(k[:, :2]), k, k, causal=True)
        assert tuple((out[0, :, 0] > 0).sum(-1).tolist()) == seen
