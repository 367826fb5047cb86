"""What the checks of every op are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
INTEGERS = frozenset({torch.int32, torch.int64})


def shape_of(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def not_a_tensor(name: str, value: object) -> NoReturn:
    raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")


def require_flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, not {value!r}")


def require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def require_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} must be a float, not {type(value).__name__}")
    return value  # type: ignore[return-value]


def require_probability(name: str, value: object) -> None:
    if not 0 <= require_number(name, value) <= 1:
        raise ValueError(f"{name} must be between 0 and 1, not {value}")


def require_broadcast(
    name: str, mask: object, like: str, x: Tensor, shape: tuple[int, ...], dtypes: frozenset[torch.dtype]
) -> None:
    """A tensor that broadcasts to ``shape``, on the device of ``x``, which messages call ``like``."""
    if not isinstance(mask, Tensor):
        not_a_tensor(name, mask)
    if mask.dtype not in dtypes:
        known = ", ".join(sorted(str(one).removeprefix("torch.") for one in dtypes))
        raise TypeError(f"{name} must be one of {known} for {like} of {x.dtype}, not {mask.dtype}")
    if mask.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like {like}, not on {mask.device}")
    padded = (1,) * (len(shape) - mask.dim()) + tuple(mask.shape)
    if mask.dim() > len(shape) or any(have not in (1, want) for have, want in zip(padded, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to {shape}, which the shape {shape_of(mask)} does not")


def require_indices(name: str, value: object, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        not_a_tensor(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, not {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the activations, not on {value.device}")
    return value


def require_writable(name: str, x: Tensor) -> None:
    strides, shape = x.stride(), x.shape
    if shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{name} must have a contiguous last dimension to be written, not the stride {strides[-1]}")
    if 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, shape, strict=True)):
        raise ValueError(f"{name} must not be an expanded tensor to be written: its strides are {strides}")


def refuse(error: Exception, check: Callable[..., None], *args: object) -> NoReturn:
    """Raise what ``check`` says of the arguments of a call that failed; ``error`` itself, if it finds nothing wrong.

    The compiled ops check for themselves, in nanoseconds, and say little: the words are for those who need them.
    """
    try:
        check(*args)
        raise error
    except Exception as raised:
        if raised is not error:
            raised.__suppress_context__ = True  # one story, not two
        raise
    finally:
        del error  # it holds the frames that hold it
