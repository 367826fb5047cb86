"""The fused rotary in every attention module whose forward calls a function ``apply_rotary_pos_emb`` of its own file.

A swapped module has another class, a subclass of its own, whose forward is the same code with one global name meaning
something else. The stock class, its function and its globals stay as they are, for every other model of the process.
What may be swapped is found by trying it (see ``rotary_trial``), with the tables of the model's own rotary embedding.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dis
import functools
import inspect
import itertools
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from neox_kernels.integrations.rotary_trial import NAME, SIGNATURES, Pair, Rotation, recognise

# These families have classes of their own, which also save work around the rotary.
_SERVED_ELSEWHERE = ("transformers.models.gpt_neox.modeling_gpt_neox", "transformers.models.gptj.modeling_gptj")


def stock_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a class of :class:`RotaryFunctions` stands in for; None for any other class."""
    return _STOCK.get(kind)


def calls_rotary(kind: type[nn.Module]) -> bool:
    """Whether the class's forward calls a global ``apply_rotary_pos_emb``, and has no other way into this package."""
    forward = inspect.unwrap(getattr(kind, "forward", None))  # type: ignore[arg-type]
    return (
        isinstance(forward, FunctionType)
        and NAME in forward.__globals__
        and NAME in _globals_of(forward.__code__)
        and forward.__globals__.get("__name__") not in _SERVED_ELSEWHERE
    )


class RotaryFunctions:
    """What is known of a model's rotary functions and tables. Made for one swap, which tries what is alike once."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._tried: dict[tuple[Any, ...], Rotation | str] = {}

    def class_for(self, module: nn.Module) -> type[nn.Module] | str:
        """The class for a module that :func:`calls_rotary`, with the fused rotary in it; or why it must stay."""
        kind = type(module)
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__func__", None) is not kind.forward:
            return "its forward is overridden on the instance"
        reason = _not_always(module)
        if reason is not None:
            return reason
        stock = inspect.unwrap(kind.forward).__globals__[NAME]
        layer_type = getattr(module, "layer_type", None)
        rotaries = self._rotaries(module)
        key = (stock, layer_type, *rotaries)
        if key not in self._tried:
            self._tried[key] = _try(stock, rotaries, layer_type)
        rotation = self._tried[key]
        try:
            return rotation if isinstance(rotation, str) else _make_class(kind, rotation)
        except _NotRebuilt as reason:
            return str(reason)

    def _rotaries(self, module: nn.Module) -> list[nn.Module]:
        """The rotary embeddings beside the module, or beside what it lies in: of a model's parts, its own ones."""
        name = self._names.get(module, "")
        while True:
            found = [child for child in self._modules[name].children() if _is_rotary(cast(Any, type(child)))]
            if found or not name:
                return found
            name = name.rpartition(".")[0]


@functools.cache
def _is_rotary(kind: Any) -> bool:
    try:
        return list(inspect.signature(kind.forward).parameters)[1:3] == ["x", "position_ids"]
    except (AttributeError, TypeError, ValueError):  # a forward that is not written in Python
        return False


def _not_always(module: nn.Module) -> str | None:
    """Why the module, as it is configured, does not call the function although its code has the call; or None."""
    forward = inspect.unwrap(type(module).forward)
    others = sorted(name for name in set(_globals_of(forward.__code__)) if name.startswith(NAME) and name != NAME)
    if others and getattr(getattr(module, "config", None), "rope_interleave", True):
        return f"{type(module).__name__} calls {', '.join(others)}"
    return None


def _try(stock: Any, rotaries: list[nn.Module], layer_type: Any) -> Rotation | str:
    parameters = inspect.signature(stock).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    signature = str(inspect.Signature(bare))
    if signature not in SIGNATURES:
        return f"its function is {NAME}{signature}"
    # torch.no_grad: the sample is nobody's graph. Not autocast's business either, which would change the dtypes.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            tables = [pair for rotary in rotaries for pair in _tables(rotary, layer_type)]
            names = ", ".join(sorted({type(rotary).__name__ for rotary in rotaries}))
            if rotaries and not tables:
                return f"{names} gives no cos and sin of (batch, seqlen, rotary_dim)"
            return recognise(stock, signature, tables)
        except Exception as error:  # whatever a model's code may raise: a swap leaves what it cannot try
            return f"its {NAME} could not be tried: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _tables(rotary: nn.Module, layer_type: Any) -> list[tuple[Pair, Pair]]:
    """Every (cos, sin) that a rotary embedding gives, in float32 and in bfloat16; [] if it gives none."""
    rotary = copy.deepcopy(rotary).to("cpu")  # a dynamic one changes with the positions that it sees
    types = getattr(rotary, "layer_types", None) or getattr(getattr(rotary, "config", None), "layer_types", None) or ()
    types = [layer_type] if layer_type in types else sorted(set(types))
    parameter = inspect.signature(type(rotary).forward).parameters.get("layer_type")
    calls: list[tuple[Any, ...]] = [(one,) for one in types] if parameter is not None else []
    if parameter is None or parameter.default is not inspect.Parameter.empty:
        calls.append(())
    positions = torch.tensor([[0, 1, 2, 5, 9], [3, 11, 40, 77, 100]], device="cpu")
    kinds = [positions]
    if _takes_images(rotary):
        kinds.append(torch.stack((positions, positions + 1, positions + 3)))  # by time, height and width
    found = []
    for call, ids in itertools.product(calls, kinds):
        with contextlib.suppress(Exception):  # a type of layer without attention has no tables
            found.append((_cos_sin(rotary, torch.float32, ids, call), _cos_sin(rotary, torch.bfloat16, ids, call)))
    return found


def _takes_images(rotary: nn.Module) -> bool:
    config = getattr(rotary, "config", None)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return hasattr(rotary, "mrope_section") or "mrope_section" in parameters


def _cos_sin(rotary: nn.Module, dtype: torch.dtype, positions: Tensor, call: tuple[Any, ...]) -> Pair:
    # The class's forward runs past hooks, which would tell others of a call that the model did not make.
    forward: Any = type(rotary).forward
    cos, sin = forward(rotary, torch.zeros(2, 5, 8, dtype=dtype, device="cpu"), positions, *call)
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[1] != 5 or cos.shape[0] not in (1, 2):
        raise ValueError
    return cos, sin


# ------------------------------------------------------------------------------------------------- classes of modules

_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}
_STOCK: dict[type[nn.Module], type[nn.Module]] = {}


class _NotRebuilt(Exception):
    """A forward whose code cannot be had without what decorates it."""


def _make_class(kind: type[nn.Module], rotation: Rotation) -> type[nn.Module]:
    stock = inspect.unwrap(kind.forward).__globals__[NAME]
    key = (kind, kind.forward, stock, rotation)
    if key not in _CLASSES:

        def reduce(self: nn.Module, protocol: Any) -> Any:
            made: Any = kind.__reduce_ex__(self, max(2, protocol))
            if made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
                made = (_blank, (kind, rotation), *made[2:])  # this class has no place where pickle could find it
            return made

        name = f"Rotary{kind.__name__}"
        members = {"__module__": __name__, "__qualname__": name, "__doc__": f"{kind.__name__} with the fused rotary."}
        forward = _with_global(kind.forward, SIGNATURES[rotation.signature].replacement(stock, rotation))
        made = type(name, (kind,), {**members, "forward": forward, "__reduce_ex__": reduce})
        _CLASSES[key] = made
        _STOCK[made] = kind
    return _CLASSES[key]


def _blank(kind: type[nn.Module], rotation: Rotation) -> nn.Module:
    """What copies and files begin with; in another process, with a class that is made there, if it still can be."""
    return nn.Module.__new__(_make_class(kind, rotation) if calls_rotary(kind) else kind)


def _with_global(function: Any, value: Any) -> FunctionType:
    """The function, and every function that wraps it, with NAME meaning ``value``."""
    if not isinstance(function, FunctionType):
        raise _NotRebuilt(f"its forward is wrapped in a {type(function).__name__}")
    inner = getattr(function, "__wrapped__", None)
    namespace, closure = function.__globals__, function.__closure__
    if inner is None:
        namespace = {**namespace, NAME: value}
        # By this name torch.compile would look for globals in the stock module, where NAME means the stock function.
        namespace.pop("__name__", None)
    else:
        rebuilt = _with_global(inner, value)
        cells = closure or ()
        if not any(_holds(cell, inner) for cell in cells):
            raise _NotRebuilt(f"its forward is wrapped by {function.__code__.co_name}, which hides what it calls")
        closure = tuple(CellType(rebuilt) if _holds(cell, inner) else cell for cell in cells)
    made = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(made, function)
    made.__kwdefaults__ = cast(Any, copy.copy(function.__kwdefaults__))
    del made.__dict__["__wrapped__"]  # by update_wrapper
    if inner is not None:
        made.__dict__["__wrapped__"] = rebuilt
    return made


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


def _globals_of(code: CodeType) -> Iterator[str]:
    yield from (one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a comprehension, a nested function
            yield from _globals_of(constant)
