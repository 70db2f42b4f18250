"""The figures of an experiment, drawn with matplotlib because they are files too (`frontier.svg`, `.png`): usefulness against
attack success, and attack success against the share of poisons.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from roclip.report.comparison import attack_names
from roclip.report.curves import COLORS
from roclip.storage import write_atomic

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
PANEL_INCHES = (3.3, 3.1)
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")


def frontier(rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> Figure:
    """One panel for each attack: its success (x) against zero-shot top-1 (y), both in the worse phase.

    A small mark is a seed, a large one the mean of an arm with the 95 % interval of its successes; the dotted line joins
    the arms that no other beats in both. `rows` are those of one point of the sweep.
    """
    attacks = attack_names(rows)
    figure, panels = _panels(attacks)
    for attack, axes in zip(attacks, panels, strict=True):
        means = {}
        for row in rows:
            worst, color = row["worst"], colors[row["arm"]]
            if attack not in worst["attacks"] or "zero_shot_top1" not in worst:
                continue
            result, useful = worst["attacks"][attack], worst["zero_shot_top1"]
            rates = [seed["rate"] for seed in result["by_seed"]]
            axes.scatter(rates, useful["by_seed"], s=13, color=color, alpha=0.45, linewidths=0, zorder=3)
            low, high = result["ci95"]
            axes.plot([low, high], [useful["mean"]] * 2, color=color, linewidth=1.2, alpha=0.5, zorder=2)
            axes.scatter(result["rate"], useful["mean"], s=64, color=color, edgecolors="white", zorder=4)
            means[row["arm"]] = (result["rate"], useful["mean"])
        if front := pareto(means.values()):
            axes.plot(*zip(*front, strict=True), color=INK, linewidth=0.9, linestyle=":", zorder=1)
        _name(axes, means, colors)
        axes.set_xlim(-0.05, 1.05)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel(f"{attack} success")
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.margins(y=0.18)
    if panels:
        panels[0].set_ylabel("zero-shot top-1")
    return figure


def dose_response(
    rows: Sequence[Mapping[str, Any]], points: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]
) -> Figure:
    """One panel for each attack: the share of its poisons in the data (x, logarithmic) against its success, by arm."""
    attacks = attack_names(rows)
    figure, panels = _panels(attacks)
    for attack, axes in zip(attacks, panels, strict=True):
        ticks = set()
        for arm, color in colors.items():
            found = _doses([row for row in rows if row["arm"] == arm], points, attack)
            if not found:
                continue
            shares, results = zip(*found, strict=True)
            ticks.update(shares)
            low, high = zip(*(result["ci95"] for result in results), strict=True)
            axes.fill_between(shares, low, high, color=color, alpha=0.12, linewidth=0)
            axes.plot(shares, [result["rate"] for result in results], color=color, marker="o", markersize=4, label=arm)
        axes.set_xscale("log")
        axes.set_xticks(_apart(ticks), minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-0.04, 1.04)
        axes.set_xlabel(f"{attack} poisons in the data")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.2g} %"))
    if panels:
        panels[0].set_ylabel("attack success")
        panels[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (attack success, usefulness) that no other beats in both, in order of attack success."""
    front: list[tuple[float, float]] = []
    for success, useful in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or useful > front[-1][1]:
            front.append((success, useful))
    return front


def arm_colors(arms: Iterable[str]) -> dict[str, str]:
    """The report's colours, in the order of the arms."""
    return {arm: COLORS[place % len(COLORS)] for place, arm in enumerate(arms)}


def save(figure: Figure, folder: Path, stem: str) -> Markup:
    """Write `<stem>.svg` and `<stem>.png`, and return the drawing for a page."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": stem}):
        text, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pixels, format="png", dpi=200, metadata={"Software": None})
    write_atomic(folder / f"{stem}.svg", text.getvalue())
    write_atomic(folder / f"{stem}.png", pixels.getvalue())
    return Markup(_inline_svg(text.getvalue()))  # drawn from numbers and checked names only


def _apart(shares: Iterable[float], least: float = 1.5) -> list[float]:
    """The shares whose labels do not touch on a logarithmic axis: each at least `least` times the one before."""
    kept: list[float] = []
    for share in sorted(shares):
        if not kept or share >= least * kept[-1]:
            kept.append(share)
    return kept


def _doses(
    rows: Sequence[Mapping[str, Any]], points: Mapping[str, Mapping[str, Any]], attack: str
) -> list[tuple[float, Mapping[str, Any]]]:
    """For each row, the share of an attack's poisons among all pairs and its result, in order of the share."""
    found = []
    for row in rows:
        result, data = row["worst"]["attacks"].get(attack), points[row["point"]]
        if result and data["poisons"].get(attack):
            found.append((data["poisons"][attack] / data["pairs"], result))
    return sorted(found, key=lambda pair: pair[0])


def _panels(attacks: Sequence[str]) -> tuple[Figure, list[Axes]]:
    count = max(len(attacks), 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL_INCHES[0] * count, PANEL_INCHES[1]), layout="constrained")
        panels = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for axes in panels:
        axes.grid(color=GRID, linewidth=0.7)
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, panels[: len(attacks)]


def _name(axes: Axes, means: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    for arm, (x, y) in means.items():
        left = x > 0.7
        axes.annotate(
            arm,
            (x, y),
            (-7 if left else 7, 4),
            textcoords="offset points",
            ha="right" if left else "left",
            va="bottom",
            color=colors[arm],
            fontsize=8,
            fontweight="bold",
        )


def _inline_svg(svg: str) -> str:
    """The <svg> element alone, without metadata, a fixed size, or ids that every figure of matplotlib has."""
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
