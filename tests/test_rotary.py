"""The forward of rotary: every backend and CPU instruction set against the float64 oracle."""

import functools
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_kernels import apply_rotary, apply_rotary_kv_append, apply_rotary_qk, compiled, reference, rotary_tables
from neox_kernels.backends import use_backend
from neox_kernels.testing import assert_within_budget, eager_rotary, packed_qkv

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
I32, I64 = torch.int32, torch.int64
BOTH, LAYOUTS = (False, True), ("bshd", "bhsd")
COS, SIN = rotary_tables(16, 48)


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


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def memory(x: Tensor, written: Tensor | None = None) -> Tensor:
    """Every byte that ``x`` is a view into; as they are to be once ``written`` is in the place of ``x``."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).clone()
    if written is not None:
        whole.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(written)
    return whole.view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    dense = (memory(x.clone(memory_format=torch.contiguous_format)) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*dense)


def rows(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, seqlen_offsets: Any = None, cu_seqlens: Any = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token, by the contract's words and plain loops: not the reference's way."""
    if cos.dim() == 3:
        return cos, sin
    batch, seqlen = (1, x.shape[0]) if x.dim() == 3 else (x.shape[0], x.shape[1])
    c = torch.ones(batch, seqlen, cos.shape[1], dtype=cos.dtype)
    s = torch.zeros_like(c)
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    for b in range(batch):
        for t in range(seqlen):
            sequence, first = b, 0
            if ends is not None:
                owners = [i for i in range(len(ends) - 1) if ends[i] <= t < ends[i + 1]]
                if not owners:
                    continue  # padding: turned by no angle
                sequence, first = owners[0], ends[owners[0]]
            if position_ids is not None:
                ids = position_ids[None] if position_ids.dim() == 1 else position_ids
                position = int(ids[b if ids.shape[0] > 1 else 0, t])
            else:
                offsets = seqlen_offsets.tolist() if isinstance(seqlen_offsets, Tensor) else None
                position = t - first + (offsets[sequence] if offsets else seqlen_offsets or 0)
            c[b, t], s[b, t] = cos[position], sin[position]
    return (c[0], s[0]) if x.dim() == 3 else (c, s)


def check(
    actual: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, layout: str = "bshd", **where: Any
) -> None:
    """Within the budget of the oracle, which itself gives what plain loops give; and passed features bit for bit."""

    def swap(y: Tensor) -> Tensor:
        return y.transpose(1, 2) if layout == "bhsd" else y

    c, s = rows(swap(x), cos, sin, **where)
    options: dict[str, Any] = {"interleaved": interleaved, "layout": layout}
    oracle = reference.apply_rotary(x.double(), cos.double(), sin.double(), **options, **where)
    by_hand = swap(eager_rotary(swap(x).double(), c.double(), s.double(), interleaved))
    assert_within_budget(oracle, by_hand, by_hand, "the oracle")
    what = f"{x.dtype} {tuple(x.shape)}, rotary_dim {2 * cos.shape[-1]}, {options}"
    assert_within_budget(actual, swap(eager_rotary(swap(x), c, s, interleaved)), oracle, what)
    assert same_bits(actual[..., 2 * cos.shape[-1] :], x[..., 2 * cos.shape[-1] :]), f"{what}: features that pass"


def rotate(x: Tensor, cos: Tensor = COS, sin: Tensor = SIN, **options: Any) -> Tensor:
    """apply_rotary out of place, checked; and nothing that it read has changed."""
    read = [x, cos, sin, *(value for value in options.values() if isinstance(value, Tensor))]
    before = [memory(tensor) for tensor in read]
    y = apply_rotary(x, cos, sin, **options)
    assert all(torch.equal(memory(tensor), old) for tensor, old in zip(read, before, strict=True)), "an input changed"
    assert y.is_contiguous() and y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    check(y, x, cos, sin, **options)
    return y


@every(dtype=FLOATS, interleaved=BOTH, head_dim=[32, 64, 80, 96, 128, 256, 33, 7])
def test_every_rotary_dim(backend: str, dtype: torch.dtype, interleaved: bool, head_dim: int) -> None:
    dims = {0, 2, 6, 8, 16, 20, 24, 32, 64, head_dim - head_dim % 2}
    for rotary_dim in sorted(dim for dim in dims if dim <= head_dim):
        rotate(randn(2, 5, 3, head_dim, dtype=dtype), *rotary_tables(rotary_dim, 8), interleaved=interleaved)


@every(interleaved=BOTH, layout=LAYOUTS)
def test_float64_is_served_by_the_reference(interleaved: bool, layout: Any) -> None:
    x = randn(2, 5, 3, 32).double()
    y = rotate(x, COS.double() + 1e-12, SIN.double() - 1e-12, interleaved=interleaved, layout=layout)
    in_float32 = apply_rotary(x.float(), COS, SIN, interleaved=interleaved, layout=layout)
    assert y.dtype == torch.float64 and not torch.equal(y.float(), in_float32)


def views(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of (2, 5, 3, 32) that lie differently in memory."""
    return {
        "contiguous": randn(2, 5, 3, 32, dtype=dtype),
        "transposed": randn(2, 3, 5, 32, dtype=dtype).transpose(1, 2),
        "slice of packed qkv": randn(2, 5, 3, 96, dtype=dtype)[..., 32:64],
        "odd storage offset": randn(963, dtype=dtype)[3:].view(2, 5, 3, 32),
        "every second token": randn(2, 10, 3, 32, dtype=dtype)[:, 1::2],
        "batch after heads": randn(5, 3, 2, 32, dtype=dtype).permute(2, 0, 1, 3),
        "expanded heads": randn(2, 5, 1, 32, dtype=dtype).expand(2, 5, 3, 32),
        "expanded batch": randn(1, 5, 3, 32, dtype=dtype).expand(2, 5, 3, 32),
        "last dim of stride 2": randn(2, 5, 3, 64, dtype=dtype)[..., 1::2],
        "last dim first in memory": randn(32, 2, 5, 3, dtype=dtype).permute(1, 2, 3, 0),
    }


@every(dtype=FLOATS, interleaved=BOTH, layout=LAYOUTS)
def test_views_are_read_and_written_as_they_lie(
    backend: str, dtype: torch.dtype, interleaved: bool, layout: Any
) -> None:
    for name, x in views(dtype).items():
        expected = rotate(x, interleaved=interleaved, layout=layout, seqlen_offsets=3)
        if "expanded" in name or "last dim" in name:
            continue  # not written: see test_rotary_errors
        after = memory(x, written=expected)
        assert apply_rotary(x, COS, SIN, interleaved=interleaved, layout=layout, seqlen_offsets=3, inplace=True) is x
        assert torch.equal(memory(x), after), f"in place, {name}"


@every(layout=LAYOUTS, heads=[(12, 12), (12, 1), (6, 3), (5, 7)])
def test_qk_is_each_alone(backend: str, layout: Any, heads: tuple[int, int]) -> None:
    q, k = (randn(2, 5, n, 32) if layout == "bshd" else randn(2, n, 5, 32) for n in heads)
    options: dict[str, Any] = {"layout": layout, "position_ids": torch.tensor([[4, 0, 9, 9, 1], [7, 6, 5, 4, 3]])}
    results = apply_rotary_qk(q, k, COS, SIN, **options)
    assert same_bits(results[0], rotate(q, **options)) and same_bits(results[1], rotate(k, **options))
    assert apply_rotary_qk(q, k, COS, SIN, **options, inplace=True) == (q, k)
    assert same_bits(q, results[0]) and same_bits(k, results[1])


@every(dtype=FLOATS)
def test_packed_projection_in_place_leaves_v(backend: str, dtype: torch.dtype) -> None:
    q, k, v = packed_qkv(2, 5, 3, 80, dtype)
    old_v, expected = v.clone(), apply_rotary_qk(q, k, COS, SIN)
    apply_rotary_qk(q, k, COS, SIN, inplace=True)
    assert same_bits(q, expected[0]) and same_bits(k, expected[1]) and same_bits(v, old_v)


def ids(*shape: int, dtype: torch.dtype = I64) -> Tensor:
    return torch.randint(0, 48, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


CU = torch.tensor([0, 0, 4, 4, 9, 10, 10])  # empty at the start, inside and at the end; of 12 tokens two are padding
OFFSETS = torch.tensor([99, 40, 99, 0, 47, 99])  # an empty sequence reads none
POSITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "int offset": {"seqlen_offsets": 43},
    "offsets int32": {"seqlen_offsets": torch.tensor([0, 43, 7], dtype=I32)},
    "offsets int64, strided": {"seqlen_offsets": torch.tensor([0, 99, 43, 99, 7, 99])[::2]},
    "ids (seqlen,) int32, offset": {"position_ids": ids(6, dtype=I32)[1:]},
    "ids (1, seqlen) int64": {"position_ids": ids(1, 5)},
    "ids (batch, seqlen) int32": {"position_ids": ids(3, 5, dtype=I32)},
    "ids (batch, seqlen) int64, transposed": {"position_ids": ids(5, 3).T},
    "ids expanded over the batch": {"position_ids": ids(1, 5).expand(3, 5)},
    "ids of one position": {"position_ids": ids(3, 1).expand(3, 5)},
    "ids of every second column": {"position_ids": ids(3, 10, dtype=I32)[:, 1::2]},
    "flat: ids": {"position_ids": ids(12)},
    "flat: cu int32": {"cu_seqlens": CU.to(I32)},
    "flat: cu int64": {"cu_seqlens": CU},
    "flat: one sequence": {"cu_seqlens": torch.tensor([0, 12])},
    "flat: all padding": {"cu_seqlens": torch.tensor([0, 0, 0])},
    "flat: no sequence": {"cu_seqlens": torch.tensor([0], dtype=I32)},
    "flat: cu, int offset": {"cu_seqlens": CU.to(I32), "seqlen_offsets": 43},
    "flat: cu, offsets int32": {"cu_seqlens": CU, "seqlen_offsets": OFFSETS.to(I32)},
    "flat: cu, offsets int64": {"cu_seqlens": CU.to(I32), "seqlen_offsets": OFFSETS},
    "flat: cu, ids; no one reads padding's": {"cu_seqlens": CU, "position_ids": ids(12) + 999 * (torch.arange(12) > 9)},
    "flat: cu, strided ids": {"cu_seqlens": CU, "position_ids": ids(24)[::2]},
}


@every(interleaved=BOTH, case=POSITIONS)
def test_positions(backend: str, case: str, interleaved: bool) -> None:
    where: dict[str, Any] = {"interleaved": interleaved, **POSITIONS[case]}
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(*((12,) if case.startswith("flat") else (3, 5)), 3, 32, dtype=dtype)
        y = rotate(x, **where)
        q, k = apply_rotary_qk(x, x[..., :1, :], COS, SIN, **where, max_seqlen=5)
        assert same_bits(q, y) and same_bits(k, y[..., :1, :])
        if x.dim() == 4:
            assert same_bits(rotate(x.transpose(1, 2), layout="bhsd", **where).transpose(1, 2), y)


def forms(table: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "rows of a wider table": torch.cat((table + 1, table, table - 1), 1)[:, 8:16],
        "every second row": torch.stack((table, table + 1), 1).view(96, 8)[::2],
        "columns first": table.T.contiguous().T,
        "one position for all": table[5:6].expand(48, 8),
        "dtype of the activations": table.to(dtype),
        "gathered, one for all": table[None, 3:8],
        "gathered, per sequence": table[torch.tensor([[0, 9, 3, 3, 47], [5, 4, 3, 2, 1]])],
        "gathered, dtype of the activations": table.repeat(1, 2).to(dtype)[None, :5, 8:].expand(2, 5, 8),
    }


@every(dtype=FLOATS, interleaved=BOTH)
def test_tables_of_every_form(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    x, sines = randn(2, 5, 3, 40, dtype=dtype), forms(SIN, dtype)
    for name, cos in forms(COS, dtype).items():
        y = rotate(x, cos, sines[name], interleaved=interleaved)
        by_heads = apply_rotary(x.transpose(1, 2), cos, sines[name], interleaved=interleaved, layout="bhsd")
        assert same_bits(by_heads.transpose(1, 2), y), name


@every(shape=[(0, 5, 3, 32), (2, 0, 3, 32), (2, 5, 0, 32), (0, 3, 32), (5, 0, 32), (2, 5, 3, 0)], by_ids=BOTH)
def test_empty_parts(backend: str, shape: tuple[int, ...], by_ids: bool) -> None:
    x, tables = randn(*shape), (COS[:, :0], SIN[:, :0]) if shape[-1] == 0 else (COS, SIN)
    where = {"cu_seqlens": torch.tensor([0, shape[0]])} if len(shape) == 3 else {}
    where |= {"position_ids": torch.zeros(shape[:-2], dtype=I64)} if by_ids else {}
    for y in (apply_rotary(x, *tables, **where), *apply_rotary_qk(x, x, *tables, **where)):
        assert same_bits(y, x)
    assert apply_rotary(x, *tables, **where, inplace=True) is x


@every(dtype=FLOATS, interleaved=BOTH)
def test_zeros_of_either_sign_infinities_and_nan(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    specials = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 2, 1.0, 0.0])
    x = randn(2, 40, 3, 40)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = torch.inf
    x[1, ::3, 1, 5], x[0, :, 0, 2] = torch.nan, -0.0
    x[..., 16:] = specials[torch.arange(24) % 7]  # these pass through: check() compares their bits
    rotate(x.to(dtype), interleaved=interleaved)


@every(dtype=FLOATS[1:], interleaved=BOTH, rotary_dim=[4, 8, 64])
def test_every_bit_pattern_is_read_and_rounded_to_nearest_even(
    backend: str, dtype: torch.dtype, interleaved: bool, rotary_dim: int
) -> None:
    patterns, half = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype), rotary_dim // 2
    patterns = patterns[patterns.isfinite()].view(1, 1, -1, half)
    x = torch.stack((patterns, torch.zeros_like(patterns)), dim=4 if interleaved else 3).flatten(3)
    for factor in (1.0, 1 + 2.0**-8, 1 + 2.0**-11, 0.7, 2.0**-9):  # the second and third give ties
        y = apply_rotary(x, torch.full((1, half), factor), torch.zeros(1, half), interleaved=interleaved)
        expected = (x.float() * factor).to(dtype)
        tiny = 0.0 if dtype == torch.float16 else torch.finfo(dtype).tiny  # smaller ones: see the next test
        assert torch.equal(y.masked_fill(y.abs() <= tiny, 0.0), expected.masked_fill(expected.abs() <= tiny, 0.0))


@every(dtype=FLOATS)
def test_subnormal_numbers_survive(backend: str, dtype: torch.dtype) -> None:
    rotate((randn(2, 5, 3, 64) * torch.finfo(dtype).tiny / 8).to(dtype), *rotary_tables(64, 5))


@every(far=[0, 1, 2])
def test_offsets_of_64_bits(backend: str, far: int) -> None:
    strides = [800, 160, 32, 1]
    strides[far] = 2**31 + 32  # in memory of which only what is touched exists
    pages = mmap.mmap(-1, 2 * (2**32 + 8192), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    x, cache = (
        torch.frombuffer(pages, dtype=torch.bfloat16).as_strided((3, 3, 3, 32), strides, at) for at in (0, 4096)
    )
    x.copy_(randn(3, 3, 3, 32))
    expected = rotate(x.contiguous())
    assert same_bits(apply_rotary(x, COS, SIN), expected)
    assert same_bits(apply_rotary_qk(x, x, COS, SIN)[1], expected)
    other, used = torch.empty(3, 3, 3, 32, dtype=x.dtype), torch.zeros(3, dtype=I32)
    apply_rotary_kv_append(x, x, x, COS, SIN, cache, other, used)
    assert same_bits(cache, expected)
    apply_rotary_kv_append(x, x, x, COS, SIN, other, cache, used)
    assert same_bits(cache, x)
    apply_rotary(x, COS, SIN, inplace=True)
    assert same_bits(x, expected)


def test_one_thread_or_two_give_the_same_bits(backend: str) -> None:
    x, tables, threads, results = randn(3, 67, 12, 64), rotary_tables(20, 201), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            flat = apply_rotary(x.view(201, 12, 64), *tables, cu_seqlens=torch.tensor([0, 40, 40, 150, 190]))
            results.append((apply_rotary(x, *tables), flat))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    check(results[1][0], x, *tables)


# tokens, the dtype of cache_seqlens, position_ids
APPENDS = ((4, I32, None), (1, I64, None), (4, I64, ids(3, 4)), (4, I32, ids(4)), (0, I32, None))


@every(dtype=FLOATS, interleaved=BOTH, layout=LAYOUTS)
def test_kv_append(backend: str, dtype: torch.dtype, interleaved: bool, layout: Any) -> None:
    def lay(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if layout == "bhsd" else x

    for seqlen, index, position_ids in APPENDS:
        used = torch.tensor([[0, 12 - seqlen, 3], [9, 9, 9]]).to(index).T[:, 0]
        where = used[:, None] + torch.arange(seqlen) if position_ids is None else position_ids
        q, (k, v) = randn(3, seqlen, 5, 40, dtype=dtype), randn(3, seqlen, 2, 80, dtype=dtype).chunk(2, -1)
        room = torch.full((2, 3, 13, 2, 50), torch.nan).to(dtype)
        expected = room.clone()
        k_turned = apply_rotary(k, COS, SIN, position_ids=where, interleaved=interleaved) if seqlen else k
        for b, start in enumerate(used.tolist()):
            for n, new in enumerate((k_turned, v)):
                expected[n, b, start : start + seqlen, :, 5:45] = new[b]
        read = [(x, memory(x)) for x in (q, k, used)]
        tensors = (*map(lay, (q, k, v)), COS, SIN, *(lay(part[:, :12, :, 5:45]) for part in room), used)
        y = apply_rotary_kv_append(*tensors, interleaved=interleaved, position_ids=position_ids, layout=layout)
        assert y.is_contiguous() and torch.equal(memory(room), memory(expected))
        assert all(torch.equal(memory(x), old) for x, old in read)
        if seqlen:
            check(lay(y), q, COS, SIN, interleaved, position_ids=where)
