"""The charts of all pages, as inline SVG. Colours come from the page's stylesheet and no chart has a style of its own, so a
strict Content-Security-Policy lets it through and it follows a dark page. The markup holds numbers and given labels only.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import median

from markupsafe import Markup, escape

from roclip.report.curves import Curve, smoothed

Span = tuple[float, float]
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 8.0, 8.0, 20.0
_RAW_POINTS = 60
"""A curve without a band and with more points is drawn smoothed above its raw points."""


class _Frame:
    """Maps values to positions in a drawing of `width` x `height`."""

    def __init__(self, x: Span, y: Span, width: float, height: float):
        self.x, self.y, self.width, self.height = x, y, width, height
        self.right, self.bottom = width - _RIGHT, height - _BOTTOM

    def at(self, x: float, y: float) -> tuple[str, str]:
        return self.across(x), self.down(y)

    def across(self, x: float) -> str:
        share = (x - self.x[0]) / (self.x[1] - self.x[0])
        return f"{_LEFT + share * (self.right - _LEFT):.1f}"

    def down(self, y: float) -> str:
        share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return f"{self.bottom - min(max(share, 0), 1) * (self.bottom - _TOP):.1f}"

    def path(self, points: Sequence[Span]) -> str:
        return " ".join(",".join(self.at(x, y)) for x, y in points)


def chart(
    curves: Sequence[Curve],
    shaded: Sequence[Span] = (),
    *,
    share: bool,
    until: float = 0.0,
    width: float = 400,
    height: float = 190,
) -> Markup:
    """Curves over epochs (or minutes) as an `<svg>`; the live page's script reads values off its `data-` attributes and
    polylines.

    Args:
        shaded: (start, end) of shaded periods, such as the matched epochs.
        share: The values are shares, shown in percent from 0; otherwise the axis covers their own range.
        until: Minimal end of the x axis.
    """
    values = [value for curve in curves for pair in curve.reach for value in pair]
    ends = [x for curve in curves for x, _ in curve.points] + [end for _, end in shaded]
    frame = _Frame((0.0, max([until, *ends]) or 1.0), _range(values, share), width, height)
    parts = [
        f'<svg class="plot{" wide" if width > 400 else ""}" viewBox="0 0 {width:g} {height:g}" aria-hidden="true" '
        f'data-x="0 {frame.x[1]:g}" '
        f'data-y="{frame.y[0]:g} {frame.y[1]:g}" data-box="{_LEFT:g} {_TOP:g} {frame.right:g} {frame.bottom:g}" '
        f'data-unit="{"%" if share else ""}">'
    ]
    for start, end in shaded:
        left, right = float(frame.across(start)), float(frame.across(end))
        parts.append(
            f'<rect class="shade" x="{left}" y="{_TOP:g}" width="{max(right - left, 0.5):.1f}" height="{frame.bottom - _TOP:g}"/>'
        )
    parts += _rules(frame, _ticks(*frame.y, 4), lambda value: _label(value, share))
    for value in _whole_ticks(frame.x[1], int(width // 70)):
        anchor = "end" if value == frame.x[1] else "middle"
        parts.append(f'<text x="{frame.across(value)}" y="{height - 5:g}" text-anchor="{anchor}">{value:g}</text>')
    parts += [_curve(frame, curve) for curve in curves if curve.points]
    return Markup("".join([*parts, "</svg>"]))


def rank_columns(p50_s: Sequence[float], p99_s: Sequence[float], *, width: float = 400, height: float = 120) -> Markup:
    """One column for each rank's median step time, with a tick for its 99 % quantile. With very many ranks a column is the
    slowest of several adjacent ranks. Columns more than a quarter slower than the median rank stand out."""
    group = -(-len(p50_s) // 64) or 1
    columns = [
        (start, max(p50_s[start : start + group]), max(p99_s[start : start + group], default=0.0))
        for start in range(0, len(p50_s), group)
    ]
    usual, pitch = median(p50_s), (width - _LEFT - _RIGHT) / len(columns)
    frame = _Frame((0.0, 1.0), (0.0, max(max(pair[1:]) for pair in columns) * 1.05 or 1.0), width, height)
    parts = [f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" aria-hidden="true">']
    parts += _rules(frame, _ticks(*frame.y, 3), "{:g} s".format)
    thick = min(pitch * 0.7, 36.0)
    for place, (rank, middle, slow) in enumerate(columns):
        centre = _LEFT + pitch * (place + 0.5)
        top, tick = float(frame.down(middle)), frame.down(slow)
        late = ' class="late"' if middle > 1.25 * usual else ' class="column"'
        parts.append(
            f'<rect{late} x="{centre - thick / 2:.1f}" y="{top}" width="{thick:.1f}" height="{frame.bottom - top:.1f}" rx="2"/>'
            f'<line class="slow" x1="{centre - thick / 2:.1f}" x2="{centre + thick / 2:.1f}" y1="{tick}" y2="{tick}"/>'
        )
        if place % (-(-len(columns) // 16)) == 0:
            parts.append(f'<text x="{centre:.1f}" y="{height - 5:g}" text-anchor="middle">{rank}</text>')
    return Markup("".join([*parts, "</svg>"]))


def bars(labels: Sequence[str], counts: Sequence[int], *, width: float = 720, height: float = 190) -> Markup:
    """One labelled column for each count."""
    pitch = (width - _LEFT - _RIGHT) / len(counts)
    frame = _Frame((0.0, 1.0), (0.0, max(counts) * 1.05 or 1.0), width, height)
    parts = [f'<svg class="plot wide" viewBox="0 0 {width:g} {height:g}" aria-hidden="true">']
    parts += _rules(frame, _ticks(*frame.y, 4), "{:,.4g}".format)
    for place, (label, count) in enumerate(zip(labels, counts, strict=True)):
        centre, top = _LEFT + pitch * (place + 0.5), float(frame.down(count))
        parts.append(
            f'<rect class="column" x="{centre - 0.35 * pitch:.1f}" y="{top}" width="{0.7 * pitch:.1f}" '
            f'height="{frame.bottom - top:.1f}" rx="2"/>'
            f'<text x="{centre:.1f}" y="{height - 5:g}" text-anchor="middle">{escape(label)}</text>'
        )
    return Markup("".join([*parts, "</svg>"]))


def _rules(frame: _Frame, values: Sequence[float], label: Callable[[float], str]) -> list[str]:
    parts = []
    for value in values:
        y = frame.down(value)
        parts.append(f'<line class="rule" x1="{_LEFT:g}" x2="{frame.right:g}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6:g}" y="{float(y) + 3.5:.1f}" text-anchor="end">{label(value)}</text>')
    return parts


def _curve(frame: _Frame, curve: Curve) -> str:
    parts, points, thin = ['<g class="curve">'], list(curve.points), not curve.filled
    stretches = _stretches(points) if thin else [(0, len(points))]
    for start, end in stretches if curve.band else ():
        xs = [x for x, _ in points[start:end]]
        lower = [(x, low) for x, (low, _) in zip(xs, curve.band[start:end], strict=True)]
        upper = [(x, high) for x, (_, high) in zip(xs, curve.band[start:end], strict=True)]
        parts.append(f'<polygon class="band" fill="{curve.color}" points="{frame.path([*lower, *reversed(upper)])}"/>')
    if thin and not curve.band and len(points) > _RAW_POINTS:
        parts += [_line(frame, curve, points[start:end], "raw") for start, end in stretches]
        means = smoothed(points, len(points) // 40)
        points = [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
    parts += [_line(frame, curve, points[start:end], "line") for start, end in stretches]
    for (x, y), filled in zip(curve.points, curve.filled, strict=False):
        across, down = frame.at(x, y)
        inside = curve.color if filled else "var(--card)"
        parts.append(f'<circle cx="{across}" cy="{down}" r="2.6" fill="{inside}" stroke="{curve.color}"/>')
    if not curve.filled:
        across, down = frame.at(*points[-1])
        parts.append(f'<circle cx="{across}" cy="{down}" r="2.6" fill="{curve.color}"/>')
    return "".join([*parts, "</g>"])


def _line(frame: _Frame, curve: Curve, points: Sequence[Span], kind: str) -> str:
    return f'<polyline class="{kind}" stroke="{curve.color}" points="{frame.path(points)}"/>'


def _stretches(points: Sequence[Span]) -> list[tuple[int, int]]:
    """(start, end) of the runs of points without a gap: a metric of matched steps has no value in between."""
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(points)]
    if not gaps:
        return [(0, len(points))]
    wide = max(5 * median(gaps), 0.02 * (points[-1][0] - points[0][0]))
    ends = [n + 1 for n, gap in enumerate(gaps) if gap > wide]
    return list(zip([0, *ends], [*ends, len(points)], strict=True))


def _range(values: Sequence[float], share: bool) -> Span:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if share and low >= 0:
        return 0.0, max(0.1, min(1.0, high * 1.08), high)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.25 * high else low - margin), high + margin


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within a range, about `most` of them."""
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, first + most + 2) if n * step <= high * (1 + 1e-9) or n == 0]


def _whole_ticks(end: float, most: int) -> list[float]:
    step = max(1.0, *(_ticks(0.0, end, most)[1:2] or [1.0]))
    return [n * math.ceil(step) for n in range(int(end // math.ceil(step)) + 1)]


def _label(value: float, share: bool) -> str:
    return f"{100 * value:.3g} %" if share else f"{value:.4g}"
