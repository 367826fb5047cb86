"""The memory of torch tensors as ptxsim sees it."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from ptxsim import Buffer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MAP_NORESERVE = 0x4000  # Linux's, which not every Python names


def as_array(x: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor, of any dtype, with its strides."""
    x = x.detach()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


class FreshMemory(TorchDispatchMode):
    """Knows which bytes torch handed out and nothing has written yet. Host code counts as writing whole tensors."""

    EMPTY = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, np.ndarray[Any, Any]] = {}  # by address of the memory, of each of its bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        for value, described in zip(made, func._schema.returns, strict=False):
            if isinstance(value, Tensor) and (described.alias_info is None or described.alias_info.is_write):
                memory = value.untyped_storage()
                if func.overloadpacket.__name__ in self.EMPTY:
                    self.written[memory.data_ptr()] = np.zeros(memory.nbytes(), bool)
                else:
                    self.written.pop(memory.data_ptr(), None)
        return result

    def buffer(self, x: Tensor) -> Buffer:
        written = self.written.get(x.untyped_storage().data_ptr())
        if written is None:
            return Buffer(as_array(x))
        size = x.element_size()
        strides = [stride * size for stride in x.stride()]
        of_x = np.lib.stride_tricks.as_strided(written[x.storage_offset() * size :], (*x.shape, size), (*strides, 1))
        return Buffer(as_array(x), of_x)


def far_apart(x: Tensor, distance: int = 2**31 + 16) -> Tensor:
    """A copy of x whose items along dimension 0 lie ``distance`` elements apart; what is between costs no memory."""
    size = ((len(x) - 1) * distance + x[0].numel()) * x.element_size()
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    strides = (distance, *x[0].contiguous().stride())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)
