"""Whole models on a GPU: ours and swapped ones against transformers', forward, gradients and cache."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from cache_cases import in_chunks, positioned
from model_cases import FAMILIES, Errors, batch, in_float64, pair
from test_models import SEEDS, add, gradients, inputs_of
from to_device import move
from transformers import DynamicCache

import neox_kernels
from neox_kernels.models import KVCache

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("eager", "fused", "sdpa", "flash_attention_2", "auto")


def pair_on_gpu(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    theirs, ours = pair(family, dtype=dtype)
    return theirs.cuda(), ours.cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward(family: str, dtype: torch.dtype) -> None:
    theirs, ours = pair_on_gpu(family, dtype)
    exact, errors = in_float64(theirs), Errors()
    swapped = copy.deepcopy(theirs)
    assert len(neox_kernels.swap(swapped).replaced) == 2
    for kind, seed in itertools.product(("none", "left", "right", "both"), SEEDS):
        inputs = move(inputs_of("ForCausalLM", kind, seed))
        same, truth = theirs(**inputs), exact(**inputs)
        add(errors, swapped(**inputs), same, truth, inputs, "swapped ")
        for ours.attn_implementation in IMPLEMENTATIONS:
            add(errors, ours(**inputs), same, truth, inputs, f"{ours.attn_implementation} ")
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient(family: str, dtype: torch.dtype) -> None:
    # In float32 auto is torch's sdpa, whose gradient of GPT-J's keys has up to twice the budget's error.
    implementations = ("fused",) if (family, dtype) == ("GPTJ", torch.float32) else ("fused", "auto")
    theirs, ours = pair_on_gpu(family, dtype)
    exact, errors = in_float64(theirs), Errors()
    swapped = copy.deepcopy(theirs)
    neox_kernels.swap(swapped)
    for kind, seed in itertools.product(("none", "left", "right"), SEEDS):
        inputs = move(inputs_of("ForCausalLM", kind, seed))
        same, truth = gradients(theirs, inputs), gradients(exact, inputs)
        found = {"swapped": gradients(swapped, inputs)}
        for ours.attn_implementation in implementations:
            found[ours.attn_implementation] = gradients(ours, inputs)
        for what, got in found.items():
            assert got.keys() == truth.keys()
            for name, gradient in got.items():
                errors.add(f"{what} {name}", gradient, same[name], truth[name])
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_and_then_tokens(family: str, dtype: torch.dtype) -> None:
    theirs, ours = pair_on_gpu(family, dtype)
    exact, errors = in_float64(theirs), Errors()
    for kind, seed in itertools.product(("none", "left"), range(3)):
        inputs = move(positioned(kind, seed))
        seen = inputs.get("attention_mask", torch.ones(3, 13)).bool()
        truth = exact(**inputs).logits[seen]
        for sizes in ((9, 1, 1, 1, 1), (6, 7)):
            same = in_chunks(theirs, inputs, sizes, DynamicCache())[0][seen]
            for ours.attn_implementation in IMPLEMENTATIONS:
                for cache in (KVCache(), KVCache(13)):
                    got = in_chunks(ours, inputs, sizes, cache)[0][seen]
                    errors.add(f"{ours.attn_implementation}", got.to(dtype), same.to(dtype), truth)
    errors.check()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compiled(family: str) -> None:
    """By inductor: the numbers of the model that is not compiled."""
    _, ours = pair_on_gpu(family, torch.float32)
    inputs = move(batch("left"))
    expected = ours(**inputs).logits
    torch._dynamo.reset()
    actual = torch.compile(ours)(**inputs).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
