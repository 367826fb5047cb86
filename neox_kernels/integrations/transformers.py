"""The swap into transformers' GPT-NeoX and GPT-J, of 4.57 and 5.x, and of the rotary alone into other models.

A swapped attention module has another class: a subclass of its stock one, with the stock wiring around the fused ops.
Parameters, buffers, hooks and names stay, so the state dict, deep copies, ``isinstance`` and transformers' capture of
attentions work as before; transformers' own classes are never touched. To import this module also lets transformers
know the attention implementation ``neox_kernels``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.activations import NewGELUActivation
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.gptj import modeling_gptj as gptj

from neox_kernels.integrations.rotary_functions import RotaryFunctions, calls_rotary, stock_class
from neox_kernels.integrations.transformers_attention import NAME, register
from neox_kernels.integrations.transformers_layers import (
    FusedGPTJAttention,
    FusedGPTNeoXAttention,
    FusedNewGELUActivation,
)

register()
# GPT-J makes its layers by this table, and knows no interface.
gptj.GPTJ_ATTENTION_CLASSES[NAME] = FusedGPTJAttention

_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    gpt_neox.GPTNeoXAttention: FusedGPTNeoXAttention,
    gptj.GPTJAttention: FusedGPTJAttention,
    NewGELUActivation: FusedNewGELUActivation,  # of GPT-J
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


def swap(model: nn.Module, *, attention: bool = True) -> SwapReport:
    """See :func:`neox_kernels.swap`."""
    report = SwapReport()
    modules = list(_modules(model))
    functions = RotaryFunctions(model)
    for name, module in modules:
        if isinstance(module, NewGELUActivation):
            continue  # with its MLP
        if type(module) is gptj.GPTJMLP:
            if attention and type(module.act) is NewGELUActivation and not _overridden(module.act):
                _exchange(module.act, FusedNewGELUActivation)
                report.replaced.append((f"{name}.act".lstrip("."), "fused GELU"))
            continue
        kind = _class_for(module, functions)
        if isinstance(kind, str):
            report.left.append((name, kind))
        elif kind is not None:
            _exchange(module, kind)
            whole = attention and kind in _STOCK
            if kind in _STOCK and not attention:
                module.fuses_attention = False  # type: ignore[assignment]
            report.replaced.append((name, "fused rotary and attention" if whole else "fused rotary"))
    return report


def restore(model: nn.Module) -> SwapReport:
    """See :func:`neox_kernels.restore`."""
    return _restore(_modules(model))


@contextlib.contextmanager
def swapped(model: nn.Module, *, attention: bool = True) -> Iterator[SwapReport]:
    """See :func:`neox_kernels.swapped`."""
    report = swap(model, attention=attention)
    modules = [(name, model.get_submodule(name)) for name, _ in report.replaced]
    try:
        yield report
    finally:
        _restore(modules)


def _restore(modules: Iterable[tuple[str, nn.Module]]) -> SwapReport:
    report = SwapReport()
    for name, module in modules:
        stock = _STOCK.get(type(module)) or stock_class(type(module))
        if stock is None:
            continue
        if _overridden(module):
            report.left.append((name, "its forward was overridden after the swap: undo that first"))
        elif _made_by_name(module):
            report.left.append((name, f"it was made with attn_implementation={NAME!r}"))
        else:
            _exchange(module, stock)
            report.replaced.append((name, f"the stock {stock.__name__}"))
    return report


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules()
    return modules


def _class_for(module: nn.Module, functions: RotaryFunctions) -> type[nn.Module] | str | None:
    """The class that a module gets, or why it stays as it is; None where there is nothing to say of it."""
    kind = type(module)
    if kind in _STOCK or stock_class(kind):
        return "swapped already"
    if kind not in _SWAPPED:
        bases = [stock.__name__ for stock in _SWAPPED if issubclass(kind, stock)]
        if bases:
            return f"{kind.__name__} is a subclass of {bases[0]}"
        if calls_rotary(kind):
            return functions.class_for(module)
        if kind.__name__.endswith("Attention"):
            return f"{kind.__name__} does not call apply_rotary_pos_emb"
        return None
    if _overridden(module):
        return "its forward is overridden on the instance"
    if kind is gptj.GPTJAttention:
        rotary_dim: Any = module.rotary_dim
        head_dim: Any = module.head_dim
        if rotary_dim is None or rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            return f"rotary_dim={rotary_dim} is not an even number of up to head_dim={head_dim}"
    return _SWAPPED[kind]


def _overridden(module: nn.Module) -> bool:
    # 4.57 leaves the class's own forward on the instance, as a bound method, after attentions were asked for.
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _made_by_name(module: nn.Module) -> bool:
    """Whether transformers made the layer so, and its stock class would not understand the masks it gets."""
    config: Any = getattr(module, "config", None)
    return isinstance(module, FusedGPTJAttention) and config._attn_implementation == NAME


def _exchange(module: nn.Module, kind: type[nn.Module]) -> None:
    for name in ("forward", "fuses_attention"):  # forward: see _overridden, it is bound to the old class
        vars(module).pop(name, None)
    module.__class__ = kind
