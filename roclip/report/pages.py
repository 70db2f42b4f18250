"""The toolkit of all pages: one base template, one stylesheet, shared macros and filters.

A page extends `base.html.jinja`, which holds head, style (light and dark) and frame, and draws with the macros of
`macros.html.jinja` and the SVG of `charts.py`. With a `nonce` it is served and live; without one it is a file that needs no
other, and that forbids itself scripts and requests.
"""

import time
from pathlib import Path
from typing import Any

import jinja2

from roclip.report.curves import COLORS, DARK_COLORS


def environment(*folders: Path) -> jinja2.Environment:
    """The templates of these folders and of this one, with automatic escaping."""
    made = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
    )
    made.filters.update(percent=percent, duration=duration, size=size, plain=plain, clock=_clock)
    made.globals.update(arm_colors=COLORS, arm_colors_dark=DARK_COLORS)
    return made


def _clock(moment_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment_s))


def percent(share: float | None, digits: int = 1) -> str:
    """0.1234 as '12.3 %', and None as a dash."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds as text: '42 s', '3 min 20 s', '2 h 05 min'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes as text: '1.5 GB'."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def plain(value: Any) -> str:
    """A value for a table cell: a short number, yes or no for a truth value, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
