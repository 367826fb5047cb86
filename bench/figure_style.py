"""How the figures of a benchmark look: colours for a light and a dark page, and one style for each contender.

The colours are Okabe and Ito's, which the colour-blind can tell apart, or such a hue made darker or lighter until it
stands out from the page (3 to 1 for lines and bars, 4.5 to 1 for text). Colour is never alone in telling contenders
apart: marker, dash and hatch differ too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from neox_kernels.bench.record import CaseRecord

# Figures are drawn in LIGHT; on the page each of its colours becomes a CSS variable of this name, which DARK sets anew.
# So no two of LIGHT may be the same.
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2430",
    "faint": "#5b6675",
    "line": "#dde2e9",
    "ours": "#0072b2",
    "peer-1": "#d55e00",
    "peer-2": "#009e73",
    "peer-3": "#c4659a",
    "peer-4": "#b07a00",
    "peer-5": "#3b4452",
    "peer-6": "#857d00",
    "limit": "#6b7482",
}
DARK = {
    "paper": "#14181f",
    "ink": "#e7eaf0",
    "faint": "#a3adbb",
    "line": "#2e3643",
    "ours": "#56b4e9",
    "peer-1": "#f07d2e",
    "peer-2": "#1fb88c",
    "peer-3": "#d98fb8",
    "peer-4": "#e69f00",
    "peer-5": "#cdd3dc",
    "peer-6": "#f0e442",
    "limit": "#8d97a6",
}
PEERS = [name for name in LIGHT if name.startswith("peer")]
MARKERS = "s^DvPX<>"
HATCHES = ("", "////", "\\\\\\\\", "xxxx", "----", "||||", "++++")  # no dots: each is a path of its own in SVG
DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
ROLES = ("ours", "peer", "added", "variant", "limit")  # their order in a legend

RC: Any = {  # not a dict of str: some versions of matplotlib type its keys by name, some do not
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["faint"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.borderaxespad": 0.2,
    "text.parse_math": False,  # a name with dollars in it is no formula
    "svg.hashsalt": "neox_kernels",  # the same record gives the same file
}


@dataclass(frozen=True)
class Style:
    """How one contender is drawn wherever it appears.

    hatch: of its bars.
    filled: whether its markers are.
    """

    name: str
    role: str
    colour: str
    marker: str
    dash: Any
    hatch: str
    filled: bool

    @property
    def line(self) -> dict[str, Any]:
        """What ``Axes.plot`` takes."""
        ours = self.role == "ours"
        return {
            "color": self.colour,
            "linestyle": self.dash,
            "linewidth": 2.0 if ours else 1.2,
            "marker": self.marker,
            "markersize": 5.0 if ours else 4.2,
            "markerfacecolor": self.colour if self.filled else LIGHT["paper"],
            "markeredgecolor": self.colour if not self.filled else LIGHT["paper"],
            "markeredgewidth": 0.5 if self.filled else 1.0,
            "zorder": 4 if ours else 3,
        }

    @property
    def point(self) -> dict[str, Any]:
        """What ``Axes.plot`` takes for points alone."""
        return {**self.line, "linestyle": "none", "markersize": self.line["markersize"] + 1.2}

    @property
    def bar(self) -> dict[str, Any]:
        """What ``Axes.barh`` takes. The hatch has the colour of the edge, which itself is not drawn."""
        return {"facecolor": self.colour, "edgecolor": LIGHT["paper"], "linewidth": 0, "hatch": self.hatch}


def styles_of(cases: Iterable[CaseRecord]) -> dict[str, Style]:
    """A style for each contender, by name, in the order of a legend.

    Give it all cases of an op, of every dtype: then a contender looks the same in all its figures.
    """
    roles: dict[str, str] = {}
    for case in cases:
        for result in case.results:
            roles.setdefault(result.name, result.role)
    counts: dict[str, int] = {}
    styles = {}
    for name in sorted(roles, key=lambda name: ROLES.index(roles[name])):
        role = roles[name]
        kin = "peer" if role == "added" else role  # the user's own take the colours that peers have left
        index = counts[kin] = counts.get(kin, -1) + 1
        styles[name] = _style(name, role, index)
    return styles


def _style(name: str, role: str, index: int) -> Style:
    marker, hatch, dash = MARKERS[index % len(MARKERS)], HATCHES[index % len(HATCHES)], DASHES[index % len(DASHES)]
    if role == "ours":
        return Style(name, role, LIGHT["ours"], "o", "-", "", True)
    if role == "variant":  # of our colour, hollow and dashed
        return Style(name, role, LIGHT["ours"], marker, dash, hatch, False)
    if role == "limit":
        return Style(name, role, LIGHT["limit"], "", ("-", *DASHES)[index % (len(DASHES) + 1)], hatch, True)
    return Style(name, role, LIGHT[PEERS[index % len(PEERS)]], marker, "-", hatch, True)
