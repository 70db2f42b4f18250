"""Dashboards for Grafana, made of the registry of series, one for each part of a run.

`python -m cluster.monitoring.grafana configs/cluster` writes them and the alert rules. Matched epochs are annotations,
so every panel of a training shows them shaded.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.monitoring.alerts import alerts_yaml
from roclip.metrics.series import SERIES
from roclip.storage import write_atomic

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 12, 8
_UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "percentunit"}
"""Grafana's unit for each ending of a series' name."""


_LINK = {
    "type": "dashboards",
    "title": "RoCLIP",
    "tags": ["roclip"],
    "asDropdown": True,
    "keepTime": True,
    "includeVars": True,
}


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[Query, ...]
    help: str
    unit: str = "short"
    kind: str = "timeseries"
    needs_gpu: bool = False


@dataclass(frozen=True)
class Board:
    name: str
    panels: tuple[Panel, ...]
    of_training: bool = False


def dashboards() -> tuple[Board, ...]:
    """All dashboards."""
    return (
        Board("ingest", tuple(_ingest())),
        Board("training", tuple(_training()), of_training=True),
        Board("pool", tuple(_pool()), of_training=True),
        Board("oracle", tuple(_oracle())),
        Board("nodes", tuple(_nodes())),
    )


def write_grafana(out: Path) -> list[Path]:
    """Write `<out>/grafana/roclip-<part>.json` and `<out>/prometheus/alerts.yml`; returns their paths."""
    files = {f"grafana/{uid(board)}.json": json.dumps(dashboard_json(board), indent=1) + "\n" for board in dashboards()}
    files["prometheus/alerts.yml"] = alerts_yaml()
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, text)
    return [out / name for name in files]


def uid(board: Board) -> str:
    return f"roclip-{board.name}"


# ---- what is shown ------------------------------------------------------------------------------------------


def _ingest() -> Iterator[Panel]:
    yield _rates("Images and rows a second", "ingest_images", "ingest_urls")
    yield Panel(
        "Share of the rows that gave no sample",
        (Query(f"{_rate('ingest_failed', 'run')} / {_rate('ingest_urls', 'run')}", "{{run}}"),),
        "Failed rows over rows of sealed shards",
        "percentunit",
    )
    yield _rates("Failed rows a second, by reason", "ingest_failed")
    yield _rates("Rows that a rule refused, a second", "ingest_refused")
    yield _values("Rows that are left", "ingest_backlog_rows")
    yield _values("Tasks in flight, and their limit", "ingest_in_flight_tasks", "ingest_window_tasks")
    yield _rates("Bytes sealed a second", "ingest_bytes", unit="Bps")
    yield _rates("Shards sealed a second", "ingest_shards")
    yield _rates("Time of the tasks, by phase", "ingest_phase_seconds", unit="short")
    yield _rates("Tasks that ended without a shard, a second", "ingest_task_failures")
    yield Panel(
        "Hosts with the most failed rows",
        (Query(f"topk(10, {_sum('ingest_host_errors', 'run, host')})", "{{host}}"),),
        SERIES["roclip_ingest_host_errors"].help,
        kind="bargauge",
    )


def _training() -> Iterator[Panel]:
    yield _values("Loss", "train_loss_nats")
    yield Panel(
        "Phase",
        (Query(_most("train_matched"), "{{run}}/{{arm}}"),),
        "Matched epochs learn with the pool's captions, plain ones with the images' own",
        kind="state-timeline",
    )
    yield Panel(
        "Done",
        (Query(f"{_most('train_done_epochs')} / {_most('train_epochs')}", "{{run}}/{{arm}}"),),
        "Share of the epochs that is done",
        "percentunit",
        "bargauge",
    )
    yield _values("Time left", "train_left_seconds")
    yield _values("Samples a second", "train_samples_per_second")
    yield _values("Waiting for data", "data_wait_ratio")
    yield _values("Time of a step, by rank", "train_step_median_seconds", "train_step_p99_seconds")
    yield _values("Gradient norm", "train_gradient_norm")
    yield _values("Logit scale", "train_logit_scale")
    yield _values("Learning rate", "train_learning_rate")
    yield Panel(
        "Since the last step",
        (Query(f"time() - {_most('train_last_step_timestamp_seconds')}", "{{run}}/{{arm}}"),),
        SERIES["roclip_train_last_step_timestamp_seconds"].help,
        "s",
    )
    yield _values("Ranks, and how often they started", "train_ranks", "train_starts")
    yield _values("Steps", "train_step", "train_left_out_steps")
    yield _values("Samples seen", "train_seen_samples")
    yield _values("Epoch, and shards of its snapshot", "train_epoch", "train_snapshot_shards")
    yield _values("Samples that could not be read", "data_bad_samples")
    yield _values("Shards from the cache and from the store", "data_cache_hit_shards", "data_cache_miss_shards")
    yield Panel(
        "Age of the last checkpoint",
        (Query(f"time() - {_most('checkpoint_last_timestamp_seconds')}", "{{run}}/{{arm}}"),),
        "Work that would be lost if the training died now",
        "s",
    )
    yield _values("Time to write and to copy a checkpoint", "checkpoint_write_seconds", "checkpoint_copy_seconds")
    yield _values("Size of a checkpoint", "checkpoint_size_bytes")
    yield _values(
        "Checkpoints, and copies that failed", "checkpoint_saves", "checkpoint_copy_failures", "checkpoint_step"
    )


def _pool() -> Iterator[Panel]:
    yield _values(
        "Cosine of an image and its nearest caption",
        *(f"pool_similarity{quantile}" for quantile in ("", "_p10", "_p50", "_p90")),
    )
    yield _values("Found its own caption", "pool_own_ratio")
    yield _values("Found a caption that others found too", "pool_duplicates_ratio")
    yield _values("Age of the captions found", "pool_staleness_steps")
    yield _values("Entropy of the captions found", "pool_entropy_nats")
    yield _values("Captions in the pool", "pool_captions")
    yield _values("Agreement with the own caption", "filter_agreement_ratio")
    yield _values("Pairs of a batch that the sample filter suspects", "filter_suspected_samples")


def _oracle() -> Iterator[Panel]:
    yield Panel(
        "Verdicts",
        (Query(_sum("oracle_verdicts", "run, arm, verdict"), "{{run}}/{{arm}}: {{verdict}}"),),
        SERIES["roclip_oracle_verdicts"].help,
        kind="bargauge",
    )
    yield _values("Progress of the check", "oracle_progress_ratio")
    yield Panel(
        "Verdict on the newest checkpoint",
        (Query(f"{_most('oracle_verdict')} == 1", "{{run}}/{{arm}}: {{verdict}}"),),
        SERIES["roclip_oracle_verdict"].help,
    )
    yield _values("Images named as poisoned", "oracle_suspects")
    yield _values("Attack success after the repair", "oracle_repair_attack_ratio")
    yield _values("Repaired and trusted", "oracle_repair_accepted")


def _nodes() -> Iterator[Panel]:
    yield _node("Processor", "ray_node_cpu_utilization", "percent")
    yield _node("Memory used", "ray_node_mem_used / ray_node_mem_total", "percentunit")
    yield _node("GPU", "ray_node_gpus_utilization", "percent", needs_gpu=True)
    yield _node("GPU memory used", "ray_node_gram_used", "decmbytes", needs_gpu=True)
    yield _node("Disk free", "ray_node_disk_free", "bytes")
    yield _values("Disk free where the run is, and its size", "run_disk_free_bytes", "run_disk_size_bytes")
    yield _node("Received a second", "ray_node_network_receive_speed", "Bps")
    yield _node("Sent a second", "ray_node_network_send_speed", "Bps")
    yield Panel("Nodes", (Query("sum(ray_cluster_active_nodes)", "nodes"),), "Nodes of the cluster")
    yield Panel(
        "Tasks by state",
        (Query('sum by (State) (ray_tasks{State!~"FINISHED|FAILED"})', "{{State}}"),),
        "Ray tasks that have not ended",
    )
    yield Panel(
        "Actors by state",
        (Query('sum by (State) (ray_actors{State!="DEAD"})', "{{State}}"),),
        "Ray actors that are alive",
    )


# ---- panels and queries of the registry ---------------------------------------------------------------------


def _values(title: str, *names: str) -> Panel:
    """A panel of gauges."""
    ending = names[0].rpartition("_")[2]
    queries = tuple(Query(_most(name), _legend(name, several=len(names) > 1)) for name in names)
    return Panel(title, queries, _help(names), _UNITS.get(ending, "short"))


def _rates(title: str, *names: str, unit: str = "short") -> Panel:
    """A panel of counters, per second."""
    by = ", ".join(SERIES[f"roclip_{names[0]}"].labels)
    queries = tuple(Query(_rate(name, by), _legend(name, several=len(names) > 1)) for name in names)
    return Panel(title, queries, _help(names), unit)


def _node(title: str, expr: str, unit: str, *, needs_gpu: bool = False) -> Panel:
    """A panel of one of Ray's own metrics, by node."""
    return Panel(title, (Query(f"sum by (instance) ({expr})", "{{instance}}"),), expr, unit, needs_gpu=needs_gpu)


def _help(names: tuple[str, ...]) -> str:
    return "; ".join(SERIES[f"roclip_{name}"].help for name in names)


def _legend(name: str, *, several: bool) -> str:
    labels = SERIES[f"roclip_{name}"].labels
    legend = "/".join(f"{{{{{label}}}}}" for label in labels)
    return f"{legend} {name.partition('_')[2].replace('_', ' ')}" if several else legend


def _selected(name: str) -> str:
    series = SERIES[f"roclip_{name}"]
    arm = ', arm=~"$arm"' if "arm" in series.labels else ""
    return f'{series.exposed}{{run=~"$run"{arm}}}'


def _most(name: str) -> str:
    """The value without the labels that Ray adds, which change when a resume starts another process."""
    return f"max by ({', '.join(SERIES[f'roclip_{name}'].labels)}) ({_selected(name)})"


def _sum(name: str, by: str) -> str:
    return f"sum by ({by}) ({_selected(name)})"


def _rate(name: str, by: str) -> str:
    return f"sum by ({by}) (rate({_selected(name)}[$__rate_interval]))"


# ---- Grafana's JSON -----------------------------------------------------------------------------------------


def dashboard_json(board: Board) -> dict[str, Any]:
    """As Grafana imports and provisions it."""
    return {
        "uid": uid(board),
        "title": f"RoCLIP {board.name}",
        "tags": ["ray", "roclip"],
        "schemaVersion": 36,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [_LINK],
        "annotations": {"list": [_matched()] if board.of_training else []},
        "templating": {"list": _variables()},
        "panels": [_panel_json(number, panel) for number, panel in enumerate(board.panels)],
    }


def _matched() -> dict[str, Any]:
    return {
        "name": "matched epochs",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "rgba(255, 152, 48, 0.8)",
        "expr": f"{_most('train_matched')} == 1",
        "step": "10s",
        "titleFormat": "matched: {{run}}/{{arm}}",
    }


def _variables() -> list[dict[str, Any]]:
    step = SERIES["roclip_train_step"].exposed
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        _variable("run", 'label_values({__name__=~"ray_roclip_.+"}, run)'),
        _variable("arm", f'label_values({step}{{run=~"$run"}}, arm)'),
    ]


def _variable(name: str, query: str) -> dict[str, Any]:
    on_time_range_change = 2
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": on_time_range_change,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _panel_json(number: int, panel: Panel) -> dict[str, Any]:
    instant = panel.kind == "bargauge"
    phases = [{"type": "value", "options": {"0": {"text": "plain"}, "1": {"text": "matched", "color": "orange"}}}]
    return {
        "id": number + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": WIDTH * (number % 2), "y": HEIGHT * (number // 2)},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "mappings": phases if panel.kind == "state-timeline" else []},
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + n),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "range": not instant,
                "instant": instant,
            }
            for n, query in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m cluster.monitoring.grafana OUT   (such as configs/cluster)")
    print(*write_grafana(Path(sys.argv[1])), sep="\n")
