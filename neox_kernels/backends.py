"""Which backend serves which op on which device, and why each other does not.

A backend is a module; its implementation of an op is its function of that name. A module also has ``DTYPES``;
``unavailable(device_type)``, which gives the reason why it cannot serve a device, or None; and, if its functions refuse
bad input by themselves there, before anything is touched, the device in ``CHECKS_ITSELF``. Its ops that serve CPUs
alone are in ``CPU_ONLY``. To add a backend, write such a module and add a line to ``MODULES``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

# In the order of preference.
MODULES = {
    "compiled": "neox_kernels.compiled",
    "triton": "neox_kernels.kernels",
    "reference": "neox_kernels.reference",
}
OPS = (
    "apply_rotary",
    "apply_rotary_qk",
    "apply_rotary_kv_append",
    "causal_softmax",
    "causal_attention",
    "varlen_metadata",
    "unpad_input",
    "pad_input",
    "index_first_axis",
    "gelu_tanh",
)
DEVICES = ("cpu", "cuda")

Implementation = Callable[..., Any]

# What select() answers from: filled ahead, so that torch.compile sees a plain dictionary lookup. A ContextVar or an
# import inside the call would break its graph.
_table: dict[tuple[str, str, Any], tuple[Implementation, bool]] = {}
_forced: str | None = os.environ.get("NEOX_KERNELS_BACKEND") or None


def select(op: str, device_type: str, dtype: Any) -> tuple[Implementation, bool]:
    """The implementation of ``op`` for tensors of that device and dtype, and whether it checks its arguments itself.

    The dtype of an op that only moves bytes is None: any.
    """
    found = _table.get((op, device_type, dtype))
    return found if found is not None else _resolve(op, device_type, dtype)


def _module(name: str) -> ModuleType | str:
    """The backend's module, or which of its requirements is not installed. Any other failure to import is raised."""
    try:
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("neox_kernels"):
            raise
        return f"{error.name} is not installed"


def _reason(name: str, op: str, device_type: str, dtype: Any = None) -> str | None:
    """Why the backend cannot serve the call, or None when it can."""
    if name == "triton" and device_type != "cuda":
        return "triton serves GPUs only"  # said without importing it
    module = _module(name)
    if isinstance(module, str):
        return module
    reason: str | None = module.unavailable(device_type)
    if reason is None and (not hasattr(module, op) or (device_type != "cpu" and op in getattr(module, "CPU_ONLY", ()))):
        reason = f"it does not have {op} on {device_type}"
    if reason is None and dtype is not None and dtype not in module.DTYPES:
        reason = f"it does not serve {dtype}"
    return reason


def _candidates() -> Iterable[str]:
    if _forced is None:
        return MODULES
    if _forced not in MODULES:
        raise ValueError(
            f"the backend must be one of {', '.join(MODULES)}, not {_forced!r} (NEOX_KERNELS_BACKEND or use_backend)"
        )
    return (_forced,)


def _resolve(op: str, device_type: str, dtype: Any) -> tuple[Implementation, bool]:
    reasons = []
    for name in _candidates():
        reason = _reason(name, op, device_type, dtype)
        if reason is None:
            module = importlib.import_module(MODULES[name])
            found = getattr(module, op), device_type in getattr(module, "CHECKS_ITSELF", ())
            _table[op, device_type, dtype] = found
            return found
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend can serve {op} for {dtype or 'any dtype'} on {device_type} ({'; '.join(reasons)})")


def fill(device_types: Iterable[str]) -> None:
    """Resolve every op ahead of its first call, for all that can be served."""
    reference = importlib.import_module(MODULES["reference"])
    _table.clear()
    if _forced is not None and _forced not in MODULES:
        return  # the first call says so
    for device_type in device_types:
        for op in OPS:
            for dtype in (*reference.DTYPES, None):
                if any(_reason(name, op, device_type, dtype) is None for name in _candidates()):
                    _resolve(op, device_type, dtype)


class use_backend:
    """Serve every call by one backend, until changed or until the ``with`` block ends. Process-wide.

    Args:
        name: "compiled", "triton" or "reference"; None for the automatic choice.

    A call that the backend cannot serve raises; it never goes to another one.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in MODULES:
            raise ValueError(f"name must be one of {', '.join(MODULES)} or None, not {name!r}")
        self._previous = _forced
        self._set(name)

    @staticmethod
    def _set(name: str | None) -> None:
        global _forced
        devices = {device_type for _, device_type, _ in _table} | {"cpu"}
        _forced = name
        fill(devices)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(self._previous)


@dataclass(frozen=True)
class Choice:
    """Who serves an op on a device: ``backend`` (None: no one), and the reason of every other, by name."""

    op: str
    device: str
    backend: str | None
    reasons: dict[str, str]


class Explanation(list[Choice]):
    """What :func:`explain` gives: a list of :class:`Choice` that prints as a table."""

    def __str__(self) -> str:
        same: dict[tuple[str, str | None, tuple[tuple[str, str], ...]], list[str]] = {}
        for choice in self:
            same.setdefault((choice.device, choice.backend, tuple(choice.reasons.items())), []).append(choice.op)
        lines = []
        for (device, backend, reasons), ops in same.items():
            lines.append(f"{', '.join(ops)} on {device}: {backend or 'NO BACKEND'}")
            lines.extend(f"    not {name}: {reason}" for name, reason in reasons)
        return "\n".join(lines)


def explain(op: str | None = None, device: str | None = None) -> Explanation:
    """Say which backend serves every op (or one) on every device type (or one), and why each other does not.

    Args:
        op: a name of ``backends.OPS``, such as "apply_rotary"; None for all.
        device: a device type, such as "cuda"; None for "cpu" and "cuda".

    Returns:
        One :class:`Choice` for each op and device type, in a list that prints as text.

    Raises:
        ValueError: ``op`` is not known.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, not {op!r}")
    rows = Explanation()
    for device_type in (device,) if device else DEVICES:
        for name in (op,) if op else OPS:
            backend, reasons = None, {}
            for candidate in MODULES:
                reason = _reason(candidate, name, device_type)
                if reason is None and _forced not in (None, candidate):
                    reason = f"{_forced} is forced"
                if reason is None and backend is not None:
                    reason = f"{backend} comes first"
                if reason is None:
                    backend = candidate
                else:
                    reasons[candidate] = reason
            rows.append(Choice(name, device_type, backend, reasons))
    return rows
