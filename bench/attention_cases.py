"""What the attention benchmarks run: one layer's attention by each implementation, checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from neox_kernels import attention, explain_attention, prepare_attention
from neox_kernels.testing import error_budget, max_error, packed_qkv, to_float64

OP = "causal_softmax"  # whose backend the report names
HEADS = {"pythia-160m": (12, 64), "pythia-1.4b": (16, 128), "gpt-j-6b": (16, 256)}
PREFILL = ((1, 128, 128), (1, 512, 512), (4, 512, 512), (1, 2048, 2048), (1, 128, 1024))
DECODE = ((1, 1, 128), (1, 1, 1024), (8, 1, 1024), (1, 1, 8192))
PADDED = ((4, 128, 128), (4, 512, 512))
DTYPES = (torch.float32, torch.bfloat16)
BASELINE = "sdpa"
Call = Callable[[], object]
PEERS: dict[str, Any] = {}


@dataclass(frozen=True)
class AttentionCase:
    """One layer's attention: q, k and v as slices of a packed projection, k and v of a cache where q is shorter."""

    kind: str  # a key of CONTENDERS
    model: str
    batch: int
    q_len: int
    k_len: int
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        nheads, head_dim = HEADS[self.model]
        shape = f"batch {self.batch}, q_len {self.q_len}, k_len {self.k_len}, {nheads} heads of {head_dim}"
        return f"{self.kind}: {shape}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """Of q, k, v and the result."""
        nheads, head_dim = HEADS[self.model]
        return 2 * self.batch * (self.q_len + self.k_len) * nheads * head_dim * self.dtype.itemsize


def cases(device: str = "cpu") -> Iterator[AttentionCase]:
    for model in HEADS:
        for kind, lengths in (("prefill", PREFILL), ("padded", PADDED), ("decode", DECODE)):
            for length in lengths:
                for dtype in DTYPES:
                    yield AttentionCase(kind, model, *length, dtype, device)


def contenders(case: AttentionCase, *, compiled: bool = False) -> dict[str, Call]:
    """By name; BASELINE is what the others are compared with."""
    q, k, v = packed_qkv(case.batch, case.k_len, *HEADS[case.model], case.dtype, device=case.device)
    q = q[:, case.k_len - case.q_len :]
    if case.q_len < case.k_len:
        k, v = (torch.cat((x, x[:, :64]), dim=1)[:, : case.k_len] for x in (k, v))  # of a cache that has room
    padding = None
    if case.kind == "padded":
        start = torch.arange(case.batch) * case.k_len // (2 * case.batch)
        padding = (torch.arange(case.k_len) >= start[:, None]).to(case.device)
    masks = prepare_attention(case.q_len, case.k_len, padding)

    def call_of(implementation: str, probabilities: bool) -> Call:
        return lambda: attention(
            q, k, v, implementation=implementation, prepared=masks, output_attentions=probabilities
        )

    names = ["sdpa", "fused", "eager"]
    if explain_attention(q, k, v, prepared=masks).implementation == "flash_attention_2":
        names.append("flash_attention_2")
    calls = {name: call_of(name, False) for name in names}
    calls["neox_kernels"] = call_of("auto", False)
    if case.kind != "decode":
        calls["fused, probabilities"] = call_of("fused", True)
        calls["eager, probabilities"] = call_of("eager", True)
    heads = slice(0, 2)  # few: the oracle in float64 takes eight times the memory
    few = [x[:1, :, heads] for x in (q, k, v)]
    options = {"key_padding_mask": None if padding is None else padding[:1]}
    truth = attention(*to_float64(few), **options, implementation="eager")[0]
    same = attention(*few, **options, implementation="eager")[0]
    for name in (*names, "auto"):
        got = attention(*few, **options, implementation=name)[0]
        error, budget = max_error(got, truth), error_budget(same, truth)
        # Of PyTorch's SDPA on a GPU twice as much must do.
        allowed = budget * (1 if name == "fused" or case.device == "cpu" else 2)
        if not error <= allowed:
            raise AssertionError(f"{name}, {case}: error {error:.3g}, above {allowed:.3g}")
    return calls


CONTENDERS = ("prefill", "padded", "decode")
