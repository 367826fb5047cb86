"""Unpad and pad: batches whose sequences are padded on the right, about two thirds of them tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neox_kernels import pad_input, unpad_input, varlen_metadata
from neox_kernels.bench.case import MEMCPY, Case, Family, Work
from neox_kernels.bench.harness import Call
from neox_kernels.testing import packed_qkv


def eager_metadata(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """As flash-attn's bert_padding finds them."""
    seqlens = mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(mask.flatten()).flatten()
    longest = int(seqlens.max().item())
    return indices, torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0)), longest


class Varlen(Work):
    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        self.batch, self.seqlen = case.size
        lengths = torch.linspace(self.seqlen // 3, self.seqlen, self.batch).long()
        self.mask = (torch.arange(self.seqlen) < lengths[:, None]).long().to(case.device)
        self.indices = eager_metadata(self.mask)[0]
        self.row_bytes = shape * case.dtype.itemsize

    def randn(self, *rows: int) -> Tensor:
        generator = torch.Generator(self.case.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": self.case.device}
        return torch.randn(*rows, self.shape, **options).to(self.case.dtype)

    def require_equal(self, results: list[Tensor], truths: list[Tensor]) -> None:
        for result, truth in zip(results, truths, strict=True):
            if result.dtype != truth.dtype or not torch.equal(result, truth):
                raise AssertionError(f"{self.case}: the result is not what indexing gives")


class Unpad(Varlen):
    """The hidden states of a batch, metadata included."""

    signature = "function(x, mask) -> y; (batch, seqlen, features), (batch, seqlen) int64 -> (total, features)"

    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        self.args = self.randn(self.batch, self.seqlen), self.mask
        self.truth = self.args[0].flatten(0, 1)[self.indices]
        self.bytes = 2 * self.truth.nbytes

    def ours(self) -> Call:
        return self.call_of(lambda x, mask: unpad_input(x, varlen_metadata(mask)))

    def variants(self) -> dict[str, Call]:
        metadata = varlen_metadata(self.mask)
        return {"neox_kernels, metadata at hand": self.call_of(lambda x, mask: unpad_input(x, metadata))}

    def peers(self) -> dict[str, Callable[[], Call]]:
        eager = self.call_of(lambda x, mask: x.flatten(0, 1)[eager_metadata(mask)[0]])
        return {"indexing": lambda: eager, "flash-attn": self._flash_attn}

    def limits(self) -> dict[str, Call]:
        there = torch.empty_like(self.truth)
        return {MEMCPY: lambda: there.copy_(self.truth), "memcpy to fresh memory": self.truth.clone}

    def check(self, result: Any) -> None:
        self.require_equal([result], [self.truth])

    def _flash_attn(self) -> Call:
        from flash_attn.bert_padding import unpad_input as theirs

        return self.call_of(lambda x, mask: theirs(x, mask)[0])


class UnpadQKV(Varlen):
    """q, k and v as slices of a packed projection, metadata at hand."""

    signature = """function(heads, indices) -> list of three
    heads: three of (batch, seqlen, nheads, 64), slices; indices: (total,) int64"""

    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        heads = packed_qkv(self.batch, self.seqlen, shape // 64, 64, case.dtype, device=case.device)
        self.args = heads, self.indices
        self.truth = [x.flatten(0, 1)[self.indices] for x in heads]
        self.bytes = 6 * self.truth[0].nbytes

    def ours(self) -> Call:
        metadata = varlen_metadata(self.mask)
        return self.call_of(lambda heads, indices: unpad_input(heads, metadata))

    def peers(self) -> dict[str, Callable[[], Call]]:
        eager = self.call_of(lambda heads, indices: [x.flatten(0, 1)[indices] for x in heads])
        return {"indexing": lambda: eager}

    def limits(self) -> dict[str, Call]:
        there = [torch.empty_like(x) for x in self.truth]
        return {
            MEMCPY: lambda: [target.copy_(x) for target, x in zip(there, self.truth, strict=True)],
            "memcpy to fresh memory": lambda: [x.clone() for x in self.truth],
        }

    def check(self, result: Any) -> None:
        self.require_equal(list(result), self.truth)


class Pad(Varlen):
    """Back to the batch, zeros in the padding."""

    signature = "function(y, indices, batch, seqlen) -> x; (total, features) -> (batch, seqlen, features)"

    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        y = self.randn(len(self.indices))
        self.args = y, self.indices, self.batch, self.seqlen
        self.truth = self._indexing(*self.args)
        self.bytes = y.nbytes + self.truth.nbytes

    def ours(self) -> Call:
        metadata = varlen_metadata(self.mask)
        return self.call_of(lambda y, *_: pad_input(y, metadata))

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {"indexing": lambda: self.call_of(self._indexing), "flash-attn": self._flash_attn}

    def limits(self) -> dict[str, Call]:
        there = torch.empty_like(self.truth)
        return {MEMCPY: lambda: there.copy_(self.truth), "memcpy to fresh memory": self.truth.clone}

    def check(self, result: Any) -> None:
        self.require_equal([result], [self.truth])

    @staticmethod
    def _indexing(y: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
        padded = y.new_zeros(batch * seqlen, *y.shape[1:])
        padded[indices] = y
        return padded.view(batch, seqlen, *y.shape[1:])

    def _flash_attn(self) -> Call:
        from flash_attn.bert_padding import pad_input as theirs

        return self.call_of(theirs)


class Metadata(Varlen):
    """The metadata alone."""

    signature = "function(mask) -> indices, cu_seqlens; (batch, seqlen) int64 -> (total,) int64, (batch + 1,) int32"

    def __init__(self, case: Case, shape: int) -> None:
        super().__init__(case, shape)
        self.args = (self.mask,)
        self.bytes = self.mask.nbytes

    def ours(self) -> Call:
        return self.call_of(varlen_metadata)

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {"indexing": lambda: self.call_of(eager_metadata)}

    def check(self, result: Any) -> None:
        found = result[:2] if isinstance(result, tuple) else (result.indices, result.cu_seqlens)
        self.require_equal(list(found), list(eager_metadata(self.mask)[:2]))


WORKS = {"unpad": Unpad, "qkv": UnpadQKV, "pad": Pad, "metadata": Metadata}
FAMILY = Family(
    name="varlen",
    op="unpad_input",
    works=WORKS,
    shapes={"768 features": 768, "2048 features": 2048},
    sizes=dict.fromkeys(WORKS, ((8, 128), (8, 512), (4, 512), (16, 512))),
    eager="indexing",  # the steps of flash-attn's bert_padding
    quick=lambda case: case.shape == "768 features" and case.size[0] != 16,
    fits=lambda case: case.kind != "metadata" or (case.shape == "768 features" and case.dtype == torch.float32),
)
