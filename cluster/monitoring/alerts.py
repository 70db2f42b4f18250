"""Alert rules for Prometheus, generated from the registry of series: `configs/cluster/prometheus/alerts.yml`."""

from dataclasses import dataclass
from typing import Any, Literal

import yaml

from roclip.metrics.series import SERIES

NO_STEP_S = 600
CHECKPOINT_S = 2 * 3600
SPIKE_SIGMAS = 5
SPIKE_FRAC = 1.2
DATA_WAIT_FRAC = 0.3
INGEST_SUCCESS_FRAC = 0.5
STALE_FRAC = 0.9
DISK_FREE_FRAC = 0.05
RESTARTS_PER_HOUR = 2

_HEAD = """\
# Written by `python -m cluster.monitoring.grafana`; edit cluster/monitoring/alerts.py instead. Thresholds are its constants.
# Unit tests: tests/cluster/monitoring/alerts_test.yml.
"""


@dataclass(frozen=True)
class Alert:
    name: str
    expr: str
    lasts: str
    """How long the expression must hold, in the notation of Prometheus."""
    severity: Literal["warning", "critical"]
    summary: str
    do: str
    """What the alert means and what to do."""

    @property
    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasts,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "description": self.do},
        }


def alerts() -> tuple[Alert, ...]:
    """All alert rules."""
    return (
        Alert(
            "RoclipNoStep",
            f"time() - {_most('train_last_step_timestamp_seconds')} > {NO_STEP_S}",
            "1m",
            "critical",
            "{{ $labels.run }}/{{ $labels.arm }}: no step for {{ $value | humanizeDuration }}",
            "The ranks hang, or train.log_every_steps is too large for this limit. See log/ranks.log and the Ray dashboard's "
            "stack traces; ending the run and giving the same command again goes on from the last checkpoint.",
        ),
        Alert(
            "RoclipTrainingGone",
            f"{_most('train_done_epochs', last='15m')} < {_most('train_epochs', last='15m')} "
            f"unless {_most('train_done_epochs')}",
            "1m",
            "critical",
            "{{ $labels.run }}/{{ $labels.arm }} ended in epoch {{ $value | humanize }}, before its last",
            "The driver or its node has died, or somebody stopped it. The same command goes on from the last checkpoint.",
        ),
        Alert(
            "RoclipLossSpike",
            f"{_arms(_spike())} or {_most('train_loss_nats')} != {_most('train_loss_nats')}",
            "0s",
            "warning",
            "{{ $labels.run }}/{{ $labels.arm }}: loss {{ $value | humanize }} is far above the last half hour's",
            "See the gradient norm and diverged.json. train.on_divergence says what is done about spikes.",
        ),
        Alert(
            "RoclipStepsLeftOut",
            f"{_grown('train_left_out_steps', '15m')} > 0",
            "0s",
            "warning",
            "{{ $labels.run }}/{{ $labels.arm }}: {{ $value }} steps left out in 15 minutes",
            "Losses or gradients were not finite, or spikes. diverged.json names the samples of their batches.",
        ),
        Alert(
            "RoclipDataWait",
            f"{_arms('avg_over_time(' + _name('data_wait_ratio') + '[10m])')} > {DATA_WAIT_FRAC}",
            "5m",
            "warning",
            "{{ $labels.run }}/{{ $labels.arm }} waits for data {{ $value | humanizePercentage }} of the time",
            "Raise data.loader_workers, or data.cache_bytes where shards lie on a store.",
        ),
        Alert(
            "RoclipIngestFailing",
            f"1 - sum by (run) (increase({_name('ingest_failed')}[15m])) / "
            f"sum by (run) (increase({_name('ingest_urls')}[15m])) < {INGEST_SUCCESS_FRAC}",
            "10m",
            "warning",
            "{{ $labels.run }}: only {{ $value | humanizePercentage }} of the URLs give a sample",
            "See the reasons on the ingest dashboard or in ingest/report.html: names that are not found want a better "
            "resolver (`roclip doctor`), 403 and 429 a slower pace.",
        ),
        Alert(
            "RoclipPoolStale",
            f"{_most('pool_staleness_steps')} > {STALE_FRAC} * {_most('pool_captions')} * {_most('train_step')} / "
            f"{_most('train_seen_samples')}",
            "5m",
            "warning",
            "{{ $labels.run }}/{{ $labels.arm }}: images find captions that are {{ $value | humanize }} steps old",
            "That is the oldest part of the pool: what is new in it is not found. Look at the pool's similarities and "
            "duplicates, and lower pool.size.",
        ),
        Alert(
            "RoclipRestarts",
            f"{_grown('train_starts', '1h')} >= {RESTARTS_PER_HOUR}",
            "0s",
            "warning",
            "{{ $labels.run }}/{{ $labels.arm }}: ranks restarted {{ $value }} times in an hour",
            "log/ranks.log says who died and why; cluster.max_failures says how often more.",
        ),
        Alert(
            "RoclipCheckpointOld",
            f"time() - {_most('checkpoint_last_timestamp_seconds')} > {CHECKPOINT_S}",
            "1m",
            "warning",
            "{{ $labels.run }}/{{ $labels.arm }}: the last checkpoint is {{ $value | humanizeDuration }} old",
            "So much would be lost now. Lower train.checkpoint_every_s.",
        ),
        Alert(
            "RoclipCheckpointNotCopied",
            f"{_grown('checkpoint_copy_failures', '1h')} > 0",
            "0s",
            "warning",
            "{{ $labels.run }}/{{ $labels.arm }}: {{ $value }} checkpoints did not reach train.checkpoint_store",
            "The log of rank 0 has the store's error. The next checkpoint is tried all the same.",
        ),
        Alert(
            "RoclipDiskFull",
            f"{_arms(_name('run_disk_free_bytes') + ' / ' + _name('run_disk_size_bytes'), 'min')} < {DISK_FREE_FRAC}",
            "1m",
            "critical",
            "{{ $labels.run }}: {{ $value | humanizePercentage }} of the run directory's file system is free",
            "A full disk stops the run. Lower train.keep_checkpoints, or make room.",
        ),
        Alert(
            "RoclipNodeDiskFull",
            f"min by (instance) (ray_node_disk_free / (ray_node_disk_free + ray_node_disk_usage)) < {DISK_FREE_FRAC}",
            "5m",
            "warning",
            "{{ $labels.instance }}: {{ $value | humanizePercentage }} of its disk is free",
            "Ray's session folder, the shard cache (data.cache_bytes) or unfinished shards fill it.",
        ),
        Alert(
            "RoclipNodeGone",
            'up{job="ray"} == 0',
            "2m",
            "warning",
            "{{ $labels.instance }} cannot be scraped",
            "The node or its metrics agent is gone. Ray takes nodes that ended well off the list by itself.",
        ),
        Alert(
            "RoclipVerdict",
            _new('oracle_verdicts{verdict=~"poisoned|suspicious"}', "run, arm, verdict", "1h"),
            "0s",
            "critical",
            "{{ $labels.run }}/{{ $labels.arm }} is {{ $labels.verdict }}",
            "TRUSTED has not moved. Read oracle/report.html; `roclip oracle RUN --repair` repairs what was found.",
        ),
    )


def alerts_yaml() -> str:
    """The file of rules."""
    groups = {"groups": [{"name": "roclip", "rules": [alert.rule for alert in alerts()]}]}
    return _HEAD + yaml.safe_dump(groups, sort_keys=False, width=120, allow_unicode=True)


def _name(short: str) -> str:
    name, brace, labels = short.partition("{")
    return SERIES[f"roclip_{name}"].exposed + brace + labels


def _arms(expr: str, how: str = "max") -> str:
    """The value without the labels that Ray adds, which change when a resume starts another process."""
    return f"{how} by (run, arm) ({expr})"


def _most(short: str, last: str = "") -> str:
    return _arms(f"last_over_time({_name(short)}[{last}])" if last else _name(short))


def _grown(short: str, window: str) -> str:
    name = _name(short)
    return _arms(f"max_over_time({name}[{window}]) - min_over_time({name}[{window}])")


def _new(short: str, by: str, window: str) -> str:
    """True where a counter has grown, also where it has just started at 1, which `increase` does not see."""
    now, before = (f"sum by ({by}) ({_name(short)}{offset})" for offset in ("", f" offset {window}"))
    return f"({now} - {before}) > 0 or ({now} unless {before})"


def _spike() -> str:
    loss = _name("train_loss_nats")
    mean, deviation = f"avg_over_time({loss}[30m])", f"stddev_over_time({loss}[30m])"
    return f"({loss} > {mean} + {SPIKE_SIGMAS} * {deviation} and {loss} > {SPIKE_FRAC} * {mean})"
