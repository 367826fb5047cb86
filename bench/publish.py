"""Puts measured records into the documentation: the tables of docs/performance.md, and the picture of the README.

    python -m neox_kernels.bench.publish bench/results/FOLDER

The document keeps its words; what stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is made anew from
``FOLDER/NAME.json``, and the table named static from the figures that tests hold the GPU kernels to. A test holds that
the document agrees with them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from neox_kernels.bench.record import CaseRecord, Record, Result, Spread
from neox_kernels.bench.units import duration, quartiles, seconds, three_digits

BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Of each op the case that the picture shows, and what it is called there.
SHOWN = (
    ("rotary", "forward", "pythia-160m", "(4, 512)", "rotary of q and k"),
    ("softmax", "forward", "12 heads", "(4, 512, 512)", "causal softmax"),
    ("softmax", "backward", "12 heads", "(4, 512, 512)", "its backward"),
    ("gelu", "forward", "gptj-12x768", "(4, 512)", "GELU by tanh"),
    ("varlen", "qkv", "768 features", "(4, 512)", "unpad q, k and v"),
    ("attention", "probabilities", "pythia-160m", "(4, 512, 512)", "attention with probabilities"),
    ("models", "logits", "pythia-160m", "(4, 512)", "Pythia-160M, whole forward"),
    ("models", "logits", "gptj-12x768", "(4, 512)", "GPT-J of 12 layers, whole forward"),
)
STATIC = {
    "rotary, Pythia-1.4B": "rotary | Pythia-1.4B, forward: 16 heads of 128, 32 rotated, 2048 tokens",
    "rotary, Pythia-1.4B, in place": "rotary | Pythia-1.4B, in place: 16 heads of 128, 32 rotated, 2048 tokens",
    "rotary, GPT-NeoX-20B": "rotary | GPT-NeoX-20B, forward: 64 heads of 96, 24 rotated, 2048 tokens",
    "rotary, GPT-J-6B": "rotary | GPT-J-6B, forward: 16 heads of 256, 64 rotated, 2048 tokens",
    "causal softmax, 2048 keys": "softmax forward | scores 1 x 1 x 2048 x 2048",
    "its backward": "softmax backward | scores 1 x 1 x 2048 x 2048",
    "unpad q, k and v": "varlen gather | unpad, 3 x 768 features, 4 x 512 tokens, 384 kept",
}


def about(record: Record) -> str:
    """Where and how a record was made, in a sentence or two."""
    machine, versions = record.machine, record.versions
    isa = f" ({machine['cpu_isa']})" if machine.get("cpu_isa") else ""
    threads = f", {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}" if "threads" in machine else ""
    there = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    return (
        f"`{record.command}`, commit `{record.commit}`, {record.started[:10]}, {duration(record.seconds)}. "
        f"{machine['name']}{isa}{threads}, {machine['clock']}; {there}."
    )


def tables(record: Record) -> Iterator[str]:
    """A table for each kind of call: our time, that of our variants, and how many times as fast we are as each peer,
    median and quartiles, in bold where the peer is faster; last our rate as a share of the limit's."""
    for kind, group in groupby(record.cases, key=lambda case: case.kind):
        cases = list(group)
        variants, peers = (_names(cases, roles) for roles in (("variant",), ("peer", "added")))
        limit = next((case.limit.name for case in cases if case.limit), None)
        columns = ["", "size", "dtype", "neox_kernels", *(name.removeprefix("neox_kernels, ") for name in variants)]
        columns += [f"times {name}" for name in peers] + ([f"of {limit}"] if limit else [])
        lines = [f"**{kind}**", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for case in cases:
            by_name = {result.name: result for result in case.results}
            cells = [case.shape, case.size.strip("()"), case.dtype, seconds(case.ours.seconds.middle)]
            cells += [seconds(by_name[name].seconds.middle) if name in by_name else "" for name in variants]
            cells += [_ratio(case, by_name.get(name)) for name in peers]
            if limit:
                share = case.limit and case.rate(case.ours) / case.rate(case.limit)
                cells.append(f"{share:.0%}" if share else "")
            lines.append("| " + " | ".join(cells) + " |")
        yield "\n".join(lines)


def _names(cases: Sequence[CaseRecord], roles: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(x.name for case in cases for x in case.results if x.role in roles))


def _ratio(case: CaseRecord, result: Result | None) -> str:
    if result is None:
        return ""
    ratio: Spread = case.ratio(result)
    middle = three_digits(ratio.middle)
    return f"{f'**{middle}**' if ratio.middle < 1 else middle} ({quartiles(ratio)})"


def static_table(golden: Mapping[str, Any]) -> str:
    """Of the CUDA and Triton kernels on an H100, by the figures of tests/kernel_report_golden.json."""
    lines = ["| | by | registers | SASS per element | DRAM bytes per element |", "|---|---|---|---|---|"]
    for what, configuration in STATIC.items():
        for backend in ("cuda", "triton"):
            row = golden["rows"][f"{backend} | {configuration} | bfloat16 | sm_90"]
            figures = row["registers"], f"{row['instructions_run']:.1f}", f"{row['dram_bytes']:.2f}"
            lines.append("| " + " | ".join(map(str, (what, backend, *figures))) + " |")
    return "\n".join(lines)


def fill(document: str, records: Mapping[str, Record], golden: Mapping[str, Any]) -> str:
    """The document with its tables made anew. Raises KeyError for a table of which there is no record."""

    def block(match: re.Match[str]) -> str:
        if match["name"] == "static":
            return f"{match[1]}{static_table(golden)}\n{match[3]}"
        record = records[match["name"]]
        parts = [about(record), *tables(record)]
        if not record.complete:
            parts.insert(0, "*This run was interrupted.*")
        return match[1] + "\n".join(f"{part}\n" for part in parts) + match[3]

    return BLOCK.sub(block, document)


def draw(records: Mapping[str, Record], path: Path) -> None:
    """The picture: how many times as fast as its eager peer one case of each op is, float32 and bfloat16."""
    import matplotlib

    from neox_kernels.bench.figure_parts import new_figure
    from neox_kernels.bench.figure_style import LIGHT, RC

    rows = []
    for op, kind, shape, size, label in SHOWN:
        for case in records[op].cases:
            if (case.kind, case.shape, case.size) == (kind, shape, size):
                peer = next(result for result in case.results if result.role == "peer")
                rows.append((label, case.dtype, case.ratio(peer), peer.name))
    labels = list(dict.fromkeys(label for label, *_ in rows))
    with matplotlib.rc_context(RC):
        figure = new_figure(0.45 * len(labels) + 0.9)
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        for dtype, offset, alpha in (("float32", -0.19, 0.55), ("bfloat16", 0.19, 1.0)):
            own = [(labels.index(label) + offset, ratio) for label, of, ratio, _ in rows if of == dtype]
            ys, spreads = [y for y, _ in own], [ratio for _, ratio in own]
            widths = [ratio.middle - 1 for ratio in spreads]
            axes.barh(ys, widths, 0.34, left=1, color=LIGHT["ours"], label=dtype, alpha=alpha)
            axes.hlines(ys, [x.low for x in spreads], [x.high for x in spreads], LIGHT["ink"], linewidth=0.9)
            for y, ratio in own:
                axes.annotate(f"{ratio.middle:.1f}", (ratio.high, y), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        high = max(ratio.high for *_, ratio, _ in rows)
        axes.set_xlim(1, 1.35 * high)
        ticks = [2**power for power in range(6) if 2**power < 1.35 * high]
        axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
        axes.set_xlabel("times as fast as plain PyTorch (transformers' code), one CPU thread")
        axes.legend(loc="lower right")
        figure.savefig(path, transparent=False, facecolor="white", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tree", type=Path, default=Path(), help="the source tree")
    args = parser.parse_args(argv)
    records = {path.stem: Record.read(path) for path in sorted(args.folder.glob("*.json"))}
    golden = json.loads((args.tree / "tests" / "kernel_report_golden.json").read_text())
    document = args.tree / "docs" / "performance.md"
    document.write_text(fill(document.read_text(), records, golden))
    draw(records, args.tree / "docs" / "performance.svg")


if __name__ == "__main__":
    main()
