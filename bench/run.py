"""An op family against what people run today, the same under torch.compile, and memcpy of the same bytes.

    python bench/run.py [FAMILY] [--model pythia-160m] [--compiled] [--threads 2 --wall] [--json F]
    python bench/run.py [FAMILY] --device cuda [--json F]

On the CPU one thread and CPU time by default: every figure in the README's tables comes from that. On a GPU its own
events (with --wall the wall clock, launches included), every backend, and the peers that are installed; those that are
not are named. A family is a file ``<family>_cases.py`` with OP, BASELINE, CONTENDERS, PEERS, cases and contenders, and
its name in FAMILIES.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import gpu
from harness import Call, Sampler, compare, host_sampler

import neox_kernels
from neox_kernels import compiled

FAMILIES = ("rotary", "softmax", "varlen", "gelu", "attention", "models", "swap")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=FAMILIES, default="rotary")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", action="append", help="only this shape; may be repeated")
    parser.add_argument("--kind", action="append", help="only this kind of call; may be repeated")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile of the baseline too (rotary, softmax; minutes)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall clock in place of CPU time, or of CUDA events")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(argv)


def add_peers(calls: dict[str, Call], family: Any, case: Any) -> dict[str, str]:
    """Add the peers that serve this case, checked like everyone; of the others, why they do not."""
    absent = {}
    for name, make in family.PEERS.get(case.kind, {}).items():
        try:
            calls[name] = make(case)
        except (ImportError, AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            absent[name] = f"{type(error).__name__}: {error}"
    return absent


def add_other_backends(calls: dict[str, Call], family: Any) -> None:
    """Add our call by the backends that could serve it, were it not for the first."""
    ours = calls["neox_kernels"]

    def by(backend: str) -> Call:
        def call() -> object:
            with neox_kernels.use_backend(backend):
                return ours()

        return call

    for backend, reason in neox_kernels.explain(family.OP, gpu.DEVICE)[0].reasons.items():
        if reason.endswith("comes first") and backend != "reference":
            calls[f"neox_kernels, {backend}"] = by(backend)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    family = importlib.import_module(f"{args.family}_cases")
    torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    clock = time.perf_counter if args.wall else time.thread_time
    on_device = gpu.WallSampler if args.wall else gpu.CudaSampler
    sampler: Sampler = on_device() if on_gpu else host_sampler(clock)
    backend = neox_kernels.explain(family.OP, args.device)[0].backend
    isa = compiled.cpu_isa() if backend == "compiled" and not on_gpu else "-"
    machine = f"{platform.machine()}, {args.threads} thread(s), {'wall clock' if args.wall else 'CPU time'}"
    device = gpu.describe() if on_gpu else {"name": "cpu"}
    if on_gpu:
        machine = f"{device['name']}, {'wall clock' if args.wall else 'CUDA events, L2 flushed before every call'}"
    print(f"neox_kernels {neox_kernels.__version__} ({backend}, {isa}), torch {torch.__version__}, {machine}")
    print(f"time per call, times as fast as {family.BASELINE} (median and quartiles of the rounds' ratios)")
    rows = []
    with torch.no_grad():
        for case in family.cases(gpu.DEVICE if on_gpu else "cpu"):
            if case.model not in (args.model or [case.model]) or case.kind not in (args.kind or family.CONTENDERS):
                continue
            calls = family.contenders(case, compiled=args.compiled)
            absent = add_peers(calls, family, case) if on_gpu else {}
            if on_gpu:
                add_other_backends(calls, family)
            timings = compare(calls, family.BASELINE, sampler, rounds=args.rounds)
            print(f"\n{case}, {case.bytes / 1e6:.2f} MB read and written")
            for timing in timings.values():
                print(f"  {timing.name:30}{timing.describe()}  {case.bytes / timing.seconds / 1e9:6.1f} GB/s")
                rows.append({"case": str(case), "bytes": case.bytes, **asdict(timing)})
            for name, reason in absent.items():
                print(f"  {name:30}absent: {reason}")
                rows.append({"case": str(case), "name": name, "absent": reason})
    if args.json:
        versions = {"neox_kernels": neox_kernels.__version__, "torch": torch.__version__, "cpu_isa": isa}
        record = {"machine": machine, "device": device, "backend": backend, **versions, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
