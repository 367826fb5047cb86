"""The figures of a benchmark run: that they show the run's numbers, and are written as what their names say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
from bench_records import EVIL, made_up_case, made_up_cases, made_up_record, record_of
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from neox_kernels.bench import figures
from neox_kernels.bench.figure_style import LIGHT, styles_of
from neox_kernels.bench.record import OURS, CaseRecord, Record, Result


def only(record: Record, op: str, dtype: str = "float32") -> list[CaseRecord]:
    return [case for case in record.cases if (case.op, case.dtype) == (op, dtype)]


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def points(axes: Axes, colour: str) -> set[tuple[float, float]]:
    """Of all lines of a colour."""
    lines = [line for line in axes.get_lines() if to_hex(line.get_color()) == colour]
    return {(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)}


@pytest.fixture(scope="module")
def record() -> Record:
    return made_up_record()


def test_ratios_are_bars_from_one_with_quartiles(record: Record) -> None:
    figure = figures.ratios(record, "softmax", "float32")
    assert figure
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    spreads = [
        case.ratio(result)
        for case in only(record, "softmax")
        for result in case.results
        if result.role in ("peer", "added")
    ]
    ends = sorted(patch.get_x() + patch.get_width() for patch in axes.patches)
    assert {patch.get_x() for patch in axes.patches} == {1}
    assert ends == pytest.approx(sorted(spread.middle for spread in spreads))
    assert min(ends) < 1 < max(ends), "bars go both ways"
    (whiskers,) = axes.collections
    reach = sorted((path.vertices[0][0], path.vertices[1][0]) for path in whiskers.get_paths())
    assert numpy.allclose(reach, sorted((spread.low, spread.high) for spread in spreads))
    low, high = axes.get_xlim()
    assert low < min(spread.low for spread in spreads) and high > max(spread.high for spread in spreads)
    middles = [patch.get_y() + patch.get_height() / 2 for patch in axes.patches]
    assert len({round(y, 4) for y in middles}) == len(spreads), "bars lie on each other"
    assert {"forward · heads-12", "(1, 2048)", "mine", f"{OURS} = 1"} <= texts(figure)
    assert "memcpy" not in texts(figure)
    assert [line.get_xdata() for line in axes.get_lines() if to_hex(line.get_color()) == LIGHT["ours"]] == [[1, 1]]


def test_bars_grow_thinner_and_then_fewer() -> None:
    def height(number: int) -> tuple[float, set[str]]:
        case = made_up_case("softmax", "forward", "heads-12", 1, 1, "float32")
        figure = figures.ratios(record_of([replace(case, size=f"({i})") for i in range(number)]), "softmax", "float32")
        assert figure
        return figure.get_size_inches()[1], texts(figure)

    few, _ = height(4)
    many, _ = height(60)
    most, said = height(200)
    assert few < 6 < many < most < 65
    assert any("the first 120 of 200 cases" in text for text in said)


def test_the_roofline_is_of_this_run(record: Record) -> None:
    for op, work in (("softmax", "bytes"), ("models", "flops")):
        figure = figures.roofline(record, op, "float32")
        assert figure
        (axes,) = figure.axes
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        cases = only(record, op)
        styles = styles_of(case for case in record.cases if case.op == op)
        for name in {result.name for case in cases for result in case.results if result.role in ("ours", "peer")}:
            expected = {
                (getattr(case, work), case.rate(result))
                for case in cases
                for result in case.results
                if result.name == name
            }
            assert points(axes, styles[name].colour) == expected
        roof = points(axes, LIGHT["limit"])
        assert {x for x, _ in roof} == {getattr(case, work) for case in cases}
        if op == "models":  # one case of each size
            assert roof == {(case.flops, case.rate(case.limit)) for case in cases if case.limit}


def test_without_a_limit_there_is_no_roof(record: Record) -> None:
    figure = figures.roofline(record, "varlen", "float32")
    assert figure and not points(figure.axes[0], LIGHT["limit"])
    assert not any("limit" in text for text in texts(figure))


def test_bytes_and_flops_have_axes_of_their_own(record: Record) -> None:
    cases = [replace(case, op="both") for op in ("gelu", "models") for case in only(record, op)]
    figure = figures.roofline(record_of(cases), "both", "float32")
    assert figure and [axes.get_ylabel() for axes in figure.axes] == ["bytes per second", "FLOP per second"]


def test_times_have_a_panel_for_each_series(record: Record) -> None:
    figure = figures.times(record, "rotary", "float32")
    assert figure
    cases = only(record, "rotary")
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes]
    lengths: dict[str, set[int]] = {}
    for case in cases:
        lengths.setdefault(case.series, set()).add(case.length)
    expected = [name.replace(" float32", "") for name, found in lengths.items() if len(found) > 1]
    assert titles == expected and len(expected) < len(lengths), "batch 8 has one length"
    for axes, name in zip(figure.axes, expected, strict=True):
        own = [case for case in cases if case.series.replace(" float32", "") == name]
        names = [result.name for result in own[0].results]
        assert len(axes.get_lines()) == len(names)
        assert points(axes, LIGHT["ours"]) == {
            (case.length, result.seconds.middle)
            for case in own
            for result in case.results
            if result.role in ("ours", "variant")
        }
        for line in axes.get_lines():
            assert list(line.get_xdata()) == sorted(line.get_xdata())


def test_contenders_can_be_told_apart_without_colour(record: Record) -> None:
    looks = set()
    styles = styles_of(case for case in record.cases if case.op == "rotary").values()
    for style in styles:
        assert (style.colour == LIGHT["ours"]) == (style.role in ("ours", "variant"))
        looks.add((style.marker, str(style.dash), style.filled))
    assert len(looks) == len(styles) == 7
    hatches = [style.hatch for style in styles if style.role == "peer"]
    assert len(set(hatches)) == len(hatches) == 3


def test_a_contender_looks_the_same_in_every_dtype(record: Record) -> None:
    """Though in one of them another is missing before it."""
    cases = only(record, "rotary", "float32")
    less = [
        replace(case, results=tuple(x for x in case.results if x.name != "transformers eager"))
        for case in only(record, "rotary", "bfloat16")
    ]
    both = record_of([*cases, *less])
    colours = []
    for dtype in ("float32", "bfloat16"):
        figure = figures.roofline(both, "rotary", dtype)
        assert figure
        legend = figure.legends[0]
        texts = [text.get_text() for text in legend.get_texts()]
        colours.append(to_hex(legend.get_lines()[texts.index("flash-attn")].get_color()))
    assert colours[0] == colours[1]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_every_figure_is_written(tmp_path: Path, suffix: str) -> None:
    record = record_of(
        [case for case in made_up_cases(("float32",), ((1, 1), (1, 128))) if case.op in ("gelu", "varlen")]
    )
    written = figures.save(record, tmp_path / f"out{suffix}")
    expected = [
        f"out-{op}-float32-{kind}{suffix}" for op in ("varlen", "gelu") for kind in ("ratios", "roofline", "times")
    ]
    assert [path.name for path in written] == expected
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written:
        if suffix == ".png":
            pixels = image.imread(path)
            assert pixels.shape[1] == pytest.approx(992, abs=1) and pixels.std() > 0.02
        else:
            root = ElementTree.parse(path).getroot()
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20
    if suffix == ".svg":
        again = tmp_path / "again"
        again.mkdir()
        figures.save(record, again / f"out{suffix}")
        assert (again / expected[0]).read_bytes() == written[0].read_bytes()


def test_names_of_files_stay_in_their_folder(tmp_path: Path) -> None:
    case = replace(made_up_case("gelu", "forward", "gpt-j-6b", 1, 1, "float32"), op="../a b")
    (tmp_path / "below").mkdir()
    written = figures.save(record_of([case]), tmp_path / "below/out.svg")
    assert [path.name for path in written] == [
        "out-..%2Fa%20b-float32-ratios.svg",
        "out-..%2Fa%20b-float32-roofline.svg",
    ]
    assert all(path.parent == tmp_path / "below" and path.exists() for path in written)


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png or \.svg, not as 'out\.pdf'"):
        figures.save(record_of([]), tmp_path / "out.pdf")


def test_strange_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    case = made_up_case("gelu", "forward", "gpt-j-6b", 1, 1, "float32")
    ours = case.ours
    for name, shown in (
        (EVIL, EVIL),
        ("_hidden", "_hidden"),
        ("$x$", "$x$"),
        ("a\x00b", "a\ufffdb"),
        ("x" * 99, "x" * 59 + "…"),
    ):
        results = (ours, Result(name, "peer", ours.samples))
        figure = figures.ratios(record_of([replace(case, results=results)]), "gelu", "float32")
        assert figure and shown in texts(figure)
