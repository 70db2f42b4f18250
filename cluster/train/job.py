"""Trains one arm under Ray Train: DeepSpeed ranks as Ray workers, restarted when one dies.

Ray only places and restarts. What is complete is decided by the run directory's own LATEST, so that a checkpoint
can neither be lost between Ray's polls nor differ from what `torchrun -m roclip.training` would leave.
"""

import datetime
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from cluster.monitoring.publisher import following
from cluster.ray.queueing import training_need, wait_for_room
from roclip.checkpoint import pointers
from roclip.config import Config, dump_config, environment_defaults, parse_config
from roclip.errors import StageError
from roclip.report.training_state import CAUSE

PLACED_WITHIN_S = "20"
"""How long Ray waits for room for the ranks that it thinks will fit, before it counts nodes again. It counts them every 20 s,
so after a loss the first attempt may include a node that is gone."""


def train_arm(config: Config, arm: str, run: Path, *, name: str = "") -> Path:
    """Train one arm to its end and return its last checkpoint; returns at once when that exists.

    The training's folder is `<run>/<name>`, or `<run>/<arm>` without a name. Ray must be initialised. Raises `StageError` with
    the worker's own message when training cannot be finished.
    """
    name = name or arm
    folder = run / name / "checkpoints"
    if (done := finished(config, folder)) is not None:
        return done
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer  # loads torch
    from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

    from cluster.train.restarts import Restarts, SigtermTorchConfig, WaitLimit, note

    (run / name).mkdir(parents=True, exist_ok=True)
    (run / name / CAUSE).unlink(missing_ok=True)
    cluster = config.cluster
    need = training_need(cluster, name)
    wait_for_room(need, cluster, partial(note, run / name))
    patience = WaitLimit(
        need, cluster.queue_timeout_s, partial(note, (run / name).resolve()), (run / name / CAUSE).resolve()
    )
    if cluster.elastic:
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, PLACED_WITHIN_S)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": dump_config(config), "arm": arm, "name": name, "run": str(run.resolve())},
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.workers) if cluster.elastic else cluster.workers,
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=need.bundle,
            placement_strategy="PACK",
        ),
        torch_config=SigtermTorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            timeout_s=math.ceil(config.train.collective_timeout_s),
            folder=(run / name).resolve(),
        ),
        run_config=RunConfig(
            name=f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}",  # a name used again would resume Ray's own state
            storage_path=str((run / "ray").resolve()),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[Restarts((run / name).resolve(), cluster.max_failures), patience],  # pyright: ignore[reportArgumentType]
        ),
    )
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with following(config, run / name, "training"):
            trainer.fit()
    except SystemExit as stop:  # Ray Train's own SIGINT handler ends the workers, then the process
        raise KeyboardInterrupt from stop
    except Exception as error:
        said = run / name / CAUSE
        noted = said.read_text() if said.exists() else ""  # nothing where the disk is full
        cause = noted or str(error).strip().splitlines()[-1]
        raise StageError(
            f"training {name}: {cause.rstrip('.')}. Logs: {run / name / 'log'}. "
            "The same command resumes from the last checkpoint."
        ) from error
    finally:
        signal.signal(signal.SIGINT, on_ctrl_c)
    done = finished(config, folder)
    if done is None:
        raise StageError(f"training {name}: ended before epoch {config.train.epochs}. Run the same command again.")
    return done


def finished(config: Config, folder: Path) -> Path | None:
    """The last checkpoint of a training that has done all its epochs, else None."""
    path = pointers.named(folder, "LATEST")
    if path is None or pointers.cursor(path).epoch <= config.train.epochs:
        return None
    return path


def _worker(settings: dict[str, Any]) -> None:
    """One rank, in a Ray worker process."""
    environment_defaults()
    import logging

    import ray.train

    from cluster.train.restarts import note
    from cluster.train.topology import topology_line
    from roclip.evaluation.evaluate import record_evaluation
    from roclip.model.towers import Towers
    from roclip.training.loop import train

    config, run, name = parse_config(settings["config"]), Path(settings["run"]), settings["name"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if rank == 0:
        reached = pointers.named(run / name / "checkpoints", "LATEST")
        step = pointers.cursor(reached).step if reached else 0
        note(run / name, f"{context.get_world_size()} ranks from step {step}")
    log = run / name / "log" / f"rank-{rank:05d}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)

    def say_where(towers: Towers) -> None:
        line = topology_line(towers, ray.get_runtime_context().get_node_id())
        if rank == 0:
            note(run / name, line)

    train(
        config,
        settings["arm"],
        run,
        name=name,
        on_start=say_where,
        on_epoch_end=lambda towers, cursor: record_evaluation(config, run, name, towers, cursor),
    )
