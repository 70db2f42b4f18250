"""One registry of all series that Prometheus sees of a run, through Ray's endpoint on each node.

Ray puts `ray_` before each name and `_total` after that of a counter. Names are `roclip_<part>_<what>_<unit>`, units base ones
(seconds, bytes, ratio). Every series has the label `run`, the name of the run directory; `arm` is the training's folder in
it. The metrics of a step in `metrics.jsonl` are included by `roclip.metrics.registry.Metric.series`.
A total that should be visible from 0 on, and vanish with its run, is a gauge: Ray keeps a counter as long as the node lives.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from roclip.metrics.registry import METRICS

OF_ARM = ("run", "arm")


@dataclass(frozen=True)
class Series:
    """One series for each value of its labels."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = OF_ARM

    @property
    def exposed(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


def _of_steps() -> Iterator[Series]:
    for metric in METRICS.values():
        if metric.series:
            yield Series(
                f"roclip_{metric.series}", "gauge", metric.help, (*OF_ARM, *((metric.each,) if metric.each else ()))
            )


def _ingest(name: str, help: str, *labels: str) -> Series:
    return Series(f"roclip_ingest_{name}", "counter", help, ("run", *labels))


SERIES: dict[str, Series] = {
    series.name: series
    for series in (
        *_of_steps(),
        _ingest("images", "Images that are in sealed shards"),
        _ingest("urls", "Rows of the list in sealed shards, counted once for each pass"),
        _ingest("failed", "Rows that gave no sample, counted at each attempt", "reason"),
        _ingest("refused", "Rows that gave no sample because a rule refused them", "rule"),
        _ingest("bytes", "Size of the sealed tars"),
        _ingest("shards", "Shards that were sealed"),
        _ingest("task_failures", "Tasks that ended without a shard", "how"),
        _ingest("host_errors", "Failed rows of the hosts with the most of them", "host"),
        _ingest("phase_seconds", "Time in a phase of the tasks", "phase"),
        Series("roclip_ingest_backlog_rows", "gauge", "Rows that are left, if known", ("run",)),
        Series("roclip_ingest_in_flight_tasks", "gauge", "Tasks that run or wait for a node", ("run",)),
        Series("roclip_ingest_window_tasks", "gauge", "Tasks that may be in flight now", ("run",)),
        Series(
            "roclip_train_last_step_timestamp_seconds", "gauge", "When a step was last logged, or the ranks started"
        ),
        Series("roclip_train_ranks", "gauge", "Training ranks, since they last started"),
        Series(
            "roclip_train_starts", "gauge", "How often the ranks have started; each start but the first is a restart"
        ),
        Series("roclip_checkpoint_last_timestamp_seconds", "gauge", "When a checkpoint was last complete"),
        Series("roclip_checkpoint_step", "gauge", "Step of the newest complete checkpoint"),
        Series("roclip_checkpoint_saves", "gauge", "Checkpoints that were written so far"),
        Series("roclip_checkpoint_size_bytes", "gauge", "Size of the newest complete checkpoint"),
        Series("roclip_checkpoint_write_seconds", "gauge", "Time it took to write the newest one, beside the training"),
        Series("roclip_checkpoint_copy_seconds", "gauge", "Time it took to copy it to train.checkpoint_store"),
        Series("roclip_checkpoint_copy_failures", "gauge", "Checkpoints that could not be copied there, so far"),
        Series("roclip_run_disk_free_bytes", "gauge", "Free space of the file system with the run directory"),
        Series("roclip_run_disk_size_bytes", "gauge", "Size of that file system"),
        Series("roclip_oracle_progress_ratio", "gauge", "Progress of the present part of the check"),
        Series("roclip_oracle_verdict", "gauge", "1 for the verdict on the newest checkpoint", (*OF_ARM, "verdict")),
        Series("roclip_oracle_suspects", "gauge", "Images that the check names as poisoned"),
        Series("roclip_oracle_repair_accepted", "gauge", "1 if the repaired checkpoint is trusted, else 0"),
        Series("roclip_oracle_repair_attack_ratio", "gauge", "Success of the found triggers after the repair"),
        Series("roclip_oracle_verdicts", "counter", "Verdicts given so far", (*OF_ARM, "verdict")),
    )
}
