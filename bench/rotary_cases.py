"""What the rotary benchmarks run: shapes of known models, and the contenders of each, checked before they are timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_kernels import apply_rotary_qk, rotary_tables
from neox_kernels.reference import apply_rotary_qk as oracle
from neox_kernels.testing import ROTARY_SHAPES, RotaryShape, assert_within_budget, packed_qkv, to_float64

LENGTHS = ((1, 1), (8, 1), (1, 128), (4, 512), (1, 2048))
DTYPES = (torch.float32, torch.bfloat16)
Call = Callable[[], object]


@dataclass(frozen=True)
class RotaryCase:
    """One model's rotary over a batch: what one layer does per forward."""

    shape: RotaryShape
    batch: int
    seqlen: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.shape.model} ({self.batch}, {self.seqlen}) {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """Read once and written once: q and k."""
        return 4 * self.batch * self.seqlen * self.shape.nheads * self.shape.head_dim * self.dtype.itemsize


def cases() -> Iterator[RotaryCase]:
    for shape, (batch, seqlen), dtype in itertools.product(ROTARY_SHAPES, LENGTHS, DTYPES):
        yield RotaryCase(shape, batch, seqlen, dtype)


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


def contenders(case: RotaryCase, *, compiled: bool = False) -> dict[str, Call]:
    """By name; "transformers eager" is the baseline. Results are checked against the float64 oracle first."""
    shape, seqlen = case.shape, case.seqlen
    q, k, _ = packed_qkv(case.batch, seqlen, shape.nheads, shape.head_dim, case.dtype)
    if shape.interleaved:  # GPT-J projects q and k on their own
        q, k = q.contiguous(), k.contiguous()
    cos, sin = rotary_tables(shape.rotary_dim, 2048)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    eager: Call
    if shape.interleaved:
        table = torch.cat((sin, cos), dim=-1)
        position_ids = torch.arange(seqlen)[None].expand(case.batch, -1).contiguous()
        eager_function, eager_args = _gpt_j, (q.transpose(1, 2), k.transpose(1, 2), table, position_ids)
    else:
        wide = [torch.cat((t[:seqlen], t[:seqlen]), dim=-1)[None].to(case.dtype) for t in (cos, sin)]
        eager_function, eager_args = _gpt_neox, (q, k, wide[0], wide[1])
    eager = lambda: eager_function(*eager_args)  # noqa: E731

    def ours() -> object:
        return apply_rotary_qk(q, k, cos, sin, interleaved=shape.interleaved, layout="bhsd")

    spare_q, spare_k = q.clone(), k.clone()

    def ours_in_place() -> object:
        return apply_rotary_qk(spare_q, spare_k, cos, sin, interleaved=shape.interleaved, layout="bhsd", inplace=True)

    flat_q, flat_k = q.contiguous(), k.contiguous()
    target_q, target_k = torch.empty_like(flat_q), torch.empty_like(flat_k)
    calls: dict[str, Call] = {
        "transformers eager": eager,
        "neox_kernels": ours,
        "neox_kernels in place": ours_in_place,
        "memcpy to fresh memory": lambda: (flat_q.clone(), flat_k.clone()),
        "memcpy": lambda: (target_q.copy_(flat_q), target_k.copy_(flat_k)),
    }
    if compiled:
        fast = torch.compile(eager_function, dynamic=False)
        calls["transformers compiled"] = lambda: fast(*eager_args)

    truth = oracle(*to_float64((q, k, cos, sin)), interleaved=shape.interleaved, layout="bhsd")
    for actual, same_dtype, exact in zip(ours(), eager(), truth, strict=True):  # type: ignore[call-overload]
        assert_within_budget(actual, same_dtype, exact, str(case))
    return calls
