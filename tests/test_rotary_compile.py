"""torch.compile, torch.export and opcheck: one graph, one node, right numbers, no recompiling for every length."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from neox_kernels import RotaryEmbedding, apply_rotary, apply_rotary_kv_append, apply_rotary_qk, compiled, rotary_tables
from neox_kernels import use_backend as use
from neox_kernels.testing import assert_within_budget, eager_rotary

COS, SIN = rotary_tables(16, 128)
IDS = torch.tensor([[4, 0, 9, 9, 31], [7, 6, 5, 4, 3]])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


pytestmark = pytest.mark.skipif(compiled.load_error is not None, reason=str(compiled.load_error))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compile_counted(f: Callable[..., Any], backend: str = "aot_eager") -> tuple[Callable[..., Any], Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(f, backend=counter, fullgraph=True), counter


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pairs": {"interleaved": True, "position_ids": IDS},
    "offset": {"seqlen_offsets": 7},
    "offsets": {"seqlen_offsets": torch.tensor([7, 2])},
    "bhsd": {"layout": "bhsd", "position_ids": torch.arange(3)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward_in_one_graph(variant: str) -> None:
    options = VARIANTS[variant]

    def f(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *apply_rotary_qk(q * 2, k, COS, SIN, **options), apply_rotary(q, COS, SIN, **options)

    def run(function: Callable[..., Any]) -> list[Tensor]:
        q, k = randn(2, 5, 3, 40).requires_grad_(), randn(2, 5, 3, 40, seed=1).requires_grad_()
        results = function(q, k)
        grads = torch.autograd.grad(results, (q, k), [randn(*r.shape, seed=2) for r in results])
        with torch.no_grad():
            return [*results, *grads, *function(q, k)]

    whole, counter = compile_counted(f)
    for ours, eager in zip(run(whole), run(f), strict=True):
        assert torch.equal(ours, eager)
    assert counter.frame_count == 2  # with and without gradient


def test_inductor() -> None:
    def f(x: Tensor) -> Tensor:
        return apply_rotary(x.sin(), COS, SIN, interleaved=True, position_ids=IDS).transpose(1, 2) * 3

    x, grad = randn(2, 5, 3, 40).requires_grad_(), randn(2, 3, 5, 40, seed=1)
    y = torch.compile(f, fullgraph=True)(x)
    (dx,) = torch.autograd.grad(y, x, grad)

    def eager(x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = eager_rotary(x.sin(), cos[IDS], sin[IDS], True).transpose(1, 2) * 3
        return [y, *torch.autograd.grad(y, x, grad.to(x.dtype))]

    for ours, same, oracle in zip(
        (y, dx), eager(x, COS, SIN), eager(x.double(), COS.double(), SIN.double()), strict=True
    ):
        assert_within_budget(ours, same, oracle)


def test_the_reference_compiles_to_one_graph_and_gives_nan_outside_the_tables() -> None:
    f = torch.compile(apply_rotary, backend="aot_eager", fullgraph=True)
    x = randn(2, 5, 3, 40)
    with use("reference"):
        assert torch.equal(f(x, COS, SIN, position_ids=IDS), apply_rotary(x, COS, SIN, position_ids=IDS))
        short = f(x, COS[:31], SIN[:31], position_ids=IDS)
    assert torch.equal(short.isnan().any(-1).any(-1), IDS.expand(2, 5) >= 31)


LENGTHS = (5, 9, 16, 33, 64)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["qk", "in place", "ids", "cu_seqlens", "int offset"])
def test_two_compilations_serve_every_length(kind: str, grad: bool) -> None:
    def f(q: Tensor, k: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        if kind == "in place":
            return apply_rotary_qk(q + 0, k + 0, COS, SIN, inplace=True)
        if kind == "ids":
            return apply_rotary_qk(q, k, COS, SIN, position_ids=where)
        if kind == "cu_seqlens":
            return apply_rotary_qk(q.flatten(0, 1), k.flatten(0, 1), COS, SIN, cu_seqlens=where)
        return apply_rotary_qk(q, k, COS, SIN, seqlen_offsets=where)

    whole, counter = compile_counted(f)
    for length in LENGTHS:
        q, k = (randn(2, length, n, 40, seed=n).requires_grad_(grad) for n in (3, 1))
        where: Any = None
        if kind == "ids":
            where = torch.arange(length).flip(0)
        elif kind == "cu_seqlens":
            where = torch.tensor([0, length, 2 * length])
        elif kind == "int offset":
            where = 65 - length
        results = whole(q, k, where), f(q, k, where)
        grads = [torch.autograd.grad([y.sin().sum() for y in ys], (q, k)) for ys in results] if grad else ((), ())
        for ours, eager in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count <= 2, "a length was compiled for"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", ["one", "qk"])
def test_in_place_under_compile(op: str, grad: bool) -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        qkv = x * 2
        q, k = qkv[..., :40], qkv[..., 40:80]
        if op == "one":
            apply_rotary(q, COS, SIN, inplace=True)
        else:
            q, k = apply_rotary_qk(q, k, COS, SIN, inplace=True)
        return qkv, q + k

    results = []
    for function in (f, compile_counted(f)[0]):
        x = randn(2, 5, 3, 120).requires_grad_(grad)
        qkv, total = function(x)
        dx = torch.autograd.grad((qkv.sin() * 2).sum() + (total**2).sum(), x)[0] if grad else total
        results.append((qkv, total, dx))
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)


def test_in_place_on_an_input_under_compile() -> None:
    def f(q: Tensor, k: Tensor) -> None:
        apply_rotary_qk(q, k[..., 40:], COS, SIN, inplace=True)

    q, k = randn(2, 5, 3, 40), randn(2, 5, 3, 80)
    expected = apply_rotary_qk(q, k[..., 40:], COS, SIN)
    kept, versions = k[..., :40].clone(), (q._version, k._version)
    compile_counted(f)[0](q, k)
    assert torch.equal(q, expected[0]) and torch.equal(k[..., 40:], expected[1]) and torch.equal(k[..., :40], kept)
    assert q._version > versions[0] and k._version > versions[1]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_kv_append_under_compile(layout: Any) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, used: Tensor) -> Tensor:
        return apply_rotary_kv_append(q, k * 1, v, COS, SIN, k_cache, v_cache, used, layout=layout) + 1

    def run(function: Callable[..., Tensor], length: int) -> list[Tensor]:
        shape = (2, length, 3, 40) if layout == "bshd" else (2, 3, length, 40)
        room = (2, 70, 3, 40) if layout == "bshd" else (2, 3, 70, 40)
        caches = [randn(*room, seed=9) for _ in "kv"]
        with torch.no_grad():
            q_out = function(*(randn(*shape, seed=n) for n in range(3)), *caches, torch.tensor([0, 2]))
        return [q_out, *caches]

    whole, counter = compile_counted(f)
    for length in LENGTHS[:4]:
        for ours, eager in zip(run(whole, length), run(f, length), strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count <= 2, "a length was compiled for"


@pytest.mark.parametrize("grad", [False, True])
def test_rotary_embedding_under_compile(grad: bool) -> None:
    rope = RotaryEmbedding(16, 64)
    whole, counter = compile_counted(rope)
    for length in LENGTHS:
        q, k = (randn(2, length, n, 40, seed=n).requires_grad_(grad) for n in (3, 1))
        for ours, eager in zip(whole(q, k), apply_rotary_qk(q, k, COS, SIN), strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count <= 3  # the first makes the tables, the second finds them, the third is for any length


class Rotated(torch.nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.rope, self.inplace = RotaryEmbedding(16, 64, interleaved=True), inplace

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.rope(q * 1, k * 1, inplace=self.inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_export_keeps_one_node(inplace: bool) -> None:
    q, k = randn(2, 5, 3, 40), randn(2, 5, 1, 40)
    model, length = Rotated(inplace), torch.export.Dim("length", max=64)
    model(q, k)
    program = torch.export.export(model, (q, k), dynamic_shapes=({1: length}, {1: length}))
    ours = [str(node.target).split(".")[1] for node in program.graph.nodes if "neox_kernels" in str(node.target)]
    assert ours == ["rotary_qk_" if inplace else "rotary_qk"]
    core = program.run_decompositions()
    for n in (5, 33):
        q, k = randn(2, n, 3, 40), randn(2, n, 1, 40)
        expected = apply_rotary_qk(q, k, COS, SIN, interleaved=True)
        for exported in (program.module(), core.module()):
            assert all(torch.equal(a, b) for a, b in zip(exported(q, k), expected, strict=True))


FORMS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: randn(2, 5, 3, 40),
    "transposed": lambda: randn(2, 3, 5, 40).transpose(1, 2),
    "sliced with an offset": lambda: randn(2, 6, 3, 91)[:, 1:, :, 51:],
    "empty": lambda: randn(2, 5, 0, 40),
    "expanded": lambda: randn(2, 1, 1, 40).expand(2, 5, 3, 40),
    "stride 2": lambda: randn(2, 5, 3, 80)[..., ::2],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rotary", "rotary_qk", "rotary_", "rotary_qk_", "rotary_kv_append"])
def test_opcheck(name: str, form: str) -> None:
    packet, (x, y, z) = getattr(torch.ops.neox_kernels, name), (FORMS[form]() for _ in "qkv")
    if name.endswith("_") and form in ("expanded", "stride 2"):
        pytest.skip("what is written must not be so: see test_rotary_errors")
    for overload in packet.overloads():
        op = getattr(packet, overload)
        differentiable = name in ("rotary", "rotary_qk") and overload == "default"
        x, y = (t.detach().requires_grad_(differentiable) for t in (x, y))
        tensors: tuple[Tensor, ...] = (x, y, COS, SIN) if "qk" in name else (x, COS, SIN)
        if name == "rotary_kv_append":
            caches = (torch.randn(2, 9, x.shape[2], 80)[..., 17:57] for _ in "kv")
            torch.library.opcheck(op, (*caches, x, y, z, COS, SIN, torch.tensor([0, 2]), None, 1))
        else:
            where = (None, torch.tensor([3, 4]), None, 0, 0) if "qk" in name else (IDS, None, None, 0, 5)
            torch.library.opcheck(op, (*tensors, *where))


def test_every_op_is_in_the_test_above() -> None:
    ops = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "neox_kernels::" in name
    }
    with_a_tensor = {"rotary", "rotary_qk", "rotary_", "rotary_qk_", "rotary_kv_append"}
    elsewhere = {"gather_rows", "varlen_metadata"}  # test_varlen_autograd
    assert ops - {"cpu_isa"} - elsewhere == with_a_tensor
