"""Items of a batch more than 2**31 elements apart: offsets of 64 bits, in every kernel that takes strides.

The same kernel with its products cut to 32 bits, as strides multiplied too early would leave them, is found out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_on_ptxsim import ARCHS, CudaOps
from ptxsim import MemoryFault, parse
from tensor_memory import far_apart
from torch import Tensor

from neox_kernels import reference, rotary_tables

TABLES = rotary_tables(16, 40)
HEADS, SCORES = torch.randn(2, 5, 3, 32), torch.randn(2, 3, 4, 16)
ROWS = torch.randn(2, 9, 23).bfloat16()  # moved by 2 bytes
MASK = torch.arange(9)[None] < torch.tensor([[4], [7]])
INDICES, _, INVERSE, FACTS = reference.varlen_metadata(MASK)
INDICES = INDICES[: int(FACTS[0])]
OPS = ("rotary", "softmax", "softmax backward", "gather", "metadata")


def cut_products(ptx: str) -> str:
    """Of every product of 64 bits the low half, with its sign."""
    product = re.compile(r"(?:mul\.lo|mad\.lo)\.[su]64\s+(%rd\d+),[^;]*;")
    return product.sub(r"\g<0> shl.b64 \1, \1, 32; shr.s64 \1, \1, 32;", ptx)


def check(op: str, call: Callable[[Tensor], Any]) -> None:
    """In place where that is possible, so that what is written lies as far."""
    if op == "metadata":
        assert torch.equal(call(far_apart(MASK, 2**32 + 16))[2], INVERSE)
    elif op == "gather":
        # Whether strides count bytes or accesses, cut to 32 bits they turn negative.
        assert torch.equal(call(far_apart(ROWS, 3 * 2**30))[0], ROWS[MASK])
    elif op == "softmax backward":
        scores = SCORES.clone().requires_grad_()
        (expected,) = torch.autograd.grad(reference.causal_softmax(scores), scores, -SCORES)
        torch.testing.assert_close(call(far_apart(-SCORES))[0], expected)
    else:
        given = HEADS if op == "rotary" else SCORES
        expected = reference.apply_rotary(HEADS, *TABLES) if op == "rotary" else reference.causal_softmax(SCORES)
        x = far_apart(given)
        call(x)
        torch.testing.assert_close(x, expected)


@pytest.fixture(scope="module")
def ptx_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("triton")
    from triton_on_ptxsim import ptx_only

    with ptx_only(tmp_path_factory.mktemp("triton")):
        yield


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_triton(op: str, arch: int, ptx_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_on_ptxsim import Gpu

    from neox_kernels import kernels
    from neox_kernels.kernels import rotary_autograd, softmax_autograd, varlen_autograd

    def backward(grad: Tensor) -> tuple[Tensor, ...]:
        scores = SCORES.clone().requires_grad_()
        return torch.autograd.grad(kernels.causal_softmax(scores), scores, grad)

    calls: dict[str, tuple[Any, list[str], Callable[[Tensor], Any]]] = {
        "rotary": (rotary_autograd, ["_rotary_kernel"], lambda x: kernels.apply_rotary(x, *TABLES, inplace=True)),
        "softmax": (softmax_autograd, ["_softmax_kernel"], lambda x: kernels.causal_softmax(x, inplace=True)),
        "softmax backward": (softmax_autograd, ["_softmax_kernel", "_softmax_backward_kernel"], backward),
        "gather": (varlen_autograd, ["_gather_kernel"], lambda x: kernels.unpad_input([x], INDICES, INVERSE)),
        "metadata": (varlen_autograd, ["_count_kernel", "_metadata_kernel"], kernels.varlen_metadata),
    }
    module, names, call = calls[op]
    originals = [getattr(module, name) for name in names]

    def run(gpu: Gpu) -> None:
        for name, kernel in zip(names, originals, strict=True):
            monkeypatch.setattr(module, name, gpu.stand_in(kernel))
        with gpu.fresh:
            check(op, call)

    run(Gpu(arch))
    with pytest.raises(MemoryFault):
        run(Gpu(arch, cut_products))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_cuda(op: str, arch: int, cuda: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(x: Tensor) -> Any:
        name, rest = {
            "rotary": ("rotary_", (*TABLES, None, None, None, 0, 0)),
            "softmax": ("causal_softmax_", (1.0, None, None, None, None, 0.0, 1)),
            "softmax backward": (
                "causal_softmax_backward",
                (reference.causal_softmax(SCORES), 1.0, None, None, 0.0, 1),
            ),
            "gather": ("gather_rows", (INDICES, INVERSE)),
            "metadata": ("varlen_metadata", (MASK.numel(), 0)),
        }[op]
        return cuda.call(name, arch, [x] if op == "gather" else x, *rest)[0]

    check(op, call)
    kernel = cuda.launches[0].kernel
    monkeypatch.setitem(cuda.kernels[arch], kernel, parse(cut_products(cuda.text_of(arch, kernel))))
    with pytest.raises(MemoryFault):
        check(op, call)
