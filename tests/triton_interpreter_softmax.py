"""Run by test_triton_interpreter.py under TRITON_INTERPRET=1: the Triton softmax against the oracle, on CPU tensors.

Only float32 and float16: the interpreter's bfloat16 truncates. Every output buffer is NaN before it is written.
"""

import itertools

import pytest
import torch
from softmax_calls import Case, check

from neox_kernels import kernels
from neox_kernels.kernels import softmax, softmax_backward
from neox_kernels.kernels.softmax import block_sizes

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN

SHAPES = [
    (2, 3, 1, 1), (1, 2, 1, 31), (2, 1, 31, 31), (1, 2, 33, 31), (1, 1, 5, 1000), (1, 2, 2, 2049), (1, 1, 2, 8200),
    (2, 2, 0, 5), (2, 2, 5, 0), (0, 2, 3, 4),
]  # fmt: skip
FEATURES = [
    {}, {"causal": False, "scale": -2.0}, {"padding": "rows"}, {"padding": "strided", "view": "heads_last"},
    {"padding": "hidden", "view": "slice"}, {"mask": "bool_full"}, {"mask": "bool_keys", "causal": False},
    {"mask": "bool_strided"}, {"mask": "float_full", "view": "expanded"}, {"mask": "float_queries"},
    {"mask": "float_strided", "view": "strided"}, {"mask": "lowest"}, {"head_mask": "flat"},
    {"head_mask": "full", "dropout_p": 0.3}, {"head_mask": "row", "mask": "float_keys"},
    {"dropout_p": 0.5, "view": "unaligned"}, {"dropout_p": 1.0}, {"special": "nan"},
    {"special": "nan", "dropout_p": 0.4}, {"special": "inf", "causal": False},
    {"special": "-inf", "padding": "rows", "mask": "float_full", "dropout_p": 0.1},
    {"out_dtype": torch.float16, "padding": "rows"}, {"out_dtype": torch.float32, "dropout_p": 0.2},
]  # fmt: skip


def check_many_rows(dtype: torch.dtype) -> None:
    """Several share a program, of which the last is not full, and the upper ones take the narrow half of a tile."""
    check(Case((1, 2, 21, 40), dtype, dropout_p=0.2, mask="float_full"), kernels.causal_softmax)
    for module in (softmax, softmax_backward):
        module.block_sizes = lambda *lengths: {**block_sizes(*lengths), "HALVE": True}  # as with many rows of 1024
    check(Case((1, 2, 45, 45), dtype, padding="rows"), kernels.causal_softmax)
    check(Case((1, 2, 45, 48), dtype, special="nan", dropout_p=0.2), kernels.causal_softmax)
    for module in (softmax, softmax_backward):
        module.block_sizes = block_sizes


def check_refusals() -> None:
    x = torch.randn(1, 1, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad(kernels.causal_softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()
    with pytest.raises(ValueError, match="inplace"):
        kernels.causal_softmax(x, inplace=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        kernels.causal_softmax(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))


def main() -> None:
    cases = 0
    for dtype, (i, shape), (j, features) in itertools.product(
        (torch.float32, torch.float16), enumerate(SHAPES), enumerate(FEATURES)
    ):
        # Everything with everything would take minutes: every shape meets a sixth of the features in each dtype.
        if (i + j + 3 * (dtype == torch.float16)) % 6 == 0:
            check(Case(shape, dtype, **features), kernels.causal_softmax)
            cases += 1
    check_many_rows(torch.float16)
    check_refusals()
    print(f"{cases} cases")


if __name__ == "__main__":
    main()
