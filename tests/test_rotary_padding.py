"""Tokens past the last sequence belong to no one: they pass through bit by bit."""

import pytest
import torch

from neox_kernels import apply_rotary, rotary_tables, use_backend


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_is_copied_bit_by_bit(dtype: torch.dtype, backend: str) -> None:
    cos, sin = rotary_tables(16, 8)
    x = torch.randn(7, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[5], x[6] = torch.inf, -0.0
    x[5, 0, 3] = -torch.inf
    with use_backend(backend):
        y = apply_rotary(x, cos, sin, cu_seqlens=torch.tensor([0, 2, 5]))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y[5:].view(bits), x[5:].view(bits))
    assert not torch.equal(y[1], x[1])
