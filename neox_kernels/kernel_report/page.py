"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

from neox_kernels.kernel_report.rows import Row, missed_gates

STYLE = """
:root { --ink: #1c2330; --faint: #667085; --line: #e3e7ee; --paper: #fff; --tint: #f6f8fb; --good: #2f855a;
  --bad: #c0392b; --bar: #7aa5e6; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --faint: #98a2b3; --line: #2b3341; --paper: #12161d;
  --tint: #1a202a; --good: #68d391; --bad: #ff8a7a; --bar: #3f6fb5; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 92rem;
  margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin: 2.4rem 0 .6rem; font-size: 1.25rem; }
p { max-width: 62rem; } .faint { color: var(--faint); } .good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--faint); font-size: .8rem; text-align: right; vertical-align: bottom; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; } td { text-align: right; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } tbody tr:hover td { background: var(--tint); }
tr.title td { background: var(--tint); font-weight: 600; padding-top: .5rem; }
.bar { display: inline-block; height: .55rem; background: var(--bar); border-radius: 2px; margin-left: .5rem; }
"""
COLUMNS = (
    ("", "backend"),
    ("", "arch"),
    ("registers of a thread", "regs"),
    ("bytes of a thread that went to memory", "spill"),
    ("bytes of shared memory of a block", "shared"),
    ("of the warps that a multiprocessor holds, and what limits it", "occupancy"),
    ("instructions x bytes of a lane's access to global memory", "loads"),
    ("instructions x bytes of a lane's access to global memory", "stores"),
    ("machine instructions issued per element, by the path that runs", "SASS / el"),
    ("bytes per element asked of the L1 cache", "L1 B / el"),
    ("bytes per element in different sectors, and the least that the call must move", "DRAM B / el (min)"),
    ("bytes over 85 % of the card's bandwidth: a prediction, nothing was timed", "predicted"),
)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def widths(counts: dict[int, int]) -> str:
    """``4x16 1x8``: four accesses of 16 bytes and one of 8."""
    return " ".join(f"{count}x{width}" for width, count in counts.items()) or "-"


def render(rows: Sequence[Row], report: dict[str, Any]) -> str:
    """The page of ``command.as_dict``'s report."""
    missed = [f"{row.name}: {gate}" for row in rows for gate in missed_gates(row)]
    made_by = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>neox_kernels: GPU kernels</title><style>{STYLE}</style>",
        f"<h1>GPU kernels of neox_kernels</h1><p class=faint>{escape(made_by)}</p>",
        "<p>Static figures: what the compilers say, and what a simulator counts that executes the kernels' PTX on a "
        "CPU. <b>No GPU time was measured.</b> Times are predicted: bytes of DRAM over 85 % of the card's "
        "bandwidth.</p>",
    ]
    parts += [f"<p>Without {escape(name)}: {escape(reason)}.</p>" for name, reason in report["absent"].items()]
    if missed:
        parts.append("<p class=bad>Gates missed:</p><ul>" + "".join(f"<li>{escape(text)}" for text in missed) + "</ul>")
    else:
        parts.append("<p class=good>Every row holds its gates.</p>")
    for kernel, group in groupby(rows, key=lambda row: row.kernel):
        heads = "".join(f"<th title='{escape(title)}'>{escape(name)}" for title, name in COLUMNS)
        parts.append(f"<h2>{escape(kernel)}</h2><div class=scroll><table><thead><tr>{heads}</thead><tbody>")
        parts += body(group)
        parts.append("</tbody></table></div>")
    return "\n".join(parts) + "\n"


def body(rows: Iterable[Row]) -> Iterable[str]:
    for (configuration, dtype), group in groupby(rows, key=lambda row: (row.configuration, row.dtype)):
        yield f"<tr class=title><td colspan={len(COLUMNS)}>{escape(configuration)}, {dtype}</tr>"
        for row in group:
            tone = " class=bad" if missed_gates(row) else ""
            why = escape("; ".join(missed_gates(row)) or "; ".join(dict.fromkeys(row.absent.values())), quote=True)
            yield f"<tr{tone} title='{why}'>" + "".join(f"<td>{cell}" for cell in cells(row)) + "</tr>"


def cells(row: Row) -> Iterable[str]:
    yield row.backend
    yield row.arch
    yield from map(str, (row.registers, row.spill_bytes, row.shared_bytes))
    yield f"{row.occupancy:.0%} <span class=faint>{row.occupancy_limit}</span>"
    yield widths(row.loads)
    yield widths(row.stores)
    yield number(row.instructions_run)
    yield number(row.l1_bytes)
    excess = row.dram_bytes / row.minimum_bytes if row.dram_bytes is not None else 0.0
    bar = f"<span class=bar style='width:{min(excess, 3) * 1.5:.2f}rem'></span>" if excess else ""
    yield f"{number(row.dram_bytes)} ({number(row.minimum_bytes)}){bar}"
    yield "-" if row.predicted_us is None else f"{row.predicted_us:.1f} us on {row.predicted_card}"
