"""What the figures of a benchmark are put together from: the cases they show, their scales, texts and legends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from neox_kernels.bench.figure_style import Style
from neox_kernels.bench.record import CaseRecord, Record, Result

WIDTH = 6.2  # inches
COMPARED = ("peer", "added")


def ops(record: Record) -> list[str]:
    """In the order of the run."""
    return list(dict.fromkeys(case.op for case in record.cases))


def dtypes(record: Record, op: str | None = None) -> list[str]:
    """Of one op, or of all, in the order of the run."""
    return list(dict.fromkeys(case.dtype for case in record.cases if op in (None, case.op)))


def select(record: Record, op: str, dtype: str | None = None) -> list[CaseRecord]:
    """The cases of an op: of one dtype, or of all."""
    return [case for case in record.cases if case.op == op and dtype in (None, case.dtype)]


def has_ours(case: CaseRecord) -> bool:
    """Whether there is something to compare the others with: not where ours itself failed."""
    return any(result.role == "ours" for result in case.results)


def compared(case: CaseRecord) -> list[Result]:
    """Those whose ratio to ours a figure shows."""
    return [result for result in case.results if result.role in COMPARED] if has_ours(case) else []


def work_of(case: CaseRecord) -> int:
    """Floating-point operations, or bytes where memory bounds the op."""
    return case.flops or case.bytes


def printable(text: str, most: int = 60) -> str:
    """As a figure can show it: XML has no control characters, and there is room for so many."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")


def engineering(axes: Axes, x_unit: str, y_unit: str) -> None:
    """Ticks like 10 kB and 2 ms, on log axes: at decades, or closer where there are few."""
    for axis, unit, (low, high) in ((axes.xaxis, x_unit, axes.get_xlim()), (axes.yaxis, y_unit, axes.get_ylim())):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 50 * low else (1,), numticks=7))
        axis.set_major_formatter(EngFormatter(unit, sep="\N{NO-BREAK SPACE}"))
        axis.set_minor_locator(NullLocator())


def legend_of_lines(figure: Figure, styles: Iterable[Style]) -> None:
    styles = list(styles)
    legend_above(figure, [Line2D([], [], **style.line) for style in styles], [style.name for style in styles])


def legend_above(figure: Figure, keys: Sequence[Artist], names: Sequence[str]) -> None:
    """Above the axes, in as many columns as fit."""
    texts = [printable(name) for name in names]
    columns = max(1, min(len(texts), int(WIDTH * 13.5 / (max(map(len, texts)) + 6))))
    legend = figure.legend(keys, ["-"] * len(texts), loc="outside upper left", ncols=columns)
    # Only now, since matplotlib leaves names that begin with an underscore out of a legend.
    for label, text in zip(legend.get_texts(), texts, strict=True):
        label.set_text(text)


def apart(lengths: Sequence[int], most: int) -> list[int]:
    """Those of the lengths whose labels do not touch on a log axis that has room for so many."""
    least = math.log(lengths[-1] / lengths[0]) / most
    kept = lengths[:1]
    for length in lengths[1:]:
        if math.log(length / kept[-1]) >= least:
            kept = [*kept, length]
    return list(kept)


def wrapped(text: str, width: int) -> str:
    """In at most two lines."""
    text = printable(text, 2 * width)
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width + 1)
    cut = cut if cut > 0 else width
    return text[:cut].rstrip() + "\n" + text[cut:].lstrip()
