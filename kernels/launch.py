"""What the launches of every op share: the device, the last dimension, and autograd's bookkeeping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, **args: Any) -> None:
    """Launch a kernel on the device of ``like``."""
    if like.is_cuda:
        with torch.cuda.device(like.device):  # Triton launches on the current device
            kernel[grid](**args)
    else:
        kernel[grid](**args)  # Triton's interpreter


def last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def power_of_2_from(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()  # Triton's own is not traced by torch.compile


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd must see a call with these inputs."""
    if forward_ad._current_level >= 0:  # a launch would drop the tangents without a word
        raise NotImplementedError("the triton backend has no forward-mode derivative; use_backend('reference') has")
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])


def mark_written(*tensors: Tensor) -> None:
    """Tell autograd, which sees no launch, that these were written."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if not tensor.is_inference():
                increment_version(tensor)


def apart_from(x: Tensor | None, written: Tensor) -> Tensor | None:
    """x, or a copy where it shares the memory of what is written while it is read."""
    if x is None or torch.compiler.is_compiling():  # a compiler keeps them apart
        return x
    return x.clone() if x.untyped_storage().data_ptr() == written.untyped_storage().data_ptr() else x
