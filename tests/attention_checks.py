"""What the tests of attention share: inputs, and the check of an implementation against the float64 oracle."""

from typing import Any

import torch
from softmax_checks import memory
from to_device import move
from torch import Tensor

from neox_kernels import attention
from neox_kernels.testing import assert_within_budget, max_error, to_float64

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# q_len and k_len: a square, a token behind a cache, a chunk behind a cache, more queries than keys, and nothing.
LENGTHS = ((33, 33), (1, 40), (12, 40), (40, 24), (1, 1), (5, 0), (0, 5), (0, 0))
NHEADS, HEAD_DIM = 3, 16
SEED = 11  # of incoming gradients
QKV = ("gradient of q", "gradient of k", "gradient of v")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    q_len: int, k_len: int, dtype: torch.dtype = torch.float32, *, batch: int = 3, head_dim: int = HEAD_DIM
) -> tuple[Tensor, Tensor, Tensor]:
    """q as the last tokens of a packed projection, k and v as the filled part of a cache."""
    packed = randn(batch, max(q_len, 1), NHEADS, 3 * head_dim, dtype=dtype)
    cache = randn(2, batch, k_len + 5, NHEADS, head_dim, dtype=dtype, seed=1)
    # Beyond what is filled a cache holds anything.
    cache[:, :, k_len:] = torch.nan
    return packed[:, :q_len, :, :head_dim] * 2, cache[0, :, :k_len], cache[1, :, :k_len]


def padding(kind: str, k_len: int) -> Tensor:
    """(3, k_len), bool."""
    mask = torch.ones(3, k_len, dtype=torch.bool)
    if kind in ("left", "mixed", "dead"):
        mask[0, : k_len // 2] = False
    if kind in ("right", "mixed"):
        mask[1, k_len - k_len // 3 :] = False
    if kind == "holes":
        mask[0, 1::3] = False
    if kind == "dead":
        mask[2] = False
    return mask


def backward(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The result, the probabilities if asked for, and the gradient of every floating input; none of them changed."""
    given = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    # A clone has other strides: q, k and v stay the views that they were.
    given.update({name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v")})
    before = {name: memory(x.detach()) for name, x in given.items()}
    out, probs = attention(**given, **options)
    results = {"result": out} if probs is None else {"result": out, "probabilities": probs}
    leaves = {name: x for name, x in given.items() if x.requires_grad}
    seeds = [randn(*x.shape, seed=SEED + i).to(x) for i, x in enumerate(results.values())]
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), seeds, allow_unused=True)
    for name, x in given.items():
        assert torch.equal(memory(x.detach()), before[name]), f"{name} was written"
    found = {f"gradient of {name}": torch.zeros_like(leaves[name]) if g is None else g
             for name, g in zip(leaves, grads, strict=True)}  # fmt: skip
    return {name: x.detach() for name, x in {**results, **found}.items()}


def by_torch(inputs: dict[str, Tensor], causal: bool = True, **_: Any) -> dict[str, Tensor]:
    """The same by PyTorch's SDPA itself, with one mask for everything; without what it does not give."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items() if n in "qkv" or x.is_floating_point()}
    q, k, v = (leaves[name].transpose(1, 2) for name in "qkv")
    q_len, k_len = q.shape[2], k.shape[2]
    seen = torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len if causal else torch.ones(q_len, k_len)
    mask = torch.where(seen.bool(), 0.0, -torch.inf).expand(len(q), 1, q_len, k_len).to(q.device)
    if "key_padding_mask" in inputs:
        mask = mask.masked_fill(~inputs["key_padding_mask"][:, None, None], -torch.inf)
    if "attn_mask" in inputs:
        given = leaves.get("attn_mask", inputs["attn_mask"])
        mask = mask.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else mask + given
    dead = (mask == -torch.inf).all(-1, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.masked_fill(dead, 0.0).to(q.dtype))
    out = out.masked_fill(dead, 0.0).transpose(1, 2)
    seed = randn(*out.shape, seed=SEED).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), seed, allow_unused=True)
    found = {f"gradient of {name}": x for name, x in zip(leaves, grads, strict=True) if x is not None}
    return {"result": out.detach(), **found}


def agrees(inputs: dict[str, Tensor], implementation: str, *, device: str = "cpu", **options: Any) -> dict[str, Tensor]:
    """An implementation within the budget: forward with and without a graph, and every gradient."""
    oracle = move(backward(to_float64(inputs), implementation="eager", **options), device)
    inputs = move(inputs, device)
    same = backward(inputs, implementation="eager", **options)
    actual = backward(inputs, implementation=implementation, **options)
    with torch.no_grad():
        out, probs = attention(**inputs, implementation=implementation, **options)
    inference = {"result": out} if probs is None else {"result": out, "probabilities": probs}
    what = f"by {implementation}, {options}"
    # PyTorch's SDPA rounds more often than eager code: on the CPU in float32 gradients, on a GPU everywhere.
    theirs = {} if implementation == "fused" else by_torch(inputs, **options)

    def check(got: Tensor, name: str, eager: Tensor, stock: Tensor | None, truth: Tensor) -> None:
        assert not got.isnan().any() and (stock is None or not stock.isnan().any()), name
        worse = stock is not None and max_error(stock, truth) > max_error(eager, truth)
        assert_within_budget(got, stock if worse else eager, truth, f"{name} {what}")

    for name, x in [*actual.items(), *inference.items()]:
        if name not in QKV:
            allowed = theirs.get(name) if device != "cpu" else None
            check(x, name, same[name], allowed, oracle[name])
    # Those of q, k and v together: of a lone query alone there are too few numbers for two maxima to be compared.
    actual_qkv, same_qkv, oracle_qkv, *stock = (
        torch.cat([found[name].flatten() for name in QKV]) for found in (actual, same, oracle, theirs) if found
    )
    check(actual_qkv, "gradients", same_qkv, stock[0] if stock else None, oracle_qkv)
    return actual
