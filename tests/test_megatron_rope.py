"""The fused rope of gpt-neox and Apex by its names: arguments and results, by plain PyTorch."""

import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import use_backend
from neox_kernels.integrations.megatron import (
    FusedRoPECachedFunc,
    FusedRoPEFunc,
    fused_apply_rotary_pos_emb,
    fused_apply_rotary_pos_emb_cached,
    fused_apply_rotary_pos_emb_thd,
)
from neox_kernels.testing import assert_within_budget

SEQLEN, HEADS, DIM = 6, 4, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENDS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)  # and two tokens of padding behind them

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
partial_and_full = pytest.mark.parametrize("rotary_dim", [8, DIM], ids=["partial", "full"])
both_memories = pytest.mark.parametrize("transposed", [False, True], ids=["sbhd", "bshd"])


@pytest.fixture(params=[None, "reference"], ids=["default", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str | None]:
    with use_backend(request.param):
        yield request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(seqlen: int, rotary_dim: int, first: int = 0) -> Tensor:
    """(seqlen, 1, 1, rotary_dim), float32: each angle twice."""
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    once = torch.outer(torch.arange(first, first + seqlen).float(), frequencies)
    return torch.cat((once, once), -1)[:, None, None]


def plain_cached(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half rotation of t of (seqlen, batch, nheads, head_dim), every step in the dtype of t."""
    rotary_dim = cos.shape[-1]
    turned, passed = t[..., :rotary_dim], t[..., rotary_dim:]
    a, b = turned.chunk(2, -1)
    return torch.cat((turned * cos.to(t.dtype) + torch.cat((-b, a), -1) * sin.to(t.dtype), passed), -1)


def plain(t: Tensor, freqs: Tensor) -> Tensor:
    return plain_cached(t, freqs.cos(), freqs.sin())


def plain_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor) -> Tensor:
    ends = cu_seqlens.tolist()
    rows = [plain(t[a:b, None], freqs[: b - a])[:, 0] for a, b in pairwise(ends)]
    return torch.cat((*rows, t[ends[-1] :]))


def doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def check(function: Callable[..., Tensor], yardstick: Callable[..., Tensor], t: Tensor, *rest: Tensor) -> Tensor:
    """``function`` and its gradient within the budget."""
    before = t.clone()
    y = function(t, *rest)
    assert_within_budget(y, yardstick(t, *rest), yardstick(t.double(), *map(doubled, rest)))
    assert y.shape == t.shape and torch.equal(t, before)

    def gradient(f: Callable[..., Tensor], t: Tensor, grad: Tensor, rest: Any) -> Tensor:
        t = t.detach().requires_grad_()
        (dt,) = torch.autograd.grad(f(t, *rest), t, grad)
        return dt

    grad = randn(*t.shape, dtype=t.dtype, seed=9)
    oracle = gradient(yardstick, t.double(), grad.double(), tuple(map(doubled, rest)))
    assert_within_budget(gradient(function, t, grad, rest), gradient(yardstick, t, grad, rest), oracle, "gradient")
    return y


# What gpt-neox has at hand: a projection split in three, whose q may be cut to rotary_dim; and what attention gives.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "packed": lambda t: torch.cat((t, t + 1, t - 1), -1)[..., : t.shape[-1]],
    "batch first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "heads first": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "features first": lambda t: t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
}


def test_arguments_are_gpt_neoxs() -> None:
    def signature(function: Callable[..., Any]) -> str:
        return ", ".join(
            name if p.default is p.empty else f"{name}={p.default}"
            for name, p in inspect.signature(function).parameters.items()
        )

    assert signature(fused_apply_rotary_pos_emb) == "t, freqs, transpose_output_memory=False"
    assert signature(fused_apply_rotary_pos_emb_cached) == "t, cos_, sin_, transpose_output_memory=False"
    assert signature(fused_apply_rotary_pos_emb_thd) == "t, cu_seqlens, freqs"
    assert FusedRoPEFunc.apply is fused_apply_rotary_pos_emb
    assert FusedRoPECachedFunc.apply is fused_apply_rotary_pos_emb_cached


@pytest.mark.parametrize("batch", [1, 3])
@both_memories
@partial_and_full
@every_dtype
def test_by_angles(dtype: torch.dtype, rotary_dim: int, transposed: bool, batch: int) -> None:
    t = randn(SEQLEN, batch, HEADS, DIM, dtype=dtype)
    for form in FORMS.values():
        for freqs in (angles(SEQLEN, rotary_dim), angles(SEQLEN, rotary_dim, first=70), angles(SEQLEN, 4).double()):
            y = check(lambda t, f: fused_apply_rotary_pos_emb(t, f, transposed), plain, form(t), freqs)
            assert y.transpose(0, 1).is_contiguous() if transposed else y.is_contiguous()
            assert torch.equal(y[..., freqs.shape[-1] :], t[..., freqs.shape[-1] :])


@both_memories
@partial_and_full
@every_dtype
def test_by_cosines_and_sines(dtype: torch.dtype, rotary_dim: int, transposed: bool) -> None:
    t, freqs = randn(SEQLEN, 3, HEADS, DIM, dtype=dtype), angles(SEQLEN, rotary_dim, first=3)
    for table_dtype in (torch.float32, dtype):
        cos, sin = freqs.cos().to(table_dtype), freqs.sin().to(table_dtype)
        for form in FORMS.values():
            function = lambda t, c, s: fused_apply_rotary_pos_emb_cached(t, c, s, transposed)  # noqa: E731
            y = check(function, plain_cached, form(t), cos, sin)
            assert y.transpose(0, 1).is_contiguous() if transposed else y.is_contiguous()


@partial_and_full
@every_dtype
def test_sequences_behind_one_another(dtype: torch.dtype, rotary_dim: int) -> None:
    t = randn(14, HEADS, DIM, dtype=dtype)
    for freqs in (angles(7, rotary_dim), angles(20, rotary_dim)):
        for ends in (ENDS, ENDS.long()):
            y = check(fused_apply_rotary_pos_emb_thd, plain_thd, t, ends, freqs)
            assert torch.equal(y[12:], t[12:]), "padding passes through"


@both_memories
def test_gradcheck(transposed: bool) -> None:
    t, freqs = randn(3, 2, 2, 6).double().requires_grad_(), angles(3, 4)
    assert torch.autograd.gradcheck(lambda t: fused_apply_rotary_pos_emb(t, freqs, transposed), (t,))
    assert torch.autograd.gradgradcheck(lambda t: fused_apply_rotary_pos_emb(t, freqs, transposed), (t,))
    assert torch.autograd.gradcheck(
        lambda t: fused_apply_rotary_pos_emb_cached(t, freqs.cos(), freqs.sin(), transposed), (t,)
    )
    ends = torch.tensor([0, 1, 3])
    assert torch.autograd.gradcheck(lambda t: fused_apply_rotary_pos_emb_thd(t[:, 0], ends, freqs), (t,))


def test_a_split_projection_trains() -> None:
    """q and k of one projection, as gpt-neox splits it: the gradient of the weight."""
    weight, x = randn(16, HEADS * 3 * DIM).requires_grad_(), randn(SEQLEN, 2, 16, seed=1)
    freqs = angles(SEQLEN, 8)

    def gradient(rotate: Callable[..., Tensor], weight: Tensor, x: Tensor) -> Tensor:
        q, k, v = (x @ weight).view(SEQLEN, 2, HEADS, 3 * DIM).chunk(3, -1)
        (dw,) = torch.autograd.grad((rotate(q, freqs) * v).sum() + rotate(k, freqs).sin().sum(), weight)
        return dw

    wide = weight.detach().double().requires_grad_()
    oracle = gradient(lambda t, f: plain(t, f.double()), wide, x.double())
    assert_within_budget(
        gradient(FusedRoPEFunc.apply, weight, x), gradient(plain, weight, x), oracle, "gradient of the weight"
    )


def test_compiles() -> None:
    t, freqs = randn(SEQLEN, 3, HEADS, DIM), angles(SEQLEN, 8)
    compiled = torch.compile(fused_apply_rotary_pos_emb_cached, fullgraph=True, backend="eager")
    expected = fused_apply_rotary_pos_emb_cached(t, freqs.cos(), freqs.sin())
    assert torch.equal(compiled(t, freqs.cos(), freqs.sin()), expected)


@both_memories
def test_nothing_to_rotate(transposed: bool) -> None:
    for shape in ((0, 3, 4, 32), (6, 0, 4, 32), (6, 3, 0, 32), (0, 1, 4, 32)):
        t, freqs = randn(*shape).requires_grad_(), angles(shape[0], 8)
        y = fused_apply_rotary_pos_emb(t, freqs, transposed)
        assert y.shape == shape and torch.autograd.grad(y.sum(), t)[0].shape == shape
        assert fused_apply_rotary_pos_emb_cached(t, freqs, freqs, transposed).shape == shape
    t = randn(6, 3, 4, 32)
    assert torch.equal(fused_apply_rotary_pos_emb(t, angles(6, 8)[..., :0], transposed), t)
    flat = randn(0, 4, 32)
    assert fused_apply_rotary_pos_emb_thd(flat, torch.tensor([0]), angles(0, 8)).shape == flat.shape


T, FREQS = randn(SEQLEN, 3, HEADS, DIM), angles(SEQLEN, 8)
LEAF = FREQS.clone().requires_grad_()
INTERLEAVED = FREQS[..., :4].repeat_interleave(2, -1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": None}, TypeError, "t must be a tensor, not NoneType"),
        ({"t": T[0]}, ValueError, r"t must be \(seqlen, batch, nheads, head_dim\), not of the shape \(3, 4, 32\)"),
        ({"t": T.long()}, TypeError, "t must be float32, bfloat16"),
        ({"freqs": 1.0}, TypeError, "freqs must be a tensor, not float"),
        ({"freqs": FREQS[:, 0, 0]}, ValueError, r"freqs must be \(seqlen, 1, 1, rotary_dim\)"),
        ({"freqs": FREQS.expand(-1, 3, -1, -1)}, ValueError, r"freqs must be \(seqlen, 1, 1, rotary_dim\)"),
        ({"freqs": FREQS[..., :7]}, ValueError, "freqs must be .* even width"),
        ({"freqs": angles(5, 8)}, ValueError, "freqs must have a row for each of the 6 positions of t, not 5 rows"),
        # The cache of gpt-neox passes all positions up to the last: the first of them are not those of t.
        ({"freqs": angles(9, 8)}, ValueError, "freqs must have a row for each of the 6 positions of t, not 9 rows"),
        ({"freqs": angles(6, 34)}, ValueError, "freqs must be at most as wide as the head_dim of t, 32, not 34"),
        ({"freqs": FREQS.to("meta")}, ValueError, "freqs must be on cpu like t, not on meta"),
        ({"freqs": FREQS.bfloat16()}, TypeError, "freqs must be float32 or float64, not torch.bfloat16"),
        ({"freqs": LEAF}, ValueError, "freqs must not require a gradient"),
        ({"freqs": INTERLEAVED}, ValueError, "freqs must be the same in its first and its second half"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_apply_rotary_pos_emb(**{"t": T, "freqs": FREQS, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": T[0]}, ValueError, r"t must be \(seqlen, batch, nheads, head_dim\)"),
        ({"cos_": None}, TypeError, "cos_ must be a tensor"),
        ({"cos_": angles(9, 8)}, ValueError, "cos_ must have a row for each of the 6 positions"),
        ({"sin_": angles(9, 8)}, ValueError, "sin_ must have a row for each of the 6 positions"),
        ({"sin_": angles(6, 4)}, ValueError, r"sin_ must have the shape of cos_, \(6, 1, 1, 8\), not \(6, 1, 1, 4\)"),
        ({"cos_": FREQS.half()}, TypeError, "cos_ must be float32 or torch.float32 like t, not torch.float16"),
        ({"sin_": FREQS.half()}, TypeError, "sin_ must be torch.float32 like cos_, not torch.float16"),
        ({"sin_": INTERLEAVED}, ValueError, "sin_ must be the same in its first and its second half"),
        ({"cos_": LEAF}, ValueError, "cos_ must not require a gradient"),
    ],
)
def test_what_is_refused_of_cosines_and_sines(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_apply_rotary_pos_emb_cached(**{"t": T, "cos_": FREQS, "sin_": FREQS, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": T}, ValueError, r"t must be \(total, nheads, head_dim\)"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens must be a tensor"),
        ({"cu_seqlens": ENDS.float()}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": ENDS[None]}, ValueError, "cu_seqlens must be a contiguous"),
        ({"cu_seqlens": ENDS + 3}, ValueError, "cu_seqlens must start at 0"),
        ({"freqs": angles(6, 8)}, IndexError, "outside the tables"),
        ({"freqs": FREQS[:, 0]}, ValueError, r"freqs must be \(seqlen, 1, 1, rotary_dim\)"),
    ],
)
def test_what_is_refused_of_sequences(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_apply_rotary_pos_emb_thd(
            **{"t": randn(14, HEADS, DIM), "cu_seqlens": ENDS, "freqs": angles(7, 8), **change}
        )
