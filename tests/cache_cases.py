"""Running a model in chunks with a cache, and what a cache holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from model_cases import batch
from torch import Tensor

from neox_kernels.models import KVCache


def in_chunks(model: Any, inputs: dict[str, Tensor], sizes: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
    """Logits of all tokens, given a few at a time, as generation gives them; and the cache."""
    logits, start = [], 0
    for size in sizes:
        now = {name: x[:, start : start + size] for name, x in inputs.items() if name != "attention_mask"}
        if "attention_mask" in inputs:
            now["attention_mask"] = inputs["attention_mask"][:, : start + size]
        output = model(**now, past_key_values=cache, use_cache=True)
        logits.append(output.logits)
        cache, start = output.past_key_values, start + size
    return torch.cat(logits, dim=1), cache


def positioned(padding: str, seed: int = 1) -> dict[str, Tensor]:
    """With positions counted from each row's first real token, as generation has them."""
    inputs = batch(padding, seed)
    if padding != "none":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def contents(cache: KVCache) -> tuple[Any, ...]:
    """All that a cache is, copied."""
    pairs = [(k.detach().clone(), v.detach().clone()) for k, v in cache.to_tuple()]
    return cache.length, cache.num_layers, cache.batch, cache.max_length, pairs


def assert_same(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert a[:-1] == b[:-1]
    for x, y in zip(itertools.chain(*a[-1]), itertools.chain(*b[-1]), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def filled(ours: Any, tokens: Tensor, max_length: int | None = None) -> KVCache:
    cache = KVCache(max_length)
    ours(tokens, past_key_values=cache)
    return cache


def gradients(ours: Any, tokens: Tensor, sizes: Sequence[int], max_length: int | None) -> dict[str, Tensor]:
    ours.zero_grad()
    logits = in_chunks(ours, {"input_ids": tokens}, sizes, KVCache(max_length))[0]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: x.grad.clone() for name, x in ours.named_parameters()}
