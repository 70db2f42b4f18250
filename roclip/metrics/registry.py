"""One registry of metric names, units and reductions. `metrics.jsonl` is the truth; loggers and Prometheus mirror it.

`roclip/metrics/series.py` lists everything that Prometheus sees, including these metrics.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from roclip.storage import write_atomic

Progress = Callable[[int, int, str], None]
"""Called from time to time by a long task with done, total, and a text that says what it is doing."""


@dataclass(frozen=True)
class Metric:
    """One number of a logged step."""

    name: str
    unit: str
    help: str
    reduction: Literal["global", "mean", "sum", "max"] = "global"
    """How the values of the ranks are reduced to one; a `global` value is already the same on every rank."""
    series: str = ""
    """Its name in Prometheus, after `roclip_`; empty if Prometheus does not see it."""
    each: str = ""
    """For a list, the label that tells its values apart."""
    summed: bool = False
    """Whether Prometheus sees the sum over all rows."""


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("step", "1", "optimizer step, from 1", series="train_step"),
        Metric("epoch", "1", "pass over the manifest's snapshot, from 1", series="train_epoch"),
        Metric("progress", "1", "epochs done, with the fraction of the current one", series="train_done_epochs"),
        Metric("epochs", "1", "epochs of this training", series="train_epochs"),
        Metric(
            "epoch_shards",
            "shards",
            "shards of the epoch's snapshot: what ingest had sealed when it began",
            series="train_snapshot_shards",
        ),
        Metric(
            "phase", "", "'matched' or 'plain'; a number, 1 or 0, where only numbers are shown", series="train_matched"
        ),
        Metric("samples_seen", "samples", "pairs that entered a step, over all ranks", series="train_seen_samples"),
        Metric("loss", "nats", "symmetric InfoNCE of the global batch", "mean", series="train_loss_nats"),
        Metric("logit_scale", "1", "inverse temperature", series="train_logit_scale"),
        Metric("lr", "1", "learning rate", series="train_learning_rate"),
        Metric(
            "samples_per_s",
            "samples/s",
            "pairs a second since the last logged step, over all ranks",
            series="train_samples_per_second",
        ),
        Metric(
            "data_wait_frac",
            "1",
            "share of the time in which the step waited for its batch",
            "mean",
            series="data_wait_ratio",
        ),
        Metric(
            "bad_samples", "samples", "samples of the epoch that could not be read", "sum", series="data_bad_samples"
        ),
        Metric("bad_reasons", "samples", "samples of the epoch that could not be read, an object by reason", "sum"),
        Metric(
            "left_out_steps",
            "steps",
            "steps left out so far, as `train.on_divergence` says; see diverged.json",
            series="train_left_out_steps",
        ),
        Metric(
            "grad_norm",
            "1",
            "norm of the global batch's gradient over all weights, before clipping",
            series="train_gradient_norm",
        ),
        Metric(
            "step_s_p50",
            "s",
            "time of a step since the last logged one, median; a list, by rank",
            series="train_step_median_seconds",
            each="rank",
        ),
        Metric(
            "step_s_p99",
            "s",
            "time of a step since the last logged one, 99 % quantile; a list, by rank",
            series="train_step_p99_seconds",
            each="rank",
        ),
        Metric(
            "cache_hits",
            "shards",
            "shards opened since the last logged step that lay in the cache",
            "sum",
            series="data_cache_hit_shards",
            summed=True,
        ),
        Metric(
            "cache_misses",
            "shards",
            "shards opened since the last logged step that were fetched from the store",
            "sum",
            series="data_cache_miss_shards",
            summed=True,
        ),
        Metric("eta_s", "s", "time that is left at the pace since the start or resume", series="train_left_seconds"),
        Metric(
            "pool_similarity",
            "1",
            "mean cosine of an image and its nearest caption in the pool",
            series="pool_similarity",
        ),
        Metric(
            "pool_similarity_p10",
            "1",
            "cosine of an image and its nearest caption in the pool, 10 % quantile",
            series="pool_similarity_p10",
        ),
        Metric(
            "pool_similarity_p50",
            "1",
            "cosine of an image and its nearest caption in the pool, median",
            series="pool_similarity_p50",
        ),
        Metric(
            "pool_similarity_p90",
            "1",
            "cosine of an image and its nearest caption in the pool, 90 % quantile",
            series="pool_similarity_p90",
        ),
        Metric(
            "pool_own", "1", "share of the images that found the caption of their own sample", series="pool_own_ratio"
        ),
        Metric(
            "pool_duplicates",
            "1",
            "1 - different captions found / images of the matched global batch",
            series="pool_duplicates_ratio",
        ),
        Metric("pool_staleness", "steps", "mean age of the captions found", series="pool_staleness_steps"),
        Metric(
            "pool_entropy",
            "nats",
            "entropy of the captions found; ln(batch) when all differ",
            series="pool_entropy_nats",
        ),
        Metric("pool_count", "captions", "captions in the pool", series="pool_captions"),
        Metric(
            "poisons_seen",
            "samples",
            "poisoned images of the matched global batch, by the ground truth",
            series="pool_poisons_seen_samples",
        ),
        Metric(
            "poisons_met",
            "samples",
            "poisoned images matched with the caption of a poison that has the same target",
            series="pool_poisons_met_samples",
        ),
        Metric(
            "agreement",
            "1",
            "mean share of the pool that is farther from an image than its own caption",
            "mean",
            series="filter_agreement_ratio",
        ),
        Metric(
            "suspected",
            "samples",
            "pairs of the global batch that the sample filter suspects",
            series="filter_suspected_samples",
        ),
    )
}


class MetricsWriter:
    """Appends logged steps to `metrics.jsonl`. On resume, it first removes the steps after the checkpoint."""

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict) -> None:
        """Append one object. Raises `KeyError` for a name that is not in the registry."""
        for name in row:
            METRICS[name]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict]:
    """All complete lines of a `metrics.jsonl`, without a line that is still being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
