"""Unpad and pad on a GPU, by the compiled CUDA kernels and by Triton, bit by bit against the reference on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from to_device import move
from torch import Tensor

from neox_kernels import (
    backends,
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    use_backend,
    varlen_metadata,
)

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)
SHAPES = [(3, 7, 0.5), (1, 1, 1.0), (4, 9, 0.0), (5, 1500, 0.7), (3000, 3, 0.5), (0, 4, 1.0), (3, 0, 1.0)]


@pytest.fixture(params=["compiled", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = backends.explain("unpad_input", "cuda")[0].reasons.get(request.param)
    if reason is not None and not reason.endswith("comes first"):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every fresh tensor is full of NaN, or of the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def rand(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-90, 90, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def some(batch: int, seqlen: int, share: float) -> Tensor:
    return torch.rand(batch, seqlen, generator=torch.Generator().manual_seed(0)) < share


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float16, torch.float64])
def test_metadata(dtype: torch.dtype, shape: tuple[int, int, float]) -> None:
    mask = some(*shape).to(dtype)
    total, longest = int((mask != 0).sum()), max((mask != 0).sum(1).tolist(), default=0)
    for options in ({}, {"capacity": total + 9}, {"capacity": total, "max_seqlen": longest}):
        actual = varlen_metadata(mask.cuda(), **options)
        strided = varlen_metadata(move(torch.stack((mask, mask), -1)[..., 1]), **options)
        assert actual.max_seqlen == longest
        for ours, again, theirs in zip(actual, strided, _reference(mask, options), strict=True):
            if isinstance(theirs, Tensor):
                assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs) and torch.equal(ours, again)


def _reference(mask: Tensor, options: Any) -> Any:
    with use_backend("reference"):
        return varlen_metadata(mask, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape: tuple[int, int, float]) -> None:
    mask = some(*shape)
    metadata = varlen_metadata(mask.cuda())
    for dtype in DTYPES:
        trailing = ((), (1,), (3,), (40,), (2, 24), (768,), (3, 0), (16, 80))
        tensors = [rand((*mask.shape, *features), dtype) for features in trailing]
        unpadded = unpad_input([x.cuda() for x in tensors], metadata)
        padded = pad_input(unpadded, metadata)
        for x, y, z in zip(tensors, unpadded, padded, strict=True):
            assert torch.equal(y.cpu(), x[mask]) and y.dtype == dtype
            wide = mask.view(*mask.shape, *(1,) * (x.dim() - 2))
            assert torch.equal(z.cpu(), x.masked_fill(~wide, 0))


def test_views() -> None:
    mask = some(3, 7, 0.6)
    metadata = varlen_metadata(mask.cuda(), capacity=21, max_seqlen=7)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        views = (
            *rand((3, 7, 4, 72), dtype).chunk(3, -1),
            rand((3, 4, 7, 24), dtype).transpose(1, 2),
            rand((7, 3, 4, 24), dtype).transpose(0, 1),
            rand((3 * 7 * 4 * 24 + 1,), dtype)[1:].view(3, 7, 4, 24),
            rand((3, 7, 1, 24), dtype).expand(3, 7, 4, 24),
            rand((1, 7, 4, 24), dtype).expand(3, 7, 4, 24),
            rand((3, 7, 4, 48), dtype)[..., ::2],
        )
        for x, y in zip(views, unpad_input([move(x) for x in views], metadata), strict=True):
            assert torch.equal(y[: int(mask.sum())].cpu(), x[mask]) and not y[int(mask.sum()) :].any()


def test_gradients() -> None:
    mask = some(3, 7, 0.6)
    metadata = varlen_metadata(mask.cuda())
    x = torch.randn(3, 7, 4, 24, device="cuda", requires_grad=True)
    grad = torch.randn(len(metadata.indices), 4, 1, device="cuda").expand(-1, 4, 24)
    (dx,) = torch.autograd.grad(unpad_input(x, metadata), x, grad)
    expected = torch.zeros_like(dx)
    expected[mask.cuda()] = grad
    assert torch.equal(dx, expected)
    y = torch.randn(len(metadata.indices), 5, device="cuda", requires_grad=True)
    incoming = torch.randn(3, 7, 10, device="cuda")[..., ::2]
    assert torch.equal(torch.autograd.grad(pad_input(y, metadata), y, incoming)[0], incoming[mask.cuda()])


def test_what_is_no_row_reads_nothing_and_gives_zeros() -> None:
    x = torch.ones(4, 5, device="cuda", requires_grad=True)
    y = index_first_axis(x, torch.tensor([3, -1, 4, 2**40, -(2**62), 0], device="cuda"))
    assert y.sum(1).tolist() == [5, 0, 0, 0, 0, 5]
    assert torch.autograd.grad(y.sum(), x)[0].sum(1).tolist() == [5, 0, 0, 5]
    x = x.detach()
    assert index_put_first_axis(x, torch.tensor([0, 9, -1, 2], device="cuda"), 3).sum(1).tolist() == [5, 0, 5]


def test_values_that_are_no_mask_are_seen_where_there_is_a_sync() -> None:
    with pytest.raises(ValueError, match="attention_mask must hold only 0 and 1"):
        varlen_metadata(torch.tensor([[0, 2]], device="cuda"))
    with pytest.raises(ValueError, match="capacity must be at least 2"):
        varlen_metadata(torch.tensor([[1, 1]], device="cuda"), capacity=1)
    indices, cu_seqlens, _, inverse = varlen_metadata(torch.ones(2, 3, device="cuda"), capacity=4, max_seqlen=3)
    assert indices.tolist() == [0, 1, 2, 3] and cu_seqlens.tolist() == [0, 3, 4]
    assert inverse.tolist() == [[0, 1, 2], [3, -1, -1]]


def test_cuda_graph() -> None:
    mask, x = some(3, 70, 0.5).cuda(), torch.randn(3, 70, 64, device="cuda")

    def there_and_back() -> tuple[Tensor, Tensor]:
        metadata = varlen_metadata(mask, capacity=210, max_seqlen=70)
        y = unpad_input(x, metadata)
        return y, pad_input(y, metadata)

    there_and_back()  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = there_and_back()
    x.normal_()
    mask.logical_not_()
    graph.replay()
    assert torch.equal(y[: int(mask.sum())], x[mask]) and torch.equal(z, x * mask[..., None])


def test_torch_compile() -> None:
    torch._dynamo.reset()

    def f(mask: Tensor, x: Tensor) -> Tensor:
        metadata = varlen_metadata(mask, capacity=100, max_seqlen=40)
        return pad_input(unpad_input(x * 2, metadata).sin(), metadata)

    compiled = torch.compile(f, fullgraph=True)
    for seqlen in (5, 9, 16, 33):
        mask, x = some(3, seqlen, 0.5).cuda(), torch.randn(3, seqlen, 64, device="cuda", requires_grad=True)
        actual, expected = compiled(mask, x), f(mask, x)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)]
        torch.testing.assert_close(*grads)
