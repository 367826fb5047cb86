"""What the tests of the causal softmax share: inputs, and the check against the float64 oracle."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import causal_softmax, reference
from neox_kernels.testing import assert_within_budget, eager_causal_softmax, to_float64

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 80**-0.5
SHAPE = (3, 2, 19, 67)  # batch, nheads, q_len, k_len


def every(**values: Any) -> Any:
    """The test, for every combination of these values."""
    marks = [pytest.mark.parametrize(name, choices) for name, choices in values.items()]
    return lambda test: functools.reduce(lambda marked, mark: mark(marked), marks, test)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scores_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Spread so that a row's probabilities go from nearly 1 to nearly 0."""
    return randn(*shape, dtype=dtype, seed=seed) * 8


def chance(*shape: int, p: float = 0.5, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def memory(x: Tensor) -> Tensor:
    """Every byte that ``x`` is a view into."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()).view(torch.uint8).clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    dense = (memory(x.clone(memory_format=torch.contiguous_format)) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*dense)


def above_diagonal(x: Tensor) -> Tensor:
    """What the causal rule hides, by the contract's words."""
    q_len, k_len = x.shape[-2:]
    return (torch.arange(k_len) > torch.arange(q_len)[:, None] + k_len - q_len).expand(x.shape)


def yardstick(scores: Tensor, oracle: Tensor, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """Eager code in the same dtype. In rows that are zero or NaN by the contract, where it has other habits, what the
    contract says: else its NaN would allow everything."""
    eager = eager_causal_softmax(scores if dtype is None else scores.float(), **options).to(dtype or scores.dtype)
    settled = (oracle == 0).all(-1, keepdim=True) | oracle.isnan().any(-1, keepdim=True)
    return torch.where(settled, oracle.to(eager.dtype), eager)


def expect(scores: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What eager code and what the oracle makes of these arguments."""
    dtype = options.pop("dtype", None)
    oracle = reference.causal_softmax(scores.double(), **to_float64(options))
    eager = yardstick(scores, oracle, dtype, **options)
    assert torch.equal(eager.isnan(), oracle.isnan()), "the budget would allow everything"
    return eager, oracle


def softmax(scores: Tensor, expected: tuple[Tensor, Tensor] | None = None, **options: Any) -> Tensor:
    """causal_softmax out of place, within the budget, and zero above the diagonal; what it read has not changed."""
    read = [scores, *(value for value in options.values() if isinstance(value, Tensor))]
    before = [memory(tensor) for tensor in read]
    y = causal_softmax(scores, **options)
    assert all(torch.equal(memory(tensor), old) for tensor, old in zip(read, before, strict=True)), "an input changed"
    assert y.is_contiguous() and y.untyped_storage().data_ptr() != scores.untyped_storage().data_ptr()
    assert_within_budget(y, *(expected or expect(scores, **options)), f"{scores.dtype} {tuple(scores.shape)}")
    if options.get("causal", True):
        assert not y.triu(y.shape[-1] - y.shape[-2] + 1).any(), "not zero above the diagonal"
    return y
