"""A benchmark run as figures, each of one op and one dtype; they need matplotlib.

ratios     how many times as fast ours is as every peer, a bar for each case
roofline   the rate that ours and the peers reach against the size of the work, and the limit's as a roof
times      time against length, a line for each contender

Each returns None where the run has nothing to draw for it: no peers, say, or only one length.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from neox_kernels.bench.figure_parts import (
    COMPARED,
    apart,
    compared,
    dtypes,
    engineering,
    legend_above,
    legend_of_lines,
    new_figure,
    ops,
    printable,
    select,
    work_of,
    wrapped,
)
from neox_kernels.bench.figure_style import LIGHT, RC, Style, styles_of
from neox_kernels.bench.record import CaseRecord, Record, Result

MOST_CASES = 120  # bars of more would be a figure that nobody reads; a table has them all
MOST_PANELS = 24
BYTES = ("B", "bytes read and written", "bytes")
FLOPS = ("FLOP", "floating-point operations", "FLOP")


# ------------------------------------------------------------------------------------------------------------- ratios


def ratios(record: Record, op: str, dtype: str) -> Figure | None:
    """Bars from 1 to the median ratio, to the right where ours is faster; whiskers are the quartiles."""
    cases = [case for case in select(record, op, dtype) if compared(case)]
    if not cases:
        return None
    shown, styles = cases[:MOST_CASES], styles_of(select(record, op))
    bars = sum(len(compared(case)) for case in shown)
    pitch = min(0.15, max(0.075, 10 / bars))  # inches of height for a bar: less, the more there are
    y, ticks = 0.0, []  # inches from the top, where our axis counts in them
    places: list[tuple[float, CaseRecord, Result]] = []
    for heading, group in groupby(shown, key=lambda case: f"{case.kind} · {case.shape}"):
        ticks.append((y + 0.1, heading, True))
        y += 0.2
        for case in group:
            others = compared(case)
            height = max(0.14, pitch * len(others))
            ticks.append((y + height / 2, case.size, False))
            top = y + (height - pitch * len(others)) / 2
            places += [(top + pitch * (i + 0.5), case, other) for i, other in enumerate(others)]
            y += height + 0.06
        y += 0.08
    with matplotlib.rc_context(RC):
        figure = new_figure(y + 0.9)
        axes = figure.add_subplot()
        reach = _draw_bars(axes, places, styles, pitch)
        axes.axvline(1, color=LIGHT["ours"], linewidth=1.6, zorder=4)
        axes.set_xscale("log")
        axes.set_xlim(*reach)
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5) if reach[1] < 5 * reach[0] else (1,), numticks=9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}\N{MULTIPLICATION SIGN}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(y, 0)
        axes.set_yticks([at for at, _, _ in ticks], [printable(text, 40) for _, text, _ in ticks])
        for label, (_, _, bold) in zip(axes.get_yticklabels(), ticks, strict=True):
            label.set(fontweight="bold" if bold else "normal", color=LIGHT["ink"])
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        left = "" if len(shown) == len(cases) else f"; the first {len(shown)} of {len(cases)} cases"
        axes.set_xlabel(f"times as fast as the other; right of 1, ours is faster{left}")
        ours = shown[0].ours.name
        keys: list[Artist] = [Line2D([], [], color=LIGHT["ours"], linewidth=1.6)]
        names = [name for name in styles if any(name == other.name for _, _, other in places)]
        keys += [Patch(**styles[name].bar) for name in names]
        legend_above(figure, keys, [f"{ours} = 1", *names])
    return figure


def _draw_bars(
    axes: Axes, places: Sequence[tuple[float, CaseRecord, Result]], styles: dict[str, Style], pitch: float
) -> tuple[float, float]:
    """The bars, and the limits of x that leave room for them and their labels."""
    spreads = [case.ratio(other) for _, case, other in places]
    low, high = min(1.0, *(x.low for x in spreads)), max(1.0, *(x.high for x in spreads))
    span = math.log(high / low) or 1.0
    for name, style in styles.items():
        own = [(y, x) for (y, _, other), x in zip(places, spreads, strict=True) if other.name == name]
        ys, widths = [y for y, _ in own], [x.middle - 1 for _, x in own]
        axes.barh(ys, widths, left=1, height=pitch * 0.82, zorder=2, **style.bar)
    heights = [y for y, _, _ in places]
    axes.hlines(heights, [x.low for x in spreads], [x.high for x in spreads], LIGHT["ink"], linewidth=0.9, zorder=3)
    labelled = pitch > 0.11
    for y, spread in zip(heights, spreads, strict=True) if labelled else ():
        end, away, side = (spread.high, 4, "left") if spread.middle >= 1 else (spread.low, -4, "right")
        look: dict[str, Any] = {"ha": side, "va": "center_baseline", "fontsize": 7.5, "color": LIGHT["faint"]}
        text = f"{spread.middle:#.3g}".rstrip(".")
        # In points from the whisker's end. Room for it is made below, so that the layout need not look at each.
        axes.annotate(text, (end, y), (away, 0), textcoords="offset points", in_layout=False, **look)
    room = 0.12 if labelled else 0.04
    return low * math.exp(-span * (room if low < 1 else 0.02)), high * math.exp(span * room)


# ----------------------------------------------------------------------------------------------------------- roofline


def roofline(record: Record, op: str, dtype: str) -> Figure | None:
    """Bytes per second against bytes, or FLOP per second against FLOP; where an op has cases of both, side by side."""
    cases = [case for case in select(record, op, dtype) if work_of(case)]
    panels = [panel for panel in ([c for c in cases if not c.flops], [c for c in cases if c.flops]) if panel]
    if not panels:
        return None
    styles = styles_of(select(record, op))
    with matplotlib.rc_context(RC):
        figure = new_figure(3.9)
        keys: dict[str, Line2D] = {}
        for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            axes.loglog()
            for style in styles.values():
                found = [(case, one) for case in panel for one in case.results if one.name == style.name]
                if found and style.role in ("ours", *COMPARED):
                    rates = [case.rate(one) for case, one in found]
                    (keys[style.name],) = axes.plot([work_of(case) for case, _ in found], rates, **style.point)
            _draw_roof(axes, panel, keys)
            unit, what, per = FLOPS if panel[0].flops else BYTES
            engineering(axes, unit, f"{unit}/s")
            axes.set_xlabel(what)
            axes.set_ylabel(f"{per} per second")
        if not keys:  # nobody could be timed
            return None
        legend_above(figure, list(keys.values()), list(keys))
    return figure


def _draw_roof(axes: Axes, cases: Sequence[CaseRecord], keys: dict[str, Line2D]) -> None:
    """What the limit itself reached in this run, and above it a shade: nobody was expected there."""
    rates: dict[int, list[float]] = {}
    names = list(dict.fromkeys(case.limit.name for case in cases if case.limit))
    for case in cases:
        if case.limit:
            rates.setdefault(work_of(case), []).append(case.rate(case.limit))
    if not rates:
        return
    work = sorted(rates)
    roof = [statistics.median(rates[size]) for size in work]
    top = max(axes.get_ylim()[1], 1.3 * max(roof))
    (line,) = axes.plot(work, roof, color=LIGHT["limit"], linewidth=1.4, marker="_", zorder=1)
    axes.fill_between(work, roof, [top] * len(work), color=LIGHT["line"], alpha=0.4, linewidth=0)
    axes.set_ylim(top=top)
    keys[f"the limit: {', '.join(names)}"] = line


# -------------------------------------------------------------------------------------------------------------- times


def times(record: Record, op: str, dtype: str) -> Figure | None:
    """Median times; a panel for each series of more than one length, all to the same scales."""
    series: dict[str, list[CaseRecord]] = {}
    for case in select(record, op, dtype):
        if case.results and case.length > 0:
            series.setdefault(case.series, []).append(case)
    panels = {name: cases for name, cases in series.items() if len({case.length for case in cases}) > 1}
    if not panels:
        return None
    shown, styles = dict(list(panels.items())[:MOST_PANELS]), styles_of(select(record, op))
    columns = min(len(shown), 2 if len(shown) < 5 else 3)
    rows = math.ceil(len(shown) / columns)
    with matplotlib.rc_context(RC):
        figure = new_figure(1.2 + rows * (2.7 if columns == 1 else 1.9 if columns == 2 else 1.65))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        drawn: dict[str, Style] = {}
        for axes, (name, cases) in zip(grid, shown.items(), strict=False):
            cases.sort(key=lambda case: case.length)
            for style in styles.values():
                found = [(case, one) for case in cases for one in case.results if one.name == style.name]
                if found:
                    medians = [one.seconds.middle for _, one in found]
                    axes.plot([case.length for case, _ in found], medians, **style.line)
                    drawn[style.name] = style
            axes.set_title(wrapped(name.replace(f" {dtype}", ""), 66 // columns), loc="left")
        axes = grid[0]
        axes.loglog()
        axes.margins(x=0.1)  # the outer labels keep clear of the next panel's
        engineering(axes, "", "s")
        lengths = sorted({case.length for cases in shown.values() for case in cases})
        axes.xaxis.set_major_locator(FixedLocator(apart(lengths, 12 // columns)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.tick_params(labelbottom=True)  # the last of its column, though the grid's last row may end before it
        left = "" if len(shown) == len(panels) else f"; the first {len(shown)} of {len(panels)} series"
        figure.supxlabel(f"length{left}", fontsize=8.5, color=LIGHT["faint"])
        legend_of_lines(figure, drawn.values())
    return figure


FIGURES = {"ratios": ratios, "roofline": roofline, "times": times}


def save(record: Record, path: Path) -> list[Path]:
    """Write every figure of the run, as PNG or SVG by the suffix of ``path``.

    ``out.png`` becomes ``out-OP-DTYPE-KIND.png``: ``out-rotary-bfloat16-ratios.png``, and so on for each op, dtype and
    kind of figure that has something to draw. What cannot stand in a file's name is quoted as in a URL.

    Returns:
        The files written.

    Raises:
        ValueError: the suffix is neither ``.png`` nor ``.svg``.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"figures are written as .png or .svg, not as {path.name!r}")
    written = []
    for op in ops(record):
        for dtype in dtypes(record, op):
            for kind, draw in FIGURES.items():
                figure = draw(record, op, dtype)
                if figure is None:
                    continue
                machine = record.machine.get("name", "")
                with matplotlib.rc_context(RC):
                    title = printable(f"{op}, {dtype}: {kind}" + (f" on {machine}" if machine else ""), 90)
                    # Every figure has a legend at its top: a title of its own would lie upon that.
                    figure.legends[0].set_title(title + "\n", FontProperties(size=10, weight="bold"))
                    figure.legends[0].set_alignment("left")
                    name = "-".join((path.stem, *(quote(part, safe="") for part in (op, dtype, kind))))
                    target = path.with_name(name + path.suffix)
                    metadata = {"Date": None} if path.suffix == ".svg" else None
                    figure.savefig(target, dpi=160, facecolor=LIGHT["paper"], metadata=metadata)
                written.append(target)
    return written
