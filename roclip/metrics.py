"""One registry of metric names, units and reductions. `metrics.jsonl` is the truth; other displays mirror it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from roclip.shards import write_atomic

Progress = Callable[[int, int, str], None]
"""What long work calls now and then: done, total, and what it is doing."""


@dataclass(frozen=True)
class Metric:
    """One number of a logged step."""

    name: str
    unit: str
    help: str
    reduction: Literal["global", "mean", "sum", "max"] = "global"
    """How the ranks' values become one; `global` is the same on every rank already."""


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("step", "1", "optimizer step, from 1"),
        Metric("epoch", "1", "pass over the manifest's snapshot, from 1"),
        Metric("progress", "1", "epochs done, with the fraction of the current one"),
        Metric("epochs", "1", "epochs of this training"),
        Metric("epoch_shards", "shards", "shards of the epoch's snapshot: what ingest had sealed when it began"),
        Metric("phase", "", "'matched' or 'plain'"),
        Metric("samples_seen", "samples", "pairs that entered a step, over all ranks"),
        Metric("loss", "nats", "symmetric InfoNCE of the global batch", "mean"),
        Metric("logit_scale", "1", "inverse temperature"),
        Metric("lr", "1", "learning rate"),
        Metric("samples_per_s", "samples/s", "pairs a second since the last logged step, over all ranks"),
        Metric("data_wait_frac", "1", "share of the time in which the step waited for its batch", "mean"),
        Metric("bad_samples", "samples", "samples of the epoch that could not be read", "sum"),
        Metric("bad_reasons", "samples", "the same by reason, as an object", "sum"),
        Metric("left_out_steps", "steps", "steps left out so far, as `train.on_divergence` says; see diverged.json"),
        Metric("grad_norm", "1", "norm of the global batch's gradient over all weights, before clipping"),
        Metric("step_s_p50", "s", "time of a step since the last logged one, median; a list, by rank"),
        Metric("step_s_p99", "s", "the same, 99 % quantile"),
        Metric("cache_hits", "shards", "shards opened since the last logged step that lay in the cache", "sum"),
        Metric("cache_misses", "shards", "those that were fetched from the store", "sum"),
        Metric("eta_s", "s", "time that is left at the pace since the start or resume"),
        Metric("pool_similarity", "1", "mean cosine of an image and its nearest caption in the pool"),
        Metric("pool_similarity_p10", "1", "the same, 10 % quantile"),
        Metric("pool_similarity_p50", "1", "the same, median"),
        Metric("pool_similarity_p90", "1", "the same, 90 % quantile"),
        Metric("pool_own", "1", "share of the images that found the caption of their own sample"),
        Metric("pool_duplicates", "1", "1 - different captions found / images of the matched global batch"),
        Metric("pool_staleness", "steps", "mean age of the captions found"),
        Metric("pool_entropy", "nats", "entropy of the captions found; ln(batch) when all differ"),
        Metric("pool_count", "captions", "captions in the pool"),
        Metric("poisons_seen", "samples", "poisoned images of the matched global batch, by the ground truth"),
        Metric("poisons_met", "samples", "of these, those that found a caption of a poison with the same aim"),
        Metric("agreement", "1", "mean share of the pool that is farther from an image than its own caption", "mean"),
        Metric("suspected", "samples", "pairs of the global batch that the gate suspected"),
    )
}


class MetricsWriter:
    """Appends logged steps to `metrics.jsonl`. On resume, steps after the checkpoint are taken back first."""

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict) -> None:
        """Append one object. Raises `KeyError` for a name that the registry lacks."""
        for name in row:
            METRICS[name]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict]:
    """All complete lines of a `metrics.jsonl`; a line that is still being written is left for later."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
