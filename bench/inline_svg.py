"""A matplotlib figure as SVG inside an HTML page: small, in the page's font, in the colours of the reader's theme."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from neox_kernels.bench.figure_style import LIGHT, RC

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
NUMBERS = ("d", "points", "transform", "x", "y", "width", "height", "viewBox")  # attributes whose digits are rounded


def inline(figure: Figure, prefix: str, label: str) -> str:
    """The ``<svg>`` element.

    Args:
        figure: drawn in the colours of ``figure_style.LIGHT`` alone.
        prefix: what the ids in it begin with; different for every figure of a page.
        label: what a screen reader says in place of the figure.
    """
    file = io.BytesIO()
    with matplotlib.rc_context({**RC, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    _rename_ids(root, prefix)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")  # inside HTML both are known without a namespace
        if HREF in element.attrib:
            element.set("href", element.attrib.pop(HREF))
        if "fill" in element.attrib:  # where a variable would not do
            element.set("style", f"fill: {element.attrib.pop('fill')}")
        if "style" in element.attrib:
            element.set("style", _themed(element.attrib["style"]))
        for name in NUMBERS:
            if name in element.attrib:
                element.set(name, re.sub(r"-?\d+\.\d+", _rounded, element.attrib[name]))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if element.tag in ("path", "g", "svg"):
            element.text = element.tail = None  # matplotlib's indents
        if element.tag == "path":
            element.set("d", " ".join(element.get("d", "").split()))
    width, height = (float(root.get(side, "").removesuffix("pt")) * 4 / 3 for side in ("width", "height"))
    root.attrib = {"viewBox": root.get("viewBox", ""), "width": f"{width:.0f}", "height": f"{height:.0f}"}
    root.attrib |= {"role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Keep those ids that something refers to, under names that no other figure has."""
    referred = re.compile(r"url\(#([^)]+)\)")
    used: dict[str, str] = {}
    for element in root.iter():
        for name, value in element.attrib.items():
            for old in [value[1:]] if name == HREF else referred.findall(value):
                used.setdefault(old, f"{prefix}-{len(used)}")
    for element in root.iter():
        old = element.attrib.pop("id", "")
        if old in used:
            element.set("id", used[old])
        for name, value in element.attrib.items():
            if name == HREF:
                element.set(name, f"#{used[value[1:]]}")
            else:
                element.set(name, referred.sub(lambda found: f"url(#{used[found[1]]})", value))


def _themed(style: str) -> str:
    """Each colour as the variable of its name; the size and weight of a font, and not its family.

    A colour that is not of LIGHT is a KeyError: on a dark page it might not be seen.
    """
    style = re.sub(r"#[0-9a-f]{6}", lambda found: VARIABLES[found[0]], style)
    style = re.sub(r"font: (?:(bold|[6-9]00) )?([\d.]+px)[^;]*", r"font-size: \2; font-weight: \1", style)
    return re.sub(r"font-family: [^;]*; ?|font-weight: (;|$) ?", "", style)


def _rounded(number: re.Match[str]) -> str:
    return f"{round(float(number[0]), 2):g}"
