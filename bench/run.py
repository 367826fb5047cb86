"""An op family on the CPU against what people run today, the same under torch.compile, and memcpy of the same bytes.

    python bench/run.py [rotary | softmax | varlen | attention] [--model pythia-160m] [--compiled] [--threads 2 --wall]
                        [--json F]

One thread and CPU time by default. Every figure in the README's tables comes from this script. A family is a file
``<family>_cases.py`` with OP, BASELINE, CONTENDERS, cases and contenders, and its name in FAMILIES.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import compare

import neox_kernels
from neox_kernels import compiled

FAMILIES = ("rotary", "softmax", "varlen", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=FAMILIES, default="rotary")
    parser.add_argument("--model", action="append", help="only this shape; may be repeated")
    parser.add_argument("--kind", action="append", help="only this kind of call; may be repeated")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile of the baseline too (rotary, softmax; minutes)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall clock in place of CPU time")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    family = importlib.import_module(f"{args.family}_cases")
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.wall else time.thread_time
    backend = neox_kernels.explain(family.OP, "cpu")[0].backend
    isa = compiled.cpu_isa() if backend == "compiled" else "-"
    machine = f"{platform.machine()}, {args.threads} thread(s), {'wall clock' if args.wall else 'CPU time'}"
    print(f"neox_kernels {neox_kernels.__version__} ({backend}, {isa}), torch {torch.__version__}, {machine}")
    print(f"time per call, times as fast as {family.BASELINE} (median and quartiles of the rounds' ratios)")
    rows = []
    with torch.no_grad():
        for case in family.cases():
            if case.model not in (args.model or [case.model]) or case.kind not in (args.kind or family.CONTENDERS):
                continue
            calls = family.contenders(case, compiled=args.compiled)
            timings = compare(calls, family.BASELINE, rounds=args.rounds, clock=clock)
            print(f"\n{case}, {case.bytes / 1e6:.2f} MB read and written")
            for timing in timings.values():
                print(f"  {timing.name:30}{timing.describe()}  {case.bytes / timing.seconds / 1e9:6.1f} GB/s")
                rows.append({"case": str(case), "bytes": case.bytes, **asdict(timing)})
    if args.json:
        versions = {"neox_kernels": neox_kernels.__version__, "torch": torch.__version__, "cpu_isa": isa}
        args.json.write_text(json.dumps({"machine": machine, **versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
