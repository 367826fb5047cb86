"""Unpad and pad as a GPU would run them: Triton's and CUDA's PTX for sm_80, sm_90 and sm_100, with all checks on."""

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

# Lengths and numbers of sequences at which the kernels' loops end, or go round once more.
LONG = [
    (torch.arange(length) % 3 < 2)[None] & (torch.arange(batch) % 4 > 0)[:, None]
    for batch, length in ((2, 1), (3, 31), (5, 33), (2, 1000), (3, 2049), (130, 2), (1, 128))
]

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


def check_metadata(varlen_metadata: Any, dtype: torch.dtype) -> None:
    cases = [
        (MASK, None),
        (MASK, 40),
        (MASK[:, ::2], 5),
        (MASK[:0], 3),
        *((mask, None) for mask in LONG),
        (LONG[4], 99),
    ]
    for mask, capacity in cases:
        given = mask.to(dtype)
        if not given.is_floating_point() and dtype != torch.bool and given.numel():
            given[0, 0] = 7  # no mask: counted, and told
        made = varlen_metadata(given, capacity)
        tokens = int(mask.sum()) if capacity is None else capacity  # without a capacity, what follows is not read
        for x, y in zip(made, reference.varlen_metadata(given, capacity), strict=True):
            assert torch.equal(x[:tokens], y[:tokens]), (mask.shape, capacity)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_triton_metadata(triton: Any, dtype: torch.dtype) -> None:
    check_metadata(triton.varlen_metadata, dtype)


def test_triton_gradients(triton: Any) -> None:
    """Of a gradient that is expanded, and of one whose last dimension is not contiguous."""
    x, y = torch.randn(B, S, 3, 24, requires_grad=True), torch.randn(len(INDICES), 10, requires_grad=True)
    incoming = torch.randn(len(INDICES), 3, 1).expand(-1, 3, 24), torch.randn(B, S, 20)[..., ::2]
    for functions in (triton, reference):
        (rows,) = functions.unpad_input([x], INDICES, INVERSE)
        (padded,) = functions.pad_input([y], INDICES, INVERSE)
        grads = torch.autograd.grad((rows, padded), (x, y), incoming)
        if functions is triton:
            ours = grads
    same(list(ours), list(grads))
    z = torch.randn(4, 5, requires_grad=True)
    rows = triton.index_first_axis(z, torch.tensor([3, -1, 4, 2**40, 0, 3]))
    (dz,) = torch.autograd.grad(rows, z, torch.ones(6, 5))
    assert dz.sum(1).tolist() == [5, 0, 0, 10], "what is no row reads nothing, and adds nothing"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", TENSORS)
def test_cuda_gather(cuda: CudaOps, arch: int, kind: str) -> None:
    tensors = TENSORS[kind]()
    rows, counters = cuda.call("gather_rows", arch, tensors, INDICES, INVERSE)
    assert len(counters) == 1, "one launch"
    same(rows, reference.unpad_input(tensors, INDICES, INVERSE))
    same(cuda.call("gather_rows", arch, rows, INVERSE, INDICES)[0], reference.pad_input(rows, INDICES, INVERSE))


@pytest.mark.parametrize("arch", ARCHS)
def test_cuda_metadata(cuda: CudaOps, arch: int) -> None:
    ran = set()

    def varlen_metadata(mask: Tensor, capacity: int | None) -> tuple[Tensor, ...]:
        made, _ = cuda.call("varlen_metadata", arch, mask, mask.numel() if capacity is None else capacity, 0)
        ran.update(one.kernel for one in cuda.launches)
        return made

    for dtype in (torch.bool, torch.int64, torch.float32, torch.float16):
        check_metadata(varlen_metadata, dtype)
    cuda.call("gather_rows", arch, TENSORS["wide"](), INDICES, INVERSE)
    assert ran | {cuda.launches[0].kernel} == cuda.kernels_of("varlen.cu"), "every kernel"
