"""The causal softmax under torch.compile, torch.export and opcheck: one graph, one node, right numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from softmax_checks import every, randn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from neox_kernels import causal_softmax, compiled, reference, use_backend
from neox_kernels.testing import assert_within_budget, eager_causal_softmax

SHAPE = (2, 3, 5, 7)
RNG = torch.tensor([7, 9])
pytestmark = pytest.mark.skipif(compiled.load_error is not None, reason=str(compiled.load_error))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_counted(f: Callable[..., Any], backend: str = "aot_eager") -> tuple[Callable[..., Any], Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(f, backend=counter, fullgraph=True), counter


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"scale": 0.5},
    "not causal": lambda: {"causal": False},
    "padding": lambda: {"key_padding_mask": torch.arange(7).expand(2, 7) > 1},
    "bool mask": lambda: {"attn_mask": randn(5, 7) > 0},
    "masks": lambda: {"attn_mask": randn(3, 1, 7), "head_mask": randn(3)},
    "other dtype": lambda: {"dtype": torch.bfloat16},
    "dropout": lambda: {"dropout_p": 0.4, "rng": RNG},
    "all": lambda: {"attn_mask": randn(5, 7), "head_mask": randn(2, 3, 1, 1), "dropout_p": 0.4, "rng": RNG},
}


@every(variant=VARIANTS)
def test_forward_and_backward_in_one_graph(variant: str) -> None:
    given = VARIANTS[variant]()
    leaves = {
        name: value.requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }

    def f(x: Tensor, given: dict[str, Any]) -> Tensor:
        return causal_softmax(x * 2, **given) * 3

    def run(function: Callable[..., Any]) -> list[Tensor]:
        x = randn(*SHAPE).requires_grad_()
        y = function(x, given)
        grads = torch.autograd.grad(y, (x, *leaves.values()), randn(*SHAPE, seed=1).to(y.dtype))
        with torch.no_grad():
            return [y, *grads, function(x, given)]

    whole, counter = compile_counted(f)
    for ours, eager in zip(run(whole), run(f), strict=True):
        assert torch.equal(ours, eager)
    assert counter.frame_count == 2  # with and without gradient


def test_inductor() -> None:
    mask = randn(5, 7)

    def f(x: Tensor) -> Tensor:
        return causal_softmax(x.sin(), scale=0.5, attn_mask=mask).transpose(1, 2) * 3

    def gradient(f: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = f(x)
        return [y, *torch.autograd.grad(y, x, randn(2, 5, 3, 7, seed=1).to(x.dtype))]

    def by(softmax: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: softmax(x.sin(), scale=0.5, attn_mask=mask.to(x.dtype)).transpose(1, 2) * 3

    x = randn(*SHAPE)
    results = gradient(torch.compile(f, fullgraph=True), x)
    oracle = gradient(by(reference.causal_softmax), x.double())
    for ours, same, exact in zip(results, gradient(by(eager_causal_softmax), x), oracle, strict=True):
        assert_within_budget(ours, same, exact)


def test_the_reference_compiles_to_one_graph() -> None:
    f = torch.compile(causal_softmax, backend="aot_eager", fullgraph=True)
    x, masks = randn(*SHAPE), {"attn_mask": randn(5, 7), "head_mask": randn(3), "dropout_p": 0.4, "rng": RNG}
    with use_backend("reference"):
        assert torch.equal(f(x, **masks), causal_softmax(x, **masks))


LENGTHS = (5, 9, 16, 33, 64)


@every(kind=["plain", "masks", "in place", "decoding", "dropout"], grad=[False, True])
def test_two_compilations_serve_every_length(kind: str, grad: bool) -> None:
    def f(x: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        if kind == "in place" and not grad:
            return causal_softmax(x + 0, inplace=True)
        if kind == "dropout":
            return causal_softmax(x, dropout_p=0.5, rng=RNG)
        if kind == "masks":
            return causal_softmax(x, key_padding_mask=padding, attn_mask=mask, head_mask=mask[0, :3])
        return causal_softmax(x)

    whole, counter = compile_counted(f)
    for length in LENGTHS:
        x = randn(2, 3, 1 if kind == "decoding" else length, length).requires_grad_(grad)
        given = (torch.arange(length).expand(2, length) > 1, randn(x.shape[2], length))
        results = whole(x, *given), f(x, *given)
        assert torch.equal(*results)
        if grad:
            assert torch.equal(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in results))
    assert counter.frame_count <= 2, "a length was compiled for"


def test_in_place_under_compile() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x * 2
        y = causal_softmax(wide[..., 1:], head_mask=wide[0, :, 0, 0], inplace=True)
        return wide, y + 1

    x = randn(*SHAPE)
    for ours, eager in zip(compile_counted(f)[0](x), f(x), strict=True):
        assert torch.equal(ours, eager)


def test_in_place_on_an_input_under_compile() -> None:
    def f(x: Tensor) -> None:
        causal_softmax(x[:, :, 1:, 2:], inplace=True)

    x = randn(*SHAPE)
    expected, version = x.clone(), x._version
    expected[:, :, 1:, 2:] = causal_softmax(x[:, :, 1:, 2:])
    compile_counted(f)[0](x)
    assert torch.equal(x, expected) and x._version > version


def test_dropout_under_compile_follows_the_generator() -> None:
    def f(x: Tensor) -> Tensor:
        return causal_softmax(x, dropout_p=0.5)

    whole, counter = compile_counted(f)
    x = randn(2, 3, 9, 33).requires_grad_()

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        results = [function(x), function(x)]
        return [*results, *(torch.autograd.grad(y, x, x.detach())[0] for y in results)]

    first, again, eager = run(whole), run(whole), run(f)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, eager, strict=True)), "eager mode drops others"
    assert not torch.equal(first[0], first[1]), "every call drops the same"
    assert counter.frame_count == 1


class Softmax(torch.nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return causal_softmax(x * 1, scale=0.5, key_padding_mask=padding, inplace=self.inplace)


@every(inplace=[False, True])
def test_export_keeps_one_node(inplace: bool) -> None:
    length = torch.export.Dim("length", max=64)
    given = randn(2, 3, 5, 5), torch.ones(2, 5, dtype=torch.bool)
    program = torch.export.export(Softmax(inplace), given, dynamic_shapes=({2: length, 3: length}, {1: length}))
    ours = [str(node.target) for node in program.graph.nodes if "neox_kernels" in str(node.target)]
    assert ours == ["neox_kernels.causal_softmax_.default" if inplace else "neox_kernels.causal_softmax.inference"]
    core = program.run_decompositions()
    for n in (5, 33):
        x, padding = randn(2, 3, n, n), torch.arange(n).expand(2, n) > 1
        expected = causal_softmax(x, scale=0.5, key_padding_mask=padding)
        for exported in (program.module(), core.module()):
            assert torch.equal(exported(x, padding), expected)


FORMS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: randn(*SHAPE),
    "transposed": lambda: randn(2, 5, 3, 7).transpose(1, 2),
    "sliced with an offset": lambda: randn(2, 4, 6, 19)[:, 1:, :5, 11:18],
    "empty": lambda: randn(2, 3, 0, 7),
    "no heads": lambda: randn(2, 0, 5, 7),
    "expanded": lambda: randn(2, 1, 5, 7).expand(SHAPE),
    "stride 2": lambda: randn(2, 3, 5, 14)[..., ::2],
    "bfloat16": lambda: randn(*SHAPE, dtype=torch.bfloat16),
}


# Of `flags`, 1 is causal, 2 to 6 a dtype and 8, in the backward, the row sums.
@every(form=FORMS, masked=[False, True])
def test_opcheck_of_the_forward(form: str, masked: bool) -> None:
    x, flags = FORMS[form](), 5 if form == "contiguous" else int(masked)
    batch, heads, q_len, k_len = x.shape
    rest: list[Any] = [0.5, None, None, None, None, 0.0, flags]
    if masked:
        rest[1:6] = torch.ones(batch, k_len) > 0, randn(q_len, k_len), randn(heads), RNG, 0.5
    ops = torch.ops.neox_kernels
    torch.library.opcheck(ops.causal_softmax.inference, (x, *rest))
    if form not in ("contiguous", "expanded", "stride 2"):  # what is written: see test_softmax_errors
        torch.library.opcheck(ops.causal_softmax_.default, (x, *rest))
    x = x.detach().requires_grad_()
    if masked:
        rest[2:4] = (mask.requires_grad_() for mask in rest[2:4])
    torch.library.opcheck(ops.causal_softmax.default, (x, *rest))


@every(form=FORMS, masked=[False, True])
def test_opcheck_of_the_backward(form: str, masked: bool) -> None:
    x, flags = FORMS[form](), 8 + 5 if masked else 1
    rest = (randn(x.shape[1]), RNG, 0.5) if masked else (None, None, 0.0)
    op = torch.ops.neox_kernels.causal_softmax_backward.default
    torch.library.opcheck(op, (x, causal_softmax(x), 0.5, *rest, flags))
    torch.library.opcheck(op, (randn(*x.shape, dtype=x.dtype), x, 0.5, *rest, flags))
    torch.library.opcheck(
        torch.ops.neox_kernels.causal_softmax_backward.inference, (x, causal_softmax(x), 0.5, *rest, flags)
    )


def test_every_op_is_in_the_tests_above() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("neox_kernels::")}
    forward, backward = "neox_kernels::causal_softmax", "neox_kernels::causal_softmax_backward"
    family = {forward, f"{forward}.inference", f"{forward}_", backward, f"{backward}.inference"}
    assert {name for name in names if "softmax" in name} == family
