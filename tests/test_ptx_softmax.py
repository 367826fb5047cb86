"""The causal softmax as a GPU would run it: Triton's and CUDA's PTX for sm_80, sm_90 and sm_100, with all checks on.

What launches them on a GPU launches them here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cuda_on_ptxsim import ARCHS, CudaOps
from softmax_cases import Case, check
from torch import Tensor

from neox_kernels.compiled import softmax as compiled

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

CASES = [
    Case((2, 3, 5, 1), BF16),
    Case((1, 3, 31, 31), F32),
    Case((1, 2, 33, 40), BF16),
    Case((1, 1, 3, 1000), F16),
    Case((1, 1, 1, 2049), BF16),
    Case((1, 2, 9, 5), F32),  # the first queries see no key
    Case((1, 2, 8, 64), BF16, out_dtype=F32, view="heads_last"),
    Case((2, 3, 7, 40), F16, padding="rows", mask="float", head_mask="flat", dropout_p=0.3),
    Case((2, 2, 5, 33), F32, padding="hidden", mask="bool_strided", head_mask="full", causal=False),
    Case((1, 2, 8, 40), BF16, mask="lowest", view="slice"),
    Case((1, 2, 12, 33), F32, view="unaligned", special="nan"),
    Case((1, 1, 2, 20000), BF16),  # longer than registers hold
    Case((1, 1, 2, 9000), F16, padding="rows", dropout_p=0.5),
    Case((2, 0, 4, 5), F32),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.shape))
def test_triton(case: Case, arch: int, monkeypatch: pytest.MonkeyPatch, ptx_cache: None) -> None:
    from triton_on_ptxsim import Gpu

    from neox_kernels.kernels import softmax_autograd

    gpu = Gpu(arch)
    for name in ("_softmax_kernel", "_softmax_backward_kernel"):
        monkeypatch.setattr(softmax_autograd, name, gpu.stand_in(getattr(softmax_autograd, name)))
    with gpu.fresh:
        check(case, softmax_autograd.causal_softmax)
    assert gpu.launches or 0 in case.shape


@pytest.fixture(scope="module")
def ptx_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("triton")
    from triton_on_ptxsim import ptx_only

    with ptx_only(tmp_path_factory.mktemp("triton")):
        yield


class OnPtxsim(torch.autograd.Function):
    """The compiled backend's own saving and backward around ops that ptxsim runs."""

    @staticmethod
    def forward(ctx: Any, call: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.call = call
        output = call("causal_softmax", *inputs)
        compiled._save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        class Shifted:  # without the first argument, which the op does not have
            needs_input_grad = ctx.needs_input_grad[1:]

            def __getattr__(self, name: str) -> Any:
                return getattr(ctx, name)

        return None, *compiled._backward(Shifted(), *grads)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.shape))
def test_cuda(cuda: CudaOps, case: Case, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    def call(name: str, *inputs: Any) -> Any:
        result, counters = cuda.call(name, arch, *inputs)
        launches.extend(counters)
        return result

    for attribute in ("_BACKWARD", "_BACKWARD_INFERENCE"):
        monkeypatch.setattr(compiled, attribute, partial(call, "causal_softmax_backward"))
    monkeypatch.setattr(compiled, "_SOFTMAX", partial(OnPtxsim.apply, call))
    monkeypatch.setattr(compiled, "_INFERENCE", lambda *inputs: call("causal_softmax", *inputs)[0])
    monkeypatch.setattr(compiled, "_INPLACE", partial(call, "causal_softmax_"))
    check(case, compiled.causal_softmax)
    assert launches or 0 in case.shape
