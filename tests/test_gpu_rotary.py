"""Rotary on a GPU, by the compiled CUDA kernel and by Triton, against the float64 oracle on the CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from to_device import move
from torch import Tensor

from neox_kernels import apply_rotary, apply_rotary_kv_append, apply_rotary_qk, backends, reference, rotary_tables
from neox_kernels.backends import use_backend
from neox_kernels.testing import assert_within_budget, to_float64

pytestmark = pytest.mark.gpu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DIMS = [(8, 32), (16, 64), (20, 80), (24, 96), (32, 128), (64, 256), (128, 128), (64, 64), (0, 32), (6, 9)]


@pytest.fixture(params=["compiled", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = backends.explain("apply_rotary", "cuda")[0].reasons.get(request.param)
    if reason is not None and not reason.endswith("comes first"):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every fresh tensor is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def positions(kind: str, batch: int, seqlen: int, limit: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "default": {},
        "offset": {"seqlen_offsets": 7},
        "offsets": {"seqlen_offsets": torch.randint(0, limit - seqlen, (batch,), generator=generator)},
        "ids": {"position_ids": torch.randint(0, limit, (seqlen,), generator=generator, dtype=torch.int32)},
        "ids_rows": {"position_ids": torch.randint(0, limit, (batch, 2 * seqlen), generator=generator)[:, ::2]},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 0, 5, 5, seqlen - 3], dtype=torch.int32)},
    }[kind]


def heads(view: str, tokens: tuple[int, ...], nheads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(nheads)
    if view == "packed":
        return torch.randn(*tokens, nheads, 3 * head_dim, generator=generator).to(dtype)[..., head_dim : 2 * head_dim]
    if view == "bhsd":
        return torch.randn(tokens[0], nheads, tokens[1], head_dim, generator=generator).to(dtype)
    if view == "stride2":
        return torch.randn(*tokens, nheads, 2 * head_dim, generator=generator).to(dtype)[..., ::2]
    if view == "unaligned":
        return torch.randn(*tokens, nheads, head_dim + 1, generator=generator).to(dtype)[..., 1:]
    return torch.randn(*tokens, nheads, head_dim, generator=generator).to(dtype)


def forward_and_backward(function: Callable[..., Any], inputs: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, *args, **kwargs)
    # A gradient whose last dimension is not contiguous, as autograd hands them over.
    grads = [x.detach().repeat_interleave(2, -1)[..., ::2] for x in inputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, grads))]


@pytest.mark.parametrize("kind", ["default", "offset", "offsets", "ids", "ids_rows", "cu_seqlens"])
@pytest.mark.parametrize("view", ["contiguous", "packed", "bhsd", "stride2", "unaligned"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_backward_and_in_place(dtype: torch.dtype, interleaved: bool, view: str, kind: str) -> None:
    if kind == "cu_seqlens" and view == "bhsd":
        pytest.skip("cu_seqlens goes with (total, nheads, head_dim)")
    batch, seqlen = 3, 70
    tokens = (seqlen,) if kind == "cu_seqlens" else (batch, seqlen)
    options = {**positions(kind, batch, seqlen, 200), "interleaved": interleaved}
    options["layout"] = "bhsd" if view == "bhsd" else "bshd"
    for rotary_dim, head_dim in DIMS:
        cos, sin = rotary_tables(rotary_dim, 200, device="cpu")
        inputs = [heads(view, tokens, nheads, head_dim, dtype) for nheads in (12, 4)]
        same = forward_and_backward(reference.apply_rotary_qk, inputs, cos, sin, **options)
        oracle = forward_and_backward(reference.apply_rotary_qk, *to_float64((inputs, cos, sin)), **options)
        on_device = [move(x) for x in inputs]
        tables, device_options = (cos.cuda(), sin.cuda()), move(options)
        before = [x.clone() for x in on_device]
        actual = forward_and_backward(apply_rotary_qk, on_device, *tables, **device_options)
        names = ("q", "k", "dq", "dk")
        for name, x, expected, exact in zip(names, actual, same, oracle, strict=True):
            assert x.is_contiguous()
            assert_within_budget(x, expected, exact, f"{name} of rotary_dim {rotary_dim}, head_dim {head_dim}")
        assert all(torch.equal(x, y) for x, y in zip(on_device, before, strict=True)), "an input was changed"
        if view != "stride2":
            q, k = (move(x) for x in inputs)
            assert apply_rotary_qk(q, k, *tables, inplace=True, **device_options)[0] is q
            assert torch.equal(q, actual[0]) and torch.equal(k, actual[1])
            leaf = on_device[0].detach().requires_grad_()
            y = apply_rotary(leaf.clone(), *tables, inplace=True, **device_options)
            assert torch.equal(y, actual[0])
            grad = inputs[0].cuda()
            assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], actual[2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_gathered_or_of_the_dtype(dtype: torch.dtype, interleaved: bool) -> None:
    q = heads("contiguous", (2, 33), 5, 96, dtype)
    for shape, table_dtype in (((64,), dtype), ((1, 33), dtype), ((2, 33), torch.float32)):
        angles = torch.rand(*shape, 12, generator=torch.Generator().manual_seed(1))
        cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
        y = apply_rotary(q.cuda(), cos.cuda(), sin.cuda(), interleaved=interleaved)
        same = reference.apply_rotary(q, cos, sin, interleaved=interleaved)
        assert_within_budget(y, same, reference.apply_rotary(*to_float64((q, cos, sin)), interleaved=interleaved))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_kv_append(dtype: torch.dtype, interleaved: bool, layout: str) -> None:
    cos, sin = rotary_tables(24, 64, device="cpu")
    view = "bhsd" if layout == "bhsd" else "packed"
    q, k, v = (heads(view, (3, 5), nheads, 96, dtype) for nheads in (8, 2, 2))
    shape = (3, 2, 40, 96) if layout == "bhsd" else (3, 40, 2, 96)
    caches = [torch.randn(shape).to(dtype) for _ in range(2)]
    used = torch.tensor([0, 7, 35], dtype=torch.int32)
    options = {"interleaved": interleaved, "layout": layout}
    on_device = [x.cuda() for x in caches]
    versions = [x._version for x in on_device]
    q_out = apply_rotary_kv_append(*(move(x) for x in (q, k, v, cos, sin)), *on_device, used.cuda(), **options)
    assert all(x._version > version for x, version in zip(on_device, versions, strict=True))
    exact_caches = to_float64(caches)
    exact = reference.apply_rotary_kv_append(*to_float64((q, k, v, cos, sin)), *exact_caches, used, **options)
    same = reference.apply_rotary_kv_append(q, k, v, cos, sin, *caches, used, **options)
    assert_within_budget(q_out, same, exact, "q")
    assert_within_budget(on_device[0], caches[0], exact_caches[0], "k_cache")
    assert torch.equal(on_device[1].cpu(), caches[1])


def test_rows_that_do_not_fit_are_not_written() -> None:
    cos, sin = (x.cuda() for x in rotary_tables(16, 64, device="cpu"))
    q = torch.ones(3, 4, 2, 64, device="cuda")
    k_cache, v_cache = torch.zeros(2, 3, 8, 2, 64, device="cuda")
    used = torch.tensor([6, -3, 100], device="cuda")
    apply_rotary_kv_append(q, q, q, cos, sin, k_cache, v_cache, used, position_ids=torch.arange(4, device="cuda"))
    written = torch.zeros(3, 8, dtype=torch.bool, device="cuda")
    written[0, 6:] = written[1, 0] = True
    assert torch.equal((k_cache != 0).flatten(2).any(-1), written)
    assert torch.equal((v_cache != 0).flatten(2).all(-1), written)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_outside_the_tables(interleaved: bool) -> None:
    cos, sin = (x.cuda() for x in rotary_tables(16, 8, device="cpu"))
    x, ids = torch.randn(1, 4, 3, 64, device="cuda"), torch.tensor([7, -1, 8, 2**40], device="cuda")
    y = apply_rotary(x, cos, sin, position_ids=ids, interleaved=interleaved)
    assert y[:, 0].isfinite().all() and y[:, 1:, :, :16].isnan().all()
    assert torch.equal(y[..., 16:], x[..., 16:])
    with pytest.raises(IndexError):
        apply_rotary(x, cos, sin, position_ids=ids, interleaved=interleaved, validate=True)


def test_padding_is_copied_bit_by_bit() -> None:
    cos, sin = (x.cuda() for x in rotary_tables(64, 8, device="cpu"))
    x = torch.full((6, 3, 64), torch.inf, device="cuda")
    y = apply_rotary(x, cos, sin, cu_seqlens=torch.tensor([0, 2], device="cuda"))
    assert torch.equal(y[2:], x[2:])
    assert torch.equal(apply_rotary(x, cos, sin, cu_seqlens=torch.tensor([0], device="cuda")), x)


def test_the_current_stream_is_used() -> None:
    cos, sin = (x.cuda() for x in rotary_tables(64, 64, device="cpu"))
    source = torch.randn(2, 64, 8, 128, device="cuda")
    expected, x = apply_rotary(source, cos, sin), torch.full_like(source, torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # long enough for a launch on another stream to read the NaN
        x.copy_(source)
        y = apply_rotary(x, cos, sin)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graph() -> None:
    cos, sin = (x.cuda() for x in rotary_tables(64, 64, device="cpu"))
    x, offsets = torch.randn(2, 1, 8, 128, device="cuda"), torch.zeros(2, dtype=torch.int32, device="cuda")
    apply_rotary(x, cos, sin, seqlen_offsets=offsets)  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = apply_rotary(x, cos, sin, seqlen_offsets=offsets)
    x.normal_()
    offsets.fill_(5)
    graph.replay()
    assert torch.equal(y, apply_rotary(x, cos, sin, seqlen_offsets=5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used() -> None:
    cos, sin = rotary_tables(16, 64, device="cpu")
    x = torch.randn(2, 5, 3, 64)
    y = apply_rotary(x.to("cuda:1"), cos.to("cuda:1"), sin.to("cuda:1"))
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), apply_rotary(x.cuda(), cos.cuda(), sin.cuda()).cpu())


def test_batches_above_the_limit_of_a_grid() -> None:
    cos, sin = (x.cuda() for x in rotary_tables(8, 16, device="cpu"))
    x = torch.randn(70_000, 1, 1, 8, device="cuda")
    ids = torch.arange(70_000, device="cuda")[:, None] % 16
    expected = apply_rotary(x.view(1, 70_000, 1, 8), cos, sin, position_ids=ids.view(1, -1))
    assert torch.equal(apply_rotary(x, cos, sin, position_ids=ids).view_as(expected), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_offsets_of_64_bits(interleaved: bool) -> None:
    stride = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 3 * stride:
        pytest.skip("needs 6 GB of free GPU memory")
    cos, sin = (x.cuda() for x in rotary_tables(16, 16, device="cpu"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    whole = torch.empty(stride + 4096, dtype=torch.bfloat16, device="cuda")
    x = whole.as_strided((2, 16, 4, 64), (stride, 256, 64, 1)).normal_()
    expected = apply_rotary(x.clone(memory_format=torch.contiguous_format), cos, sin, interleaved=interleaved)
    assert torch.equal(apply_rotary(x, cos, sin, interleaved=interleaved), expected)
    apply_rotary(x, cos, sin, interleaved=interleaved, inplace=True)
    assert torch.equal(x, expected)


def test_empty() -> None:
    cos, sin = (x.cuda() for x in rotary_tables(16, 16, device="cpu"))
    for shape in ((0, 4, 2, 64), (2, 0, 2, 64), (2, 4, 0, 64)):
        assert apply_rotary(torch.empty(shape, device="cuda"), cos, sin).shape == shape


@pytest.mark.parametrize("inplace", [False, True])
def test_torch_compile(inplace: bool) -> None:
    """One graph, forward and backward, and no compilation for a new length."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cos, sin = (x.cuda() for x in rotary_tables(16, 64, device="cpu"))

    def loss(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_qk(q * 2, k * 3, cos, sin, inplace=inplace)

    compiled = torch.compile(loss, fullgraph=True)
    for seqlen in (5, 9, 17, 33, 64):
        q = torch.randn(2, seqlen, 4, 64, device="cuda", requires_grad=True)
        k = torch.randn(2, seqlen, 2, 64, device="cuda", requires_grad=True)
        expected, actual = loss(q, k), compiled(q, k)
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y)
        grads = [torch.ones_like(x) for x in expected]
        for x, y in zip(
            torch.autograd.grad(actual, (q, k), grads), torch.autograd.grad(expected, (q, k), grads), strict=True
        ):
            torch.testing.assert_close(x, y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
