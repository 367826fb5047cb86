"""The forward of the causal softmax: every backend and CPU instruction set against the float64 oracle."""

import functools
import itertools
import math
import mmap
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from softmax_checks import (
    FLOATS,
    SCALE,
    SHAPE,
    chance,
    every,
    expect,
    memory,
    randn,
    same_bits,
    scores_of,
    softmax,
    yardstick,
)
from torch import Tensor

from neox_kernels import causal_softmax, reference
from neox_kernels.testing import assert_within_budget

INF = torch.inf


# batch, nheads, q_len, k_len; the large ones with fewer heads than a model has, since heads are all alike
SHAPES = [(batch, heads, 1, 512) for batch in (1, 8) for heads in (12, 16)]
SHAPES += [(1, 12, 128, 128), (1, 16, 128, 128), (4, 1, 512, 512), (1, 1, 2048, 2048)]
SHAPES += [(4, 12, *lengths) for lengths in itertools.product((1, 31, 33), repeat=2)]
SHAPES += [(1, 2, 2, 2049), (2, 1, 40, 1000), (1, 1, 1000, 33), (1, 1, 1000, 1000), (1, 1, 2049, 2)]
SHAPES += [(1, 2, 1, 131072), (1, 1, 2, 131072)]


@functools.cache
def case(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Scores, and what eager code and the oracle make of them: once for all backends."""
    scores = scores_of(*shape, dtype=dtype)
    return scores, expect(scores, scale=SCALE, causal=causal)


@every(dtype=FLOATS, shape=SHAPES)
def test_every_shape(every_isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if shape[2:] == (2048, 2048) and dtype != torch.bfloat16:
        pytest.skip("a second's work, done in one dtype")
    small = math.prod(shape) <= 2**18
    for causal in (True, False) if small else (True,):
        scores, expected = case(shape, dtype, causal)
        y = softmax(scores, expected, scale=SCALE, causal=causal)
        assert not small or causal_softmax(scores.clone(), scale=SCALE, causal=causal, inplace=True).equal(y)


@every(dtype=FLOATS, shape=[(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)])
def test_lengths_of_zero(every_isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, nheads, q_len, k_len = shape
    masks = {
        "key_padding_mask": torch.ones(batch, k_len, dtype=torch.bool),
        "attn_mask": randn(batch, 1, q_len, k_len),
        "head_mask": randn(nheads),
        "rng": torch.tensor([1, 2]),
        "dropout_p": 0.5,
    }
    for options in ({}, {"causal": False}, masks):
        x = randn(*shape, dtype=dtype)
        assert same_bits(causal_softmax(x, **options), x)
        assert causal_softmax(x, **options, inplace=True) is x


def by_hand(scores: Tensor, scale: float, causal: bool, padding: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
    """The contract's words in plain loops over lists of floats: not the reference's way."""
    batch, nheads, q_len, k_len = scores.shape
    probs = torch.zeros(scores.shape, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(nheads), range(q_len)):
        keys = [j for j in range(k_len) if padding[b, j] and (not causal or j <= i + k_len - q_len)]
        logits = {j: scale * float(scores[b, h, i, j]) + float(mask[b, h, i, j]) for j in keys}
        largest = max(logits.values(), default=-INF)
        if largest > -INF:
            powers = {j: math.exp(logit - largest) for j, logit in logits.items()}
            for j, power in powers.items():
                probs[b, h, i, j] = power / math.fsum(powers.values()) * float(heads[h])
    return probs


@every(causal=[True, False], lengths=[(5, 5), (1, 7), (4, 9), (9, 4)])
def test_the_oracle_is_what_plain_loops_give(lengths: tuple[int, int], causal: bool) -> None:
    shape = (2, 3, *lengths)
    scores, mask, heads = randn(*shape).double(), randn(*shape, seed=1).double(), randn(3, seed=2).double()
    mask[chance(*shape, p=0.3)], mask[0, 1, 0] = -INF, -INF
    padding = chance(2, shape[3], p=0.7)
    options = {"scale": -0.7, "causal": causal, "key_padding_mask": padding, "attn_mask": mask, "head_mask": heads}
    oracle, expected = reference.causal_softmax(scores, **options), by_hand(scores, -0.7, causal, padding, mask, heads)
    assert_within_budget(oracle, yardstick(scores, expected, **options), expected, "the oracle")
    assert (oracle == 0).all(-1).any(), "no dead row was tried"


B, H, Q, K = SHAPE


def keys(*kept: Iterable[int]) -> Tensor:
    """(batch, K): the keys that each sequence keeps."""
    return torch.tensor([[j in sequence for j in range(K)] for sequence in map(set, kept)])


PADDINGS: dict[str, Tensor] = {
    "none": torch.ones(B, K, dtype=torch.bool),
    "right": keys(range(67), range(50), range(1)),
    "left": keys(range(67), range(13, 67), range(66, 67)),
    "both": keys(range(1, 66), range(17, 18), range(33, 49)),
    "holes": chance(B, K),
    "a single hole": ~keys([0], [32], [66]),
    "all of one sequence": keys(range(67), [], range(67)),
    "all": torch.zeros(B, K, dtype=torch.bool),
    "step 2": chance(B, 2 * K)[:, ::2],
    "transposed": chance(K, B).T,
    "one for all": chance(1, K).expand(B, K),
    "one key for all": torch.tensor([[True], [False], [True]]).expand(B, K),
    "a slice": chance(B + 1, K + 9)[1:, 5:-4],
}


@every(dtype=FLOATS, causal=[True, False])
def test_key_padding(every_isa: str, dtype: torch.dtype, causal: bool) -> None:
    scores = scores_of(*SHAPE, dtype=dtype)
    for padding in PADDINGS.values():
        y = softmax(scores, scale=SCALE, causal=causal, key_padding_mask=padding)
        assert not y[~padding[:, None, None].expand_as(y)].any()


def attn_masks(make: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Every way to broadcast to SHAPE and to lie in memory."""
    whole = {f"{shape}": make(*shape) for shape in itertools.product((1, B), (1, H), (1, Q), (1, K))}
    short = {f"{shape}": make(*shape) for shape in ((), (1,), (K,), (1, K), (Q, 1), (Q, K), (H, Q, K), (H, 1, 1))}
    strided = {
        "transposed": make(K, Q).T,
        "heads first": make(H, B, Q, K).transpose(0, 1),
        "batch last": make(H, Q, K, B).permute(3, 0, 1, 2),
        "step 2": make(B, H, Q, 2 * K)[..., 1::2],
        "every second query": make(B, 1, 2 * Q, K)[:, :, ::2],
        "step 2 of keys alone": make(2 * K)[::2],
        "expanded": make(B, 1, 1, K).expand(SHAPE),
        "expanded keys": make(B, H, Q, 1).expand(SHAPE),
        "one number": make(1).expand(SHAPE),
        "a slice of a longer one": make(1, 1, 2 * Q, 2 * K)[:, :, 5 : 5 + Q, 7 : 7 + K],
    }
    return {**whole, **short, **strided}


def some_hidden(*shape: int) -> Tensor:
    return randn(*shape).masked_fill(chance(*shape, p=0.2), -INF)


MASKS = {"bool": lambda *shape: chance(*shape, p=0.7), "additive": randn, "with -inf": some_hidden}


@every(mask_dtype=FLOATS, kind=["additive", "with -inf"])
def test_additive_masks(every_isa: str, kind: str, mask_dtype: torch.dtype) -> None:
    for n, mask in enumerate(attn_masks(lambda *shape: MASKS[kind](*shape).to(mask_dtype)).values()):
        scores = scores_of(*SHAPE, dtype=FLOATS[n % 3])
        softmax(scores, scale=SCALE, attn_mask=mask, causal=n % 4 > 0)


@every(dtype=FLOATS, causal=[True, False])
def test_bool_masks(every_isa: str, dtype: torch.dtype, causal: bool) -> None:
    scores = scores_of(*SHAPE, dtype=dtype)
    for mask in attn_masks(MASKS["bool"]).values():
        y = softmax(scores, scale=SCALE, attn_mask=mask, causal=causal)
        assert not y[~mask.expand_as(y)].any()


HEAD_MASKS = {
    "(nheads,)": lambda: randn(H),
    "zeros": lambda: torch.tensor([0.0, 1.0]),
    "all zeros": lambda: torch.zeros(H),
    "step 2": lambda: randn(2 * H)[::2],
    "expanded": lambda: randn(1).expand(H),
    "(1,)": lambda: randn(1),
    "one number": lambda: torch.tensor(0.3),
    "(nheads, 1, 1)": lambda: randn(H, 1, 1),
    "(1, nheads, 1, 1)": lambda: randn(1, H, 1, 1),
    "(batch, 1, 1, 1)": lambda: randn(B, 1, 1, 1),
    "(batch, nheads, 1, 1)": lambda: randn(B, H, 1, 1),
    "transposed": lambda: randn(H, B).T[:, :, None, None],
    "a slice of the layers'": lambda: randn(5, B, H, 1, 1)[3],
}


@every(dtype=FLOATS, mask_dtype=FLOATS)
def test_head_masks(every_isa: str, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    scores = scores_of(*SHAPE, dtype=dtype)
    for head_mask in HEAD_MASKS.values():
        softmax(scores, scale=SCALE, head_mask=head_mask().to(mask_dtype))


@every(dtype=FLOATS, lengths=[(19, 67), (67, 19), (1, 67)], kind=MASKS)
def test_all_masks_together(every_isa: str, kind: str, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    heads = H if lengths[0] > 1 else 40  # the largest error of few numbers is a matter of luck
    scores = scores_of(B, heads, *lengths, dtype=dtype)
    for name, padding in PADDINGS.items():
        options = {
            "attn_mask": MASKS[kind](1, heads, *lengths),
            "key_padding_mask": padding[:, : lengths[1]],
            "head_mask": randn(heads),
        }
        y = softmax(scores, scale=SCALE, **options)
        view = scores.clone()
        assert causal_softmax(view, scale=SCALE, **options, inplace=True).equal(y), name


def views(dtype: torch.dtype) -> dict[str, Tensor]:
    """Scores of (3, 2, 19, 67) that lie differently in memory."""
    return {
        "contiguous": scores_of(*SHAPE, dtype=dtype),
        "heads first": scores_of(H, B, Q, K, dtype=dtype).transpose(0, 1),
        "queries before heads": scores_of(B, Q, H, K, dtype=dtype).transpose(1, 2),
        "slice with an odd offset": scores_of(B, H, Q + 2, K + 9, dtype=dtype)[:, :, 1:-1, 3:-6],
        "every second query": scores_of(B, H, 2 * Q, K, dtype=dtype)[:, :, 1::2],
        "expanded heads": scores_of(B, 1, Q, K, dtype=dtype).expand(SHAPE),
        "expanded queries": scores_of(B, H, 1, K, dtype=dtype).expand(SHAPE),
        "last dim of stride 0": scores_of(B, H, Q, 1, dtype=dtype).expand(SHAPE),
        "last dim of stride 2": scores_of(B, H, Q, 2 * K, dtype=dtype)[..., 1::2],
        "last dim transposed": scores_of(B, H, K, Q, dtype=dtype).transpose(2, 3),
    }


@every(dtype=FLOATS)
def test_views_are_read_and_written_as_they_lie(every_isa: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"key_padding_mask": PADDINGS["both"], "head_mask": randn(H)}
    for (name, x), rest in itertools.product(views(dtype).items(), ({}, options)):
        expected = softmax(x, scale=SCALE, **rest)
        if "expanded" in name or "last dim" in name:
            continue  # not written: see test_softmax_errors
        after = torch.empty(0, dtype=dtype).set_(x.untyped_storage()).clone()
        after.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(expected)
        kept = x.untyped_storage().clone()
        assert causal_softmax(x, scale=SCALE, inplace=True, **rest) is x
        assert torch.equal(memory(x), after.view(torch.uint8)), f"in place, {name}"
        x.untyped_storage().copy_(kept)


@every(dtype=(*FLOATS, torch.float64), result=[*FLOATS, None])
def test_dtype_of_the_result(every_isa: str, dtype: torch.dtype, result: torch.dtype | None) -> None:
    if dtype == torch.float64 and every_isa != "reference":
        pytest.skip("float64 is the reference's alone")
    scores, options = scores_of(2, 3, 33, 70).to(dtype), {"scale": SCALE, "head_mask": randn(3)}
    softmax(scores, dtype=result, **options)
    whole = causal_softmax(scores, dtype=torch.float32, **options)
    assert (
        torch.equal(causal_softmax(scores, dtype=result, **options), whole.to(result or dtype))
        or dtype == torch.float64
    )


@every(far=[0, 1, 2])
def test_offsets_of_64_bits(every_isa: str, far: int) -> None:
    strides = [4096, 1024, 128, 1]
    strides[far] = 2**31 + 64  # in memory of which only what is touched exists
    pages = mmap.mmap(-1, 2 * (2**31 + 2**15), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    x = torch.frombuffer(pages, dtype=torch.bfloat16).as_strided((2, 2, 2, 67), strides)
    scores, mask = scores_of(2, 2, 2, 67, dtype=x.dtype), randn(2, 2, 2, 67, dtype=x.dtype, seed=1)
    x.copy_(scores)
    expected = softmax(scores)
    assert same_bits(causal_softmax(x), expected)
    causal_softmax(x, inplace=True)
    assert same_bits(x, expected)
    assert same_bits(causal_softmax(scores, attn_mask=x.copy_(mask)), softmax(scores, attn_mask=mask))


def test_masks_within_what_is_written_are_read_first(every_isa: str) -> None:
    x = scores_of(2, 3, 33, 40)
    options = {"attn_mask": x[:1, 1:2], "head_mask": x[0, :, 0, 0]}
    expected = causal_softmax(x.clone(), **{name: mask.clone() for name, mask in options.items()})
    assert same_bits(causal_softmax(x, **options, inplace=True), expected)


def test_one_thread_or_two_give_the_same_bits(every_isa: str) -> None:
    if every_isa == "reference":
        pytest.skip("it is PyTorch's own")
    x, padding, threads, results = scores_of(2, 3, 65, 200), chance(2, 200), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append((causal_softmax(x), causal_softmax(x, key_padding_mask=padding)))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
