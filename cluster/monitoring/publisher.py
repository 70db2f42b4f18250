"""Publishes the contents of a run's files as metrics of Ray, for a Prometheus that scrapes the nodes.

An actor beside the driver follows each training and each check through the reader of the run directory, so the ranks need
no Ray, and a resume by another driver shows the same values. The actor ends with the training or check, also when the
driver dies, and Ray then drops its gauges within two report intervals (`RAY_metrics_report_interval_ms`, 10 s each). Events
are counted with `count` in the process where they happen. A failure to measure never ends a run.
"""

import contextlib
import functools
import logging
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
from roclip.metrics.registry import METRICS
from roclip.metrics.series import SERIES
from roclip.report.oracle_state import VERDICTS, OracleState, PngStore, oracle_state
from roclip.report.training_state import SavedCheckpoints, TrainingReader, TrainingState
from roclip.report.watched_files import WatchedFiles

Reading = tuple[str, float, dict[str, str]]
"""Name of a series, value, and its labels besides `run` and `arm`."""
Stage = Literal["training", "oracle"]

_EVERY_S = 2.0
_CLOSE_S = 20.0
_log = logging.getLogger(__name__)


def count(name: str, value: float = 1, /, **labels: Any) -> None:
    """Add to a counter of `SERIES`, or set a gauge. Without Ray nothing is sent; it never raises."""
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
    """What Ray's dashboard shows about the driver of a run. Everybody with access sees it, so it holds no secret."""
    arms, source = ", ".join(config.arms), Path(config.source).name
    run = run.resolve()
    return JobConfig(metadata={"run": run.name, "run_dir": str(run), "config": source, "arms": arms, "commit": commit})


def labels_of(folder: Path) -> dict[str, str]:
    """The labels `run` and `arm` of a training's folder. The run is the directory above it that a session has locked."""
    run = _run_of(folder)
    return {"run": run.name, "arm": folder.resolve().relative_to(run).as_posix()}


def _run_of(folder: Path) -> Path:
    folder = folder.resolve()
    return next((above for above in folder.parents if (above / "run.lock").exists()), folder.parent)


@contextlib.contextmanager
def following(config: Config, folder: Path, stage: Stage) -> Iterator[None]:
    """While the block runs, an actor publishes the state of the training in `<run>/<arm>`, or of its check.

    A local Ray without a dashboard gets no actor, because nobody would see its metrics.
    """
    actor: Any = None
    if ray.is_initialized() and (config.cluster.address != "local" or config.cluster.dashboard):
        with contextlib.suppress(Exception):
            actor = _start(folder.resolve(), stage)
    try:
        yield
    finally:
        if actor is not None:
            with contextlib.suppress(Exception):  # it ends itself after it has sent its last values
                ray.get(actor.close.remote(), timeout=_CLOSE_S)


def _start(folder: Path, stage: Stage) -> Any:
    labels = labels_of(folder)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    name = f"monitor of {labels['run']}, {labels['arm']}, {stage} since {time.strftime('%H:%M:%S')}"
    return Monitor.options(name=name, num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(folder, stage)


class Follower:
    """Publishes the readings of a training's folder every two seconds from its own thread."""

    def __init__(self, folder: Path, stage: Stage):
        self.folder, self.labels = folder, labels_of(folder)
        self._read = follow(folder, stage)
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
            for name, value, labels in self._read():
                count(name, value, **self.labels, **labels)
        except Exception:  # a file of another version, a store that cannot be reached
            _log.warning("%s: could not be read", self.folder, exc_info=True)


@ray.remote
class Monitor:
    """The actor of `following`."""

    def __init__(self, folder: Path, stage: Stage):
        self._follower = Follower(folder, stage)

    def close(self) -> None:
        self._follower.close()
        exit_actor()


def follow(folder: Path, stage: Stage) -> Callable[[], Iterator[Reading]]:
    """A function that reads what is new in a training's folder and gives all its readings."""
    arm, files = labels_of(folder)["arm"], WatchedFiles(_run_of(folder))
    if stage == "oracle":
        images = PngStore()
        return lambda: oracle_readings(oracle_state(files, arm, images))
    reader = TrainingReader(files, arm)
    return lambda: training_readings(reader.read_all(), folder)


def training_readings(training: TrainingState, folder: Path) -> Iterator[Reading]:
    """Readings of the steps, the ranks, the checkpoints, and the disk that holds the folder."""
    if training.last_written_s:
        yield "roclip_train_last_step_timestamp_seconds", training.last_written_s, {}
    for name, value in training.newest.items():
        metric = METRICS[name]
        series = f"roclip_{metric.series}"
        if not metric.series:
            continue
        if metric.summed:
            yield series, training.totals[name], {}
        elif metric.each:
            yield from ((series, each, {metric.each: str(n)}) for n, each in enumerate(value))
        else:
            yield series, value == "matched" if name == "phase" else value, {}
    if training.ranks is not None:
        yield "roclip_train_ranks", training.ranks, {}
        yield "roclip_train_starts", training.starts, {}
    yield from _checkpoint_readings(training.checkpoints)
    disk = shutil.disk_usage(folder)
    yield "roclip_run_disk_free_bytes", disk.free, {}
    yield "roclip_run_disk_size_bytes", disk.total, {}


def _checkpoint_readings(saved: SavedCheckpoints) -> Iterator[Reading]:
    if saved.count:
        yield "roclip_checkpoint_last_timestamp_seconds", saved.last["saved_s"], {}
        yield "roclip_checkpoint_step", saved.last["step"], {}
        yield "roclip_checkpoint_saves", saved.count, {}
        yield "roclip_checkpoint_size_bytes", saved.last["size_bytes"], {}
        yield "roclip_checkpoint_write_seconds", saved.last["write_s"], {}
    if saved.last_copied:
        yield "roclip_checkpoint_copy_seconds", saved.last_copied["copy_s"], {}
        yield "roclip_checkpoint_copy_failures", saved.failed_copies, {}


def oracle_readings(oracle: OracleState) -> Iterator[Reading]:
    """Readings of the check's progress, of its report, and of the repair."""
    if oracle.progress:
        done, total, _ = oracle.progress
        yield "roclip_oracle_progress_ratio", done / total if total else 1.0, {}
    if oracle.verdict:
        for verdict in VERDICTS:
            yield "roclip_oracle_verdict", oracle.verdict == verdict, {"verdict": verdict}
        if oracle.victims is not None:
            yield "roclip_oracle_suspects", oracle.victims, {}
    if oracle.repair:
        yield "roclip_oracle_repair_accepted", oracle.repair.accepted, {}
        if oracle.repair.attack_after is not None:
            yield "roclip_oracle_repair_attack_ratio", oracle.repair.attack_after, {}
