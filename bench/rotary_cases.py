"""Rotary embedding of q and k: one layer of known models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neox_kernels import apply_rotary, apply_rotary_kv_append, apply_rotary_qk, rotary_tables
from neox_kernels.bench.case import MEMCPY, Absent, Case, Family, Work, compile_for_shape, needs_gpu
from neox_kernels.bench.harness import Call
from neox_kernels.reference import apply_rotary_qk as oracle
from neox_kernels.testing import (
    ROTARY_SHAPES,
    RotaryShape,
    assert_within_budget,
    eager_rotary,
    packed_qkv,
    to_float64,
)

Pair = tuple[Tensor, Tensor]


class Forward(Work):
    """q and k of one layer, no gradient. GPT-NeoX's are slices of a packed projection, GPT-J's lie on their own."""

    signature = """function(q, k, cos, sin, *, interleaved) -> (q, k)
    q, k: (batch, seqlen, nheads, head_dim), with strides; positions from 0
    cos, sin: (2048, rotary_dim / 2), float32; interleaved: pairs of neighbours, as GPT-J, else of halves"""

    def __init__(self, case: Case, shape: RotaryShape) -> None:
        super().__init__(case, shape)
        batch, self.seqlen = case.size
        tensors = packed_qkv(batch, self.seqlen, shape.nheads, shape.head_dim, case.dtype, device=case.device)
        if shape.interleaved:
            tensors = tuple(x.contiguous() for x in tensors)  # type: ignore[assignment]
        self.q, self.k, self.v = tensors
        self.cos, self.sin = rotary_tables(shape.rotary_dim, 2048, device=case.device)
        self.args = self.q, self.k, self.cos, self.sin
        self.options = {"interleaved": shape.interleaved}
        self.bytes = 2 * (self.q.nbytes + self.k.nbytes)  # read once and written once

    def ours(self) -> Call:
        return self.call_of(apply_rotary_qk)

    def variants(self) -> dict[str, Call]:
        spare = self.q.clone(), self.k.clone(), self.cos, self.sin
        one_by_one = [(x, self.cos, self.sin) for x in (self.q, self.k)]
        return {
            "neox_kernels, in place": lambda: apply_rotary_qk(*spare, inplace=True, **self.options),
            "neox_kernels, q then k": lambda: [apply_rotary(*args, **self.options) for args in one_by_one],
        }

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {
            "transformers": self._transformers,
            "compile": lambda: self._transformers(compile_for_shape),
            "flash-attn": self._flash_attn,
            "liger": self._liger,
        }

    def limits(self) -> dict[str, Call]:
        flat = self.q.detach().contiguous(), self.k.detach().contiguous()
        there = tuple(torch.empty_like(x) for x in flat)
        return {
            MEMCPY: lambda: [target.copy_(x) for target, x in zip(there, flat, strict=True)],
            "memcpy to fresh memory": lambda: [x.clone() for x in flat],
        }

    def check(self, result: Any) -> None:
        args = self.q.detach(), self.k.detach(), self.cos, self.sin
        truth = oracle(*to_float64(args), **self.options)
        for x, actual, exact in zip(args[:2], result, truth, strict=True):
            assert_within_budget(actual, self.eager(x), exact, str(self.case))

    def eager(self, x: Tensor) -> Tensor:
        """What the budget is measured by."""
        cos, sin = (table[None, : self.seqlen] for table in (self.cos, self.sin))
        return eager_rotary(x, cos, sin, self.shape.interleaved)

    def _transformers(self, prepare: Callable[[Any], Any] = lambda function: function, first: int = 0) -> Call:
        """transformers' own code, from what its model holds: heads first, and the tables of a forward at hand."""
        if self.shape.interleaved:
            position_ids = torch.arange(first, first + self.seqlen, device=self.case.device)[None]
            position_ids = position_ids.expand(self.case.size[0], -1).contiguous()
            table = torch.cat((self.sin, self.cos), dim=-1)
            gpt_j = prepare(_gpt_j())
            return self.call_of(lambda q, k, cos, sin, interleaved: gpt_j(q, k, table, position_ids))
        from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

        cos, sin = self._wide_tables(first)
        turn = prepare(apply_rotary_pos_emb)

        def call(q: Tensor, k: Tensor, *_: Any, **__: Any) -> Pair:
            q, k = turn(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)

        return self.call_of(call)

    def _wide_tables(self, first: int = 0) -> Pair:
        """cos and sin of every column, in the dtype of the activations: (1, seqlen, rotary_dim)."""
        rows = slice(first, first + self.seqlen)
        cos, sin = (torch.cat((t, t), dim=-1)[None, rows].to(self.case.dtype) for t in (self.cos, self.sin))
        return cos, sin

    def _flash_attn(self) -> Call:
        """flash-attn's Triton rotary, q and then k."""
        needs_gpu(self.case, "flash-attn's rotary (Triton)")
        from flash_attn.layers.rotary import apply_rotary_emb

        cos, sin = (table[: self.seqlen].to(self.case.dtype) for table in (self.cos, self.sin))

        def call(q: Tensor, k: Tensor, *_: Any, interleaved: bool) -> list[Tensor]:
            return [apply_rotary_emb(x, cos, sin, interleaved=interleaved) for x in (q, k)]

        return self.call_of(call)

    def _liger(self) -> Call:
        """Liger's rotary, which turns whole heads: of a part of them, a slice, and the rest is joined on."""
        if self.shape.interleaved:
            raise Absent("Liger's rotary pairs halves only")
        needs_gpu(self.case, "Liger's rotary (Triton)")
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        rotary_dim, (cos, sin) = self.shape.rotary_dim, self._wide_tables()

        def call(q: Tensor, k: Tensor, *_: Any, **__: Any) -> list[Tensor]:
            heads = [x.transpose(1, 2) for x in (q, k)]
            turned = liger_rotary_pos_emb(*(x[..., :rotary_dim] for x in heads), cos, sin)
            both = zip(turned, heads, strict=True)
            return [torch.cat((y, x[..., rotary_dim:]), -1).transpose(1, 2) for y, x in both]

        return self.call_of(call)


def _gpt_j() -> Callable[..., Pair]:
    """What transformers' GPT-J does around its function: gather, split, rotate, concatenate."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    def call(q: Tensor, k: Tensor, table: Tensor, position_ids: Tensor) -> Pair:
        rows = table.repeat(position_ids.shape[0], 1, 1)
        index = position_ids.unsqueeze(-1).repeat(1, 1, rows.shape[-1])
        sin, cos = torch.gather(rows, 1, index).to(k.dtype).chunk(2, dim=-1)
        rotary_dim = table.shape[-1]
        out = []
        for x in (q, k):
            turned = apply_rotary_pos_emb(x[..., :rotary_dim], sin, cos)
            out.append(torch.cat([turned, x[..., rotary_dim:]], dim=-1))
        return out[0], out[1]

    return call


class Training(Forward):
    """Forward and backward of q and k."""

    def __init__(self, case: Case, shape: RotaryShape) -> None:
        super().__init__(case, shape)
        self.q, self.k = (x.detach().requires_grad_() for x in (self.q, self.k))
        self.args = self.q, self.k, self.cos, self.sin
        generator = torch.Generator(case.device).manual_seed(1)
        normal: dict[str, Any] = {"generator": generator, "device": case.device}
        self.grads = [torch.randn(x.shape, **normal).to(case.dtype) for x in (self.q, self.k)]
        self.bytes *= 2

    def call_of(self, function: Callable[..., Any]) -> Call:
        forward = super().call_of(function)

        def call() -> object:
            with torch.enable_grad():
                return torch.autograd.grad(forward(), (self.q, self.k), self.grads)

        return call

    def variants(self) -> dict[str, Call]:
        return {}

    def limits(self) -> dict[str, Call]:
        once = super().limits()[MEMCPY]
        return {MEMCPY: lambda: (once(), once())}

    def check(self, result: Any) -> None:
        """The gradient of a rotation is the rotation back, which the reference knows."""
        grad_q, grad_k, cos, sin = to_float64((*self.grads, self.cos, -self.sin))
        truth = oracle(grad_q, grad_k, cos, sin, **self.options)
        for x, grad, actual, exact in zip((self.q, self.k), self.grads, result, truth, strict=True):
            with torch.enable_grad():
                same = torch.autograd.grad(self.eager(x), x, grad)[0]
            assert_within_budget(actual, same, exact, str(self.case))


class Append(Forward):
    """A step of decoding: q and k rotated, k and v written behind the 511 tokens of a cache of 1024."""

    signature = ""

    def __init__(self, case: Case, shape: RotaryShape) -> None:
        super().__init__(case, shape)
        room = case.size[0], 1024, shape.nheads, shape.head_dim
        self.caches = [torch.zeros(room, dtype=case.dtype, device=case.device) for _ in range(2)]
        self.filled = torch.full((case.size[0],), 511, dtype=torch.int32, device=case.device)
        self.bytes += 2 * self.v.nbytes

    def ours(self) -> Call:
        tensors = self.q, self.k, self.v, self.cos, self.sin, *self.caches, self.filled

        def call() -> list[Tensor]:
            q = apply_rotary_kv_append(*tensors, **self.options)
            return [q, *(cache[:, 511:512] for cache in self.caches)]

        return call

    def variants(self) -> dict[str, Call]:
        return {}

    def peers(self) -> dict[str, Callable[[], Call]]:
        return {"transformers": self._static_cache}

    def limits(self) -> dict[str, Call]:
        return {}

    def check(self, result: Any) -> None:
        q, k, v = result
        cos, sin = (table[511:512] for table in (self.cos, self.sin))
        truth = oracle(*to_float64((self.q, self.k, cos, sin)), **self.options)
        for x, actual, exact in zip((self.q, self.k), (q, k), truth, strict=True):
            same = eager_rotary(x, cos[None], sin[None], self.shape.interleaved)
            assert_within_budget(actual, same, exact, str(self.case))
        if not torch.equal(v, self.v):
            raise AssertionError(f"{self.case}: v was not copied")

    def _static_cache(self) -> Call:
        """transformers' rotary, and its static cache's way of writing, heads first."""
        batch, room, nheads, head_dim = self.caches[0].shape
        caches = [self.caches[0].new_zeros(batch, nheads, room, head_dim) for _ in range(2)]
        row = torch.tensor([511], device=self.case.device)
        rotate = self._transformers(first=511)

        def call() -> list[Tensor]:
            q, k = rotate()
            for cache, new in zip(caches, (k, self.v), strict=True):
                cache.index_copy_(2, row, new.transpose(1, 2))
            return [q, *(cache[:, :, 511:512].transpose(1, 2) for cache in caches)]

        return call


SIZES = ((1, 1), (8, 1), (1, 128), (1, 512), (4, 512), (1, 2048))
FAMILY = Family(
    name="rotary",
    op="apply_rotary_qk",
    works={"forward": Forward, "append": Append, "training": Training},
    shapes={shape.model: shape for shape in ROTARY_SHAPES},
    sizes={"forward": SIZES, "append": ((1, 1), (8, 1)), "training": ((1, 512), (4, 512))},
    gpu_sizes={"forward": ((8, 2048),)},
    fits=lambda case: case.kind != "append" or case.size[1] == 1,
    eager="transformers",
    quick=lambda case: case.shape in ("pythia-160m", "gpt-j-6b") and case.size != (4, 512),
    backward=frozenset({"training"}),
)
