"""flash_attn.layers.rotary's names on our ops: its arguments and results, by plain PyTorch."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import rotary_tables, use_backend
from neox_kernels.integrations import flash_attn
from neox_kernels.integrations.flash_attn import (
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from neox_kernels.testing import assert_within_budget, eager_rotary

BATCH, SEQLEN, HEADS, DIM, LONGEST = 3, 5, 4, 32, 12
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OFFSETS: tuple[int | Tensor, ...] = (0, 4, torch.tensor([0, 7, 3]), torch.tensor([2, 0, 5], dtype=torch.int32))
ENDS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)  # and two tokens of padding behind them, of TOTAL
TOTAL = 14

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@pytest.fixture(params=[None, "reference"], ids=["default", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str | None]:
    with use_backend(request.param):
        yield request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(dtype: torch.dtype = torch.float32, rotary_dim: int = 16, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_tables(rotary_dim, LONGEST, base=base)
    return cos.to(dtype), sin.to(dtype)


def plain(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What flash-attn documents, token by token of each sequence, every step in the dtype of x."""
    if cu_seqlens is None:
        first = torch.as_tensor(seqlen_offsets).expand(x.shape[0])
        positions = first[:, None].long() + torch.arange(x.shape[1])
        return eager_rotary(x, cos[positions], sin[positions], interleaved)
    ends = cu_seqlens.tolist()
    first = torch.as_tensor(seqlen_offsets).expand(len(ends) - 1)
    rows = [
        plain(x[None, a:b], cos, sin, interleaved, int(f))[0] for a, b, f in zip(ends, ends[1:], first, strict=False)
    ]
    return torch.cat((*rows, x[ends[-1] :]))


def plain_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, cos_k: Tensor, sin_k: Tensor, *where: Any) -> Tensor:
    """``qkv`` of (batch, seqlen, 3, nheads, headdim)."""
    q, k, v = qkv.unbind(2)
    return torch.stack((plain(q, cos, sin, *where), plain(k, cos_k, sin_k, *where), v), 2)


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(actual: Tensor, yardstick: Callable[..., Tensor], *arguments: Any) -> None:
    assert_within_budget(actual, yardstick(*arguments), yardstick(*map(doubled, arguments)))


def check_gradient(function: Callable[..., Tensor], yardstick: Callable[..., Tensor], x: Tensor, *where: Any) -> None:
    """The gradient of x by ``function`` within the budget; the incoming one stays as it was."""
    grad = randn(*x.shape, dtype=x.dtype, seed=9)
    before = grad.clone()

    def of(f: Callable[..., Tensor], x: Tensor, grad: Tensor, where: Any) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        # Times one: what is written in place must not be the leaf.
        (dx,) = torch.autograd.grad(f(leaf * 1, *where), leaf, grad)
        return dx

    actual = of(function, x, grad, where)
    assert torch.equal(grad, before), "backward wrote into the gradient that came in"
    oracle = of(yardstick, x.double(), grad.double(), tuple(map(doubled, where)))
    assert_within_budget(actual, of(yardstick, x, grad, where), oracle, "gradient")


def test_arguments_are_flash_attns() -> None:
    def signature(function: Callable[..., Any]) -> str:
        return ", ".join(
            name if p.default is p.empty else f"{name}={p.default}"
            for name, p in inspect.signature(function).parameters.items()
        )

    assert signature(apply_rotary_emb) == (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
    )
    assert signature(apply_rotary_emb_qkv_) == (
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None"
    )
    assert signature(apply_rotary_emb_kv_) == "kv, cos, sin, interleaved=False, seqlen_offsets=0"
    assert apply_rotary_emb_func is apply_rotary_emb
    assert {name for name in flash_attn.__all__ if "rotary" in name} == {
        name for name in vars(flash_attn) if name.startswith("apply_rotary_emb")
    }


@pytest.mark.parametrize("rotary_dim", [8, DIM], ids=["partial", "full"])
@both_pairings
@every_dtype
def test_batches(dtype: torch.dtype, interleaved: bool, rotary_dim: int) -> None:
    x = randn(BATCH, SEQLEN, HEADS, DIM, dtype=dtype)
    for table_dtype in {torch.float32, dtype}:
        cos, sin = tables(table_dtype, rotary_dim)
        for offsets in OFFSETS:
            before = x.clone()
            y = apply_rotary_emb(x, cos, sin, interleaved, False, offsets)
            check(y, plain, x, cos, sin, interleaved, offsets)
            assert torch.equal(y[..., rotary_dim:], x[..., rotary_dim:]) and torch.equal(x, before)
            assert apply_rotary_emb(before, cos, sin, interleaved, True, offsets) is before
            assert torch.equal(before, y), "in place"
            check_gradient(
                lambda x, *where: apply_rotary_emb(x, *where[:3], False, where[3]),
                plain, x, cos, sin, interleaved, offsets,
            )  # fmt: skip


@both_pairings
@every_dtype
def test_sequences_behind_one_another(dtype: torch.dtype, interleaved: bool) -> None:
    x, (cos, sin) = randn(TOTAL, HEADS, DIM, dtype=dtype), tables(dtype)
    for offsets in (0, 4, torch.tensor([1, 11, 5])):
        for longest in (None, 7):
            y = apply_rotary_emb(x, cos, sin, interleaved, False, offsets, ENDS, longest)
            check(y, plain, x, cos, sin, interleaved, offsets, ENDS)
            assert torch.equal(y[12:], x[12:]), "padding passes through"
        written = x.clone()
        assert apply_rotary_emb(written, cos, sin, interleaved, True, offsets, ENDS, 7) is written
        assert torch.equal(written, y)
        check_gradient(
            lambda x, *where: apply_rotary_emb(x, *where[:3], False, *where[3:], 7),
            plain, x, cos, sin, interleaved, offsets, ENDS,
        )  # fmt: skip


@both_pairings
@every_dtype
def test_packed_projections(dtype: torch.dtype, interleaved: bool) -> None:
    qkv = randn(BATCH, SEQLEN, 3, HEADS, DIM, dtype=dtype)
    own, other = tables(dtype), tables(dtype, base=500.0)
    for offsets in OFFSETS:
        for k_tables, all_k in (((None, None), own), (other, other), ((None, other[1]), (own[0], other[1]))):
            # Heads before q, k and v, as GPT-NeoX packs them, too: then the view is not contiguous.
            for layout in (qkv.clone(), qkv.transpose(2, 3).contiguous().transpose(2, 3)):
                assert apply_rotary_emb_qkv_(layout, *own, *k_tables, interleaved, offsets) is layout
                check(layout, plain_qkv, qkv, *own, *all_k, interleaved, offsets)
                assert torch.equal(layout[:, :, 2], qkv[:, :, 2])
            check_gradient(
                lambda x, *where, k=k_tables: apply_rotary_emb_qkv_(x, *where[:2], *k, *where[4:]),
                plain_qkv, qkv, *own, *all_k, interleaved, offsets,
            )  # fmt: skip
        kv = qkv[:, :, 1:].clone()
        assert apply_rotary_emb_kv_(kv, *own, interleaved, offsets) is kv
        check(kv[:, :, 0], plain, qkv[:, :, 1], *own, interleaved, offsets)
        assert torch.equal(kv[:, :, 1], qkv[:, :, 2])
        check_gradient(
            apply_rotary_emb_kv_,
            lambda kv, *where: torch.stack((plain(kv[:, :, 0], *where), kv[:, :, 1]), 2),
            qkv[:, :, 1:], *own, interleaved, offsets,
        )  # fmt: skip


@both_pairings
@pytest.mark.parametrize("heads_k", [0, 1, 2])
def test_packed_projections_of_grouped_queries(heads_k: int, interleaved: bool) -> None:
    qkv, (cos, sin), other = randn(BATCH, SEQLEN, HEADS + 2 * heads_k, DIM), tables(), tables(base=500.0)
    rotated = HEADS + heads_k

    def same_tables(x: Tensor, *where: Any) -> Tensor:
        return torch.cat((plain(x[:, :, :rotated], *where), x[:, :, rotated:]), 2)

    written = qkv.clone()
    assert apply_rotary_emb_qkv_(written, cos, sin, None, None, interleaved, 3, HEADS) is written
    check(written, same_tables, qkv, cos, sin, interleaved, 3)
    check_gradient(
        lambda x, *where: apply_rotary_emb_qkv_(x, *where[:2], None, None, *where[2:], HEADS),
        same_tables, qkv, cos, sin, interleaved, 3,
    )  # fmt: skip
    written = qkv.clone()
    apply_rotary_emb_qkv_(written, cos, sin, *other, interleaved=interleaved, num_heads_q=HEADS)
    check(written[:, :, :HEADS], plain, qkv[:, :, :HEADS], cos, sin, interleaved)
    check(written[:, :, HEADS:rotated], plain, qkv[:, :, HEADS:rotated], *other, interleaved)
    assert torch.equal(written[:, :, rotated:], qkv[:, :, rotated:])


@both_pairings
def test_gradcheck(backend: str | None, interleaved: bool) -> None:
    cos, sin = tables(torch.float64, 4)
    x, qkv = randn(2, 3, 2, 6).double().requires_grad_(), randn(1, 2, 3, 1, 6).double().requires_grad_()
    for inplace in (False, True):
        assert torch.autograd.gradcheck(lambda x: apply_rotary_emb(x * 1, cos, sin, interleaved, inplace, 2), (x,))  # noqa: B023
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb_qkv_(x * 1, cos, sin, sin, cos, interleaved), (qkv,))
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb_qkv_(x * 1, cos, sin), (qkv,))
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary_emb(x * 1, cos, sin, interleaved, True), (x,))


def test_in_place_follows_autograd() -> None:
    """flash-attn would write all of these."""
    cos, sin = tables()
    qkv = randn(BATCH, SEQLEN, 3, HEADS, DIM).requires_grad_()
    before = qkv.detach().clone()
    for call in (
        lambda: apply_rotary_emb(qkv[:, :, 0], cos, sin, inplace=True),
        lambda: apply_rotary_emb_qkv_(qkv, cos, sin),
        lambda: apply_rotary_emb_qkv_(qkv, cos, sin, cos, sin),
        lambda: apply_rotary_emb_kv_(qkv[:, :, 1:], cos, sin),
    ):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            call()
        assert torch.equal(qkv.detach(), before)
    with torch.no_grad():
        apply_rotary_emb_qkv_(qkv, cos, sin)
    check(qkv.detach(), plain_qkv, before, cos, sin, cos, sin)


def test_positions_outside_the_tables_raise() -> None:
    """flash-attn passes some of these through unrotated."""
    x, (cos, sin) = randn(BATCH, SEQLEN, HEADS, DIM), tables()
    qkv = x[:, :, None].repeat(1, 1, 3, 1, 1)
    before = qkv.clone()
    for offsets in (8, -1, torch.tensor([0, 8, 0]), torch.tensor([0, -1, 0])):
        with pytest.raises(IndexError, match="outside the tables"):
            apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
        with pytest.raises(IndexError, match="outside the tables"):
            apply_rotary_emb_qkv_(qkv, cos, sin, seqlen_offsets=offsets)
    with pytest.raises(IndexError, match="outside the tables"):
        apply_rotary_emb_qkv_(qkv, cos, sin, cos[:4], sin[:4])
    assert torch.equal(qkv, before), "it was written all the same"
    with pytest.raises(IndexError, match="outside the tables"):
        apply_rotary_emb(x.flatten(0, 1), cos, sin, cu_seqlens=torch.tensor([0, 15]), max_seqlen=15)


def test_nothing_to_rotate() -> None:
    cos, sin = tables()
    for shape in ((0, 5, 4, 32), (3, 0, 4, 32), (3, 5, 0, 32)):
        x = randn(*shape).requires_grad_()
        y = apply_rotary_emb(x, cos, sin)
        assert y.shape == shape and torch.autograd.grad(y.sum(), x)[0].shape == shape
        qkv = randn(*shape[:2], 3, *shape[2:])
        assert apply_rotary_emb_qkv_(qkv, cos, sin) is qkv
        assert apply_rotary_emb_kv_(qkv[:, :, 1:], cos, sin).shape[2] == 2
    x = randn(0, 4, 32)
    assert apply_rotary_emb(x, cos, sin, cu_seqlens=torch.tensor([0]), max_seqlen=0).shape == x.shape
    x = randn(2, 3, 4, 32)
    assert torch.equal(apply_rotary_emb(x, cos[:, :0], sin[:, :0]), x)


X, QKV = randn(BATCH, SEQLEN, HEADS, DIM), randn(BATCH, SEQLEN, 3, HEADS, DIM)
COS, SIN = tables()
FLAT = {"cu_seqlens": ENDS, "x": randn(TOTAL, HEADS, DIM)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor"),
        ({"x": X.long()}, TypeError, "x must be float32, bfloat16"),
        ({"x": X[0, 0]}, ValueError, "x must have 3 or 4 dimensions"),
        ({"x": X[0]}, ValueError, "cu_seqlens .* must be given"),
        ({"cos": 1.0}, TypeError, "cos must be a tensor, not float"),
        ({"cos": COS[None], "sin": SIN[None]}, ValueError, r"cos must be \(seqlen_rotary, rotary_dim / 2\)"),
        ({"cos": COS.double(), "sin": SIN.double()}, TypeError, "cos must be float32"),
        ({"sin": SIN.bfloat16()}, TypeError, "sin must be torch.float32 like cos"),
        ({"sin": SIN[:, 1:]}, ValueError, "sin must have the shape of cos"),
        ({"sin": [SIN]}, TypeError, "sin must be a tensor, not list"),
        ({"cos": COS.repeat(1, 3), "sin": SIN.repeat(1, 3)}, ValueError, "rotary_dim must be at most the head_dim"),
        ({"cos": COS.clone().requires_grad_()}, ValueError, "cos and sin must not require a gradient"),
        ({"interleaved": "GPT-J"}, TypeError, "interleaved must be True or False"),
        ({"inplace": True, "x": X[:1].expand(3, -1, -1, -1)}, ValueError, "x must not be an expanded tensor"),
        ({"seqlen_offsets": 1.0}, TypeError, "seqlen_offsets must be an int"),
        ({"seqlen_offsets": torch.zeros(4, dtype=torch.int32)}, ValueError, r"seqlen_offsets must be .* shape \(3,\)"),
        ({"seqlen_offsets": torch.zeros(3)}, TypeError, "seqlen_offsets must be int32 or int64"),
        ({"cu_seqlens": ENDS}, ValueError, "cu_seqlens must be None for x"),
        ({**FLAT, "cu_seqlens": ENDS.float()}, TypeError, "cu_seqlens must be int32 or int64"),
        ({**FLAT, "cu_seqlens": ENDS.flip(0)}, ValueError, "cu_seqlens must start at 0"),
        ({**FLAT, "max_seqlen": 7.0}, TypeError, "max_seqlen must be an int"),
    ],
)
def test_what_apply_rotary_emb_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_rotary_emb(**{"x": X, "cos": COS, "sin": SIN, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": None}, TypeError, "qkv must be a tensor"),
        ({"qkv": QKV.int()}, TypeError, "qkv must be float32, bfloat16"),
        ({"qkv": QKV[:, :, :2]}, ValueError, "qkv must be .*3, nheads, headdim"),
        ({"qkv": QKV[0, 0]}, ValueError, "qkv must be .*3, nheads, headdim"),
        ({"qkv": X}, ValueError, "num_heads_q must be given"),
        ({"qkv": X, "num_heads_q": 2.0}, TypeError, "num_heads_q must be an int, not float"),
        ({"qkv": X, "num_heads_q": 3}, ValueError, "num_heads_q must leave an even number of the 4 heads"),
        ({"qkv": X, "num_heads_q": 6}, ValueError, "num_heads_q must leave an even number"),
        ({"qkv": X, "num_heads_q": -2}, ValueError, "num_heads_q must leave an even number"),
        ({"cos": COS[None]}, ValueError, "cos must be"),
        ({"cos_k": COS[None]}, ValueError, "cos_k must be"),
        ({"cos_k": "cos"}, TypeError, "cos_k must be a tensor"),
        ({"sin_k": SIN[:, 1:]}, ValueError, "sin must have the shape of cos"),
        ({"seqlen_offsets": torch.zeros(3)}, TypeError, "seqlen_offsets must be int32 or int64"),
    ],
)
def test_what_apply_rotary_emb_qkv_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    before = QKV.clone()
    with pytest.raises(error, match=message):
        apply_rotary_emb_qkv_(**{"qkv": QKV, "cos": COS, "sin": SIN, **change})
    assert torch.equal(QKV, before), "it was written all the same"


def test_what_apply_rotary_emb_kv_refuses() -> None:
    with pytest.raises(ValueError, match=r"kv must be \(batch, seqlen, 2, nheads, headdim\)"):
        apply_rotary_emb_kv_(QKV, COS, SIN)
    with pytest.raises(TypeError, match="kv must be a tensor, not NoneType"):
        apply_rotary_emb_kv_(None, COS, SIN)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kv must be float32"):
        apply_rotary_emb_kv_(QKV.bool(), COS, SIN)
    with pytest.raises(ValueError, match="cos must be"):
        apply_rotary_emb_kv_(QKV[:, :, 1:], COS[0], SIN[0])
