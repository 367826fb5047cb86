"""What must hold of every op on a GPU, by every backend: graphs, streams, a second device, compilation.

The table of calls is checked without a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import (
    apply_rotary,
    apply_rotary_kv_append,
    apply_rotary_qk,
    backends,
    causal_softmax,
    index_first_axis,
    pad_input,
    unpad_input,
    use_backend,
    varlen_metadata,
)

Call = Callable[..., Sequence[Tensor]]


def tables(like: Tensor) -> tuple[Tensor, Tensor]:
    """(40, 8) each, without a copy from the host, which no graph may hold."""
    angles = torch.arange(40, device=like.device)[:, None] / (1 + torch.arange(8, device=like.device))
    return angles.cos(), angles.sin()


def rotary_in_place(x: Tensor) -> list[Tensor]:
    return [apply_rotary(x, *tables(x), interleaved=True, inplace=True)]


def rotary_gradients(q: Tensor, k: Tensor, offsets: Tensor) -> list[Tensor]:
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    outputs = apply_rotary_qk(*leaves, *tables(q), seqlen_offsets=offsets)
    return list(torch.autograd.grad(outputs, leaves, [q, k]))


def append(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, used: Tensor) -> list[Tensor]:
    return [apply_rotary_kv_append(q, k, v, *tables(q), k_cache, v_cache, used), k_cache, v_cache]


def softmax_gradients(scores: Tensor, grad: Tensor, rng: Tensor, head_mask: Tensor) -> list[Tensor]:
    leaves = [scores.detach().requires_grad_(), head_mask.detach().requires_grad_()]
    probs = causal_softmax(leaves[0], head_mask=leaves[1], dropout_p=0.3, rng=rng)
    return [probs.detach(), *torch.autograd.grad(probs, leaves, grad)]


def there_and_back(x: Tensor, mask: Tensor) -> list[Tensor]:
    metadata = varlen_metadata(mask, capacity=mask.numel(), max_seqlen=mask.shape[1])
    rows = unpad_input(x, metadata)
    return [metadata.indices, metadata.cu_seqlens, metadata.inverse, rows, pad_input(rows, metadata)]


def unpad_gradient(x: Tensor, mask: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    return list(torch.autograd.grad(there_and_back(leaf, mask)[4], leaf, x))


def make(op: str, seed: int) -> tuple[Call, list[Tensor]]:
    """A call, and the tensors that it takes, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=generator)

    q, k = randn(2, 5, 4, 32), randn(2, 5, 2, 32)
    rng = below(2**62, 2)
    made: dict[str, tuple[Call, list[Tensor]]] = {
        "rotary": (lambda q, k, o: apply_rotary_qk(q, k, *tables(q), seqlen_offsets=o), [q, k, below(30, 2).int()]),
        "rotary in place": (rotary_in_place, [q]),
        "rotary gradients": (rotary_gradients, [q, k, below(30, 2).int()]),
        "kv append": (append, [q, k, k + 1, randn(2, 9, 2, 32), randn(2, 9, 2, 32), below(4, 2).int()]),
        "softmax": (lambda x, p: [causal_softmax(x, key_padding_mask=p)], [randn(2, 3, 7, 9), below(3, 2, 9) > 0]),
        "softmax in place": (lambda x: [causal_softmax(x, inplace=True)], [randn(2, 3, 7, 9)]),
        "softmax gradients": (softmax_gradients, [randn(2, 3, 7, 9), randn(2, 3, 7, 9), rng, randn(3)]),
        "varlen": (there_and_back, [randn(3, 7, 24), below(2, 3, 7).bool()]),
        "varlen gradient": (unpad_gradient, [randn(3, 7, 24), below(2, 3, 7).bool()]),
        "index_first_axis": (lambda x, i: [index_first_axis(x, i)], [randn(9, 24), below(9, 5)]),
    }
    return made[op]


OPS = (
    "rotary", "rotary in place", "rotary gradients", "kv append", "softmax", "softmax in place", "softmax gradients",
    "varlen", "varlen gradient", "index_first_axis",
)  # fmt: skip


def expect(op: str, seed: int, device: str) -> list[Tensor]:
    call, inputs = make(op, seed)
    return [x.clone() for x in call(*(x.to(device, copy=True) for x in inputs))]


def same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x.cpu(), y.cpu())


@pytest.mark.parametrize("op", OPS)
def test_the_calls(op: str) -> None:
    """They give what the reference gives, and other numbers for other contents."""
    with use_backend("reference"):
        expected = expect(op, 0, "cpu")
    actual = expect(op, 0, "cpu")
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)
    assert not all(torch.equal(x, y) for x, y in zip(actual, expect(op, 1, "cpu"), strict=True))


@pytest.fixture(params=["compiled", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    for op in ("apply_rotary", "causal_softmax", "unpad_input"):
        reason = backends.explain(op, "cuda")[0].reasons.get(request.param)
        if reason is not None and not reason.endswith("comes first"):
            pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


def warm_up(call: Call, inputs: Sequence[Tensor]) -> None:
    """Compile what is not compiled yet, on another stream, as a capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*(x.clone() for x in inputs))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_graph(op: str, backend: str) -> None:
    """Captured once, replayed on new contents, twice."""
    call, inputs = make(op, 0)
    static = [x.cuda() for x in inputs]
    warm_up(call, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(*static)
    for seed in (1, 2):
        for x, new in zip(static, make(op, seed)[1], strict=True):
            x.copy_(new)
        graph.replay()
        same(outputs, expect(op, seed, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_the_current_stream_is_used(op: str, backend: str) -> None:
    expected = expect(op, 1, "cuda")
    call, inputs = make(op, 0)
    wrong, right = [x.cuda() for x in inputs], [x.cuda() for x in make(op, 1)[1]]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # long enough for a launch on another stream to read the wrong contents
        for x, y in zip(wrong, right, strict=True):
            x.copy_(y)
        outputs = call(*wrong)
    stream.synchronize()
    same(outputs, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_the_device_of_the_tensors_is_used(op: str, backend: str) -> None:
    """Not the current one."""
    assert torch.cuda.current_device() == 0
    outputs = expect(op, 0, "cuda:1")
    assert all(x.device.index == 1 for x in outputs) and torch.cuda.current_device() == 0
    same(outputs, expect(op, 0, "cuda:0"))


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["rotary", "softmax", "varlen", "index_first_axis"])
def test_one_graph_of_torch_compile(op: str, backend: str) -> None:
    torch._dynamo.reset()
    call, inputs = make(op, 0)
    actual = torch.compile(call, fullgraph=True)(*(x.cuda() for x in inputs))
    for x, y in zip(actual, expect(op, 0, "cuda"), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
def test_dropout_follows_the_seed(backend: str) -> None:
    scores = torch.randn(2, 4, 64, 64, device="cuda")

    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return causal_softmax(scores, dropout_p=0.5)

    assert torch.equal(dropped(1), dropped(1)) and not torch.equal(dropped(1), dropped(2))
    assert not torch.equal(causal_softmax(scores, dropout_p=0.5), causal_softmax(scores, dropout_p=0.5))


@pytest.mark.gpu
def test_dropout_in_a_graph_is_drawn_at_every_replay(backend: str) -> None:
    """From PyTorch's generator, so that its seed decides. With ``rng`` given, the caller changes that tensor."""
    scores = torch.randn(2, 4, 64, 64, device="cuda")
    warm_up(lambda x: [causal_softmax(x, dropout_p=0.5)], [scores])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        probs = causal_softmax(scores, dropout_p=0.5)

    def replay(times: int) -> list[Any]:
        torch.manual_seed(5)
        results = []
        for _ in range(times):
            graph.replay()
            results.append(probs.clone())
        return results

    first, again = replay(2), replay(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
