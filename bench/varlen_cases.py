"""What the varlen benchmarks run: batches with padding, and the contenders of each, checked before they are timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_kernels import pad_input, unpad_input, varlen_metadata
from neox_kernels.testing import packed_qkv

OP = "unpad_input"  # whose backend the report names
BASELINE = "PyTorch indexing"  # the steps of flash-attn's bert_padding
SIZES = ((8, 128), (4, 512), (16, 512))
DTYPES = (torch.float32, torch.bfloat16)
Call = Callable[[], object]


@dataclass(frozen=True)
class VarlenCase:
    """A batch whose sequences are padded on the right to the longest, about two thirds of it tokens."""

    kind: str  # a key of CONTENDERS
    batch: int
    seqlen: int
    features: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def model(self) -> str:
        return f"hidden-{self.features}"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}: ({self.batch}, {self.seqlen}, {self.features}) {dtype}"

    @property
    def mask(self) -> Tensor:
        lengths = torch.linspace(self.seqlen // 3, self.seqlen, self.batch).long()
        return (torch.arange(self.seqlen) < lengths[:, None]).long().to(self.device)

    def randn(self, *rows: int) -> Tensor:
        return torch.randn(*rows, self.features).to(self.device, self.dtype)

    @property
    def bytes(self) -> int:
        """Read and written: the tokens each way, for pad the padding too, for the metadata what it reads."""
        if self.kind == "metadata":
            return self.mask.nbytes
        tokens, row = int(self.mask.sum()), self.features * self.dtype.itemsize
        if self.kind == "pad":
            return (tokens + self.batch * self.seqlen) * row
        return 2 * tokens * row * (3 if self.kind == "qkv" else 1)


def cases(device: str = "cpu") -> Iterator[VarlenCase]:
    for kind, (batch, seqlen), features, dtype in itertools.product(CONTENDERS, SIZES, (768, 2048), DTYPES):
        if kind != "metadata" or (features, dtype) == (768, torch.float32):
            yield VarlenCase(kind, batch, seqlen, features, dtype, device)


def eager_metadata(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """As flash-attn's bert_padding finds them."""
    seqlens = mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(mask.flatten()).flatten()
    longest = int(seqlens.max().item())
    return indices, torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0)), longest


def eager_pad(y: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    padded = y.new_zeros(batch * seqlen, *y.shape[1:])
    padded[indices] = y
    return padded.view(batch, seqlen, *y.shape[1:])


def unpad(case: VarlenCase) -> dict[str, Call]:
    """The hidden states of a batch, metadata included."""
    mask, x = case.mask, case.randn(case.batch, case.seqlen)

    def eager() -> Tensor:
        return x.flatten(0, 1)[eager_metadata(mask)[0]]

    def fused() -> Tensor:
        return unpad_input(x, varlen_metadata(mask))

    assert torch.equal(fused(), eager())
    y = fused()
    target = torch.empty_like(y)
    metadata = varlen_metadata(mask)
    return {
        BASELINE: eager,
        "neox_kernels": fused,
        "neox_kernels, metadata at hand": lambda: unpad_input(x, metadata),
        "memcpy to fresh memory": y.clone,
        "memcpy": lambda: target.copy_(y),
    }


def qkv(case: VarlenCase) -> dict[str, Call]:
    """q, k and v as slices of a packed projection, metadata at hand."""
    heads = packed_qkv(case.batch, case.seqlen, case.features // 64, 64, case.dtype, device=case.device)
    metadata = varlen_metadata(case.mask)

    def eager() -> list[Tensor]:
        return [x.flatten(0, 1)[metadata.indices] for x in heads]

    def fused() -> tuple[Tensor, ...]:
        return unpad_input(heads, metadata)

    assert all(torch.equal(a, b) for a, b in zip(fused(), eager(), strict=True))
    dense = [x.contiguous() for x in fused()]
    return {BASELINE: eager, "neox_kernels": fused, "memcpy to fresh memory": lambda: [x.clone() for x in dense]}


def pad(case: VarlenCase) -> dict[str, Call]:
    """Back to the batch."""
    metadata = varlen_metadata(case.mask)
    y = case.randn(len(metadata.indices))

    def eager() -> Tensor:
        return eager_pad(y, metadata.indices, case.batch, case.seqlen)

    def fused() -> Tensor:
        return pad_input(y, metadata)

    assert torch.equal(fused(), eager())
    whole = fused()
    return {BASELINE: eager, "neox_kernels": fused, "memcpy to fresh memory": whole.clone}


def metadata(case: VarlenCase) -> dict[str, Call]:
    """The metadata alone."""
    mask = case.mask
    ours, theirs = varlen_metadata(mask), eager_metadata(mask)
    assert torch.equal(ours.indices, theirs[0]) and torch.equal(ours.cu_seqlens, theirs[1])
    return {BASELINE: lambda: eager_metadata(mask), "neox_kernels": lambda: varlen_metadata(mask)}


def flash_attn_unpad(case: VarlenCase) -> Call:
    from flash_attn.bert_padding import unpad_input as theirs

    mask, x = case.mask, case.randn(case.batch, case.seqlen)
    assert torch.equal(theirs(x, mask)[0], unpad_input(x, varlen_metadata(mask)))
    return lambda: theirs(x, mask)


def flash_attn_pad(case: VarlenCase) -> Call:
    from flash_attn.bert_padding import pad_input as theirs

    metadata = varlen_metadata(case.mask)
    y, indices = case.randn(len(metadata.indices)), metadata.indices
    assert torch.equal(theirs(y, indices, case.batch, case.seqlen), pad_input(y, metadata))
    return lambda: theirs(y, indices, case.batch, case.seqlen)


PEERS = {"unpad": {"flash-attn": flash_attn_unpad}, "pad": {"flash-attn": flash_attn_pad}}
CONTENDERS = {"unpad": unpad, "qkv": qkv, "pad": pad, "metadata": metadata}


def contenders(case: VarlenCase, *, compiled: bool = False) -> dict[str, Call]:
    """By name; BASELINE is what the others are compared with. Results are checked first."""
    return CONTENDERS[case.kind](case)
