"""Tensors taken to another device as they lie in memory."""

from typing import Any

import torch
from torch import Tensor


def move(value: Any, device: str = "cuda") -> Any:
    """A copy on ``device``, through the whole memory behind a view, so that strides, 0 among them, where it begins and
    what lies around it come along. Of a dict or a list, each of its items."""
    if isinstance(value, Tensor):
        whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
        whole = whole.to(device, copy=True)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, dict):
        return {name: move(one, device) for name, one in value.items()}
    return [move(one, device) for one in value] if isinstance(value, list) else value
