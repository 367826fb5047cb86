"""Gradients of rotary, element by element, and what autograd is told of writes in place."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import apply_rotary, apply_rotary_kv_append, apply_rotary_qk, compiled, reference, rotary_tables
from neox_kernels import use_backend as use
from neox_kernels.testing import assert_within_budget, eager_rotary

COS, SIN = rotary_tables(16, 32)
IDS = torch.tensor([[4, 0, 9, 9, 31], [7, 6, 5, 4, 3]])
ENDS = torch.tensor([0, 3, 10])
SHAPE = (2, 5, 3, 40)
IN_PLACE = "inplace|in-place"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled" and compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    with use(request.param):
        yield request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed).requires_grad_()


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(f(x), x, grad)
    return result


def check_gradient(actual: Tensor, x: Tensor, grad: Tensor, ids: Tensor = IDS, interleaved: bool = False) -> None:
    """Against the gradient of the reference in float64, within the budget of eager code's gradient."""
    options: dict[str, Any] = {"interleaved": interleaved, "position_ids": ids}
    oracle = gradient(
        lambda t: reference.apply_rotary(t, COS.double(), SIN.double(), **options), x.double(), grad.double()
    )
    eager = gradient(lambda t: eager_rotary(t, COS[ids], SIN[ids], interleaved), x, grad)
    assert_within_budget(actual, eager, oracle, f"gradient in {x.dtype}")


@pytest.mark.parametrize("needs", ["q", "k", "qk"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_q_and_k(dtype: torch.dtype, interleaved: bool, needs: str) -> None:
    q, k = randn(*SHAPE, dtype=dtype), randn(2, 5, 1, 40, dtype=dtype, seed=1)
    grads = randn(*SHAPE, dtype=dtype, seed=2), randn(2, 5, 1, 40, dtype=dtype, seed=3)
    q.requires_grad_("q" in needs)
    k.requires_grad_("k" in needs)
    results = apply_rotary_qk(q, k, COS, SIN, interleaved=interleaved, position_ids=IDS)
    wanted = [(x, y, g) for x, y, g in zip((q, k), results, grads, strict=True) if x.requires_grad]
    kept = [g.clone() for _, _, g in wanted]
    torch.autograd.backward([y for _, y, _ in wanted], [g for _, _, g in wanted])
    for (x, _, g), old in zip(wanted, kept, strict=True):
        assert x.grad is not None and torch.equal(g, old), "the incoming gradient was changed"
        check_gradient(x.grad, x, g, interleaved=interleaved)
    assert (q.grad is not None, k.grad is not None) == ("q" in needs, "k" in needs)


@pytest.mark.parametrize("one", [0, 1])
def test_gradient_when_only_one_result_is_used(one: int) -> None:
    q, k = leaf(*SHAPE), leaf(2, 5, 1, 40, seed=1)
    y = apply_rotary_qk(q, k, COS, SIN, position_ids=IDS)[one]
    grad = randn(*y.shape, seed=2)
    y.backward(grad)
    used, unused = ((q, k), (k, q))[one]
    assert used.grad is not None and (unused.grad is None or not unused.grad.any())
    check_gradient(used.grad, used, grad)


INCOMING: dict[str, Callable[[torch.dtype], Tensor]] = {
    "transposed": lambda dtype: randn(2, 3, 5, 40, dtype=dtype).transpose(1, 2),
    "last dimension first": lambda dtype: randn(40, 2, 5, 3, dtype=dtype).permute(1, 2, 3, 0),
    "stride 2": lambda dtype: randn(2, 5, 3, 80, dtype=dtype)[..., ::2],
    "one number for all": lambda dtype: randn(1, dtype=dtype).expand(SHAPE),
    "one token for all": lambda dtype: randn(1, 1, 3, 40, dtype=dtype).expand(SHAPE),
    "one feature for all": lambda dtype: randn(2, 5, 3, 1, dtype=dtype).expand(SHAPE),
    "slice with an offset": lambda dtype: randn(2, 6, 3, 57, dtype=dtype)[:, 1:, :, 17:],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", INCOMING)
def test_incoming_gradients_of_any_stride(case: str, dtype: torch.dtype, inplace: bool) -> None:
    x, grad = leaf(*SHAPE, dtype=dtype), INCOMING[case](dtype)
    before = grad.clone()
    y = apply_rotary(x.clone() if inplace else x, COS, SIN, position_ids=IDS, inplace=inplace)
    y.backward(grad)
    assert x.grad is not None and torch.equal(grad, before), "the incoming gradient was changed"
    check_gradient(x.grad, x, grad)


VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((2, 3, 5, 40), lambda t: t.transpose(1, 2)),
    "packed": ((2, 5, 3, 120), lambda t: t[..., 40:80]),
    "expanded": ((2, 5, 1, 40), lambda t: t.expand(SHAPE)),
    "stride 2": ((2, 5, 3, 80), lambda t: t[..., 1::2]),
}
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda x: apply_rotary(x, COS, SIN, position_ids=IDS),
    "bhsd": lambda x: apply_rotary(x.transpose(1, 2), COS, SIN, position_ids=IDS, layout="bhsd").transpose(1, 2),
    "flat": lambda x: apply_rotary(x.flatten(0, 1), COS, SIN, position_ids=IDS.flatten(), cu_seqlens=ENDS).view(SHAPE),
    "gathered": lambda x: apply_rotary(x, COS[IDS], SIN[IDS]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", VIEWS)
def test_gradients_reach_inputs_of_any_stride(form: str, way: str) -> None:
    shape, view = VIEWS[form]
    base, grad = randn(*shape), randn(*SHAPE, seed=5)
    ours = gradient(lambda t: WAYS[way](view(t)), base, grad)
    eager = gradient(lambda t: eager_rotary(view(t), COS[IDS], SIN[IDS], False), base, grad)
    wide = COS.double(), SIN.double()
    oracle = gradient(lambda t: reference.apply_rotary(view(t), *wide, position_ids=IDS), base.double(), grad.double())
    assert_within_budget(ours, eager, oracle, f"gradient of {form}")


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_on_views_of_a_projection(interleaved: bool) -> None:
    weight, x, grad = leaf(40, 360), randn(2, 5, 40, seed=1), randn(2, 5, 3, 120, seed=2)

    def attention(rotate: Callable[[Tensor, Tensor], Any]) -> Tensor:
        qkv = (x @ weight).view(2, 5, 3, 120)
        q, k = qkv[..., :40], qkv[..., 40:80]
        rotated = rotate(q, k)
        return qkv if rotated is None else torch.cat((*rotated, qkv[..., 80:]), -1)

    def in_place(q: Tensor, k: Tensor) -> None:
        results = apply_rotary_qk(q, k, COS, SIN, position_ids=IDS, interleaved=interleaved, inplace=True)
        assert results[0] is q and results[1] is k and q.requires_grad

    (actual,) = torch.autograd.grad(attention(in_place), weight, grad)
    out_of_place = lambda q, k: apply_rotary_qk(q, k, COS, SIN, position_ids=IDS, interleaved=interleaved)  # noqa: E731
    (expected,) = torch.autograd.grad(attention(out_of_place), weight, grad)
    assert torch.equal(actual, expected)
    assert torch.equal(attention(in_place), attention(out_of_place))


def views_that_autograd_guards() -> dict[str, tuple[Tensor, Tensor]]:
    x, y, z = leaf(*SHAPE), leaf(*SHAPE), leaf(2, 5, 3, 80).clone()
    return {"leaf": (x, x), "view of a leaf": (y, y[:, :5]), "one of several views": (z, z.chunk(2, -1)[0])}


@pytest.mark.parametrize("case", ["leaf", "view of a leaf", "one of several views"])
def test_what_autograd_does_not_let_be_written_raises_and_stays(case: str) -> None:
    base, x = views_that_autograd_guards()[case]
    before = base.detach().clone()
    with pytest.raises(RuntimeError, match=IN_PLACE):
        apply_rotary(x, COS, SIN, position_ids=IDS, inplace=True)
    assert torch.equal(base.detach(), before), "it was written all the same"
    with pytest.raises(RuntimeError, match=IN_PLACE):
        apply_rotary_qk(x, x.detach().clone(), COS, SIN, position_ids=IDS, inplace=True)
    assert torch.equal(base.detach(), before), "it was written all the same"


@pytest.mark.parametrize("op", ["one", "qk", "view", "kv"])
def test_a_write_into_what_backward_saved_is_noticed(op: str) -> None:
    a, x = leaf(*SHAPE), randn(*SHAPE)
    product = (a * x).sum()  # saves x
    with torch.no_grad():
        if op == "one":
            apply_rotary(x, COS, SIN, inplace=True)
        elif op == "qk":
            apply_rotary_qk(randn(*SHAPE), x, COS, SIN, inplace=True)
        elif op == "view":
            apply_rotary(x[:, 1:, :1], COS, SIN, inplace=True)
        else:
            new = randn(2, 1, 3, 40)
            apply_rotary_kv_append(new, new, new, COS, SIN, torch.zeros(SHAPE), x, torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_reading_does_not_count_as_a_write() -> None:
    tensors = [randn(*SHAPE), randn(*SHAPE), COS, SIN, IDS]
    versions = [tensor._version for tensor in tensors]
    apply_rotary_qk(*tensors[:4], position_ids=IDS)
    apply_rotary(leaf(*SHAPE), COS, SIN, position_ids=IDS).sum().backward()
    assert [tensor._version for tensor in tensors] == versions


@pytest.mark.parametrize("inplace", [False, True])
def test_double_backward(inplace: bool) -> None:
    x, grad, second = leaf(*SHAPE), leaf(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    y = apply_rotary(x.clone() if inplace else x, COS, SIN, position_ids=IDS, inplace=inplace)
    (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (dgrad,) = torch.autograd.grad(dx, grad, second)
    forward = reference.apply_rotary(second.double(), COS.double(), SIN.double(), position_ids=IDS)
    assert_within_budget(dgrad, eager_rotary(second, COS[IDS], SIN[IDS], False), forward, "second gradient")


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_of_the_reference(backend: str, interleaved: bool, layout: Any) -> None:
    if backend != "reference":
        pytest.skip("float64 is the reference's alone")
    shape = (1, 3, 2, 6) if layout == "bshd" else (1, 2, 3, 6)
    q, k, (cos, sin) = leaf(*shape).double(), leaf(*shape, seed=1).double(), (t.double() for t in rotary_tables(4, 9))
    options: dict[str, Any] = {"interleaved": interleaved, "layout": layout, "position_ids": torch.tensor([8, 0, 3])}
    assert torch.autograd.gradcheck(lambda a, b: apply_rotary_qk(a, b, cos, sin, **options), (q, k))
    assert torch.autograd.gradgradcheck(lambda a: apply_rotary(a, cos, sin, **options), (q,))
    assert torch.autograd.gradcheck(lambda a: apply_rotary(a * 1, cos, sin, **options, inplace=True), (q,))


def test_no_grad_and_inference_mode() -> None:
    x = leaf(*SHAPE)
    expected = apply_rotary(x, COS, SIN).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = apply_rotary(x, COS, SIN)
            assert torch.equal(y, expected) and not y.requires_grad
            fresh = x.clone()
            assert apply_rotary(fresh, COS, SIN, inplace=True) is fresh and torch.equal(fresh, expected)
            q, k = apply_rotary_qk(x, x, *rotary_tables(16, 32))
            assert torch.equal(q, expected) and torch.equal(k, expected) and q.is_inference() == y.is_inference()
            cache = torch.zeros(2, 8, 3, 40)
            appended = apply_rotary_kv_append(x, x, x, COS, SIN, cache, cache.clone(), torch.tensor([0, 0]))
            assert torch.equal(appended, expected) and torch.equal(cache[:, :5], expected)
    with torch.no_grad():
        apply_rotary(x, COS, SIN, inplace=True)  # a leaf, where no gradient is recorded
    assert torch.equal(x, expected) and x.is_leaf


@pytest.mark.parametrize("inplace", [False, True])
def test_forward_mode_is_right_or_refused(inplace: bool) -> None:
    """Never a tangent of zero: a caller would take it for the derivative."""
    x, tangent = randn(*SHAPE), randn(*SHAPE, seed=1)

    def f(t: Tensor) -> Tensor:
        return apply_rotary(t * 1, COS, SIN, position_ids=IDS, inplace=inplace)

    try:
        y, derivative = torch.func.jvp(f, (x,), (tangent,))
    except (NotImplementedError, RuntimeError):
        return
    assert torch.equal(y, f(x)) and torch.equal(derivative, f(tangent))
