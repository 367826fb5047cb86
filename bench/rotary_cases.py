"""What the rotary benchmarks run: shapes of known models, and the contenders of each, checked before they are timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_kernels import apply_rotary, apply_rotary_kv_append, apply_rotary_qk, rotary_tables
from neox_kernels.reference import apply_rotary_qk as oracle
from neox_kernels.testing import ROTARY_SHAPES, RotaryShape, assert_within_budget, packed_qkv, to_float64

LENGTHS = ((1, 1), (8, 1), (1, 128), (4, 512), (1, 2048))
GPU_LENGTHS = (*LENGTHS, (8, 2048))
DTYPES = (torch.float32, torch.bfloat16)
OP = "apply_rotary_qk"  # whose backend the report names
BASELINE = "transformers eager"
Call = Callable[[], object]


@dataclass(frozen=True)
class RotaryCase:
    """One model's rotary over a batch: what one layer does per forward."""

    kind: str  # a key of CONTENDERS
    shape: RotaryShape
    batch: int
    seqlen: int
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.kind}: {self.shape.model} ({self.batch}, {self.seqlen}) {str(self.dtype).removeprefix('torch.')}"

    @property
    def model(self) -> str:
        return self.shape.model

    @property
    def bytes(self) -> int:
        """Of q and k, read once and written once."""
        return 4 * self.batch * self.seqlen * self.shape.nheads * self.shape.head_dim * self.dtype.itemsize


def cases(device: str = "cpu") -> Iterator[RotaryCase]:
    lengths = LENGTHS if device == "cpu" else GPU_LENGTHS
    for kind, shape, (batch, seqlen), dtype in itertools.product(CONTENDERS, ROTARY_SHAPES, lengths, DTYPES):
        if kind == "forward" or (kind == "append" and seqlen == 1) or (kind == "training" and seqlen == 512):
            yield RotaryCase(kind, shape, batch, seqlen, dtype, device)


class Inputs:
    """q, k and v of one layer as its model's code holds them, and the model's own rotary of q and k."""

    def __init__(self, case: RotaryCase) -> None:
        shape, self.seqlen = case.shape, case.seqlen
        q, k, v = packed_qkv(case.batch, case.seqlen, shape.nheads, shape.head_dim, case.dtype, device=case.device)
        if shape.interleaved:  # GPT-J projects q, k and v on their own
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        self.q, self.k, self.v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, nheads, seqlen, head_dim)
        self.cos, self.sin = rotary_tables(shape.rotary_dim, 2048, device=case.device)
        self.interleaved = shape.interleaved
        self.position_ids = torch.arange(case.seqlen, device=case.device)[None].expand(case.batch, -1).contiguous()
        self.gpt_j_table = torch.cat((self.sin, self.cos), dim=-1)
        wide = (torch.cat((t, t), dim=-1)[None, : case.seqlen].to(case.dtype) for t in (self.cos, self.sin))
        self.wide_cos, self.wide_sin = wide

    def eager_args(self) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
        if self.interleaved:
            tokens_first = self.q.transpose(1, 2), self.k.transpose(1, 2)
            return _gpt_j, (*tokens_first, self.gpt_j_table, self.position_ids)
        return _gpt_neox, (self.q, self.k, self.wide_cos, self.wide_sin)

    def eager(self) -> tuple[Tensor, Tensor]:
        function, args = self.eager_args()
        return function(*args)

    def fused(self) -> tuple[Tensor, Tensor]:
        return apply_rotary_qk(self.q, self.k, self.cos, self.sin, interleaved=self.interleaved, layout="bhsd")

    def check(self, results: tuple[Tensor, Tensor], case: RotaryCase) -> None:
        inputs = to_float64((self.q.detach(), self.k.detach(), self.cos, self.sin))
        truth = oracle(*inputs, interleaved=self.interleaved, layout="bhsd")
        for actual, same_dtype, exact in zip(results, self.eager(), truth, strict=True):
            assert_within_budget(actual, same_dtype, exact, str(case))


def _gpt_neox(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' own function; cos and sin as its model passes them: full width, in the dtype of the activations."""
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin)
    return rotated


def _gpt_j(q: Tensor, k: Tensor, table: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' GPT-J does around its function: gather, split, rotate, concatenate, permute."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    rows = table.repeat(position_ids.shape[0], 1, 1)
    index = position_ids.unsqueeze(-1).repeat(1, 1, rows.shape[-1])
    sin, cos = torch.gather(rows, 1, index).to(k.dtype).chunk(2, dim=-1)
    rotary_dim = table.shape[-1]
    out = []
    for x in (q, k):
        turned = apply_rotary_pos_emb(x[..., :rotary_dim], sin, cos)
        out.append(torch.cat([turned, x[..., rotary_dim:]], dim=-1).permute(0, 2, 1, 3))
    return out[0], out[1]


def forward(case: RotaryCase, compiled: bool) -> dict[str, Call]:
    """q and k of one layer, no gradient."""
    inputs = Inputs(case)
    inputs.check(inputs.fused(), case)
    spare_q, spare_k = inputs.q.clone(), inputs.k.clone()
    flat_q, flat_k = inputs.q.contiguous(), inputs.k.contiguous()
    target_q, target_k = torch.empty_like(flat_q), torch.empty_like(flat_k)
    args = {"interleaved": inputs.interleaved, "layout": "bhsd"}
    cos, sin = inputs.cos, inputs.sin
    calls: dict[str, Call] = {
        BASELINE: inputs.eager,
        "neox_kernels": inputs.fused,
        "neox_kernels, q then k": lambda: [apply_rotary(x, cos, sin, **args) for x in (inputs.q, inputs.k)],
        "neox_kernels in place": lambda: apply_rotary_qk(spare_q, spare_k, cos, sin, inplace=True, **args),
        "memcpy to fresh memory": lambda: (flat_q.clone(), flat_k.clone()),
        "memcpy": lambda: (target_q.copy_(flat_q), target_k.copy_(flat_k)),
    }
    if compiled:
        function, eager_args = inputs.eager_args()
        fast = torch.compile(function, dynamic=False)
        calls["transformers compiled"] = lambda: fast(*eager_args)
    return calls


def append(case: RotaryCase, compiled: bool) -> dict[str, Call]:
    """A decode step: q and k rotated, k and v written behind the 511 tokens of a cache of 1024."""
    inputs = Inputs(case)
    inputs.check(inputs.fused(), case)
    batch, nheads, _, head_dim = inputs.k.shape
    caches = [torch.zeros(batch, nheads, 1024, head_dim, dtype=case.dtype, device=case.device) for _ in range(2)]
    cache_seqlens = torch.full((batch,), 511, dtype=torch.int32, device=case.device)
    row = torch.tensor([511], device=case.device)

    def eager() -> object:
        q, k = inputs.eager()
        for cache, new in zip(caches, (k, inputs.v), strict=True):
            cache.index_copy_(2, row, new)  # as transformers' static cache writes
        return q

    def fused() -> object:
        return apply_rotary_kv_append(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.cos,
            inputs.sin,
            *caches,
            cache_seqlens,
            interleaved=inputs.interleaved,
            layout="bhsd",
        )

    return {BASELINE: eager, "neox_kernels": fused}


def training(case: RotaryCase, compiled: bool) -> dict[str, Call]:
    """Forward and backward of q and k."""
    inputs = Inputs(case)
    inputs.q, inputs.k = inputs.q.detach().requires_grad_(), inputs.k.detach().requires_grad_()
    grads = torch.randn_like(inputs.q), torch.randn_like(inputs.k)

    def step(call: Callable[[], tuple[Tensor, Tensor]]) -> object:
        with torch.enable_grad():
            return torch.autograd.grad(call(), (inputs.q, inputs.k), grads)

    inputs.check(inputs.fused(), case)
    return {BASELINE: lambda: step(inputs.eager), "neox_kernels": lambda: step(inputs.fused)}


def flash_attn(case: RotaryCase) -> Call:
    """flash-attn's Triton rotary, q and then k."""
    from flash_attn.layers.rotary import apply_rotary_emb

    inputs = Inputs(case)
    cos, sin = (table[: case.seqlen].to(case.dtype) for table in (inputs.cos, inputs.sin))

    def call() -> tuple[Tensor, Tensor]:
        q, k = (
            apply_rotary_emb(x.transpose(1, 2), cos, sin, interleaved=inputs.interleaved).transpose(1, 2)
            for x in (inputs.q, inputs.k)
        )
        return q, k

    inputs.check(call(), case)
    return call


def liger(case: RotaryCase) -> Call:
    """Liger's rotary, which turns whole heads: of a part of them, a slice, and the rest is joined on."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    inputs, rotary_dim = Inputs(case), case.shape.rotary_dim
    if inputs.interleaved:
        raise NotImplementedError("Liger pairs halves only")

    def call() -> tuple[Tensor, Tensor]:
        parts = (x[..., :rotary_dim] for x in (inputs.q, inputs.k))
        turned = liger_rotary_pos_emb(*parts, inputs.wide_cos, inputs.wide_sin)
        q, k = (torch.cat((y, x[..., rotary_dim:]), -1) for y, x in zip(turned, (inputs.q, inputs.k), strict=True))
        return q, k

    inputs.check(call(), case)
    return call


PEERS = {"forward": {"flash-attn": flash_attn, "Liger": liger}}
CONTENDERS = {"forward": forward, "append": append, "training": training}


def contenders(case: RotaryCase, *, compiled: bool = False) -> dict[str, Call]:
    """By name; BASELINE is what the others are compared with. Results are checked against the float64 oracle first."""
    return CONTENDERS[case.kind](case, compiled)
