"""``neox-kernels demo``: two transformers models on real text, before and after the swap."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj

import neox_kernels
from neox_kernels import compiled
from neox_kernels.testing import error_budget, max_error

HEAD_DIM = 64
PAD = 256  # the tokens below are bytes
BATCH = 4


@dataclass(frozen=True)
class Scale:
    """How large the models and how long the measurements are; the width is a multiple of 64."""

    layers: int = 12
    width: int = 768
    seqlen: int = 128
    seconds: float = 5.0
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """One model in one dtype: errors are largest differences over the logits of all tokens that are no padding."""

    model: str
    dtype: str
    difference: float  # swapped against stock
    stock_error: float  # against the same model in float64, like the next
    swapped_error: float
    budget: float
    rotary_ms: tuple[float, float]  # stock and fused, of all layers
    forward_ms: tuple[float, float]  # stock and swapped
    within_policy: bool


def readme() -> str:
    """The project's README, which is the long description in the metadata of every kind of installation."""
    try:
        text = importlib.metadata.metadata("neox-kernels").get_payload()  # type: ignore[attr-defined]
    except importlib.metadata.PackageNotFoundError:  # on the path, and not installed
        text = Path(neox_kernels.backends.__file__).read_text()
    return str(text)


def padded_batch(seqlen: int, device: str) -> dict[str, Tensor]:
    """Four stretches of the README, of unequal lengths: two padded on the right, two on the left."""
    tokens = list(readme().encode())
    tokens *= 1 + BATCH * seqlen // len(tokens)
    lengths = [seqlen, seqlen * 3 // 4, seqlen * 7 // 8, seqlen // 2]
    input_ids = torch.full((BATCH, seqlen), PAD)
    for row, length in enumerate(lengths):
        place = slice(length) if row < BATCH // 2 else slice(seqlen - length, seqlen)
        input_ids[row, place] = torch.tensor(tokens[row * seqlen : row * seqlen + length])
    input_ids = input_ids.to(device)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def models(scale: Scale, dtype: torch.dtype) -> Iterator[nn.Module]:
    """GPT-NeoX, of Pythia-160M's shape unless scaled (a quarter of each head is rotated), and a GPT-J as large."""
    nheads, positions = scale.width // HEAD_DIM, max(2048, scale.seqlen)
    neox = transformers.GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=nheads,
        intermediate_size=4 * scale.width,
        max_position_embeddings=positions,
    )
    gptj = transformers.GPTJConfig(
        vocab_size=50400,
        n_embd=scale.width,
        n_layer=scale.layers,
        n_head=nheads,
        rotary_dim=HEAD_DIM // 2,
        n_positions=positions,
    )
    for config in (neox, gptj):
        torch.manual_seed(0)  # the weights are the same at every run
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        yield model.eval().to(scale.device)


def rotary_before_and_after(model: Any, batch: dict[str, Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One layer's rotary as the stock model runs it and as the swapped one does, on the same tensors."""
    config, parameter = model.config, next(model.parameters())
    nheads, (rows, seqlen) = config.num_attention_heads, batch["input_ids"].shape
    positions = torch.arange(seqlen, device=parameter.device)[None]
    hidden = parameter.new_empty(rows, seqlen, 3 * config.hidden_size).normal_()

    if isinstance(model, transformers.GPTNeoXForCausalLM):
        q, k, _ = hidden.view(rows, seqlen, nheads, -1).transpose(1, 2).chunk(3, dim=-1)
        cos, sin = model.gpt_neox.rotary_emb(hidden, positions)

        def half(table: Tensor) -> Tensor:
            return table[..., : table.shape[-1] // 2]

        return (
            lambda: modeling_gpt_neox.apply_rotary_pos_emb(q, k, cos, sin),
            lambda: neox_kernels.apply_rotary_qk(q, k, half(cos), half(sin), layout="bhsd"),
        )

    attention = model.transformer.h[0].attn
    q, k, _ = (x.view(rows, seqlen, nheads, -1).contiguous() for x in hidden.chunk(3, dim=-1))
    table, rotary_dim = attention.embed_positions.to(parameter.device), attention.rotary_dim

    def stock() -> list[Tensor]:
        rows_of_table = positions[..., None].repeat(1, 1, rotary_dim)
        sincos = attention._get_embed_positions(positions).gather(1, rows_of_table).to(q.dtype)
        sin, cos = sincos.chunk(2, dim=-1)
        rotate = modeling_gptj.apply_rotary_pos_emb
        return [
            torch.cat((rotate(x[..., :rotary_dim], sin, cos), x[..., rotary_dim:]), dim=-1).permute(0, 2, 1, 3)
            for x in (k, q)
        ]

    def fused() -> tuple[Tensor, Tensor]:
        sin, cos = table.chunk(2, dim=-1)
        heads_first = q.transpose(1, 2), k.transpose(1, 2)
        return neox_kernels.apply_rotary_qk(
            *heads_first, cos, sin, interleaved=True, position_ids=positions, layout="bhsd"
        )

    return stock, fused


def race(before: Callable[[], Any], after: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Median milliseconds of each, run in turns until the time is up, and three times anyhow."""
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    for turn in itertools.count(1):
        for call, times in zip((before, after), taken, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        if turn >= 3 and time.perf_counter() > end:
            break
    return statistics.median(taken[0]), statistics.median(taken[1])


def compare(stock: Any, scale: Scale) -> Result:
    """Swap a copy of the model and put it beside the stock one."""
    batch = padded_batch(scale.seqlen, scale.device)
    tokens = batch["attention_mask"].bool()

    def forward(model: Any) -> Tensor:
        logits: Tensor = model(**batch, use_cache=False).logits
        return logits

    oracle = forward(copy.deepcopy(stock).double())[tokens]
    swapped = copy.deepcopy(stock)
    report = neox_kernels.swap(swapped)
    theirs, ours = forward(stock)[tokens], forward(swapped)[tokens]
    error, budget = max_error(ours, oracle), error_budget(theirs, oracle)
    one_layer = race(*rotary_before_and_after(stock, batch), seconds=scale.seconds / 5)
    return Result(
        model="GPT-J" if isinstance(stock, transformers.GPTJForCausalLM) else "GPT-NeoX",
        dtype=str(stock.dtype).removeprefix("torch."),
        difference=max_error(ours, theirs),
        stock_error=max_error(theirs, oracle),
        swapped_error=error,
        budget=budget,
        rotary_ms=(scale.layers * one_layer[0], scale.layers * one_layer[1]),
        forward_ms=race(lambda: forward(stock), lambda: forward(swapped), scale.seconds),
        within_policy=sum("rotary" in what for _, what in report.replaced) == scale.layers
        and bool(ours.isfinite().all())
        and error <= budget,
    )


@torch.no_grad()
def show(scale: Scale, as_json: bool) -> bool:
    """Run all of it and print it; whether the numbers kept to the policy."""
    transformers.logging.set_verbosity_error()
    load = os.getloadavg()[0]
    results = []
    with Console(stderr=True).status("") as status:
        for dtype in (torch.float32, torch.bfloat16):
            for model in models(scale, dtype):
                status.update(f"{type(model).__name__} in {dtype}: float64, stock, swapped")
                results.append(compare(model, scale))
    (choice,) = neox_kernels.explain("apply_rotary_qk", scale.device)
    if as_json:
        facts = {"scale": asdict(scale), "results": list(map(asdict, results)), "backend": asdict(choice)}
        print(json.dumps(facts, indent=2))
    else:
        print_results(results, scale, choice)
        if scale.device == "cpu" and load > 1:
            print(f"Take the times with care: other programs were running (load average {load:.1f} at the start).")
    return all(result.within_policy for result in results)


def print_results(results: list[Result], scale: Scale, choice: neox_kernels.backends.Choice) -> None:
    table = Table(title=f"layers {scale.layers}, width {scale.width}, {BATCH} sequences of up to {scale.seqlen} tokens")
    table.add_column("")
    for result in results:
        table.add_column(f"{result.model}\n{result.dtype}", justify="right", no_wrap=True)

    def row(name: str, cell: Callable[[Result], str], end_section: bool = False) -> None:
        table.add_row(name, *map(cell, results), end_section=end_section)

    def speed(name: str, times: Callable[[Result], tuple[float, float]]) -> None:
        row(f"{name}: stock, ms", lambda result: _milliseconds(times(result)[0]))
        row("  swapped, ms", lambda result: _milliseconds(times(result)[1]))
        row("  times as fast", lambda result: f"{times(result)[0] / times(result)[1]:.2f}", end_section=True)

    row("logits: swapped - stock, largest", lambda result: f"{result.difference:.2g}")
    row("  error of stock against float64", lambda result: f"{result.stock_error:.2g}")
    row("  error of swapped", lambda result: f"{result.swapped_error:.2g}")
    row("  allowed", lambda result: f"{result.budget:.2g}", end_section=True)
    speed("rotary alone", lambda result: result.rotary_ms)
    speed("whole forward", lambda result: result.forward_ms)
    row("numbers", lambda result: "kept" if result.within_policy else "BROKEN")
    console = Console()
    console.print(table)
    isa = f" ({compiled.cpu_isa()})" if (choice.backend, choice.device) == ("compiled", "cpu") else ""
    console.print(f"apply_rotary_qk on {choice.device} was served by {choice.backend}{isa}", highlight=False)
    for name, reason in choice.reasons.items():
        console.print(f"    not by {name}: {reason}", highlight=False)


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
