"""The report of a benchmark run, as text: what stands in the page, and that nothing in a record can break it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_records import ABSENT, EVIL, large_record, made_up_case, made_up_record, record_of

from neox_kernels.bench.figure_style import DARK, LIGHT
from neox_kernels.bench.record import OURS, CaseRecord, Record, Result
from neox_kernels.bench.report import render
from neox_kernels.bench.units import seconds, three_digits

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str, name: str = "") -> Iterator[Element]:
        """Every element in this one of the tag, and of the class if one is given."""
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (not name or name in child.attributes.get("class", "").split()):
                    yield child
                yield from child.all(tag, name)

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join("".join(parts).split())


class Page(HTMLParser):
    """A tree of the page. Elements that are not closed, or closed out of turn, are errors."""

    VOID = ("meta", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.ids: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        self.ids += [element.attributes["id"]] if "id" in element.attributes else []
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


@pytest.fixture(scope="module")
def record() -> Record:
    return made_up_record()


@pytest.fixture(scope="module")
def html(record: Record) -> str:
    return render(record)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def rows(page: Page) -> list[tuple[str, ...]]:
    """The tables' rows as text: op and dtype, case, contender without its role, and the cells."""
    found = []
    for article in page.root.all("article"):
        where = f"{article.attributes['data-op']} {article.attributes['data-dtype']}"
        for row in (row for body in article.all("tbody") for row in body.all("tr")):
            case, name = row.all("th")
            label = Element("", {}, [child for child in name.children if isinstance(child, str)]).text
            found.append((where, case.text, label, *(cell.text for cell in row.all("td"))))
    return found


def test_every_case_and_contender_is_in_a_table(record: Record, page: Page) -> None:
    expected = {
        (f"{case.op} {case.dtype}", f"{case.kind} {case.shape} {case.size}", name)
        for case in record.cases
        for name in [*(result.name for result in case.results), *case.absent]
    }
    found = [row[:3] for row in rows(page)]
    assert set(found) == expected and len(found) == len(expected) > 300


def test_the_figures_of_a_row() -> None:
    results = (
        Result("memcpy", "limit", (0.8e-6, 1e-6, 1.2e-6)),
        Result(OURS, "ours", (1e-6, 2e-6, 4e-6)),
        Result("flash-attn", "peer", (3e-6, 3e-6, 3e-6)),
    )
    case = CaseRecord("rotary", "forward", "tiny", "(1, 2)", 2, "all", "float32", 4000, 0, results)
    found = rows(Page(render(record_of([case]))))
    assert [row[2:] for row in found] == [
        (OURS, "2.00 µs", "1", "-", "2.00 GB/s", "50%"),
        ("flash-attn", "3.00 µs", "1.50", "1.12 to 2.25", "1.33 GB/s", "33%"),
        ("memcpy", "1.00 µs", "0.500", "0.400 to 0.650", "4.00 GB/s", "100%"),
    ]
    with_flops = rows(Page(render(record_of([replace(case, flops=8_000_000)]))))
    assert [row[6] for row in with_flops] == ["4 000 GFLOP/s", "2 670 GFLOP/s", "8 000 GFLOP/s"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0314, "0.0314"), (0.95, "0.950"), (9.999, "10.0"), (23.66, "23.7"), (99.99, "100"), (999.6, "1\u202f000")],
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3.14159e-8, "31.4 ns"), (31.4e-6, "31.4 µs"), (0.9999e-3, "1.00 ms"), (2.5, "2.50 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text.replace(" ", "\u00a0")


def test_absent_contenders_say_why(page: Page) -> None:
    said = [row for row in rows(page) if row[0].startswith("varlen") and len(row) == 4]
    assert len(said) == 8 * len(ABSENT)
    assert {(row[2], row[3]) for row in said} == {(name, f"absent: {why}") for name, why in ABSENT.items()}


def test_nothing_of_a_record_is_taken_for_markup(html: str, page: Page) -> None:
    assert EVIL not in html and "<b>" not in html and "<H100>" not in html
    assert len(list(page.root.all("script"))) == 1
    assert EVIL in {row[2] for row in rows(page)}
    assert any(EVIL in svg.attributes["aria-label"] for svg in page.root.all("svg"))


def test_the_foot_tells_of_the_run(record: Record, page: Page) -> None:
    (footer,) = page.root.all("footer")
    terms = dict(zip((x.text for x in footer.all("dt")), (x.text for x in footer.all("dd")), strict=True))
    assert terms == {
        "Status": "complete", "Command": record.command, "Commit": "0123456789abcdef", "Started": record.started,
        "Duration": "12 min 34 s", **{name: str(value) for name, value in record.machine.items()},
        "neox-kernels": "0.1.0", "torch": "2.13.0", "flash-attn": "not installed",
    }  # fmt: skip
    assert not list(page.root.all("p", "notice"))


def test_an_interrupted_run_says_so() -> None:
    whole = made_up_record(complete=False)
    page = Page(render(record_of(whole.cases[:2], complete=False)))
    (notice,) = page.root.all("p", "notice")
    assert "interrupted" in notice.text
    assert len(rows(page)) == sum(len(case.results) + len(case.absent) for case in whole.cases[:2])


def test_what_was_wrong_is_said() -> None:
    record = record_of(made_up_record().cases[:1])
    record.wrong = ["rotary forward: <pythia>: error 4"]
    (notice,) = Page(render(record)).root.all("div", "notice")
    assert "wrong" in notice.text and "rotary forward: <pythia>: error 4" in notice.text


def test_ids_are_unique_and_what_refers_to_them_finds_them(html: str, page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    referred = set(re.findall(r"url\(#([^)]*)\)", html)) | set(re.findall(r'href="#([^"]*)"', html))
    referred |= set(re.findall(r'aria-labelledby="([^"]*)"', html))
    assert referred and referred <= set(page.ids)


def test_nothing_is_loaded(html: str) -> None:
    assert not re.search(r"https?:|//cdn|@import|@font-face", html)
    assert not re.search(r"\ssrc\s*=", html)
    assert set(re.findall(r'href="([^#][^"]*)"', html)) == {"data:,"}
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert "default-src 'none'" in html


def test_every_figure_has_a_name_and_the_colours_of_the_theme(page: Page, html: str) -> None:
    figures = list(page.root.all("svg"))
    assert len(figures) == 6 * 2 * 3
    for article in page.root.all("article"):
        where = f"{article.attributes['data-op']}, {article.attributes['data-dtype']}. "
        for svg in article.all("svg"):
            label = svg.attributes["aria-label"]
            assert svg.attributes["role"] == "img" and where in label
            assert re.search(r"\d", label.split(where)[1]) or "measured no limit" in label
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--ours)" in drawn and not re.search(r"#[0-9a-fA-F]{3,8}\b(?!-)", drawn)
    assert "DejaVu" not in drawn


def contrast(one: str, other: str) -> float:
    """As WCAG 2 counts it."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_stand_out(theme: dict[str, str]) -> None:
    assert len(set(theme.values())) == len(theme) and theme.keys() == LIGHT.keys()
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name, colour in theme.items():
        if name not in ("paper", "line"):
            assert contrast(colour, theme["paper"]) >= (4.5 if name in ("ink", "faint", "ours") else 3), name


def strange_records() -> Iterator[tuple[str, Record, int]]:
    """Their names, and how many figures are in the page of each."""
    case = made_up_case("gelu", "forward", "gpt-j-6b", 1, 1, "float32")
    ours = tuple(result for result in case.results if result.role == "ours")
    others = tuple(result for result in case.results if result.role != "ours")
    yield "empty", record_of([]), 0
    yield "one round", record_of([made_up_case("gelu", "forward", "gpt-j-6b", 1, 1, "float32", rounds=1)]), 2
    yield "ours alone", record_of([replace(case, results=ours)]), 1
    yield "ours failed", record_of([replace(case, results=others, absent={OURS: "RuntimeError: no"})]), 1
    yield "all failed", record_of([replace(case, results=(), absent={OURS: "RuntimeError: no"})]), 0
    yield "no work", record_of([replace(case, bytes=0)]), 1
    names = [replace(case, op=f"op {i}", results=(*ours, Result(name, "added", ours[0].samples)))
             for i, name in enumerate(("_hidden", "$a$ $", "a\x00b", "x" * 500, "", "%s {} {{ 7 * 6 }}"))]  # fmt: skip
    yield "strange names", record_of(names), 12
    yield "strange op", record_of([replace(case, op='"><script>', dtype="a b")]), 2
    yield "no commit", replace(record_of([case]), commit=None, machine={}, versions={}), 2


@pytest.mark.parametrize(("record", "figures"), [pytest.param(x, n, id=name) for name, x, n in strange_records()])
def test_strange_records(record: Record, figures: int) -> None:
    page = Page(render(record))
    assert len(list(page.root.all("svg"))) == figures
    assert len(rows(page)) == sum(len(case.results) + len(case.absent) for case in record.cases)


def test_a_whole_run_is_a_small_file() -> None:
    record = large_record()
    assert len(record.cases) >= 250
    assert len(render(record).encode()) < 3_000_000


def test_an_install_has_what_the_page_is_made_of(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "NEOX_KERNELS_EXT": "0", "NEOX_KERNELS_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    for name in ("report.html.jinja", "report.css", "report.js", "report.py", "figures.py"):
        assert (tmp_path / "neox_kernels/bench" / name).read_text() == (ROOT / "bench" / name).read_text()
