"""flash_attn.bert_padding's names on our ops: its results, by plain indexing."""

import inspect

import pytest
import torch

from neox_kernels import use_backend
from neox_kernels.integrations import flash_attn

MASK = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
UNUSED = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]])


def test_arguments_are_flash_attns() -> None:
    names = {name: list(inspect.signature(getattr(flash_attn, name)).parameters) for name in flash_attn.__all__}
    assert names["unpad_input"] == ["hidden_states", "attention_mask", "unused_mask"]
    assert names["pad_input"] == ["hidden_states", "indices", "batch", "seqlen"]
    assert names["unpad_input_for_concatenated_sequences"] == ["hidden_states", "attention_mask_in_length"]
    assert names["index_put_first_axis"] == ["values", "indices", "first_axis_dim"]
    assert len(names["index_first_axis"]) == 2


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("unused", [False, True])
def test_unpad_and_pad(unused: bool, dtype: torch.dtype, backend: str | None) -> None:
    x = torch.randn(3, 5, 2, 4, requires_grad=True)
    both = MASK + UNUSED if unused else MASK
    with use_backend(backend):
        y, indices, cu_seqlens, longest, used = flash_attn.unpad_input(
            x, MASK.to(dtype), UNUSED.to(dtype) if unused else None
        )
        z = flash_attn.pad_input(y * 2, indices, 3, 5)
    assert indices.dtype == torch.int64 and cu_seqlens.dtype == used.dtype == torch.int32 and type(longest) is int
    assert torch.equal(y, x[both.bool()]) and torch.equal(indices, both.flatten().nonzero().flatten())
    assert cu_seqlens.tolist() == ([0, 3, 7, 8] if unused else [0, 2, 5, 5]) and longest == (4 if unused else 3)
    assert used.tolist() == [2, 3, 0]
    assert torch.equal(z, 2 * x * both[..., None, None])
    (dx,) = torch.autograd.grad(z, x, torch.ones_like(z))
    assert torch.equal(dx, 2.0 * both[..., None, None].expand_as(x))


def test_a_token_that_is_also_unused_raises() -> None:
    with pytest.raises(ValueError, match="attention_mask must hold only 0 and 1, not 2"):
        flash_attn.unpad_input(torch.randn(3, 5), MASK, MASK)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_concatenated_sequences(dtype: torch.dtype) -> None:
    lengths = torch.tensor(
        [[2, 3, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]], dtype=dtype
    )
    x = torch.randn(4, 6, 3)
    y, indices, cu_seqlens, longest = flash_attn.unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(y, torch.cat((x[0, :5], x[1], x[3, :4])))
    assert indices.tolist() == [*range(5), *range(6, 12), *range(18, 22)] and longest == 4
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 2, 5, 8, 10, 11, 15]
    assert flash_attn.unpad_input_for_concatenated_sequences(x, lengths * 0)[3] == 0


def test_index_functions() -> None:
    x, indices = torch.randn(6, 3, requires_grad=True), torch.tensor([5, 0, 2])
    assert torch.equal(flash_attn.index_first_axis(x, indices), x[indices])
    y = flash_attn.index_put_first_axis(x[:3], indices, 7)
    expected = torch.zeros(7, 3)
    expected[indices] = x[:3].detach()
    assert torch.equal(y, expected)
    (dx,) = torch.autograd.grad(y.sin().sum(), x)
    assert torch.equal(dx[:3], x[:3].cos()) and not dx[3:].any()
