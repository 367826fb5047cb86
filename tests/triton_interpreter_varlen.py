"""Run by test_triton_interpreter.py under TRITON_INTERPRET=1: the Triton unpad and pad on CPU tensors.

They move bytes, so they must agree with the oracle bit by bit, in every dtype.
"""

import itertools

import torch
from torch import Tensor

from neox_kernels import kernels, reference
from neox_kernels.kernels import varlen, varlen_autograd

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN, or the largest integer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)
MASK_DTYPES = (torch.bool, torch.int64, torch.uint8, torch.float16)
# batch, seqlen, and the share of tokens
SHAPES = [(3, 7, 0.5), (1, 1, 1.0), (4, 9, 0.0), (2, 40, 0.7), (0, 4, 1.0), (3, 0, 1.0)]
TRAILING = [(), (1,), (3,), (40,), (2, 24), (300,), (3, 0)]


def rand(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-90, 90, shape).to(dtype)


def views(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "packed": rand((3, 7, 4, 72), dtype)[..., 24:48],
        "heads first": rand((3, 4, 7, 24), dtype).transpose(1, 2),
        "tokens first": rand((7, 3, 4, 24), dtype).transpose(0, 1),
        "odd offset": rand((3 * 7 * 4 * 24 + 1,), dtype)[1:].view(3, 7, 4, 24),
        "expanded": rand((3, 7, 1, 24), dtype).expand(3, 7, 4, 24),
        "expanded batch": rand((1, 7, 4, 24), dtype).expand(3, 7, 4, 24),
        "stride 2": rand((3, 7, 4, 48), dtype)[..., ::2],
        "last dim first": rand((24, 3, 7, 4), dtype).permute(1, 2, 3, 0),
    }


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def check_metadata(shape: tuple[int, int, float], dtype: torch.dtype) -> None:
    batch, seqlen, share = shape
    mask = (torch.rand(batch, 2 * seqlen) < share).to(dtype)[:, ::2]
    total = int((mask != 0).sum())
    for capacity in (None, total + 5, max(total - 3, 0)):
        expected = reference.varlen_metadata(mask, capacity)
        for actual, wanted in zip(kernels.varlen_metadata(mask, capacity), expected, strict=True):
            assert equal(actual, wanted), (shape, dtype, capacity)


def check_there_and_back(shape: tuple[int, int, float]) -> None:
    batch, seqlen, share = shape
    mask = torch.rand(batch, seqlen) < share
    indices, _, inverse, _ = reference.varlen_metadata(mask, int(mask.sum()) + 3)
    tensors = [rand((batch, seqlen, *trailing), dtype) for trailing, dtype in zip(TRAILING, DTYPES, strict=True)]
    unpadded = kernels.unpad_input(tensors, indices, inverse)
    padded = kernels.pad_input(unpadded, indices, inverse)
    for x, y, z in zip(tensors, unpadded, padded, strict=True):
        assert equal(y, reference.unpad_input([x], indices, inverse)[0]), (shape, x.shape)
        assert equal(z, reference.pad_input([y], indices, inverse)[0]), (shape, x.shape)


def check_views(dtype: torch.dtype) -> None:
    indices, _, inverse, _ = reference.varlen_metadata(torch.rand(3, 7) < 0.6)
    for name, x in views(dtype).items():
        assert equal(kernels.unpad_input([x], indices, inverse)[0], reference.unpad_input([x], indices, inverse)[0]), (
            name
        )
        rows = torch.tensor([2, 2, 0], dtype=torch.int32)
        assert equal(kernels.index_first_axis(x, rows), x[rows.long()]), name


def check_gradients() -> None:
    indices, _, inverse, _ = reference.varlen_metadata(torch.rand(3, 7) < 0.6, 17)
    x, ids = torch.randn(3, 7, 4, 6, requires_grad=True), torch.arange(21).view(3, 7)
    grad = torch.randn(17, 4, 1).expand(17, 4, 6).requires_grad_()
    results = []
    for backend in (kernels, reference):
        y, i = backend.unpad_input([x, ids], indices, inverse)
        (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
        z = backend.pad_input([y * 2], indices, inverse)[0]
        results.append((y, i, dx, z, *torch.autograd.grad((dx.sin().sum(), z.sin().sum()), (grad, x))))
        results[-1] += torch.autograd.grad(backend.index_first_axis(x, torch.tensor([2, 2])).sin().sum(), x)
    for actual, wanted in zip(*results, strict=True):
        assert equal(actual.detach(), wanted.detach())


def check_what_is_no_row_gives_zeros() -> None:
    x = torch.ones(4, 5)
    y = kernels.index_first_axis(x, torch.tensor([3, -1, 4, 2**40, -(2**62), 0]))
    assert y.sum(1).tolist() == [5, 0, 0, 0, 0, 5]


def check_one_program_takes_all_columns() -> None:
    x, indices = torch.randn(9, 3, 1100), torch.tensor([8, -1, 3])
    out = torch.full((3, 3, 1100), torch.nan)
    grid, args, constants = varlen.plan_launch((x[:, :, :1098],), (out[..., :1098].contiguous(),), indices, 1)
    assert grid[1] > 1
    varlen._gather_kernel[(grid[0], 1)](**args, **constants)
    wanted = torch.stack((x[8], torch.zeros(3, 1100), x[3]))[..., :1098]
    assert torch.equal(args["out_0_ptr"], wanted)


def check_values_that_are_no_mask() -> None:
    facts = kernels.varlen_metadata(torch.tensor([[0.0, -0.0, 1.0], [2.0, torch.nan, -1e9]]))[3]
    assert facts.tolist() == [4, 3, 3]


def main() -> None:
    torch.manual_seed(0)
    varlen_autograd._BLOCK = 32  # so that these sizes are several blocks
    for shape, dtype in zip([*SHAPES, (40, 2, 0.5)], itertools.cycle(MASK_DTYPES)):
        check_metadata(shape, dtype)
    for shape in SHAPES:
        check_there_and_back(shape)
    for dtype in (torch.bfloat16, torch.int8):
        check_views(dtype)
    check_gradients()
    check_what_is_no_row_gives_zeros()
    check_one_program_takes_all_columns()
    check_values_that_are_no_mask()


if __name__ == "__main__":
    main()
