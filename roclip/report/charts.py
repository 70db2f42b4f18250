"""The curves of a report as inline SVG: every arm in one chart, one colour an arm, matched epochs shaded.

Text stays text, in the font of the page around it; nothing is referred to outside the SVG.
"""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from roclip.report.curves import Curve, smoothed

SHADE = "#ece9f6"
INK, GRID = "#475569", "#e5e9f0"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_SIZE_INCHES = (4.4, 2.4)
"""Small on purpose: its text stays readable when a phone shows the chart at its own width."""


def chart(curves: Sequence[Curve], matched: Iterable[int], *, share: bool, seed: str, epochs: int = 0) -> str:
    """One chart as an `<svg>` element.

    Args:
        matched: Epochs, from 1, to shade; epoch e lies between e - 1 and e.
        share: Values are shares, shown from 0 to at least 10 %; else their own range.
        seed: Different for each chart of a page, so that their element ids differ.
        epochs: Length of the axis, so that charts of a page agree.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": seed}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        for epoch in matched:
            axes.axvspan(epoch - 1, epoch, color=SHADE, linewidth=0, zorder=0)
        for curve in curves:
            _draw(axes, curve, smooth=not share)
        axes.set_xlabel("epochs")
        if epochs:
            axes.set_xlim(0, epochs * 1.015)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if share:
            top = max([0.1, *(value for curve in curves for pair in curve.reach for value in pair)])
            axes.set_ylim(-0.02 * top, min(1.0, top * 1.08) * 1.02)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        return figure_svg(figure)


def _draw(axes: Axes, curve: Curve, *, smooth: bool) -> None:
    if not curve.points:
        return
    x, y = zip(*curve.points, strict=True)
    if curve.band:
        low, high = zip(*curve.band, strict=True)
        axes.fill_between(x, low, high, color=curve.color, alpha=0.12, linewidth=0)
    if smooth and len(y) > 60:
        axes.plot(x, y, color=curve.color, linewidth=0.6, alpha=0.25)
        y = smoothed(curve.points, len(y) // 40)
    axes.plot(x, y, color=curve.color, linewidth=1.5, solid_joinstyle="round")
    for full in (True, False):
        chosen = [place for place, filled in zip(curve.points, curve.filled, strict=False) if filled == full]
        if chosen:
            style = {"color": curve.color if full else "white", "edgecolors": curve.color, "linewidths": 1.2}
            axes.scatter(*zip(*chosen, strict=True), s=16, zorder=3, **style)


def figure_svg(figure: Figure) -> str:
    """A figure as an `<svg>` element for a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline_svg(buffer.getvalue())


def inline_svg(svg: str) -> str:
    """Only the element: no prolog, no metadata, no fixed size, no ids that every figure shares."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: ([\d.]+px)[^;"]*', r"font-size: \1", svg)  # as matplotlib before 3.9 writes it
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    return re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
