"""The attention layers of transformers' GPT-NeoX and GPT-J, of 4.57 and 5.x, with the fused ops in the stock wiring."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.activations import NewGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.gptj import modeling_gptj as gptj

from neox_kernels import apply_rotary_qk, gelu_tanh
from neox_kernels.integrations.transformers_attention import NAME, attend
from neox_kernels.models.forward import watched

# What 4.57 still has and 5.x dropped, asked of the installed classes once.
_FORWARD_PARAMETERS = inspect.signature(gpt_neox.GPTNeoXAttention.forward).parameters
_CACHE_TAKES_ROTARY = "cache_position" in _FORWARD_PARAMETERS
_NOT_PASSED_ON = tuple(name for name in ("cache_position", "output_attentions") if name in _FORWARD_PARAMETERS)
_GPTJ_HEAD_MASK = "head_mask" in inspect.signature(gptj.GPTJAttention._attn).parameters
_INTERFACE_HAS_DEFAULT = hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface")


class FusedGPTNeoXAttention(gpt_neox.GPTNeoXAttention):
    """GPTNeoXAttention with the fused ops: q and k are read from the packed projection as they lie."""

    fuses_attention = True

    def forward(  # type: ignore[override,unused-ignore]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch_seqlen = hidden_states.shape[:-1]
        qkv = self.query_key_value(hidden_states).view(*batch_seqlen, -1, 3 * self.head_size).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        cos, sin = position_embeddings
        # Under autocast the projection is bfloat16 and cos float32: the stock multiplication then gives float32, and so
        # do the cache and the probabilities.
        dtype = torch.promote_types(q.dtype, cos.dtype)
        # (1 or batch, seqlen, rotary_dim): the second half repeats the first.
        c, s = (table[..., : table.shape[-1] // 2].to(dtype) for table in (cos, sin))
        q, k = apply_rotary_qk(q.to(dtype), k.to(dtype), c, s, layout="bhsd")

        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx, *_cache_arguments(cos, sin, self.rotary_ndims, kwargs))
        give = bool(kwargs.get("output_attentions"))
        for name in _NOT_PASSED_ON:
            kwargs.pop(name, None)
        dropout = self.attention_dropout if self.training else 0.0
        asked = self.config._attn_implementation
        if self.fuses_attention and asked in ("eager", "sdpa"):
            # As in stock, eager has probabilities for whoever looks.
            attended, probabilities = attend(
                self,
                q,
                k,
                v,
                attention_mask,
                scaling=self.scaling,
                dropout=dropout,
                implementation="fused" if asked == "eager" else "auto",
                output_attentions=give or asked == "eager",
                head_mask=kwargs.get("head_mask"),
            )
        else:
            if asked == NAME:
                kwargs["output_attentions"] = give
            attended, probabilities = _attention_function(asked)(
                self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
            )
        return self.dense(attended.reshape(*batch_seqlen, -1).contiguous()), probabilities


class FusedGPTJAttention(gptj.GPTJAttention):
    """GPTJAttention with the fused ops: the table is read by position as it lies, and heads come first at once."""

    fuses_attention = True

    def forward(  # type: ignore[override,unused-ignore]
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            self._split_heads(projection(hidden_states), self.num_attention_heads, self.head_dim, False)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        table: Tensor = self.embed_positions
        if table.device != q.device:  # 4.57 keeps it as a plain tensor, which .to(device) does not move
            self.embed_positions = table = table.to(q.device)  # type: ignore[assignment]
        if table.dtype not in (torch.float32, q.dtype):
            table = table.float()
        sin, cos = table.chunk(2, dim=-1)  # (max_position, rotary_dim / 2) each
        q, k = apply_rotary_qk(q, k, cos, sin, interleaved=True, position_ids=position_ids, layout="bhsd")

        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx, *_cache_arguments(cos, sin, self.rotary_dim, kwargs))
        head_mask = kwargs.get("head_mask")
        if not self.fuses_attention and self.config._attn_implementation != NAME:
            attended, probabilities = self._attn(q, k, v, attention_mask, *((head_mask,) if _GPTJ_HEAD_MASK else ()))
            merged = self._merge_heads(attended, self.num_attention_heads, self.head_dim)
            return self.resid_dropout(self.out_proj(merged)), probabilities
        attended, probabilities = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=self.attn_dropout,
            output_attentions=bool(kwargs.get("output_attentions")) or watched(self),
            head_mask=head_mask,
            upcast_scores=True,
        )
        return self.resid_dropout(self.out_proj(attended.flatten(2))), probabilities


class FusedNewGELUActivation(NewGELUActivation):
    """GPT-J's activation in one pass, where the stock one takes eight."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu_tanh(input)


def _cache_arguments(cos: Tensor, sin: Tensor, rotary_dim: int, kwargs: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """What a cache of 4.57 is told beside keys and values; its static cache writes at ``cache_position``."""
    if not _CACHE_TAKES_ROTARY:
        return ()
    position = kwargs.get("cache_position")
    return ({"sin": sin, "cos": cos, "partial_rotation_size": rotary_dim, "cache_position": position},)


def _attention_function(implementation: str) -> Any:
    functions, eager = ALL_ATTENTION_FUNCTIONS, gpt_neox.eager_attention_forward
    if _INTERFACE_HAS_DEFAULT:
        return functions.get_interface(implementation, eager)
    return eager if implementation == "eager" else functions[implementation]
