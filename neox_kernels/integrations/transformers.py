"""The swap into transformers' GPT-NeoX and GPT-J, of 4.57 and 5.x.

A swapped attention module has another class: a subclass, defined here, of its stock one, with the stock wiring around
the fused op. Parameters, buffers, hooks and names stay, so the state dict, deep copies, ``isinstance`` and
transformers' capture of attentions work as before; transformers' own classes are never touched.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.gptj import modeling_gptj as gptj

from neox_kernels import apply_rotary_qk

# What 4.57 still has and 5.x dropped, asked of the installed classes once.
_FORWARD_PARAMETERS = inspect.signature(gpt_neox.GPTNeoXAttention.forward).parameters
_CACHE_TAKES_ROTARY = "cache_position" in _FORWARD_PARAMETERS
_NOT_PASSED_ON = tuple(name for name in ("cache_position", "output_attentions") if name in _FORWARD_PARAMETERS)
_GPTJ_HEAD_MASK = "head_mask" in inspect.signature(gptj.GPTJAttention._attn).parameters
_INTERFACE_HAS_DEFAULT = hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface")


class RotaryGPTNeoXAttention(gpt_neox.GPTNeoXAttention):
    """GPTNeoXAttention with the fused rotary: q and k are read from the packed projection as they lie."""

    def forward(  # type: ignore[override,unused-ignore]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch_seqlen = hidden_states.shape[:-1]
        qkv = self.query_key_value(hidden_states).view(*batch_seqlen, -1, 3 * self.head_size).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        cos, sin = position_embeddings
        # Under autocast the projection is bfloat16 and cos float32: the stock multiplication then gives float32, and so
        # do the cache and the probabilities.
        dtype = torch.promote_types(q.dtype, cos.dtype)
        # (1 or batch, seqlen, rotary_dim): the second half repeats the first.
        c, s = (table[..., : table.shape[-1] // 2].to(dtype) for table in (cos, sin))
        q, k = apply_rotary_qk(q.to(dtype), k.to(dtype), c, s, layout="bhsd")

        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx, *_cache_arguments(cos, sin, self.rotary_ndims, kwargs))
        for name in _NOT_PASSED_ON:
            kwargs.pop(name, None)
        dropout = self.attention_dropout if self.training else 0.0
        attend = _attention_function(self.config._attn_implementation)
        attended, probabilities = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.dense(attended.reshape(*batch_seqlen, -1).contiguous()), probabilities


class RotaryGPTJAttention(gptj.GPTJAttention):
    """GPTJAttention with the fused rotary: the table is read by position as it lies, and heads come first at once."""

    def forward(  # type: ignore[override,unused-ignore]
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            self._split_heads(projection(hidden_states), self.num_attention_heads, self.head_dim, False)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        table: Tensor = self.embed_positions
        if table.device != q.device:  # 4.57 keeps it as a plain tensor, which .to(device) does not move
            self.embed_positions = table = table.to(q.device)  # type: ignore[assignment]
        if table.dtype not in (torch.float32, q.dtype):
            table = table.float()
        sin, cos = table.chunk(2, dim=-1)  # (max_position, rotary_dim / 2) each
        q, k = apply_rotary_qk(q, k, cos, sin, interleaved=True, position_ids=position_ids, layout="bhsd")

        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx, *_cache_arguments(cos, sin, self.rotary_dim, kwargs))
        head_mask = (kwargs.get("head_mask"),) if _GPTJ_HEAD_MASK else ()
        attended, probabilities = self._attn(q, k, v, attention_mask, *head_mask)
        merged = self._merge_heads(attended, self.num_attention_heads, self.head_dim)
        return self.resid_dropout(self.out_proj(merged)), probabilities


def _cache_arguments(cos: Tensor, sin: Tensor, rotary_dim: int, kwargs: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """What a cache of 4.57 is told beside keys and values; its static cache writes at ``cache_position``."""
    if not _CACHE_TAKES_ROTARY:
        return ()
    position = kwargs.get("cache_position")
    return ({"sin": sin, "cos": cos, "partial_rotation_size": rotary_dim, "cache_position": position},)


def _attention_function(implementation: str) -> Any:
    functions, eager = ALL_ATTENTION_FUNCTIONS, gpt_neox.eager_attention_forward
    if _INTERFACE_HAS_DEFAULT:
        return functions.get_interface(implementation, eager)
    return eager if implementation == "eager" else functions[implementation]


_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    gpt_neox.GPTNeoXAttention: RotaryGPTNeoXAttention,
    gptj.GPTJAttention: RotaryGPTJAttention,
}
_STOCK = {swapped: stock for stock, swapped in _SWAPPED.items()}


@dataclass(repr=False)
class SwapReport:
    """What :func:`swap` or :func:`restore` did; prints short, with the layers that are alike on one line.

    Attributes:
        replaced: (module name, what it has now) of every module that was changed.
        left: (module name, why) of every other attention module.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        lines = [*_alike("replaced", self.replaced), *_alike("left", self.left)]
        return "\n".join(lines) or "nothing was replaced"


def _alike(verb: str, entries: list[tuple[str, str]]) -> Iterator[str]:
    """One line for the modules that differ in the number of their layer only: ``gpt_neox.layers.0-11.attention``."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, text in entries:
        before, number, after = re.findall(r"(.*?)(\d*)(\D*)$", name)[0]
        groups.setdefault((before, after, text), []).append(number)
    for (before, after, text), numbers in groups.items():
        name = before + _runs(numbers) + after
        yield f"{verb} {len(numbers)}: {name or 'the model itself'}: {text}"


def _runs(numbers: list[str]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][1]) + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(first if first == last else f"{first}-{last}" for first, last in runs)


def swap(model: nn.Module, *, rotary: bool = True) -> SwapReport:
    """See :func:`neox_kernels.swap`."""
    report = SwapReport()
    for name, module in _modules(model):
        reason = _reason(module) if rotary else f"rotary={rotary}"
        if reason is None:
            _exchange(module, _SWAPPED[type(module)])
            report.replaced.append((name, "fused rotary"))
        elif isinstance(module, tuple(_SWAPPED)) or type(module).__name__.endswith(("Attention", "FlashAttention2")):
            report.left.append((name, reason))
    return report


def restore(model: nn.Module) -> SwapReport:
    """See :func:`neox_kernels.restore`."""
    report = SwapReport()
    for name, module in _modules(model):
        stock = _STOCK.get(type(module))
        if stock is None:
            continue
        if _overridden(module):
            report.left.append((name, "its forward was overridden after the swap: undo that first"))
        else:
            _exchange(module, stock)
            report.replaced.append((name, f"the stock {stock.__name__}"))
    return report


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules()
    return modules


def _reason(module: nn.Module) -> str | None:
    """Why the module must stay as it is, or None."""
    kind = type(module)
    if kind in _STOCK:
        return "swapped already"
    if kind not in _SWAPPED:
        bases = [stock.__name__ for stock in _SWAPPED if issubclass(kind, stock)]
        return f"{kind.__name__} is " + (f"a subclass of {bases[0]}" if bases else "not of GPT-NeoX or GPT-J")
    if _overridden(module):
        return "its forward is overridden on the instance"
    if kind is gptj.GPTJAttention:
        rotary_dim: Any = module.rotary_dim
        head_dim: Any = module.head_dim
        if rotary_dim is None or rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            return f"rotary_dim={rotary_dim} is not an even number of up to head_dim={head_dim}"
    return None


def _overridden(module: nn.Module) -> bool:
    # 4.57 leaves the class's own forward on the instance, as a bound method, after attentions were asked for.
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _exchange(module: nn.Module, kind: type[nn.Module]) -> None:
    vars(module).pop("forward", None)  # see _overridden: it is bound to the old class
    module.__class__ = kind
