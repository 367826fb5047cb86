"""Unpad and pad: every backend and CPU instruction set, bit by bit against plain loops."""

import functools
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import (
    compiled,
    index_first_axis,
    index_put_first_axis,
    pad_input,
    reference,
    unpad_input,
    use_backend,
    varlen_metadata,
)
from neox_kernels.testing import packed_qkv

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64)


@pytest.fixture(params=["reference", "default", "avx2", "avx512", "avx512_bf16"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the compiled library with every instruction set that runs here."""
    if request.param == "reference":
        with use_backend("reference"):
            yield "reference"
        return
    if compiled.load_error is not None:
        pytest.skip(compiled.load_error)
    before = compiled.cpu_isa()
    try:
        compiled.cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        with use_backend("compiled"):
            yield request.param
    finally:
        compiled.cpu_isa(before)


def every(**values: Any) -> Any:
    """The test, for every combination of these values."""
    marks = [pytest.mark.parametrize(name, choices) for name, choices in values.items()]
    return lambda test: functools.reduce(lambda marked, mark: mark(marked), marks, test)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(sum(shape)))
    if dtype == torch.bool:
        return x[..., 0] > 127
    return x.to(torch.uint8).view(dtype)[..., 0]  # every bit pattern, NaN too


def same_bits(a: Tensor, b: Tensor) -> bool:
    dense = (x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*dense)


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows], dtype=torch.long).view(len(rows), len(rows[0]))


MASKS = {
    "left": mask_of("0001111", "0111111", "1111111"),
    "right": mask_of("1111000", "1111110", "1000000"),
    "both": mask_of("0011100", "0111110", "0001000"),
    "mixed": mask_of("1010011", "0110110", "1000001"),
    "rows without a token": mask_of("0000000", "0111000", "0000000"),
    "all": mask_of("1111111", "1111111"),
    "none": mask_of("0000000", "0000000"),
    "one": mask_of("1"),
    "no sequence": torch.zeros(0, 5, dtype=torch.long),
    "seqlen 0": torch.zeros(3, 0, dtype=torch.long),
}


def by_hand(mask: Tensor) -> tuple[list[int], list[int], int]:
    rows = mask.tolist()
    tokens = [b * mask.shape[1] + s for b, row in enumerate(rows) for s, kept in enumerate(row) if kept]
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + int(sum(row)))
    return tokens, ends, max((int(sum(row)) for row in rows), default=0)


def padded_by_hand(y: Tensor, mask: Tensor) -> Tensor:
    x = torch.zeros(mask.numel(), *y.shape[1:], dtype=y.dtype)
    for row, token in enumerate(by_hand(mask)[0]):
        x[token] = y[row]
    return x.view(*mask.shape, *y.shape[1:])


MASK_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


@every(case=MASKS)
def test_metadata(backend: str, case: str) -> None:
    mask = MASKS[case]
    tokens, ends, longest = by_hand(mask)
    for dtype in MASK_DTYPES:
        indices, cu_seqlens, max_seqlen, inverse = varlen_metadata(mask.to(dtype))
        assert indices.dtype == torch.int64 and cu_seqlens.dtype == inverse.dtype == torch.int32
        assert (indices.tolist(), cu_seqlens.tolist(), max_seqlen) == (tokens, ends, longest), dtype
        assert same_bits(inverse, padded_by_hand(torch.arange(1, len(tokens) + 1, dtype=torch.int32), mask) - 1), dtype
    for room in (len(tokens), len(tokens) + 3):
        indices, cu_seqlens, max_seqlen, other = varlen_metadata(mask, capacity=room, max_seqlen=longest + 2)
        assert indices.tolist() == tokens + [-1] * (room - len(tokens))
        assert (cu_seqlens.tolist(), max_seqlen) == (ends, longest + 2) and same_bits(other, inverse)
        assert varlen_metadata(mask, capacity=room).max_seqlen == longest
        assert varlen_metadata(mask, max_seqlen=9).indices.tolist() == tokens


def test_masks_of_any_stride_and_of_minus_zero(backend: str) -> None:
    mask = MASKS["mixed"]
    expected = varlen_metadata(mask)
    forms = (
        mask.T.contiguous().T,
        torch.stack((mask, 1 - mask), -1)[..., 0],
        torch.cat((1 - mask, mask), 1)[:, 7:],
        torch.where(mask.bool(), 1.0, -0.0),
        torch.where(mask.bool(), 1.0, -0.0).bfloat16(),
    )
    for form in forms:
        actual = varlen_metadata(form)
        assert actual.max_seqlen == expected.max_seqlen
        assert all(same_bits(actual[i], expected[i]) for i in (0, 1, 3))
    row = varlen_metadata(mask[:1].expand(4, 7))
    assert row.cu_seqlens.tolist() == [0, 4, 8, 12, 16] and row.indices.tolist()[4:8] == [7, 9, 12, 13]


TRAILING = ((), (1,), (3,), (40,), (300,), (2, 3, 5), (3, 0), (1, 129, 1))


@every(case=MASKS, dtype=DTYPES)
def test_there_and_back(backend: str, case: str, dtype: torch.dtype) -> None:
    mask = MASKS[case]
    metadata, tokens = varlen_metadata(mask), by_hand(mask)[0]
    for trailing in TRAILING:
        x = rand(*mask.shape, *trailing, dtype=dtype)
        y = unpad_input(x, metadata)
        assert y.is_contiguous() and same_bits(y, x.flatten(0, 1)[tokens]), trailing
        back = pad_input(y, metadata)
        assert back.is_contiguous() and same_bits(back, padded_by_hand(y, mask)), trailing
        roomy = varlen_metadata(mask, capacity=len(tokens) + 2, max_seqlen=7)
        z = unpad_input(x, roomy)
        assert same_bits(z[: len(tokens)], y) and not z[len(tokens) :].any() and len(z) == len(tokens) + 2
        assert same_bits(pad_input(torch.cat((y, torch.ones_like(z[len(tokens) :]))), roomy), back)


def views(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of (3, 7, 4, 32) that lie differently in memory."""
    return {
        "contiguous": rand(3, 7, 4, 32, dtype=dtype),
        "heads first": rand(3, 4, 7, 32, dtype=dtype).transpose(1, 2),
        "tokens first": rand(7, 3, 4, 32, dtype=dtype).transpose(0, 1),
        "slice of packed qkv": rand(3, 7, 4, 96, dtype=dtype)[..., 32:64],
        "heads of a slice": rand(3, 7, 9, 32, dtype=dtype)[:, :, 3:7],
        "odd storage offset": rand(3 + 3 * 7 * 4 * 32, dtype=dtype)[3:].view(3, 7, 4, 32),
        "every second token": rand(3, 14, 4, 32, dtype=dtype)[:, 1::2],
        "every second sequence": rand(6, 7, 4, 32, dtype=dtype)[::2],
        "expanded batch": rand(1, 7, 4, 32, dtype=dtype).expand(3, 7, 4, 32),
        "expanded heads": rand(3, 7, 1, 32, dtype=dtype).expand(3, 7, 4, 32),
        "expanded features": rand(3, 7, 4, 1, dtype=dtype).expand(3, 7, 4, 32),
        "last dim of stride 2": rand(3, 7, 4, 64, dtype=dtype)[..., 1::2],
        "features before heads": rand(3, 7, 32, 4, dtype=dtype).transpose(2, 3),
        "last dim first in memory": rand(32, 3, 7, 4, dtype=dtype).permute(1, 2, 3, 0),
    }


@every(dtype=(torch.float32, torch.bfloat16, torch.uint8))
def test_views_are_read_as_they_lie(backend: str, dtype: torch.dtype) -> None:
    mask = MASKS["mixed"]
    metadata, tokens = varlen_metadata(mask), by_hand(mask)[0]
    for name, x in views(dtype).items():
        before = x.clone()
        assert same_bits(unpad_input(x, metadata), before.flatten(0, 1)[tokens]), name
        y = x.transpose(0, 1)[:4, 1]  # rows of any distance
        roomy = varlen_metadata(torch.tensor([[1, 0, 1], [0, 1, 1]]))
        assert same_bits(pad_input(y, roomy), padded_by_hand(y, torch.tensor([[1, 0, 1], [0, 1, 1]]))), name
        assert same_bits(index_first_axis(x, torch.tensor([2, 2, 0])), before[[2, 2, 0]]), name
        assert same_bits(x, before), name


@every(container=(tuple, list))
def test_several_in_one_call_are_each_alone(backend: str, container: Any) -> None:
    metadata = varlen_metadata(MASKS["left"])
    q, k, v = packed_qkv(3, 7, 4, 32, torch.bfloat16)
    ids, flags = torch.arange(21).view(3, 7), rand(3, 7, 9, dtype=torch.bool)
    several = container((q, k[:, :, :1], v, ids, flags, rand(3, 7, 0), *(rand(3, 7, n) for n in range(1, 14))))
    unpadded = unpad_input(several, metadata)
    assert isinstance(unpadded, tuple) and len(unpadded) == len(several)
    padded = pad_input(container(unpadded), metadata)
    for x, y, z in zip(several, unpadded, padded, strict=True):
        assert same_bits(y, unpad_input(x, metadata)) and same_bits(z, pad_input(y, metadata))


@every(index_dtype=(torch.int32, torch.int64))
def test_index_and_put_first_axis(backend: str, index_dtype: torch.dtype) -> None:
    x, indices = rand(9, 3, 40), torch.tensor([8, 0, 3, 3, 4, 5, 1], dtype=index_dtype)
    assert same_bits(index_first_axis(x, indices), x[indices.long()])
    assert same_bits(index_first_axis(x, indices.repeat_interleave(2)[::2]), x[indices.long()])
    assert same_bits(index_first_axis(x[:, 0, 0], indices[:0]), x[:0, 0, 0])
    unique = torch.tensor([8, 0, 3, 4, 1], dtype=index_dtype)
    expected = torch.zeros(10, 3, 40)
    expected[unique.long()] = x[:5]
    assert same_bits(index_put_first_axis(x[:5], unique, 10), expected)
    assert same_bits(index_put_first_axis(x[:0], unique[:0], 2), torch.zeros(2, 3, 40))


def test_one_thread_or_two_give_the_same_bits(backend: str) -> None:
    generator, threads, results = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    mask = torch.rand(5, 801, generator=generator) < torch.tensor([[0.5], [1.0], [0.0], [0.9], [0.1]])
    mask[0, :400], mask[3, 600:] = True, False
    x, other = rand(5, 801, 16), rand(5, 801, 3, dtype=torch.uint8)
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            metadata = varlen_metadata(mask)
            unpadded = unpad_input((x, other), metadata)
            results.append((*unpadded, *pad_input(unpadded, metadata)))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert same_bits(results[1][0], x[mask]) and same_bits(results[1][2], x.masked_fill(~mask[..., None], 0))


@every(far=[0, 1, 2])
def test_offsets_of_64_bits(backend: str, far: int) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own")
    strides = [200, 64, 32, 1]
    strides[far] = 2**31 + 32  # in memory of which only what is touched exists
    pages = mmap.mmap(-1, 2 * (2**32 + 8192), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    x = torch.frombuffer(pages, dtype=torch.bfloat16).as_strided((3, 3, 2, 32), strides)
    x.copy_(torch.randn(3, 3, 2, 32))
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]])
    assert same_bits(unpad_input(x, varlen_metadata(mask)), x[mask.bool()])


@every(case=MASKS)
def test_the_reference_undoes_itself(case: str) -> None:
    """The oracle by its own two ways: pad scatters by indices, and what it gives is the gather by inverse."""
    mask, x = MASKS[case], rand(*MASKS[case].shape, 3, dtype=torch.int32)
    indices, _, inverse, facts = reference.varlen_metadata(mask)
    assert facts.tolist() == [int(mask.sum()), by_hand(mask)[2], 0]
    (y,) = reference.unpad_input([x], indices, inverse)
    (z,) = reference.pad_input([y], indices, inverse)
    assert torch.equal(z, x * mask[..., None].int())
    flat = inverse.flatten()
    gathered = torch.cat((y, y.new_zeros(1, 3)))[flat.where(flat >= 0, len(y)).long()]
    assert torch.equal(gathered.view_as(z), z)
    found = reference.varlen.invert_indices(indices[: int(mask.sum())], mask.numel())
    assert same_bits(found.view(mask.shape), inverse)
