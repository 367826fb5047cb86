"""Gradients of unpad and pad, element by element; torch.compile, torch.export and opcheck."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from neox_kernels import (
    compiled,
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    use_backend,
    varlen_metadata,
)

MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
METADATA = varlen_metadata(MASK)
ROOMY = varlen_metadata(MASK, capacity=8, max_seqlen=5)
TOKENS = METADATA.indices.tolist()
REPEATED = torch.tensor([2, 0, 2, 2, 4])
needs_library = pytest.mark.skipif(compiled.load_error is not None, reason=str(compiled.load_error))


@pytest.fixture(params=["compiled", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled" and compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    with use_backend(request.param):
        yield request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected_unpad(grad: Tensor) -> Tensor:
    result = torch.zeros(15, *grad.shape[1:], dtype=grad.dtype)
    for row, token in enumerate(TOKENS):
        result[token] = grad[row]
    return result.view(3, 5, *grad.shape[1:])


# Gradients as autograd hands them over, for a result of (rows..., 4, 6).
INCOMING: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda *rows, dtype: randn(*rows, 4, 6, dtype=dtype),
    "one number for all": lambda *rows, dtype: randn(1, dtype=dtype).expand(*rows, 4, 6),
    "one feature for all": lambda *rows, dtype: randn(*rows, 4, 1, dtype=dtype).expand(*rows, 4, 6),
    "one row for all": lambda *rows, dtype: randn(4, 6, dtype=dtype).expand(*rows, 4, 6),
    "last dimension first": lambda *rows, dtype: randn(6, *rows, 4, dtype=dtype).movedim(0, -1),
    "stride 2": lambda *rows, dtype: randn(*rows, 4, 12, dtype=dtype)[..., ::2],
    "heads first": lambda *rows, dtype: randn(4, *rows, 6, dtype=dtype).movedim(0, -2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", INCOMING)
def test_gradients(backend: str, case: str, dtype: torch.dtype) -> None:
    for metadata, total in ((METADATA, len(TOKENS)), (ROOMY, 8)):
        x, grad = randn(3, 5, 4, 6, dtype=dtype).requires_grad_(), INCOMING[case](total, dtype=dtype)
        before = grad.clone()
        unpad_input(x, metadata).backward(grad)
        assert x.grad is not None and torch.equal(x.grad, expected_unpad(grad)) and torch.equal(grad, before)
        y, grad = randn(total, 4, 6, dtype=dtype).requires_grad_(), INCOMING[case](3, 5, dtype=dtype)
        pad_input(y, metadata).backward(grad)
        assert y.grad is not None and torch.equal(y.grad[: len(TOKENS)], grad.flatten(0, 1)[TOKENS])
        assert not y.grad[len(TOKENS) :].any()
    x, grad = randn(5, 4, 6, dtype=dtype).requires_grad_(), INCOMING[case](5, dtype=dtype)
    index_first_axis(x, REPEATED).backward(grad)
    added = torch.zeros_like(x).index_add(0, REPEATED, grad)
    assert x.grad is not None and torch.equal(x.grad, added)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_several_inputs_of_which_some_need_a_gradient(backend: str, used: tuple[bool, bool]) -> None:
    q, k, ids = randn(3, 5, 4).requires_grad_(), randn(3, 5, 2, seed=1).requires_grad_(), torch.arange(15).view(3, 5)
    constant = randn(3, 5, 7)
    a, i, b, c = unpad_input((q, ids, k, constant), METADATA)
    assert a.requires_grad and b.requires_grad and not i.requires_grad and i.tolist() == TOKENS
    grads = randn(len(TOKENS), 4, seed=2), randn(len(TOKENS), 2, seed=3)
    results = [(y, g) for y, g, wanted in zip((a, b), grads, used, strict=True) if wanted]
    torch.autograd.backward([y for y, _ in results], [g for _, g in results])
    for x, g, wanted in zip((q, k), grads, used, strict=True):
        assert (
            (x.grad is not None and torch.equal(x.grad, expected_unpad(g)))
            if wanted
            else not torch.any(torch.zeros(()) if x.grad is None else x.grad)
        )
    assert torch.equal(c, constant.flatten(0, 1)[TOKENS])


def test_gradcheck_and_double_backward(backend: str) -> None:
    x = randn(3, 5, 2, dtype=torch.float64).requires_grad_()
    y = randn(len(TOKENS), 2, dtype=torch.float64).requires_grad_()
    functions: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda t: unpad_input(t, METADATA).sin(), (x,)),
        (lambda t: pad_input(t, METADATA).sin(), (y,)),
        (lambda t: pad_input(unpad_input(t, ROOMY) ** 2, ROOMY), (x,)),
        (lambda s, t: unpad_input((s, t * 2), METADATA), (x, x.detach().clone().requires_grad_())),
        (lambda t: index_first_axis(t, torch.tensor([1, 1, 2])) ** 2, (x,)),
        (lambda t: index_put_first_axis(t, torch.tensor([8, 0, 3, 4, 1, 6]), 9) ** 2, (y,)),
    ]
    for f, inputs in functions:
        assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


def test_no_grad_and_inference_mode(backend: str) -> None:
    x = randn(3, 5, 2).requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = unpad_input(x, varlen_metadata(MASK))
            assert not y.requires_grad and torch.equal(y, x.flatten(0, 1)[TOKENS])


def test_forward_mode_is_right_or_refused(backend: str) -> None:
    """Never a tangent of zero: a caller would take it for the derivative."""
    x, tangent = randn(3, 5, 2), randn(3, 5, 2, seed=1)
    try:
        _, derivative = torch.func.jvp(lambda t: unpad_input(t, METADATA), (x,), (tangent,))
    except (NotImplementedError, RuntimeError):
        return
    assert torch.equal(derivative, unpad_input(tangent, METADATA))


# ----------------------------------------------------------------------------------- torch.compile, export and opcheck


def run(f: Callable[..., Any], mask: Tensor, grad: bool) -> list[Tensor]:
    metadata = varlen_metadata(mask)
    x, ids = randn(*mask.shape, 4, 6).requires_grad_(grad), torch.arange(mask.numel()).view(mask.shape)
    padded, unpadded_ids = f(x, ids, metadata)
    (dx,) = torch.autograd.grad(padded, x, randn(*padded.shape, seed=1)) if grad else (padded,)
    return [padded, unpadded_ids, dx]


@pytest.mark.parametrize("grad", [False, True])
def test_two_compilations_serve_every_length(backend: str, grad: bool) -> None:
    def f(x: Tensor, ids: Tensor, metadata: Any) -> tuple[Tensor, Tensor]:
        y, i = unpad_input((x * 2, ids), metadata)
        return pad_input(y.transpose(1, 2).sin().transpose(1, 2), metadata), i

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(f, backend=counter, fullgraph=True)
    for seqlen in (5, 9, 16):
        mask = (torch.arange(2 * seqlen) % 5 > 1).view(2, seqlen)
        for ours, eager in zip(run(whole, mask, grad), run(f, mask, grad), strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count <= 3, "a length was compiled for"


@needs_library
def test_inductor() -> None:
    def f(x: Tensor, ids: Tensor, metadata: Any) -> tuple[Tensor, Tensor]:
        y, i = unpad_input((x * 2, ids), metadata)
        return pad_input(y * 3, metadata), i

    torch._dynamo.reset()
    whole = torch.compile(f, fullgraph=True)
    for ours, eager in zip(run(whole, MASK, True), run(f, MASK, True), strict=True):
        torch.testing.assert_close(ours, eager)


def test_metadata_with_fixed_sizes_compiles_to_one_graph(backend: str) -> None:
    def f(mask: Tensor, x: Tensor) -> tuple[Any, ...]:
        metadata = varlen_metadata(mask, capacity=8, max_seqlen=5)
        return *metadata, pad_input(unpad_input(x, metadata), metadata), index_first_axis(x, REPEATED[:3])

    torch._dynamo.reset()
    x = randn(3, 5, 2)
    actual = torch.compile(f, backend="aot_eager", fullgraph=True)(MASK, x)
    for ours, eager in zip(actual, f(MASK, x), strict=True):
        assert torch.equal(ours, eager) if isinstance(ours, Tensor) else ours == eager


class There(torch.nn.Module):
    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        metadata = varlen_metadata(mask, capacity=40, max_seqlen=16)
        return pad_input(unpad_input(x, metadata) * 2, metadata)


@needs_library
def test_export() -> None:
    seqlen = torch.export.Dim("seqlen", max=16)
    program = torch.export.export(There(), (MASK, randn(3, 5, 2)), dynamic_shapes=({1: seqlen}, {1: seqlen}))
    ours = [str(node.target) for node in program.graph.nodes if "neox_kernels" in str(node.target)]
    assert [name.split(".")[1] for name in ours] == ["varlen_metadata", "gather_rows", "gather_rows"]
    for n in (5, 11):
        mask, x = (torch.arange(3 * n) % 3 > 0).view(3, n).long(), randn(3, n, 2)
        assert torch.equal(program.module()(mask, x), x * 2 * mask[..., None])


FORMS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: randn(3, 5, 4, 6),
    "transposed": lambda: randn(3, 4, 5, 6).transpose(1, 2),
    "sliced with an offset": lambda: randn(3, 6, 4, 13)[:, 1:, :, 7:],
    "empty": lambda: randn(3, 5, 0, 6),
    "expanded": lambda: randn(3, 1, 1, 6).expand(3, 5, 4, 6),
    "stride 2": lambda: randn(3, 5, 4, 12)[..., ::2],
}


@needs_library
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    ops, x = torch.ops.neox_kernels, FORMS[form]()
    indices, inverse = METADATA.indices, METADATA.inverse
    leaf, rows = x.detach().requires_grad_(), x[0].detach().requires_grad_()
    torch.library.opcheck(ops.gather_rows.default, ([leaf, torch.arange(15).view(3, 5)], indices, inverse))
    torch.library.opcheck(ops.gather_rows.default, ([leaf.flatten(0, 1)[:6]], inverse, indices))
    torch.library.opcheck(ops.gather_rows.default, ([rows], REPEATED, None))
    torch.library.opcheck(ops.gather_rows.inference, ([x, x], indices, inverse))
    if form == "contiguous":
        for mask in (MASK, MASK.bool().T.contiguous().T, MASK[:, :0], MASK.float()[:, ::2]):
            torch.library.opcheck(ops.varlen_metadata.default, (mask, 9, 5))
