"""One panel as SVG text: matplotlib's drawing, made fit to stand inline in a page, light or dark.

Panels are small (the width of a phone) and a page lays them out side by side where it has room. Ink, grid and paper
are drawn in colours of their own, which a page replaces by its text's colour and by custom properties. Text stays
text (svg.fonttype none); nothing depends on the time, the machine's settings or its matplotlibrc.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

INK, GRID, PAPER = "#1b1b1c", "#c9c9ca", "#fefeff"
WIDTH = 4.7
# Okabe and Ito's palette, which the colour-blind can tell apart, each with a marker of its own.
FIXED = {
    "vanilla": ("#7f7f7f", "o"),
    "depth_attention": ("#0072b2", "s"),
    "denseformer": ("#e69f00", "^"),
    "attnres": ("#009e73", "D"),
    "mhc": ("#cc79a7", "v"),
}
SPARE = [("#d55e00", "P"), ("#56b4e9", "X"), ("#8a63d2", "<"), ("#a6761d", ">")]
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


class Picture(NamedTuple):
    """A figure. `name`: of its file, and unique in a page; `alt`: what it shows, for those who cannot see it."""

    name: str
    title: str
    alt: str
    svg: str

    @property
    def inline(self) -> str:
        """For a page: its ink is the text's colour, its grid and paper are the page's."""
        colours = {INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--paper)"}
        return re.sub("|".join(colours), lambda match: colours[match[0]], self.svg)


def colours(methods: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each method, the same in every figure; labels that we do not know take the spare ones."""
    spare = [method for method in methods if method not in FIXED]
    return {**FIXED, **{method: SPARE[index % len(SPARE)] for index, method in enumerate(spare)}}


def picture(name: str, title: str, alt: str, paint: Callable[[Any], None], height: float = 3.3) -> Picture:
    """Draws one panel.

    Args:
        name: lower-case letters, digits and dashes after cleaning; the prefix of all ids in the SVG.
        paint: draws on matplotlib's Axes.
        height: inches, for a width of 4.7.
    """
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    buffer = io.StringIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
        paint(axes)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(name, title, alt, _clean(buffer.getvalue(), name, alt))


def _clean(svg: str, name: str, alt: str) -> str:
    """The svg element alone, with ids of its own and a name for those who cannot see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    label = f' role="img" aria-label="{html.escape(alt)}"'
    return re.sub(r"<svg\b", lambda match: match[0] + label, svg, count=1)
