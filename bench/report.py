"""The report of a benchmark run: one HTML file with figures and tables, which opens without a network.

It needs matplotlib and Jinja2. The page is ``report.html.jinja`` with ``report.css`` and ``report.js`` set into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from neox_kernels.bench import figures
from neox_kernels.bench.figure_parts import compared, dtypes, has_ours, ops, select
from neox_kernels.bench.figure_style import DARK, LIGHT, ROLES
from neox_kernels.bench.inline_svg import inline
from neox_kernels.bench.record import CaseRecord, Record, Result
from neox_kernels.bench.units import duration, quartiles, rate, seconds, three_digits

HERE = Path(__file__).parent
TITLES = {"ratios": "Against the others", "roofline": "Rate against size", "times": "Time against length"}


@dataclass(frozen=True)
class Cell:
    """A number as people read it, and as a table is sorted by it; None where there is none."""

    text: str
    value: float | None


@dataclass(frozen=True)
class Row:
    """One contender of one case.

    again: whether the row before is of the same case.
    cells: median time, ratio, quartiles, rate, share of the limit; none where the contender is absent.
    """

    case: str
    name: str
    role: str
    again: bool
    cells: tuple[Cell, ...]
    absent: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows in words."""

    kind: str
    title: str
    words: str
    svg: Markup


@dataclass(frozen=True)
class Part:
    """What the page says of one op in one dtype."""

    dtype: str
    cases: int
    pictures: tuple[Picture, ...]
    rows: tuple[Row, ...]


def render(record: Record) -> str:
    """The page, whatever of the run there is."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = {op: [_part(record, op, dtype) for dtype in dtypes(record, op)] for op in ops(record)}
    return environment.get_template("report.html.jinja").render(
        record=record,
        machine=record.machine.get("name"),
        sections=sections,
        dtypes=dtypes(record),
        duration=duration(record.seconds),
        light=LIGHT,
        dark=DARK,
        css=Markup((HERE / "report.css").read_text()),
        js=Markup((HERE / "report.js").read_text()),
    )


def _part(record: Record, op: str, dtype: str) -> Part:
    cases = select(record, op, dtype)
    number = [(x, y) for x in ops(record) for y in dtypes(record, x)].index((op, dtype))
    pictures = []
    for kind, draw in figures.FIGURES.items():
        figure = draw(record, op, dtype)
        if figure:
            words = WORDS[kind](cases)
            svg = inline(figure, f"figure{number}-{kind}", f"{TITLES[kind]}, {op}, {dtype}. {words}")
            pictures.append(Picture(kind, TITLES[kind], words, Markup(svg)))
    return Part(dtype, len(cases), tuple(pictures), tuple(row for case in cases for row in rows(case)))


# -------------------------------------------------------------------------------------------------------------- tables


def rows(case: CaseRecord) -> Iterator[Row]:
    """The case's rows of the table: who was timed, and then who was not and why."""
    name = f"{case.kind} {case.shape} {case.size}"
    for index, result in enumerate(sorted(case.results, key=lambda result: ROLES.index(result.role))):
        yield Row(name, result.name, result.role, index > 0, tuple(_cells(case, result)))
    for index, (absent, reason) in enumerate(case.absent.items(), len(case.results)):
        yield Row(name, absent, "absent", index > 0, (), reason)


def _cells(case: CaseRecord, result: Result) -> Iterator[Cell]:
    nothing = Cell("-", None)
    yield Cell(seconds(result.seconds.middle), result.seconds.middle)
    if not has_ours(case):
        yield from (nothing, nothing)
    elif result.role == "ours":
        yield from (Cell("1", 1.0), nothing)
    else:
        ratio = case.ratio(result)
        yield Cell(three_digits(ratio.middle), ratio.middle)
        yield Cell(quartiles(ratio), ratio.high - ratio.low)
    yield Cell(rate(case, result), case.rate(result))
    limit = case.limit
    share = case.rate(result) / case.rate(limit) if limit and (case.flops or case.bytes) else None
    yield nothing if share is None else Cell(f"{share:.0%}", share)


# --------------------------------------------------------------------------------------------------------------- words


def _range(values: list[float]) -> str:
    low, high = three_digits(min(values)), three_digits(max(values))
    return low if low == high else f"{low} to {high}"


def _words_of_ratios(cases: list[CaseRecord]) -> str:
    found: dict[str, list[float]] = {}
    for case in cases:
        for other in compared(case):
            found.setdefault(other.name, []).append(case.ratio(other).middle)
    ours = next(case.ours.name for case in cases if compared(case))
    parts = [f"{_range(ratios)} times as fast as {name}" for name, ratios in found.items()]
    return f"{ours} is {'; '.join(parts)}."


def _words_of_roofline(cases: list[CaseRecord]) -> str:
    shares = [case.rate(case.ours) / case.rate(case.limit) for case in cases if has_ours(case) and case.limit]
    if not shares:
        return "The rate that each reaches; this run measured no limit for it."
    names = dict.fromkeys(case.limit.name for case in cases if case.limit)
    ours = next(case.ours.name for case in cases if has_ours(case))
    low, high = min(shares), max(shares)
    return f"{ours} reaches {low:.0%} to {high:.0%} of the rate of {', '.join(names)} in the same case and run."


def _words_of_times(cases: list[CaseRecord]) -> str:
    lengths = sorted({case.length for case in cases})
    mine = [case.ours.seconds.middle for case in cases if has_ours(case)]
    took = f"; ours takes {seconds(min(mine))} to {seconds(max(mine))}" if mine else ""
    return f"Median time of one call at lengths from {lengths[0]} to {lengths[-1]}{took}."


WORDS = {"ratios": _words_of_ratios, "roofline": _words_of_roofline, "times": _words_of_times}
