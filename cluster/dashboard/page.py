"""The page of `roclip dashboard` in parts, each with its own HTML, so that only what has changed goes to the browser.

The templates escape everything that came from the web or from a file; the charts hold numbers only.
"""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from cluster.dashboard.next_steps import SLOW_RANK, next_steps
from roclip.report.charts import rank_columns
from roclip.report.curves import COLORS
from roclip.report.ingest_progress import failure_reasons
from roclip.report.pages import environment
from roclip.report.run_charts import RunCharts
from roclip.report.run_state import RunState
from roclip.report.training_state import TrainingState

PARTS: tuple[str, ...] = ("head", "steps", "stages", "arms", "curves", "pool", "ranks", "data", "oracle", "about")
"""Parts of the page in their order; each is a macro of parts.html.jinja."""
_POOL = ("pool_similarity", "pool_own", "pool_duplicates", "pool_staleness", "pool_entropy", "agreement", "suspected")
_SPEED = ("samples_per_s", "data_wait_frac", "grad_norm")


class Page:
    """Renders a run's state as HTML."""

    def __init__(self) -> None:
        templates = environment(Path(__file__).parent)
        self._page, self._door = (templates.get_template(f"{name}.html.jinja") for name in ("page", "door"))
        self._parts: Any = templates.get_template("parts.html.jinja").module

    def parts(self, state: RunState) -> dict[str, str]:
        """The HTML of each part."""
        view = _view(state)
        return {name: str(getattr(self._parts, name)(state, view)) for name in PARTS}

    def whole(self, parts: Mapping[str, str], *, nonce: str, version: str) -> str:
        """The whole page.

        Args:
            nonce: Allows its style and its script.
            version: The version from which its script asks for changes.
        """
        shown = {name: Markup(parts[name]) for name in PARTS}  # already escaped
        page = self._page.render(parts=shown, nonce=nonce, version=version, now_s=time.time())
        return page.lstrip()

    def door(self, nonce: str) -> str:
        """The page for a visitor without the token."""
        return self._door.render(nonce=nonce)


def _view(state: RunState) -> dict[str, Any]:
    """What the template needs besides the state."""
    colors = {training.name: f"var(--arm{place % len(COLORS)})" for place, training in enumerate(state.trainings)}
    until = max((training.row.get("epochs", 0.0) for training in state.trainings), default=0.0)
    shaded = [span for training in state.trainings for span in training.matched]
    draw = RunCharts(state.trainings, colors, shaded, until)
    return {
        "steps": next_steps(state),
        "places": {training.name: place % len(COLORS) for place, training in enumerate(state.trainings)},
        "shaded": bool(shaded),
        "curves": draw.loss() + draw.evaluations(),
        "speed": [chart for name in _SPEED for chart in draw.metric(name)],
        "pool": [chart for name in _POOL for chart in draw.metric(name)],
        "ranks": {training.name: _ranks(training) for training in state.trainings},
        "reasons": failure_reasons(state.ingest.failed) if state.ingest else [],
        "share": _whole_share(state),
    }


def _ranks(training: TrainingState) -> dict[str, Any] | None:
    """The speed of each rank, and the slowest one."""
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


def _whole_share(state: RunState) -> float:
    """Share of the whole run that is done, with equal weight for each stage."""
    shares: Iterable[float] = [1.0 if stage.status == "done" else stage.share or 0.0 for stage in state.stages]
    return math.fsum(shares) / max(1, len(state.stages))
