"""Run by test_triton_interpreter.py under TRITON_INTERPRET=1: the Triton rotary against the oracle, on CPU tensors.

Only float32 and float16: the interpreter's bfloat16 truncates. Every output buffer is NaN before it is written.
"""

import itertools
import sys

import torch
from torch import Tensor

from neox_kernels import kernels, reference
from neox_kernels.kernels import rotary, rotary_autograd
from neox_kernels.testing import assert_within_budget, to_float64

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN

DIMS = [(8, 32), (16, 64), (20, 80), (24, 96), (32, 128), (64, 256), (128, 128), (6, 9), (0, 32)]
POSITIONS = [
    "default", "offset", "offsets", "ids", "ids_row", "ids_rows", "gathered", "gathered_rows",
    "cu_seqlens", "cu_seqlens_offsets", "cu_seqlens_ids", "total_ids",
]  # fmt: skip
VIEWS = ["contiguous", "packed", "bhsd", "stride2", "expanded"]
MAX_POSITION = 50


def make_positions(kind: str, batch: int, seqlen: int) -> dict[str, object]:
    if kind == "offset":
        return {"seqlen_offsets": 7}
    if kind == "offsets":
        return {"seqlen_offsets": torch.randint(0, 40, (batch,), dtype=torch.int32)}
    if kind in ("ids", "total_ids"):
        return {"position_ids": torch.randint(0, MAX_POSITION, (seqlen,))}
    if kind == "ids_row":
        return {"position_ids": torch.randint(0, MAX_POSITION, (1, seqlen), dtype=torch.int32)}
    if kind == "ids_rows":
        return {"position_ids": torch.randint(0, MAX_POSITION, (batch, 2 * seqlen))[:, ::2]}
    if kind.startswith("cu_seqlens"):
        # Two empty sequences, and two tokens of padding behind the last one.
        cu_seqlens = torch.tensor([0, 0, 3, 3, seqlen - 2], dtype=torch.int32 if kind == "cu_seqlens" else torch.int64)
        if kind == "cu_seqlens_offsets":
            return {"cu_seqlens": cu_seqlens, "seqlen_offsets": torch.tensor([1, 2, 3, 30])}
        ids = torch.randint(0, MAX_POSITION, (seqlen,))
        return {"cu_seqlens": cu_seqlens, **({"position_ids": ids} if kind == "cu_seqlens_ids" else {})}
    return {}


def make_heads(view: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of ``shape`` (..., seqlen, nheads, head_dim), or its heads before its tokens for bhsd."""
    if view == "packed":
        return torch.randn(*shape[:-1], 3 * shape[-1]).to(dtype)[..., shape[-1] : 2 * shape[-1]]
    if view == "bhsd":
        return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype)
    if view == "stride2":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    if view == "expanded":
        return torch.randn(*shape[:-2], 1, shape[-1]).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


def check_qk(dtype: torch.dtype, dims: tuple[int, int], interleaved: bool, kind: str, view: str) -> None:
    rotary_dim, head_dim = dims
    # Heads one by one, or in blocks of which the last is not full.
    nheads_q, nheads_k = (15, 8) if head_dim in (64, 96) else (3, 1)
    batch, seqlen = 2, 7
    flat = kind.startswith(("cu_seqlens", "total"))
    if flat and view == "bhsd":
        view = "packed"
    tokens = (seqlen,) if flat else (batch, seqlen)
    table_dtype = dtype if kind in ("ids", "gathered") else torch.float32
    rows = {"gathered": (1, seqlen), "gathered_rows": (batch, seqlen)}.get(kind, (MAX_POSITION,))
    angles = torch.rand(*rows, rotary_dim // 2) * 100
    cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
    options = {**make_positions(kind, batch, seqlen), "interleaved": interleaved}
    options["layout"] = "bhsd" if view == "bhsd" else "bshd"
    heads = [make_heads(view, (*tokens, nheads, head_dim), dtype).requires_grad_() for nheads in (nheads_q, nheads_k)]
    if view == "expanded":
        grads = [torch.randn(x.shape[:-1]).to(dtype)[..., None].expand(x.shape) for x in heads]
    else:
        grads = [torch.randn(*x.shape[:-1], 2 * head_dim).to(dtype)[..., ::2] for x in heads]

    def run(apply: object, convert: object) -> list[Tensor]:
        inputs = [convert(x.detach()).requires_grad_() for x in heads]
        outputs = apply(*inputs, convert(cos), convert(sin), **options)
        return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, inputs, [convert(g) for g in grads]))]

    oracle = run(reference.apply_rotary_qk, to_float64)
    same = run(reference.apply_rotary_qk, lambda x: x)
    before = [x.detach().clone() for x in heads]
    for actual, expected, exact in zip(run(kernels.apply_rotary_qk, lambda x: x), same, oracle, strict=True):
        assert actual.is_contiguous()
        assert_within_budget(actual, expected, exact)
    assert all(torch.equal(x, y) for x, y in zip(heads, before, strict=True)), "an input was changed"
    if view in ("stride2", "expanded"):
        return

    # In place, without and with a gradient; the features beside a slice stay as they are.
    with torch.no_grad():
        q, k = (x.detach().clone(memory_format=torch.preserve_format) for x in heads)
        version = q._version
        assert kernels.apply_rotary_qk(q, k, cos, sin, inplace=True, **options)[0] is q
        assert q._version > version
        assert_within_budget(q, same[0], oracle[0])
        assert_within_budget(k, same[1], oracle[1])
        if view == "packed":
            base = torch.randn(*heads[0].shape[:-1], 3 * head_dim).to(dtype)
            packed, untouched = base[..., head_dim : 2 * head_dim], base.clone()
            packed.copy_(heads[0])
            kernels.apply_rotary(packed, cos, sin, inplace=True, **options)
            assert_within_budget(packed, same[0], oracle[0])
            packed.copy_(untouched[..., head_dim : 2 * head_dim])
            assert torch.equal(base, untouched), "features beside the slice were changed"
    inputs = [x.detach().requires_grad_() for x in heads]
    outputs = kernels.apply_rotary_qk(*(x.clone() for x in inputs), cos, sin, inplace=True, **options)
    actual = (*outputs, *torch.autograd.grad(outputs, inputs, grads))
    for x, expected, exact in zip(actual, same, oracle, strict=True):
        assert_within_budget(x.detach(), expected, exact)


def check_one_program(dtype: torch.dtype) -> None:
    """All heads by one program per block of tokens: the loop over heads, and a last block that is not full."""
    q, out = torch.randn(2, 3, 21, 64).to(dtype), torch.full((2, 3, 21, 64), torch.nan).to(dtype)
    angles = torch.rand(3, 32)
    table = (angles.cos(), angles.sin(), None, None, 0, None, False, False, False)
    grid, args, constants = rotary.plan_launch((q,), (out,), table)
    assert grid[1] > 1
    rotary._rotary_kernel[(grid[0], 1)](**args, **constants)
    same = reference.apply_rotary(q, *table[:2])
    assert_within_budget(out, same, reference.apply_rotary(*to_float64((q, *table[:2]))))


def check_out_of_range(dtype: torch.dtype, interleaved: bool) -> None:
    x, cos, sin = torch.randn(1, 4, 3, 16).to(dtype), torch.ones(6, 4), torch.zeros(6, 4)
    ids = torch.tensor([5, -1, 6, 2**40])
    y = kernels.apply_rotary(x, cos, sin, position_ids=ids, interleaved=interleaved)
    assert torch.equal(y[:, 0], x[:, 0]) and torch.equal(y[..., 8:], x[..., 8:])
    assert y[:, 1:, :, :8].isnan().all()


def check_kv_append(dtype: torch.dtype, interleaved: bool, layout: str, ids: bool) -> None:
    batch, seqlen, cache_length, rotary_dim, head_dim = 4, 3, 10, 24, 96
    q, k, v = (
        make_heads("bhsd" if layout == "bhsd" else "packed", (batch, seqlen, nheads, head_dim), dtype)
        for nheads in (15, 8, 8)
    )
    angles = torch.rand(MAX_POSITION, rotary_dim // 2) * 100
    cos, sin = angles.cos(), angles.sin()
    # The first two fit, the third has room for two rows, the fourth begins before the cache and has room for one.
    used = torch.tensor([0, 7, 8, -2], dtype=torch.int32)
    positions = torch.randint(0, MAX_POSITION, (batch, seqlen)) if ids else None
    shape = (batch, 8, cache_length, head_dim) if layout == "bhsd" else (batch, cache_length, 8, head_dim)
    k_cache, v_cache = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    k_before, v_before = k_cache.clone(), v_cache.clone()
    options = {"interleaved": interleaved, "layout": layout}
    q_out = kernels.apply_rotary_kv_append(q, k, v, cos, sin, k_cache, v_cache, used, position_ids=positions, **options)

    tokens = positions if ids else (used[:, None] + torch.arange(seqlen))
    outside = tokens < 0
    options["position_ids"] = tokens.clamp(min=0).long()
    same = reference.apply_rotary_qk(q, k, cos, sin, **options)
    exact = reference.apply_rotary_qk(*to_float64((q, k, cos, sin)), **options)
    if layout == "bhsd":
        q_out, k_cache, v_cache, k_before, v_before, v = (
            x.transpose(1, 2) for x in (q_out, k_cache, v_cache, k_before, v_before, v)
        )
        same, exact = ([x.transpose(1, 2) for x in pair] for pair in (same, exact))
    assert q_out[outside][..., :rotary_dim].isnan().all()
    assert_within_budget(q_out[~outside], same[0][~outside], exact[0][~outside])
    written = torch.zeros(batch, cache_length, dtype=torch.bool)
    for b, s in itertools.product(range(batch), range(seqlen)):
        row = int(used[b]) + s
        if 0 <= row < cache_length:
            written[b, row] = True
            assert_within_budget(k_cache[b, row], same[1][b, s], exact[1][b, s])
            assert torch.equal(v_cache[b, row], v[b, s])
    assert torch.equal(k_cache[~written], k_before[~written]) and torch.equal(v_cache[~written], v_before[~written])


def main() -> None:
    torch.manual_seed(0)
    cases = 0
    for dtype, interleaved in itertools.product((torch.float32, torch.float16), (False, True)):
        # Everything with everything would take minutes. Every dimension meets two thirds of the kinds of positions, by
        # one dtype and pairing and in one view each; every dtype and pairing meets every dimension, kind and view.
        turn = 2 * (dtype == torch.float16) + interleaved
        for (i, dims), (j, kind) in itertools.product(enumerate(DIMS), enumerate(POSITIONS)):
            if (i + j) % 6 == turn:
                view = VIEWS[(i + j // 6 + turn) % len(VIEWS)]
                try:
                    check_qk(dtype, dims, interleaved, kind, view)
                except Exception:
                    print("failed:", dtype, dims, "interleaved" if interleaved else "half", kind, view, file=sys.stderr)
                    raise
                cases += 1
        check_out_of_range(dtype, interleaved)
        for layout, ids in itertools.product(("bshd", "bhsd"), (False, True)):
            check_kv_append(dtype, interleaved, layout, ids)
        check_one_program(dtype)
    empty = torch.empty(2, 0, 3, 8)
    assert kernels.apply_rotary(empty, torch.ones(4, 4), torch.ones(4, 4)).shape == empty.shape
    assert rotary_autograd.apply_rotary is kernels.apply_rotary
    print(f"{cases} cases")


if __name__ == "__main__":
    main()
