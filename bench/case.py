"""What a benchmark is made of: a family of cases, and the work that every contender of a case does."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from neox_kernels.bench.harness import Call

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMCPY = "memcpy"


class Absent(Exception):
    """Why a peer does not take part in a case."""


@dataclass(frozen=True)
class Case:
    """One thing to time: what ``kind`` of a ``family`` does with a named ``shape`` at a ``size``.

    size: batch and lengths; what the numbers are, ``Family.size_names`` says.
    """

    family: str
    kind: str
    shape: str
    size: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        size = ", ".join(map(str, self.size))
        return f"{self.family} {self.kind}: {self.shape} ({size}) {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def series(self) -> str:
        """What cases that differ in their length alone have in common: the batch, and how q and k lie to each other."""
        batch, *lengths = self.size
        queries = ""
        if len(lengths) == 2:
            q_len, k_len = lengths
            queries = ", square" if q_len == k_len else f", {q_len} {'query' if q_len == 1 else 'queries'}"
        return f"{self.kind} {self.shape} {self.dtype_name}, batch {batch}{queries}"


class Work(ABC):
    """A case with its inputs made. Contenders are functions of the same arguments; what they give is checked first.

    bytes: that must be read and written.
    flops: of the matrix products; 0 where memory bounds the work.
    signature: what a user's own function is called with, and must give; empty where none can take part.
    """

    bytes: int
    flops: int = 0
    signature: str = ""
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = {}

    def __init__(self, case: Case, shape: Any) -> None:
        self.case, self.shape = case, shape

    def call_of(self, function: Callable[..., Any]) -> Call:
        """The function with the arguments of this case."""
        return functools.partial(function, *self.args, **self.options)

    @abstractmethod
    def ours(self) -> Call: ...

    @abstractmethod
    def check(self, result: Any) -> None:
        """Raises AssertionError where a contender's result is wrong."""

    def variants(self) -> dict[str, Call]:
        """Ours in other ways, by name."""
        return {}

    def peers(self) -> dict[str, Callable[[], Call]]:
        """Others' code, by name, each made only when it is asked for: raises ImportError where it is not installed, or
        Absent."""
        return {}

    def limits(self) -> dict[str, Call]:
        """What the machine can do, into memory that is there; the first is the limit, more are for comparison."""
        return {}


@dataclass(frozen=True)
class Family:
    """The cases of one op.

    op: the op (of ``neox_kernels.explain``) whose backend the report names.
    works: by kind.
    backward: the kinds that take gradients.
    shapes: by name.
    sizes: by kind; ``gpu_sizes`` are added on a GPU.
    size_names: of the numbers of a size.
    eager: the peer that is plain PyTorch, as models are written in it.
    fits: whether a case of a grid can be made.
    quick: whether a case belongs to the short run.
    rounds: samples of each contender.
    """

    name: str
    op: str
    works: Mapping[str, type[Work]]
    shapes: Mapping[str, Any]
    sizes: Mapping[str, tuple[tuple[int, ...], ...]]
    eager: str
    quick: Callable[[Case], bool]
    size_names: tuple[str, ...] = ("batch", "length")
    backward: frozenset[str] = frozenset()
    gpu_sizes: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    fits: Callable[[Case], bool] = lambda case: True
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 15

    def cases(
        self,
        device: str = "cpu",
        *,
        grid: Iterable[tuple[int, ...]] = (),
        dtypes: Iterable[str] = (),
    ) -> list[Case]:
        """All of them; with a grid these sizes in place of the family's, with dtypes these."""
        chosen = [DTYPES[name] for name in dtypes or self.dtypes]
        found = []
        for kind in self.works:
            sizes = tuple(grid) or (*self.sizes[kind], *(self.gpu_sizes.get(kind, ()) if device == "cuda" else ()))
            for shape, size, dtype in itertools.product(self.shapes, sizes, chosen):
                found.append(Case(self.name, kind, shape, size, dtype, device))
        return [case for case in found if self.fits(case)]

    def work(self, case: Case) -> Work:
        return self.works[case.kind](case, self.shapes[case.shape])


def needs_gpu(case: Case, what: str) -> None:
    """Raises Absent on a CPU."""
    if case.device == "cpu":
        raise Absent(f"{what} needs a GPU")


def compile_for_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for the shapes of the first call alone. What other cases compiled is forgotten: after some
    recompilations of a function torch would leave it as it is."""
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled
