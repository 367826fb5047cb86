"""Attention of one layer: q, k and v as slices of a packed projection, k and v of a cache where q is shorter."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from neox_kernels import attention, explain_attention, prepare_attention
from neox_kernels.bench.case import Case, Family, Work
from neox_kernels.bench.harness import Call
from neox_kernels.testing import error_budget, max_error, packed_qkv, to_float64

Heads = tuple[int, int]  # nheads, head_dim
SMALL = 1 << 20  # scores


class Attend(Work):
    """Causal, without padding: prefill, and decoding behind a cache."""

    signature = """function(q, k, v, *, key_padding_mask) -> out, (batch, q_len, nheads, head_dim)
    q: (batch, q_len, nheads, head_dim), k, v: (batch, k_len, ...), slices; causal, the last query sees all keys;
    key_padding_mask: (batch, k_len) bool, True is seen, or None"""
    probabilities = False

    def __init__(self, case: Case, shape: Heads) -> None:
        super().__init__(case, shape)
        self.batch, self.q_len, self.k_len = case.size
        q, k, v = packed_qkv(self.batch, self.k_len, *shape, case.dtype, device=case.device)
        q = q[:, self.k_len - self.q_len :]
        if self.q_len < self.k_len:
            k, v = (torch.cat((x, x[:, :64]), dim=1)[:, : self.k_len] for x in (k, v))  # of a cache that has room
        self.args, self.options = (q, k, v), {"key_padding_mask": self.padding()}
        self.masks = prepare_attention(self.q_len, self.k_len, self.padding())
        nheads, head_dim = shape
        self.bytes = (2 * self.q_len + 2 * self.k_len) * self.batch * nheads * head_dim * case.dtype.itemsize
        seen = self.q_len * self.k_len - self.q_len * (self.q_len - 1) // 2  # by the causal rule
        self.flops = 4 * self.batch * nheads * head_dim * seen

    def padding(self) -> Tensor | None:
        return None

    def by(self, implementation: str) -> Call:
        options: dict[str, Any] = {"implementation": implementation, "prepared": self.masks}
        options["output_attentions"] = self.probabilities

        def call(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Any:
            out, probs = attention(q, k, v, **options)
            return (out, probs) if self.probabilities else out

        return self.call_of(call)

    def ours(self) -> Call:
        return self.by("auto")

    def variants(self) -> dict[str, Call]:
        if self.probabilities:
            return {}
        names = ["sdpa", "fused"]
        if explain_attention(*self.args, prepared=self.masks).implementation == "flash_attention_2":
            names.append("flash_attention_2")
        return {f"neox_kernels, {name}": self.by(name) for name in names}

    def peers(self) -> dict[str, Callable[[], Call]]:
        peers: dict[str, Callable[[], Call]] = {"transformers": self._transformers}
        if not self.probabilities:
            peers |= {"sdpa": self._sdpa, "flash-attn": self._flash_attn}
        return peers

    def limits(self) -> dict[str, Call]:
        """The two products, into memory that is there. Without a mask they take all keys: twice what causal needs."""
        q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in self.args)
        scores = torch.empty(*q.shape[:2], self.k_len, dtype=q.dtype, device=q.device)
        out = torch.empty_like(q)

        def call() -> None:
            torch.bmm(q, k.mT, out=scores)
            torch.bmm(scores, v, out=out)

        return {"matrix products": call}

    def mask(self) -> Tensor:
        """What a query sees: (batch or 1, 1, q_len, k_len)."""
        every = torch.ones(1, 1, self.q_len, self.k_len, dtype=torch.bool, device=self.case.device)
        seen, padding = every.tril(self.k_len - self.q_len), self.padding()
        return seen if padding is None else seen & padding[:, None, None]

    def _transformers(self) -> Call:
        """transformers' eager function, with the mask that its model makes once for all layers."""
        from transformers.models.gpt_neox.modeling_gpt_neox import eager_attention_forward

        lowest = torch.finfo(self.case.dtype).min
        mask = torch.where(self.mask(), 0.0, lowest).to(self.case.dtype)
        module: Any = SimpleNamespace(training=False)
        scale = self.shape[1] ** -0.5

        def call(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out, probs = eager_attention_forward(module, q, k, v, mask, scaling=scale)
            return (out, probs) if self.probabilities else out

        return self.call_of(call)

    def _sdpa(self) -> Call:
        """torch's own: causal where its rule (aligned at the top left) is this one, else a mask made once."""
        square = self.q_len == self.k_len and self.padding() is None
        mask = None if square or (self.q_len == 1 and self.padding() is None) else self.mask()

        def call(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square).transpose(1, 2)

        return self.call_of(call)

    def _flash_attn(self) -> Call:
        from flash_attn import flash_attn_func

        return self.call_of(lambda q, k, v, **_: flash_attn_func(q, k, v, causal=True))

    def check(self, result: Any) -> None:
        out = result[0] if self.probabilities else result
        scores = self.batch * self.shape[0] * self.q_len * self.k_len
        # All of a small case, of a large one two heads: the oracle in float64 takes eight times the memory.
        batch, heads = (self.batch, self.shape[0]) if scores <= SMALL else (1, 2)
        few = [x[:batch, :, :heads] for x in self.args]
        padding = self.padding()
        options: dict[str, Any] = {"implementation": "eager"}
        options["key_padding_mask"] = None if padding is None else padding[:batch]
        truth, same = attention(*to_float64(few), **options)[0], attention(*few, **options)[0]
        seen = self.mask()[:batch, 0].any(-1).expand(batch, -1)  # of a query that sees no key others give anything
        error = max_error(out[:batch, :, :heads][seen], truth[seen])
        # torch's kernels on a GPU keep less of float32 than its eager code.
        budget = error_budget(same[seen], truth[seen]) * (1 if self.case.device == "cpu" else 2)
        if not error <= budget:
            raise AssertionError(f"{self.case}: error {error:.3g}, above the budget of {budget:.3g}")


class Padded(Attend):
    """Padding on the left, of a quarter of the keys on average."""

    def padding(self) -> Tensor:
        start = torch.arange(self.batch) * self.k_len // (2 * self.batch)
        return (torch.arange(self.k_len) >= start[:, None]).to(self.case.device)

    def _flash_attn(self) -> Call:
        from flash_attn import flash_attn_varlen_func
        from flash_attn.bert_padding import pad_input, unpad_input

        padding = self.padding()

        def call(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            unpadded = [unpad_input(x, padding) for x in (q, k, v)]
            _, indices, cu_seqlens, longest = unpadded[0][:4]
            tokens = (x[0] for x in unpadded)
            out = flash_attn_varlen_func(*tokens, cu_seqlens, cu_seqlens, longest, longest, causal=True)
            padded: Tensor = pad_input(out, indices, self.batch, self.q_len)
            return padded

        return self.call_of(call)


class Probabilities(Attend):
    """With the probabilities, as those need them who study a model."""

    signature = ""
    probabilities = True


PREFILL = ((1, 128, 128), (1, 512, 512), (4, 512, 512), (1, 2048, 2048), (1, 128, 1024))
DECODE = ((1, 1, 128), (1, 1, 1024), (8, 1, 1024), (1, 1, 8192))
SQUARES = ((1, 128, 128), (1, 512, 512), (4, 512, 512), (1, 2048, 2048))
FAMILY = Family(
    name="attention",
    op="causal_softmax",
    works={"prefill": Attend, "padded": Padded, "decode": Attend, "probabilities": Probabilities},
    shapes={"pythia-160m": (12, 64), "pythia-1.4b": (16, 128), "gpt-j-6b": (16, 256)},
    sizes={
        "prefill": PREFILL,
        "padded": ((4, 128, 128), (4, 512, 512)),
        "decode": DECODE,
        "probabilities": SQUARES,
    },
    size_names=("batch", "q_len", "k_len"),
    eager="transformers",
    quick=lambda case: case.shape == "pythia-160m" and 2048 not in case.size and 8192 not in case.size,
    fits=lambda case: case.kind != "padded" or case.size[1] == case.size[2],
    rounds=7,
)
