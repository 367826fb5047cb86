"""The causal softmax as a GPU would run it: Triton's and CUDA's PTX for sm_80, sm_90 and sm_100, with all checks on.

What launches them on a GPU launches them here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cuda_on_ptxsim import ARCHS, CudaOps
from softmax_calls import Case, check, make_inputs, run
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


# Sequences of which no key is seen, in rows that stay in registers, are shared out to warps, and go by twice.
DEAD = [
    Case((2, 2, 5, 33), F32, padding="hidden", mask="bool_strided", head_mask="full", causal=False),
    Case((2, 3, 7, 40), F16, padding="hidden", mask="float", head_mask="flat", dropout_p=0.3),
    Case((2, 1, 2, 9000), F16, padding="hidden", dropout_p=0.5),
]


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


def on_triton(arch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    from triton_on_ptxsim import Gpu

    from neox_kernels.kernels import softmax_autograd

    gpu = Gpu(arch)
    for name in ("_softmax_kernel", "_softmax_backward_kernel"):
        monkeypatch.setattr(softmax_autograd, name, gpu.stand_in(getattr(softmax_autograd, name)))
    with gpu.fresh:
        yield softmax_autograd.causal_softmax, gpu.launches


def on_cuda(arch: int, monkeypatch: pytest.MonkeyPatch, cuda: CudaOps) -> Iterator[tuple[Any, list[Any]]]:
    launches: list[Any] = []

    def call(name: str, *inputs: Any) -> Any:
        result, _ = cuda.call(name, arch, *inputs)
        launches.extend(cuda.launches)
        return result

    for attribute in ("_BACKWARD", "_BACKWARD_INFERENCE"):
        monkeypatch.setattr(compiled, attribute, partial(call, "causal_softmax_backward"))
    monkeypatch.setattr(compiled, "_SOFTMAX", partial(OnPtxsim.apply, call))
    monkeypatch.setattr(compiled, "_INFERENCE", lambda *inputs: call("causal_softmax", *inputs)[0])
    monkeypatch.setattr(compiled, "_INPLACE", partial(call, "causal_softmax_"))
    yield compiled.causal_softmax, launches


@pytest.fixture(params=[f"{backend}-{arch}" for backend in ("triton", "cuda") for arch in ARCHS])
def softmax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """causal_softmax by the PTX of a backend for an architecture, and what it has launched."""
    backend, arch = request.param.split("-")
    if backend == "triton":
        request.getfixturevalue("ptx_cache")
        yield from on_triton(int(arch), monkeypatch)
    else:
        yield from on_cuda(int(arch), monkeypatch, request.getfixturevalue("cuda"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.shape))
def test_forward_backward_and_in_place(softmax: tuple[Any, list[Any]], case: Case) -> None:
    function, launches = softmax
    check(case, function)
    assert launches or 0 in case.shape


@pytest.mark.parametrize("case", DEAD, ids=lambda case: str(case.shape))
def test_rows_without_a_visible_key(softmax: tuple[Any, list[Any]], case: Case) -> None:
    """What comes in for them shows nowhere."""
    function, _ = softmax
    inputs, options, grad = make_inputs(case)
    expected = run(function, inputs, options, grad)
    assert not expected[1][0].any() and expected[1][1].any()
    for value in (float("inf"), float("nan")):
        incoming = grad.clone()
        incoming[0] = value
        for x, y in zip(run(function, inputs, options, incoming), expected, strict=True):
            assert torch.equal(x, y), value


@pytest.mark.parametrize("arch", ARCHS)
def test_every_cuda_kernel(cuda: CudaOps, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of dtypes, with rows of whole accesses and with others."""
    for function, launches in on_cuda(arch, monkeypatch, cuda):
        for dtype, out_dtype, k_len in itertools.product((F32, BF16, F16), (F32, BF16, F16), (31, 1000)):
            check(Case((1, 3, 5, k_len), dtype, out_dtype=out_dtype), function)
        ran = {one.kernel for one in launches}
    assert ran == cuda.kernels_of("softmax.cu") | cuda.kernels_of("softmax_backward.cu")
