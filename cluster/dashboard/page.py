"""The page of `roclip dashboard` in parts: each is HTML of its own, so that only what has changed goes to the browser.

All that came from the web or from a file is escaped by the template; the charts are made of numbers.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup

from cluster.dashboard.live_chart import live_chart, rank_columns
from cluster.dashboard.next_steps import SLOW_RANK, next_steps
from roclip.data.outcomes import REASONS, is_passing
from roclip.metrics.registry import METRICS
from roclip.report import PAGES
from roclip.report.curves import (
    ATTACK_SAYS,
    COLORS,
    SHARE_CURVES,
    SHARES,
    Curve,
    attack_curve,
    attack_names,
    share_curve,
)
from roclip.report.readable import duration, percent, plain, size
from roclip.report.run_state import RunState
from roclip.report.training_state import TrainingState

TEMPLATE, DOOR = (Path(__file__).with_name(name) for name in ("page.html.jinja", "door.html.jinja"))
_FOLDERS = (TEMPLATE.parent, PAGES)
"""The second has the style that it shares with the report of a run."""
PARTS: tuple[str, ...] = ("head", "steps", "stages", "arms", "curves", "pool", "ranks", "data", "oracle", "about")
"""Of the page, in their order; each is a macro of the template."""
_POOL = ("pool_similarity", "pool_own", "pool_duplicates", "pool_staleness", "pool_entropy", "agreement", "suspected")
_SPEED = ("samples_per_s", "data_wait_frac", "grad_norm")
_TITLES = {
    "pool_similarity": "Similarity",
    "pool_own": "Own caption found",
    "pool_duplicates": "Duplicates",
    "pool_staleness": "Staleness",
    "pool_entropy": "Entropy",
    "agreement": "Agreement",
    "suspected": "Suspected",
    "samples_per_s": "Pace",
    "data_wait_frac": "Waiting for data",
    "grad_norm": "Gradient norm",
}
_SHARES = {"pool_own", "pool_duplicates", "agreement", "data_wait_frac"}


class Page:
    """Makes HTML of a run's state."""

    def __init__(self) -> None:
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FileSystemLoader(_FOLDERS)
        )
        environment.filters.update(percent=percent, duration=duration, size=size, plain=plain, clock=_clock)
        self._whole, self._door = (environment.get_template(path.name) for path in (TEMPLATE, DOOR))
        self._parts: Any = self._whole.module

    def parts(self, state: RunState) -> dict[str, str]:
        """Each part's HTML by its name."""
        view = _view(state)
        return {name: str(getattr(self._parts, name)(state, view)) for name in PARTS}

    def whole(self, parts: Mapping[str, str], *, nonce: str, version: str) -> str:
        """The page of these parts.

        Args:
            nonce: Of its style and script.
            version: Where its script goes on to listen.
        """
        shown = {name: Markup(parts[name]) for name in PARTS}  # escaped when they were made
        page = self._whole.render(parts=shown, nonce=nonce, version=version, now_s=time.time(), colors=COLORS)
        return page.lstrip()

    def door(self, nonce: str) -> str:
        """What somebody sees who has not shown the token."""
        return self._door.render(nonce=nonce)


def _view(state: RunState) -> dict[str, Any]:
    """What the template shows beside the state itself."""
    colors = {training.name: f"var(--arm{place % len(COLORS)})" for place, training in enumerate(state.trainings)}
    until = max((training.row.get("epochs", 0.0) for training in state.trainings), default=0.0)
    shaded = [span for training in state.trainings for span in training.matched]
    draw = _Drawer(state.trainings, colors, shaded, until)
    return {
        "steps": next_steps(state),
        "places": {training.name: place % len(COLORS) for place, training in enumerate(state.trainings)},
        "shaded": bool(shaded),
        "curves": draw.course("loss", "Training loss", "symmetric InfoNCE; a matched period learns with other captions")
        + draw.evaluations(),
        "speed": [chart for name in _SPEED for chart in draw.metric(name)],
        "pool": [chart for name in _POOL for chart in draw.metric(name)],
        "ranks": {training.name: _ranks(training) for training in state.trainings},
        "reasons": _reasons(state.ingest.failed) if state.ingest else [],
        "share": _whole_share(state),
    }


class _Drawer:
    """Draws every arm's curve of something into one chart."""

    def __init__(
        self,
        trainings: Sequence[TrainingState],
        colors: Mapping[str, str],
        shaded: Sequence[tuple[float, float]],
        until: float,
    ):
        self.trainings, self.colors, self.shaded, self.until = trainings, colors, shaded, until

    def course(self, name: str, title: str, says: str, *, small: bool = False) -> list[dict[str, Any]]:
        """The chart of a metric; none where no arm has it."""
        curves = {
            training.name: Curve(self.colors[training.name], curve.means, curve.reach)
            for training in self.trainings
            if (curve := training.curves.get(name))
        }
        last = {training.name: training.curves[name].last for training in self.trainings if name in training.curves}
        return self._chart(curves, last, title, says, share=name in _SHARES, small=small)

    def metric(self, name: str) -> list[dict[str, Any]]:
        """The same, small, in the words of the registry."""
        known = METRICS[name]
        unit = f", {known.unit}" if known.unit not in ("", "1") and name not in _SHARES else ""
        return self.course(name, _TITLES[name], f"{known.help}{unit}", small=True)

    def evaluations(self) -> list[dict[str, Any]]:
        """Charts of attack success and accuracy over the evaluated epochs."""
        charts = []
        for name in attack_names(row for training in self.trainings for row in training.evaluations):
            charts += self._evaluated(f"{name} attack success".capitalize(), ATTACK_SAYS, attack_curve, name)
        for key, title, says in SHARES:
            if key in SHARE_CURVES:
                charts += self._evaluated(title[0].upper() + title[1:], says, share_curve, key)
        return charts

    def _evaluated(self, title: str, says: str, curve_of: Callable[..., Curve], key: str) -> list[dict[str, Any]]:
        found = {
            training.name: curve_of(self.colors[training.name], training.evaluations, key)
            for training in self.trainings
        }
        curves = {arm: curve for arm, curve in found.items() if curve.points}
        last = {arm: curve.points[-1][1] for arm, curve in curves.items()}
        return self._chart(curves, last, title, says, share=True, small=False)

    def _chart(
        self, curves: Mapping[str, Curve], last: Mapping[str, float], title: str, says: str, *, share: bool, small: bool
    ) -> list[dict[str, Any]]:
        if not curves:
            return []
        size = {"width": 220, "height": 104} if small else {}
        svg = live_chart(list(curves.values()), self.shaded, share=share, until=self.until, **size)
        values = [{"arm": arm, "value": percent(value) if share else f"{value:.4g}"} for arm, value in last.items()]
        return [{"title": title, "says": says, "svg": svg, "values": values}]


def _ranks(training: TrainingState) -> dict[str, Any] | None:
    """How fast each rank is, and which one the others wait for."""
    times = training.step_s_p50
    if not times:
        return None
    usual, slowest = median(times), max(range(len(times)), key=times.__getitem__)
    return {
        "count": len(times),
        "usual": usual,
        "slowest": slowest,
        "slowest_s": times[slowest],
        "late": len(times) > 1 and times[slowest] > SLOW_RANK * usual,
        "columns": rank_columns(times, training.step_s_p99),
    }


def _reasons(failed: Mapping[str, int]) -> list[dict[str, Any]]:
    most = max(failed.values(), default=0)
    return [
        {
            "name": name.replace("_", " "),
            "rows": rows,
            "share": rows / most,
            "help": REASONS[name].help if name in REASONS else "",
            "kind": "refused"
            if name in REASONS and REASONS[name].refused
            else "passing"
            if is_passing(name)
            else "bad",
        }
        for name, rows in failed.items()
    ]


def _whole_share(state: RunState) -> float:
    """Of the whole way, each stage counting the same."""
    shares: Iterable[float] = [1.0 if stage.status == "done" else stage.share or 0.0 for stage in state.stages]
    return math.fsum(shares) / max(1, len(state.stages))


def _clock(moment_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment_s))
