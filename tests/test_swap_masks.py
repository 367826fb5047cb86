"""How attention reads the masks that transformers makes: mostly they are the causal rule and padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from neox_kernels.integrations import transformers_attention


def causal(q_len: int, k_len: int, offset: int = 0) -> Tensor:
    """(1, 1, q_len, k_len), for tokens behind `offset` cached ones."""
    return torch.ones(q_len, k_len, dtype=torch.bool).tril(offset)[None, None]


def read(mask: Tensor | None, batch: int, q_len: int, k_len: int) -> tuple[Any, int]:
    return transformers_attention._read(mask, batch, q_len, k_len, True)


@pytest.mark.parametrize("form", [torch.bool, torch.float32, torch.bfloat16])
def test_a_mask_that_is_the_causal_rule_and_padding_is_none(form: torch.dtype) -> None:
    padding = torch.arange(12)[None] >= torch.tensor([[0], [3], [5]])

    def formed(mask: Tensor) -> Tensor:
        if form == torch.bool:
            return mask
        return torch.zeros(mask.shape, dtype=form).masked_fill(~mask, torch.finfo(form).min)

    whole, length = read(formed(causal(12, 12)), 3, 12, 12)
    assert (whole.causal, whole.attn_mask, whole.key_padding_mask, length) == (True, None, None, 12)
    padded, _ = read(formed(causal(12, 12) & padding[:, None, None]), 3, 12, 12)
    assert padded.causal and padded.attn_mask is None and torch.equal(padded.key_padding_mask, padding)
    chunk, _ = read(formed(causal(4, 12, 8) & padding[:, None, None]), 3, 4, 12)
    assert chunk.causal and chunk.attn_mask is None and torch.equal(chunk.key_padding_mask, padding)
    static, length = read(formed(causal(4, 40, 8)), 3, 4, 40)  # 12 of 40 are filled
    assert (static.causal, static.attn_mask, static.key_padding_mask, length) == (True, None, None, 12)
    one, length = read(formed(causal(1, 40, 11)), 3, 1, 40)
    assert (one.attn_mask, length) == (None, 12)

    odd = causal(12, 12).clone()
    odd[..., 5, 2] = False
    other, _ = read(formed(odd), 3, 12, 12)
    assert not other.causal and other.attn_mask is not None
    if form != torch.bool:
        soft, _ = read(formed(causal(12, 12)).masked_fill(causal(12, 12), 0.5), 3, 12, 12)
        assert not soft.causal and soft.attn_mask is not None


def test_a_mask_is_read_once_for_all_layers_and_again_when_it_changes() -> None:
    mask = causal(5, 5).clone()
    first = read(mask, 1, 5, 5)
    assert read(mask, 1, 5, 5)[0] is first[0]
    assert read(mask.clone(), 1, 5, 5)[0] is not first[0]
    first = read(mask, 1, 5, 5)
    mask[..., 4, 0] = False
    assert read(mask, 1, 5, 5)[0] is not first[0] and not read(mask, 1, 5, 5)[0].causal


def test_no_mask_is_causal_from_the_first_key() -> None:
    prepared, length = read(None, 1, 4, 9)  # a static cache of 9 whose first 4 are these
    assert (prepared.causal, length) == (True, 4)
    prepared, length = read(None, 1, 1, 9)
    assert (prepared.causal, length) == (False, 9)
