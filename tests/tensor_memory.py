"""The memory of torch tensors as ptxsim sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def as_array(x: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor, of any dtype, with its strides."""
    x = x.detach()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


class FreshMemory(TorchDispatchMode):
    """Knows which memory torch handed out and nothing has written yet."""

    EMPTY = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        for value, described in zip(made, func._schema.returns, strict=False):
            if isinstance(value, Tensor) and (described.alias_info is None or described.alias_info.is_write):
                address = value.untyped_storage().data_ptr()
                if func.overloadpacket.__name__ in self.EMPTY:
                    self.addresses.add(address)
                else:
                    self.addresses.discard(address)
        return result

    def holds(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.addresses

    def written(self, x: Tensor) -> None:
        self.addresses.discard(x.untyped_storage().data_ptr())
