"""``_C.so``: loading it, what it was built with, and what its callers share.

The library is on PyTorch's stable ABI: no Python and no ATen, so one binary serves every Python and every torch from
2.10 on.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

_FOLDER = Path(__file__).parent.parent


def _read_build_config() -> dict[str, Any]:
    path = _FOLDER / "_build_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return config


def _load() -> str | None:
    """Load the library; why it could not be, or None."""
    library = _FOLDER / "_C.so"
    if not library.exists():
        return f"this installation has no compiled library ({build_config.get('ext_reason') or 'it was not built'})"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        # torch wraps the loader's own words, which name the symbol or the file that is missing.
        reason = f"the compiled library does not load: {error.__cause__ or error}"
        warnings.warn(f"neox_kernels: {reason}; other backends serve instead", stacklevel=2)
        return reason
    return None


build_config = _read_build_config()
load_error = _load()


def find_op(name: str, overload: str = "default") -> Any:
    """``torch.ops.neox_kernels.<name>.<overload>``, or None without library. Looked up once: it costs 0.3 us."""
    return None if load_error is not None else getattr(getattr(torch.ops.neox_kernels, name), overload)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd must see a call with these inputs."""
    if forward_ad._current_level >= 0:  # a library op would drop the tangents without a word
        raise NotImplementedError("the compiled backend has no forward-mode derivative; use_backend('reference') has")
    return torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


def mark_written(*tensors: Tensor) -> None:
    """Tell autograd that these were written: the dispatcher does not for ops of a library."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if not tensor.is_inference():
                increment_version(tensor)


def same_place(*args: Any) -> None:
    """For fakes: a call with a meta tensor among real ones ends up there, where nothing would be computed."""
    places = {arg.device for arg in args if isinstance(arg, Tensor)}
    if len(places) > 1:
        raise ValueError(f"all tensors must be on one device, not on {', '.join(sorted(map(str, places)))}")
