"""What autograd is told by the causal softmax: writes in place, second derivatives, forward mode, checkpointing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from softmax_checks import every, memory, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neox_kernels import causal_softmax, compiled, use_backend

SHAPE = (2, 3, 5, 7)
RNG = torch.tensor([7, 9])


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled" and compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    with use_backend(request.param):
        yield request.param


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"scale": 0.5},
    "not causal": lambda: {"causal": False},
    "head mask": lambda: {"head_mask": randn(3)},
    "dropout": lambda: {"dropout_p": 0.4, "rng": RNG},
    "all": lambda: {"attn_mask": randn(5, 7), "head_mask": randn(2, 3, 1, 1), "dropout_p": 0.4, "rng": RNG},
}


def test_gradcheck_of_the_reference(backend: str) -> None:
    if backend != "reference":
        pytest.skip("float64 is the reference's alone")
    scores, mask, heads = (leaf(*shape).double() for shape in ((1, 2, 2, 3), (2, 3), (2,)))
    padding = torch.tensor([[True, False, True]])
    for dropout in ({}, {"dropout_p": 0.4, "rng": RNG}):

        def f(scores: Tensor, mask: Tensor, heads: Tensor, dropout: Any = dropout) -> Tensor:
            masks = {"attn_mask": mask, "head_mask": heads, "key_padding_mask": padding}
            return causal_softmax(scores, scale=0.7, **masks, **dropout)

        assert torch.autograd.gradcheck(f, (scores, mask, heads))
        assert torch.autograd.gradgradcheck(f, (scores, mask, heads))
    more_queries = leaf(1, 1, 5, 3).double()  # two of them see nothing
    assert torch.autograd.gradcheck(causal_softmax, (more_queries,))
    assert torch.autograd.gradgradcheck(causal_softmax, (more_queries,))


@every(case=OPTIONS, by=["scores", "grad"])
def test_second_derivatives_are_right_or_refused(backend: str, case: str, by: str) -> None:
    """Never zero without a word."""
    x, grad = leaf(*SHAPE), leaf(*SHAPE, seed=1)
    (dx,) = torch.autograd.grad(causal_softmax(x, **OPTIONS[case]()), x, grad, create_graph=True)
    if backend == "compiled":
        with pytest.raises(NotImplementedError, match=r"no second derivative of causal_softmax; use_backend"):
            torch.autograd.grad(dx.sum(), x if by == "scores" else grad)
    else:
        assert torch.autograd.grad(dx.square().sum(), x if by == "scores" else grad)[0].any()


@every(inplace=[False, True], needs=["scores", "attn_mask", "head_mask"])
def test_forward_mode_is_right_or_refused(backend: str, needs: str, inplace: bool) -> None:
    """Never a tangent of zero: a caller would take it for the derivative."""
    given = {"scores": randn(*SHAPE), "attn_mask": randn(5, 7), "head_mask": randn(3)}
    before = given["scores"].clone()

    def f(t: Tensor) -> Tensor:
        return causal_softmax(**{**given, needs: t}, inplace=inplace)

    try:
        _, tangent = torch.func.jvp(f, (given[needs],), (randn(*given[needs].shape, seed=1),))
    except (NotImplementedError, RuntimeError):
        assert backend == "compiled" or inplace
        assert torch.equal(given["scores"], before), "written in spite of the refusal"
        return
    assert tangent.any()


def refused_in_place() -> dict[str, tuple[str, dict[str, Any]]]:
    x = randn(*SHAPE)
    return {
        "leaf": ("scores", {"scores": leaf(*SHAPE)}),
        "what is no leaf": ("scores", {"scores": leaf(*SHAPE) * 2}),
        "view of a leaf": ("scores", {"scores": leaf(4, *SHAPE)[1]}),
        "mask": ("attn_mask", {"scores": x, "attn_mask": leaf(5, 7)}),
        "head mask": ("head_mask", {"scores": x, "head_mask": leaf(3)}),
    }


@every(case=["leaf", "what is no leaf", "view of a leaf", "mask", "head mask"])
def test_in_place_is_refused_where_a_gradient_is_needed(case: str) -> None:
    name, arguments = refused_in_place()[case]
    scores = arguments["scores"]
    before, version = memory(scores.detach()), scores._version
    with pytest.raises(ValueError, match=f"inplace must be False where {name} requires a gradient"):
        causal_softmax(**arguments, inplace=True)
    assert torch.equal(memory(scores.detach()), before) and scores._version == version, "it was written all the same"
    with torch.no_grad():
        expected = causal_softmax(**arguments)
        assert causal_softmax(**arguments, inplace=True) is scores and torch.equal(scores, expected)


@every(view=[False, True])
def test_a_write_into_what_backward_saved_is_noticed(view: bool) -> None:
    a, x = leaf(*SHAPE), randn(*SHAPE)
    product, version = (a * x).sum(), x._version  # saves x
    causal_softmax(x[:, 1:, 2:] if view else x, inplace=True)
    assert x._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@every(case=OPTIONS)
def test_a_change_of_the_result_is_noticed_or_does_not_matter(case: str) -> None:
    x, grad = leaf(*SHAPE), randn(*SHAPE, seed=1)
    (expected,) = torch.autograd.grad(causal_softmax(x, **OPTIONS[case]()), x, grad)
    y = causal_softmax(x, **OPTIONS[case]())
    with torch.no_grad():
        y.mul_(3)
    try:
        (dx,) = torch.autograd.grad(y, x, grad)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    assert torch.equal(dx, expected)


def test_reading_does_not_count_as_a_write() -> None:
    masks = {"attn_mask": randn(5, 7), "head_mask": randn(3), "key_padding_mask": torch.ones(2, 7) > 0, "rng": RNG}
    x = leaf(*SHAPE)
    versions = [tensor._version for tensor in (x, *masks.values())]
    causal_softmax(x.detach(), **masks, dropout_p=0.5)
    causal_softmax(x, **masks, dropout_p=0.5).sum().backward()
    causal_softmax(x.detach().clone(), **masks, inplace=True)
    assert [tensor._version for tensor in (x, *masks.values())] == versions


def test_what_needs_no_gradient_gets_none() -> None:
    x, mask = randn(*SHAPE), leaf(5, 7)
    y = causal_softmax(x, attn_mask=mask)
    y.sum().backward()
    assert x.grad is None and mask.grad is not None
    assert not causal_softmax(x, attn_mask=torch.ones(5, 7) > 0).requires_grad
    assert causal_softmax(
        leaf(*SHAPE), attn_mask=torch.ones(5, 7) > 0, key_padding_mask=torch.ones(2, 7) > 0
    ).requires_grad


@every(case=OPTIONS)
def test_no_grad_and_inference_mode(case: str) -> None:
    x, options = leaf(*SHAPE), OPTIONS[case]()
    expected = causal_softmax(x, **options).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = causal_softmax(x, **options)
            assert torch.equal(y, expected) and not y.requires_grad and y.is_inference() == (mode != torch.no_grad)
            fresh = x.clone()
            assert causal_softmax(fresh, **options, inplace=True) is fresh and torch.equal(fresh, expected)


@every(use_reentrant=[False, True])
def test_checkpointing_drops_the_same_again(use_reentrant: bool) -> None:
    x, mask, heads, grad = leaf(*SHAPE), leaf(5, 7, seed=1), leaf(3, seed=2), randn(*SHAPE, seed=3)

    def f(x: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
        return causal_softmax(x * 2, attn_mask=mask, head_mask=heads, dropout_p=0.5).sin()

    results = []
    for function in (f, lambda *args: checkpoint(f, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = function(x, mask, heads)
        torch.randint(9, (4,))  # the generator goes on before the backward
        x.grad = mask.grad = heads.grad = None
        y.backward(grad)
        results.append((y, x.grad, mask.grad, heads.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][0] == 0).any() and results[0][1].any()
