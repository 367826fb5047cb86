"""The language model's head where it fills large memory by itself: the same numbers, and nobody passed by."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neox_kernels import memory
from neox_kernels.models.logits import logits_of

VOCAB = 5000  # more than two steps of columns
CASES = [
    (torch.bfloat16, False, None),
    (torch.bfloat16, True, torch.float32),
    (torch.float16, True, None),
    (torch.float32, False, None),
    (torch.float32, True, torch.float32),
]


@pytest.fixture(autouse=True)
def every_size_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE", 0)


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of the memory that was filled."""
    shapes: list[Any] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shapes.append(shape)
        return torch.full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(memory, "empty", empty)
    return shapes


def inputs(dtype: torch.dtype, bias: bool, *shape: int) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(64, VOCAB, bias=bias).to(dtype), torch.randn(*shape, 64).to(dtype)


@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (13,), (2, 0)], ids=str)
@pytest.mark.parametrize(("dtype", "bias", "result"), CASES, ids=str)
@torch.no_grad()
def test_the_same_as_the_head(
    dtype: torch.dtype, bias: bool, result: torch.dtype | None, shape: tuple[int, ...], filled: list[Any]
) -> None:
    head, hidden = inputs(dtype, bias, *shape)
    expected = head(hidden)
    got = logits_of(head, hidden, result)
    assert got.dtype == (result or dtype) and got.shape == expected.shape and len(filled) == 1
    torch.testing.assert_close(got.to(dtype), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert got.is_contiguous()


def test_who_looks_at_the_head_sees_its_call(filled: list[Any]) -> None:
    head, hidden = inputs(torch.bfloat16, True, 2, 3)
    with torch.no_grad():
        expected = head(hidden)
        for register in (head.register_forward_hook, head.register_forward_pre_hook):
            calls: list[Any] = []
            handle = register(lambda *args, calls=calls: calls.append(args))
            assert torch.equal(logits_of(head, hidden), expected) and len(calls) == 1
            handle.remove()
        head.forward = lambda x: x.new_zeros(1)  # type: ignore[method-assign]
        assert torch.equal(logits_of(head, hidden), torch.zeros(1))
        del head.forward
        wrapped: Any = nn.Sequential(head)
        wrapped.out_features = VOCAB
        assert torch.equal(logits_of(wrapped, hidden), expected)
        with torch.autocast("cpu", torch.float16):
            assert logits_of(head, hidden).dtype == torch.float16
    logits_of(head, hidden).sum().backward()
    assert head.weight.grad is not None
    assert not filled


@torch.no_grad()
def test_small_results_are_the_heads_own(filled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE", 1 << 30)
    head, hidden = inputs(torch.float32, True, 2, 3)
    assert torch.equal(logits_of(head, hidden), head(hidden)) and not filled


def test_memory_is_advised_in_whole_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[Any] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *args: advised.append(args))
    monkeypatch.setattr(memory, "LARGE", 8 << 20)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    x = memory.empty((3, 1 << 20), torch.float32)
    (first, length, advice), begin, end = advised.pop(), x.data_ptr(), x.data_ptr() + x.nbytes
    assert first % (2 << 20) == length % (2 << 20) == 0 and advice == mmap.MADV_HUGEPAGE
    assert begin <= first < begin + (2 << 20) and end - (2 << 20) < first + length <= end
    assert memory.empty((1000,), torch.float32).shape == (1000,) and not advised


def test_memory_is_usable_as_any() -> None:
    x = memory.empty((3, 1 << 20), torch.float32)
    assert x.shape == (3, 1 << 20) and x.is_contiguous() and x.device.type == "cpu"
    assert float(x.fill_(2).sum()) == 2 * x.numel()
