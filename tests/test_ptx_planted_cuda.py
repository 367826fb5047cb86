"""Bugs planted in CUDA kernels that are right: ptxsim finds each of them, and nothing in the kernel as it is."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cuda_on_ptxsim import ARCHS, CudaOps
from ptxsim import Fault, MemoryFault, Race, parse

BARRIER = r"bar\.sync\s+0;"
BRANCH = r"@!?%p\d+ bra\s+([^;]+);"


class Planted:
    """The softmax of rows that a block shares, 1000 keys in 1024 lanes' elements, with its PTX edited."""

    def __init__(self, cuda: CudaOps, arch: int) -> None:
        self.cuda, self.arch = cuda, arch
        self.scores = torch.randn(1, 2, 3, 1000)
        self.expected = self.softmax()
        (launch,) = cuda.launches
        self.kernel, self.body = launch.kernel, cuda.text_of(arch, launch.kernel)

    def softmax(self) -> torch.Tensor:
        rest = 1.0, None, None, None, None, 0.0, 0  # a scale; no mask, no dropout, not causal
        return self.cuda.call("causal_softmax", self.arch, self.scores, *rest)[0][0]

    def outcome(self, edit: Callable[[str], str]) -> type[Fault] | None:
        """The fault. Where there is none, what was edited is not needed here: the result is still right."""
        kernels = self.cuda.kernels[self.arch]
        whole, edited = kernels[self.kernel], edit(self.body)
        assert edited != self.body
        kernels[self.kernel] = parse(edited)
        try:
            result = self.softmax()
        except Fault as fault:
            return type(fault)
        finally:
            kernels[self.kernel] = whole
        assert torch.equal(result, self.expected), "a wrong result that is no fault"
        return None

    def without(self, found: list[re.Match[str]]) -> list[type[Fault] | None]:
        return [self.outcome(lambda body, at=at: body[: at.start()] + body[at.end() :]) for at in found]

    def barriers(self) -> list[re.Match[str]]:
        return list(re.finditer(BARRIER, self.body))

    def masks(self, access: str) -> list[re.Match[str]]:
        """Branches over accesses of this kind, and of no other."""
        masks = []
        for branch in re.finditer(BRANCH, self.body):
            skipped = self.body[branch.end() : max(branch.end(), self.body.index(f"{branch[1]}:"))]
            if set(re.findall(r"\b(?:(?:ld|st)\.global|bar\.sync|shfl\.sync)", skipped)) == {access}:
                masks.append(branch)
        return masks


@pytest.mark.parametrize("arch", ARCHS)
def test_softmax_with_a_bug(cuda: CudaOps, arch: int) -> None:
    planted = Planted(cuda, arch)
    # Half of the kernel is for rows that go by twice, and is not run.
    barriers = planted.without(planted.barriers())
    assert barriers.count(Race) == barriers.count(None) == 2
    for access in ("ld.global", "st.global"):
        outcomes = planted.without(planted.masks(access))
        assert MemoryFault in outcomes, access
    shorter = re.compile(r"(\.shared [^;]*partial)\[128\]")
    assert planted.outcome(lambda body: shorter.sub(r"\1[64]", body)) is MemoryFault
    # Every block takes the row of the first.
    assert planted.outcome(lambda body: body.replace("%ctaid.x", "%ctaid.z")) is Race
