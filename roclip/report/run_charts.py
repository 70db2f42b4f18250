"""The charts of a run, which its report and its live page share: loss, metrics and evaluations, one curve for each arm."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from roclip.metrics.registry import METRICS
from roclip.report.charts import chart
from roclip.report.curves import (
    ATTACK_SAYS,
    SHARE_CURVES,
    SHARES,
    Curve,
    attack_curve,
    attack_names,
    share_curve,
)
from roclip.report.pages import percent
from roclip.report.training_state import TrainingState

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
_SHARE_METRICS = {"pool_own", "pool_duplicates", "agreement", "data_wait_frac"}


class RunCharts:
    """Draws charts with one curve for each arm. A chart is a dict of `title`, `says`, `svg` and the last `values`."""

    def __init__(
        self,
        trainings: Sequence[TrainingState],
        colors: Mapping[str, str],
        shaded: Sequence[tuple[float, float]],
        until: float,
    ):
        self.trainings, self.colors, self.shaded, self.until = trainings, colors, shaded, until

    def loss(self) -> list[dict[str, Any]]:
        """The chart of the training loss."""
        return self.metric_named(
            "loss", "Training loss", "symmetric InfoNCE; a matched period learns with other captions"
        )

    def metric_named(self, name: str, title: str, says: str, *, small: bool = False) -> list[dict[str, Any]]:
        """The chart of a metric, as a list of one; empty if no arm has logged it."""
        curves = {
            training.name: Curve(self.colors[training.name], curve.means, curve.reach)
            for training in self.trainings
            if (curve := training.curves.get(name))
        }
        last = {training.name: training.curves[name].last for training in self.trainings if name in training.curves}
        return self._chart(curves, last, title, says, share=name in _SHARE_METRICS, small=small)

    def metric(self, name: str) -> list[dict[str, Any]]:
        """A small chart of a metric, with the registry's explanation."""
        known = METRICS[name]
        unit = f", {known.unit}" if known.unit not in ("", "1") and name not in _SHARE_METRICS else ""
        return self.metric_named(name, _TITLES[name], f"{known.help}{unit}", small=True)

    def evaluations(self) -> list[dict[str, Any]]:
        """The charts of attack success and accuracy over the evaluated epochs."""
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
        svg = chart(list(curves.values()), self.shaded, share=share, until=self.until, **size)
        values = [{"arm": arm, "value": percent(value) if share else f"{value:.4g}"} for arm, value in last.items()]
        return [{"title": title, "says": says, "svg": svg, "values": values}]
