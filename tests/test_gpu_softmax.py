"""Causal softmax on a GPU, by the compiled CUDA kernel and by Triton, against the float64 oracle on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from softmax_calls import Case, check

from neox_kernels import backends, causal_softmax, reference
from neox_kernels.backends import use_backend

pytestmark = pytest.mark.gpu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (2, 3, 1, 1), (2, 4, 1, 2048), (1, 2, 1, 33), (2, 3, 31, 31), (3, 2, 40, 31), (2, 4, 100, 1000), (2, 4, 33, 2049),
    (2, 8, 40, 2048), (1, 1, 1100, 1100), (1, 1, 3, 16384), (1, 2, 3, 100_001), (2, 2, 0, 5), (2, 2, 5, 0),
    (0, 2, 3, 4),
]  # fmt: skip
FEATURES: list[dict[str, Any]] = [
    {}, {"causal": False, "scale": -2.0}, {"padding": "rows"}, {"padding": "strided", "view": "heads_last"},
    {"padding": "hidden", "view": "slice"}, {"mask": "bool_full"}, {"mask": "bool_keys", "causal": False},
    {"mask": "bool_strided"}, {"mask": "float_full", "view": "expanded"}, {"mask": "float_queries"},
    {"mask": "float_strided", "view": "strided"}, {"mask": "lowest"}, {"head_mask": "flat"},
    {"head_mask": "full", "dropout_p": 0.3}, {"head_mask": "row", "mask": "float_keys"},
    {"dropout_p": 0.5, "view": "unaligned"}, {"dropout_p": 1.0}, {"special": "nan"},
    {"special": "nan", "dropout_p": 0.4}, {"special": "inf", "causal": False},
    {"special": "-inf", "padding": "rows", "mask": "float_full", "dropout_p": 0.1},
    {"out_dtype": torch.float16, "padding": "rows"}, {"out_dtype": torch.float32, "dropout_p": 0.2},
]  # fmt: skip


@pytest.fixture(params=["compiled", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    found = next(row for row in backends.explain("causal_softmax", "cuda"))
    reason = found.reasons.get(request.param)
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


@pytest.mark.parametrize("features", FEATURES, ids=lambda features: "-".join(map(str, features.values())) or "plain")
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_backward_and_in_place(dtype: torch.dtype, features: dict[str, Any]) -> None:
    for shape in SHAPES:
        check(Case(shape, dtype, **features), causal_softmax, "cuda")


def test_the_same_elements_are_dropped_everywhere() -> None:
    scores, rng = torch.randn(2, 3, 50, 77), torch.tensor([2**62 + 3, 2**35 + 1])
    expected = reference.causal_softmax(scores, dropout_p=0.5, rng=rng) == 0
    assert torch.equal((causal_softmax(scores.cuda(), dropout_p=0.5, rng=rng.cuda()) == 0).cpu(), expected)


def test_the_current_stream_is_used() -> None:
    source = torch.randn(2, 4, 64, 64, device="cuda")
    expected, x = causal_softmax(source), torch.full_like(source, torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # long enough for a launch on another stream to read the NaN
        x.copy_(source)
        y = causal_softmax(x)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graph() -> None:
    x, rng = torch.randn(2, 4, 8, 64, device="cuda"), torch.tensor([1, 2], device="cuda")
    causal_softmax(x, dropout_p=0.3, rng=rng)  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = causal_softmax(x, dropout_p=0.3, rng=rng)
    x.normal_()
    rng += 5
    graph.replay()
    assert torch.equal(y, causal_softmax(x, dropout_p=0.3, rng=rng))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used() -> None:
    x = torch.randn(2, 5, 3, 64)
    y = causal_softmax(x.to("cuda:1"))
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), causal_softmax(x.cuda()).cpu())


def test_heads_above_the_limit_of_a_grid() -> None:
    x = torch.randn(35_000, 2, 3, 8, device="cuda", requires_grad=True)
    expected = causal_softmax(x.view(5, 14_000, 3, 8))
    y = causal_softmax(x)
    assert torch.equal(y, expected.view_as(y))
    grads = [torch.autograd.grad(one, x, torch.ones_like(one))[0] for one in (y, expected)]
    assert torch.equal(*grads)


def test_offsets_of_64_bits() -> None:
    stride = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 3 * stride:
        pytest.skip("needs 6 GB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    whole = torch.empty(stride + 2**20, dtype=torch.bfloat16, device="cuda")
    x = whole.as_strided((2, 4, 16, 256), (stride, 4096, 256, 1)).normal_()
    expected = causal_softmax(x.clone(memory_format=torch.contiguous_format))
    assert torch.equal(causal_softmax(x), expected)
    causal_softmax(x, inplace=True)
    assert torch.equal(x, expected)


def test_refusals() -> None:
    x = torch.randn(1, 1, 3, 3, device="cuda", requires_grad=True)
    (first,) = torch.autograd.grad(causal_softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_torch_compile(inplace: bool) -> None:
    """One graph, forward and backward where there is one, and few compilations for new lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def probs(x: torch.Tensor) -> torch.Tensor:
        return causal_softmax(x * 2, scale=0.5, inplace=inplace)

    compiled = torch.compile(probs, fullgraph=True)
    for k_len in (70, 90, 100, 128):
        x = torch.randn(2, 4, 9, k_len, device="cuda", requires_grad=not inplace)
        expected, actual = probs(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        if not inplace:
            grad = torch.randn_like(x)
            a, b = (torch.autograd.grad(one, x, grad)[0] for one in (actual, expected))
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
