"""Publishes what a run's files say as metrics of Ray, for a Prometheus that scrapes the nodes.

An actor follows each training and each check, beside the driver, and reads what they write down; so the ranks need no Ray,
and a resume by another driver shows the same. The actor ends with what it follows, also when the driver dies, and Ray then
drops its gauges within two report intervals (`RAY_metrics_report_interval_ms`, 10 s each). What is counted as it happens
goes through `count`, from the process where it happens. Measuring never ends a run.
"""

import contextlib
import functools
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ray
from ray.actor import exit_actor
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roclip.config import Config
from roclip.metrics.registry import METRICS, read_metrics
from roclip.metrics.series import SERIES
from roclip.report.training_state import LOG

Reading = tuple[str, float, dict[str, str]]
"""Name of a series, value, and the labels that it has beside `run` and `arm`."""
Stage = Literal["training", "oracle"]

_EVERY_S = 2.0
_LAST_WORDS_S = 20.0
_STARTED = re.compile(r"(\d+) ranks from step \d+$", re.MULTILINE)
_log = logging.getLogger(__name__)


def count(name: str, value: float = 1, /, **labels: Any) -> None:
    """Add to a counter of `SERIES`, or set a gauge of it. Without Ray nothing is sent; nothing ever fails."""
    if not value and SERIES[name].kind == "counter":
        return
    with contextlib.suppress(Exception):
        metric = _made(name)
        metric.inc(value, labels) if SERIES[name].kind == "counter" else metric.set(value, labels)


@functools.cache
def _made(name: str) -> Any:
    from ray.util import metrics

    known = SERIES[name]
    kind = {"counter": metrics.Counter, "gauge": metrics.Gauge}[known.kind]
    return kind(name, description=known.help, tag_keys=known.labels)


def job_config(config: Config, run: Path, commit: str) -> JobConfig:
    """What Ray's dashboard says of the driver of a run: nothing that is secret, everybody who may look sees it."""
    arms, source = ", ".join(config.arms), Path(config.source).name
    run = run.resolve()
    return JobConfig(metadata={"run": run.name, "run_dir": str(run), "config": source, "arms": arms, "commit": commit})


def labels_of(folder: Path) -> dict[str, str]:
    """`run` and `arm` of a training's folder: the run is the directory above it that a session has locked."""
    folder = folder.resolve()
    run = next((above for above in folder.parents if (above / "run.lock").exists()), folder.parent)
    return {"run": run.name, "arm": folder.relative_to(run).as_posix()}


@contextlib.contextmanager
def following(config: Config, folder: Path, stage: Stage) -> Iterator[None]:
    """While the block runs, an actor publishes how a training, or the check of it, in `<run>/<arm>` stands.

    Not on a local Ray without a dashboard, where nobody looks.
    """
    actor: Any = None
    if ray.is_initialized() and (config.cluster.address != "local" or config.cluster.dashboard):
        with contextlib.suppress(Exception):
            actor = _start(folder.resolve(), stage)
    try:
        yield
    finally:
        if actor is not None:
            with contextlib.suppress(Exception):  # it ends itself, so that its last values are sent
                ray.get(actor.close.remote(), timeout=_LAST_WORDS_S)


def _start(folder: Path, stage: Stage) -> Any:
    labels = labels_of(folder)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    name = f"monitor of {labels['run']}, {labels['arm']}, {stage} since {time.strftime('%H:%M:%S')}"
    return Monitor.options(name=name, num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(folder, stage)


class Follower:
    """Publishes the readings of a training's folder every two seconds, from a thread of its own."""

    def __init__(self, folder: Path, stage: Stage):
        self.folder, self.labels = folder, labels_of(folder)
        self._read = READERS[stage]
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publish the last readings."""
        self._halt.set()
        self._thread.join()
        self._publish()

    def _follow(self) -> None:
        while True:
            self._publish()
            if self._halt.wait(_EVERY_S):
                return

    def _publish(self) -> None:
        try:
            for name, value, labels in self._read(self.folder):
                count(name, value, **self.labels, **labels)
        except Exception:  # a file of another version, a store that is away
            _log.warning("%s: could not be read", self.folder, exc_info=True)


@ray.remote
class Monitor:
    """The actor of `following`."""

    def __init__(self, folder: Path, stage: Stage):
        self._follower = Follower(folder, stage)

    def close(self) -> None:
        self._follower.close()
        exit_actor()


def training_readings(folder: Path) -> Iterator[Reading]:
    """Of `metrics.jsonl`, the log of the ranks, the checkpoints and the disk below them."""
    path, log = folder / "metrics.jsonl", folder / LOG
    if times := [file.stat().st_mtime for file in (path, log) if file.exists()]:
        yield "roclip_train_last_step_timestamp_seconds", max(times), {}
    yield from _of_rows(read_metrics(path))
    if starts := _STARTED.findall(log.read_text()) if log.exists() else []:
        yield "roclip_train_ranks", int(starts[-1]), {}
        yield "roclip_train_starts", len(starts), {}
    yield from _of_checkpoints(folder)
    disk = shutil.disk_usage(folder)
    yield "roclip_run_disk_free_bytes", disk.free, {}
    yield "roclip_run_disk_size_bytes", disk.total, {}


def _of_rows(rows: list[dict]) -> Iterator[Reading]:
    newest = {name: value for row in rows for name, value in row.items()}
    for name, value in newest.items():
        metric = METRICS.get(name)
        if metric is None or not metric.series:
            continue
        series = f"roclip_{metric.series}"
        if metric.summed:
            yield series, sum(row.get(name, 0) for row in rows), {}
        elif metric.each:
            yield from ((series, each, {metric.each: str(n)}) for n, each in enumerate(value))
        elif name == "phase":
            yield series, value == "matched", {}
        else:
            yield series, value, {}


def _of_checkpoints(folder: Path) -> Iterator[Reading]:
    saves = read_metrics(folder / "checkpoints" / "saves.jsonl")
    if not saves:
        return
    last = saves[-1]
    yield "roclip_checkpoint_last_timestamp_seconds", last["saved_s"], {}
    yield "roclip_checkpoint_step", last["step"], {}
    yield "roclip_checkpoint_saves", len(saves), {}
    yield "roclip_checkpoint_size_bytes", last["size_bytes"], {}
    yield "roclip_checkpoint_write_seconds", last["write_s"], {}
    copies = [save for save in saves if save["copied"] is not None]
    if copies:
        yield "roclip_checkpoint_copy_seconds", copies[-1]["copy_s"], {}
        yield "roclip_checkpoint_copy_failures", sum(not save["copied"] for save in copies), {}


def oracle_readings(folder: Path) -> Iterator[Reading]:
    """Of the check's progress, its report, and what came of the repair."""
    if progress := _json(folder / "oracle" / "progress.json"):
        done, total, _ = progress
        yield "roclip_oracle_progress_ratio", done / total if total else 1.0, {}
    if report := _json(folder / "oracle" / "report.json"):
        for verdict in VERDICTS:
            yield "roclip_oracle_verdict", report["verdict"] == verdict, {"verdict": verdict}
        yield "roclip_oracle_suspects", report["numbers"]["victims"], {}
    if repair := _json(folder / "repair" / "repair.json"):
        yield "roclip_oracle_repair_accepted", repair["accepted"], {}
        if "after" in repair:
            yield "roclip_oracle_repair_attack_ratio", repair["after"]["attack"], {}


VERDICTS = ("clean", "suspicious", "poisoned", "inconclusive")
READERS: dict[Stage, Callable[[Path], Iterator[Reading]]] = {"training": training_readings, "oracle": oracle_readings}


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
