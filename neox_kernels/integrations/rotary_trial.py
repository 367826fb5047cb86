"""What a function ``apply_rotary_pos_emb`` of a model does, found by trying it, and the same by the fused op.

transformers' models write the function in a dozen ways, of which nothing here knows: cos and sin that repeat halves or
pairs or nothing, features paired in halves or as neighbours, some of them or all, one dtype or another. Each way that
:func:`neox_kernels.apply_rotary_qk` can go is tried on a small input until one gives what the function gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from neox_kernels import apply_rotary, apply_rotary_qk
from neox_kernels.testing import assert_within_budget, max_error

NAME = "apply_rotary_pos_emb"
Pair = tuple[Tensor, Tensor]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAYOUTS: dict[int, Literal["bhsd", "bshd"]] = {
    1: "bhsd",
    2: "bshd",
}  # by unsqueeze_dim, which is where q and k have their heads

# ------------------------------------------------------------------------------------------------------- one rotation


@dataclass(frozen=True)
class Rotation:
    """How an ``apply_rotary_pos_emb`` rotates, as far as the fused op has to know.

    Attributes:
        signature: of the function, without annotations.
        tables: what cos and sin repeat: "halves" (twice the same), "pairs" (each element twice), or "nothing".
        interleaved: as in :func:`neox_kernels.apply_rotary_qk`.
        backwards: by the negative angle.
        partial: features past the tables' may follow, and pass through.
        promotes: the result has the promoted dtype of q and cos; else that of q.
        widths: of cos, those that were tried; () for any.
    """

    signature: str
    tables: str
    interleaved: bool
    backwards: bool
    partial: bool = True
    promotes: bool = True
    widths: tuple[int, ...] = ()


def _fuse(rotation: Rotation, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, heads_dim: int) -> Any:
    """q and k rotated, q alone if there is no k; None for a call that the stock function has to answer.

    At one token this takes as long as the op: hence every attribute is read once, and nothing converted without need.
    """
    q_shape, cos_shape, dtype, table_dtype, device = q.shape, cos.shape, q.dtype, cos.dtype, q.device
    if heads_dim not in _LAYOUTS or len(q_shape) != 4 or len(cos_shape) != 3 or sin.shape != cos_shape:
        return None
    (batch, seqlen, head_dim), (rows, positions, width) = (q_shape[0], q_shape[3 - heads_dim], q_shape[3]), cos_shape
    rotary_dim = 2 * width if rotation.tables == "nothing" else width
    if (
        positions != seqlen
        or (rows != 1 and rows != batch)
        or (rotation.widths and width not in rotation.widths)
        or rotary_dim % 2
        or rotary_dim > head_dim
        or (rotary_dim < head_dim and not rotation.partial)
        or dtype not in _FLOATS
        or table_dtype not in _FLOATS
        or sin.dtype != table_dtype
        or cos.requires_grad
        or sin.requires_grad
        or cos.device != device
        or sin.device != device
    ):
        return None
    if k is not None:
        k_shape = k.shape
        if len(k_shape) != 4 or (k_shape[0], k_shape[3 - heads_dim], k_shape[3]) != (batch, seqlen, head_dim):
            return None
        if k.dtype != dtype or k.device != device:
            return None

    c, s = _one_of_each(rotation, cos), _one_of_each(rotation, sin)
    if dtype != table_dtype:
        if rotation.promotes:
            dtype = torch.promote_types(dtype, table_dtype)
            q, k = q.to(dtype), None if k is None else k.to(dtype)
        if rotation.promotes or table_dtype != torch.float32:
            c, s = c.to(dtype), s.to(dtype)
    if rotation.backwards:
        s = -s
    if k is None:
        return apply_rotary(q, c, s, interleaved=rotation.interleaved, layout=_LAYOUTS[heads_dim])
    return apply_rotary_qk(q, k, c, s, interleaved=rotation.interleaved, layout=_LAYOUTS[heads_dim])


def _one_of_each(rotation: Rotation, table: Tensor) -> Tensor:
    if rotation.tables == "halves":
        return table[..., : table.shape[-1] // 2]
    return table[..., ::2] if rotation.tables == "pairs" else table


def _q_and_k(stock: Any, rotation: Rotation) -> Any:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        fused = _fuse(rotation, q, k, cos, sin, unsqueeze_dim)
        return stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim) if fused is None else fused

    return apply_rotary_pos_emb


def _q_and_k_with_positions(stock: Any, rotation: Rotation) -> Any:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
    ) -> Any:
        fused = _fuse(rotation, q, k, cos, sin, unsqueeze_dim) if position_ids is None else None
        return stock(q, k, cos, sin, position_ids, unsqueeze_dim) if fused is None else fused

    return apply_rotary_pos_emb


def _one_tensor(stock: Any, rotation: Rotation) -> Any:
    def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        fused = _fuse(rotation, x, None, cos, sin, unsqueeze_dim)
        return stock(x, cos, sin, unsqueeze_dim=unsqueeze_dim) if fused is None else fused

    return apply_rotary_pos_emb


def _one_tensor_sin_first(stock: Any, rotation: Rotation) -> Any:
    def apply_rotary_pos_emb(tensor: Tensor, sin: Tensor, cos: Tensor) -> Any:
        fused = _fuse(rotation, tensor, None, cos, sin, 2)
        return stock(tensor, sin, cos) if fused is None else fused

    return apply_rotary_pos_emb


def _call_both(stock: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int) -> Pair:
    return cast(Pair, stock(q, k, cos, sin, unsqueeze_dim=heads_dim))


def _call_each(stock: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int) -> Pair:
    return stock(q, cos, sin, unsqueeze_dim=heads_dim), stock(k, cos, sin, unsqueeze_dim=heads_dim)


def _call_each_sin_first(stock: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int) -> Pair:
    return stock(q, sin, cos), stock(k, sin, cos)


@dataclass(frozen=True)
class Signature:
    """What takes the place of a function, and how to try the function: on q and k, for some places of the heads."""

    replacement: Callable[[Any, Rotation], Any]
    call: Callable[..., Pair]
    heads_dims: tuple[int, ...] = (1, 2)


SIGNATURES = {
    "(q, k, cos, sin, unsqueeze_dim=1)": Signature(_q_and_k, _call_both),
    "(q, k, cos, sin, position_ids=None, unsqueeze_dim=1)": Signature(_q_and_k_with_positions, _call_both),
    "(x, cos, sin, unsqueeze_dim=1)": Signature(_one_tensor, _call_each),
    "(tensor, sin, cos)": Signature(_one_tensor_sin_first, _call_each_sin_first, (2,)),
}


# -------------------------------------------------------------------------------------------------- found by trying it


def recognise(stock: Any, signature: str, tables: list[tuple[Pair, Pair]]) -> Rotation | str:
    """The rotation that the function makes of tables; or why it makes none that the fused op has.

    Args:
        signature: one of SIGNATURES.
        tables: (cos, sin) of (1 or batch, seqlen, width), in float32 and in bfloat16, all that the model has. Without
            any, only a function that takes them as the op does is recognised.
    """
    widths = tuple(sorted({cos.shape[-1] for (cos, _), _ in tables}))
    tables = tables or [_made_up_tables()]
    flat = [table for pairs in tables for pair in pairs for table in pair]
    kinds = [kind for kind in ("halves", "pairs", "nothing") if all(_repeats(kind, table) for table in flat)]
    for backwards, kind, interleaved in itertools.product((False, True), kinds, (False, True)):
        rotation = Rotation(signature, kind, interleaved, backwards, widths=widths)
        try:
            wrong = any(_differs(stock, rotation, torch.float32, pair, 0) for pair, _ in tables)
        except RuntimeError:  # from the function: heads that its tables do not fit, with this reading of them
            continue
        if not wrong:
            return _examine(stock, rotation, tables)
    repeat = " or ".join(kinds[:-1]) or "neither halves nor pairs"
    origin = "no rotary embedding was found" if not widths else f"cos and sin repeat {repeat}"
    return f"its {NAME} is no rotation that the fused op has ({origin})"


def _made_up_tables() -> tuple[Pair, Pair]:
    angles = torch.arange(40, dtype=torch.float32, device="cpu").view(2, 5, 4) / 7
    pair = (angles.cos(), angles.sin())
    return pair, (pair[0].bfloat16(), pair[1].bfloat16())


def _repeats(kind: str, table: Tensor) -> bool:
    if kind == "nothing":
        return True
    if table.shape[-1] % 2:
        return False
    one, other = table.chunk(2, dim=-1) if kind == "halves" else (table[..., ::2], table[..., 1::2])
    return torch.equal(one, other)


def _examine(stock: Any, rotation: Rotation, tables: list[tuple[Pair, Pair]]) -> Rotation | str:
    """Everything else about a function that rotates a whole head in float32 as ``rotation`` does."""
    (first, _), bfloat16 = tables[0], torch.bfloat16
    signature = SIGNATURES[rotation.signature]
    mixed = signature.call(stock, *_sample(rotation, bfloat16, first, 0, 2), *first, 2)[0].dtype
    try:
        signature.call(stock, *_sample(rotation, torch.float32, first, 6, 2), *first, 2)
        partial = True
    except RuntimeError:  # it multiplies the whole head: then the model cuts off what is to pass through
        partial = False
    rotation = replace(rotation, partial=partial, promotes=mixed != bfloat16)
    for (pair, half_pair), more in itertools.product(tables, (0, 6) if partial else (0,)):
        for dtype, used in ((torch.float32, pair), (bfloat16, half_pair), (bfloat16, pair)):
            difference = _differs(stock, rotation, dtype, used, more)
            if difference is not None:
                return f"its {NAME} differs in {dtype} with {more} features more than the tables: {difference}"
    return rotation


def _differs(stock: Any, rotation: Rotation, dtype: torch.dtype, tables: Pair, more: int) -> str | None:
    """How the function and the rotation differ by the numbers policy, for heads of ``more`` features than are rotated.

    The policy alone would let a wrong function pass, whose error is the yardstick: so that has to be small, too.
    """
    signature = SIGNATURES[rotation.signature]
    for heads_dim in signature.heads_dims:
        q, k = _sample(rotation, dtype, tables, more, heads_dim)
        theirs = signature.call(stock, q, k, *tables, heads_dim)
        exact = _fuse_both(rotation, signature, *(x.double() for x in (q, k, *tables)), heads_dim)
        ours = _fuse_both(rotation, signature, q, k, *tables, heads_dim)
        for name, got, same, truth in zip("qk", ours, theirs, exact, strict=True):
            if same.shape != truth.shape:
                return f"{name} of the shape {tuple(same.shape)}"
            error, allowed = max_error(same, truth), 4 * torch.finfo(same.dtype).eps * float(truth.abs().max())
            if not error <= allowed:
                return f"{name} is {error:.3g} away"
            try:
                assert_within_budget(got, same, truth, name)
            except AssertionError as above:
                return str(above)
    return None


def _fuse_both(rotation: Rotation, signature: Signature, *call: Any) -> Pair:
    q, k, cos, sin, heads_dim = call
    if signature.call is _call_both:
        return cast(Pair, _fuse(rotation, q, k, cos, sin, heads_dim))
    return _fuse(rotation, q, None, cos, sin, heads_dim), _fuse(rotation, k, None, cos, sin, heads_dim)


def _sample(rotation: Rotation, dtype: torch.dtype, tables: Pair, more: int, heads_dim: int) -> Pair:
    """q of three heads and k of two; no random number of the caller's is used up."""
    batch, seqlen, width = tables[0].shape
    head_dim = (2 * width if rotation.tables == "nothing" else width) + more
    generator = torch.Generator("cpu").manual_seed(0)
    q, k = (
        torch.randn(batch, heads, seqlen, head_dim, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        for heads in (3, 2)
    )
    return (q, k) if heads_dim == 1 else (q.transpose(1, 2), k.transpose(1, 2))
