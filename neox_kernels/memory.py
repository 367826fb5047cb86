"""Memory for results that are too large for what the allocator has at hand.

Such memory comes from the system anew at every call, and on a CPU a page of 4 KB that is written first costs a fault: a
language model's logits, (2048, 50304) in bfloat16, take a third longer for it. Pages of 2 MB make the faults few.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 8 << 20  # bytes
_HUGE_PAGE = 2 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, where it is large in pages of 2 MB if the system has them.

    Not to be called under torch.compile, which has no addresses.
    """
    x = torch.empty(shape, dtype=dtype, device="cpu")
    advise = _madvise()
    if advise is not None and x.nbytes >= LARGE:
        first = -(-x.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        last = (x.data_ptr() + x.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        advise(first, last - first, mmap.MADV_HUGEPAGE)  # advice: a refusal changes nothing
    return x


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's, where there is such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
