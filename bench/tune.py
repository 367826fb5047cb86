"""The launch choices of the Triton kernels, which are fixed by plans, against their neighbours on this GPU.

    python -m neox_kernels.bench.tune [--op rotary] [--within 5] [--json F]

A neighbour has half or twice the warps, or one block size halved or doubled. Each must give what the fixed choice
gives before it is timed; one that does not compile, or does not fit, is named. The report says of every case whether
the fixed choice is within so many per cent of the best. It decides no test: a time on one machine is not a property of
the code.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from neox_kernels import kernels, rotary_tables
from neox_kernels import varlen_metadata as metadata_of
from neox_kernels.bench import gpu
from neox_kernels.bench.harness import Race, Sampler
from neox_kernels.kernels import rotary, softmax, softmax_backward, varlen
from neox_kernels.testing import ROTARY_SHAPES, packed_qkv

FIXED = "fixed"
Run = Callable[[], Sequence[Tensor]]
Neighbour = Callable[[], Any]  # a context in which plans choose otherwise


@contextmanager
def block_sizes(modules: Sequence[Any], name: str, factor: float) -> Iterator[None]:
    """Plans that multiply one of the block sizes."""
    original = modules[0].block_sizes

    def changed(*args: Any) -> dict[str, Any]:
        blocks: dict[str, Any] = original(*args)
        return {**blocks, name: max(1, int(blocks[name] * factor))}

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "block_sizes", changed))
        yield


def constant(module: Any, name: str, factor: float) -> Any:
    return mock.patch.object(module, name, max(1, int(getattr(module, name) * factor)))


def neighbours(op: str) -> dict[str, Neighbour]:
    made: dict[str, Neighbour] = {}
    for factor in (0.5, 2.0):
        if op == "rotary":
            made[f"NUM_WARPS x {factor}"] = partial(constant, rotary, "NUM_WARPS", factor)
            for name in ("BLOCK_M", "BLOCK_H", "BLOCK_C"):
                made[f"{name} x {factor}"] = partial(block_sizes, [rotary], name, factor)
        elif op == "softmax":
            for name in ("num_warps", "BLOCK_M"):
                made[f"{name} x {factor}"] = partial(block_sizes, [softmax, softmax_backward], name, factor)
        else:
            for name in ("NUM_WARPS", "THREADS"):  # by THREADS, the rows of a program
                made[f"{name} x {factor}"] = partial(constant, varlen, name, factor)
    return made


def rotary_cases(device: str) -> Iterator[tuple[str, Run]]:
    for shape in ROTARY_SHAPES:
        for batch, seqlen in ((8, 1), (4, 512), (4, 2048)):
            q, k, _ = packed_qkv(batch, seqlen, shape.nheads, shape.head_dim, torch.bfloat16, device=device)
            cos, sin = rotary_tables(shape.rotary_dim, seqlen, device=device)
            options: dict[str, Any] = {"interleaved": shape.interleaved}
            yield (
                f"rotary: {shape.model} ({batch}, {seqlen})",
                partial(kernels.apply_rotary_qk, q, k, cos, sin, **options),
            )


def _softmax(scores: Tensor) -> Sequence[Tensor]:
    return [kernels.causal_softmax(scores)]


def softmax_cases(device: str) -> Iterator[tuple[str, Run]]:
    for lengths in ((8, 1, 512), (8, 128, 128), (4, 512, 512), (4, 2048, 2048), (1, 16, 16384)):
        shape = (lengths[0], 16, *lengths[1:])
        scores, grad = torch.randn(2, *shape).to(device, torch.bfloat16)
        yield f"softmax: forward {shape}", partial(_softmax, scores)

        def backward(scores: Tensor = scores, grad: Tensor = grad) -> Sequence[Tensor]:
            with torch.enable_grad():
                leaf = scores.detach().requires_grad_()
                return torch.autograd.grad(kernels.causal_softmax(leaf), leaf, grad)

        yield f"softmax: forward and backward {shape}", backward


def varlen_cases(device: str) -> Iterator[tuple[str, Run]]:
    for batch, seqlen, features in ((8, 128, 768), (16, 512, 2048), (4, 2048, 6144)):
        mask = (torch.arange(seqlen) < torch.linspace(seqlen // 3, seqlen, batch).long()[:, None]).to(device)
        metadata = metadata_of(mask)
        x = torch.randn(batch, seqlen, features).to(device, torch.bfloat16)
        indices, inverse = metadata.indices, metadata.inverse
        yield (
            f"varlen: unpad ({batch}, {seqlen}, {features})",
            partial(kernels.unpad_input, [x], indices, inverse),
        )


CASES = {"rotary": rotary_cases, "softmax": softmax_cases, "varlen": varlen_cases}


def in_context(neighbour: Neighbour, run: Run) -> Run:
    def call() -> Sequence[Tensor]:
        with neighbour():
            return run()

    return call


def tune(op: str, name: str, run: Run, sampler: Sampler, rounds: int, within: float) -> dict[str, Any]:
    """The report of one case."""
    expected, calls, refused = run(), {FIXED: in_context(ExitStack, run)}, {}
    for label, neighbour in neighbours(op).items():
        call = in_context(neighbour, run)
        try:
            results = call()
        except Exception as error:  # whatever Triton's compiler or the driver says of this choice
            refused[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        # Sums of another order differ in their last bits.
        for x, y in zip(results, expected, strict=True):
            torch.testing.assert_close(x, y)
        calls[label] = call
    race = Race(calls, sampler)
    for _ in range(rounds):
        race.run_round()
    seconds = {label: statistics.median(samples) for label, samples in race.samples.items()}
    best = min(seconds, key=lambda label: seconds[label])
    return {
        "case": name,
        "seconds": seconds,
        "refused": refused,
        "best": best,
        "fixed_over_best": seconds[FIXED] / seconds[best],
        "within": seconds[FIXED] <= seconds[best] * (1 + within / 100),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=tuple(CASES), help="only this; may be repeated")
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--within", type=float, default=5.0, help="per cent")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here")
    sampler, rows = gpu.CudaSampler(), []
    print(gpu.describe()["name"])
    with torch.no_grad():
        for op in args.op or CASES:
            for name, run in CASES[op](gpu.DEVICE):
                if args.case in name:
                    row = tune(op, name, run, sampler, args.rounds, args.within)
                    said = "within" if row["within"] else "NOT within"
                    print(f"{name:55} {said} {args.within} %: {row['fixed_over_best']:.3f} x the best, {row['best']}")
                    rows.append(row)
    if args.json:
        record = {"device": gpu.describe(), "within_per_cent": args.within, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
