"""Unpad and pad as a GPU would run them: Triton's and CUDA's PTX for sm_80, sm_90 and sm_100, with all checks on.

The CUDA metadata is missing: it writes to memory of its own, which ptxsim is not told of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_on_ptxsim import ARCHS, CudaOps
from torch import Tensor

from neox_kernels import reference

# Where sequences of 9 have their tokens: right, left and scattered padding, none, all, one token.
MASK = torch.tensor(
    [[1] * 6 + [0] * 3, [0] * 5 + [1] * 4, [0, 1, 0, 0, 1, 1, 0, 1, 0], [0] * 9, [1] * 9, [0] * 8 + [1]],
)
INDICES, _, INVERSE, FACTS = reference.varlen_metadata(MASK)
INDICES = INDICES[: int(FACTS[0]) + 2]  # two more, of no token

B, S = MASK.shape
TENSORS = {
    "packed qkv": lambda: list(torch.randn(B, S, 3, 24).bfloat16().chunk(3, -1)),
    "heads first": lambda: [torch.randn(B, 5, S, 20).half().transpose(1, 2)],
    "unaligned": lambda: [torch.randn(B, S, 34)[..., 1:], torch.randn(B, S)],
    "of many types": lambda: [torch.randint(9, (B, S, 3)), torch.rand(B, S, 5) > 0.5, torch.randn(B, S, 1).double()],
    "wide": lambda: [torch.randn(B, S, 1000)],
}


def same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.fixture(scope="module")
def ptx_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("triton")
    from triton_on_ptxsim import ptx_only

    with ptx_only(tmp_path_factory.mktemp("triton")):
        yield


@pytest.fixture(params=ARCHS)
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, ptx_cache: None) -> Iterator[Any]:
    from triton_on_ptxsim import Gpu

    from neox_kernels.kernels import varlen_autograd

    gpu = Gpu(request.param)
    for name in ("_gather_kernel", "_count_kernel", "_metadata_kernel"):
        monkeypatch.setattr(varlen_autograd, name, gpu.stand_in(getattr(varlen_autograd, name)))
    with gpu.fresh:
        yield varlen_autograd
    assert gpu.launches, "nothing ran"


@pytest.mark.parametrize("kind", TENSORS)
def test_triton_gather(triton: Any, kind: str) -> None:
    tensors = TENSORS[kind]()
    rows = reference.unpad_input(tensors, INDICES, INVERSE)
    same(triton.unpad_input(tensors, INDICES, INVERSE), rows)
    same(triton.pad_input(rows, INDICES, INVERSE), reference.pad_input(rows, INDICES, INVERSE))
    again = torch.tensor([3, 0, 3], dtype=torch.int32)
    same([triton.index_first_axis(x, again) for x in rows], [reference.index_first_axis(x, again) for x in rows])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_triton_metadata(triton: Any, dtype: torch.dtype) -> None:
    for mask, capacity in ((MASK, None), (MASK, 40), (MASK[:, ::2], 5), (MASK[:0], 3)):
        given = mask.to(dtype)
        made = triton.varlen_metadata(given, capacity)
        tokens = int(mask.sum()) if capacity is None else capacity  # without a capacity, what follows is not read
        for x, y in zip(made, reference.varlen_metadata(given, capacity), strict=True):
            assert torch.equal(x[:tokens], y[:tokens])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", TENSORS)
def test_cuda_gather(cuda: CudaOps, arch: int, kind: str) -> None:
    tensors = TENSORS[kind]()
    rows, counters = cuda.call("gather_rows", arch, tensors, INDICES, INVERSE)
    assert len(counters) == 1, "one launch"
    same(rows, reference.unpad_input(tensors, INDICES, INVERSE))
    same(cuda.call("gather_rows", arch, rows, INVERSE, INDICES)[0], reference.pad_input(rows, INDICES, INVERSE))
