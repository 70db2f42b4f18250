"""Callbacks of Ray Train: restarts and waits, a line each in `log/ranks.log`, which the display shows; and SIGTERM."""

import contextlib
import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.util
from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.callback import ControllerCallback

from cluster.ray.network import join_network, network_environment
from cluster.ray.queueing import Need, free, waited_in_vain
from roclip.errors import RoclipError, StageError
from roclip.report.training_state import CAUSE, LOG
from roclip.training.sigterm import leave, listen


@dataclass
class SigtermTorchConfig(TorchConfig):
    """Torch's process group over the nodes' own network, with a SIGTERM handler in each worker: Ray trains in a thread, which
    cannot have one. Healthy ranks save and leave before Ray ends them to start another number of ranks."""

    folder: Path = Path()
    """The training's folder."""
    network: dict[str, str] = field(default_factory=network_environment)

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: SigtermTorchConfig) -> None:
        worker_group.execute(_join_network, backend_config.network)
        super().on_start(worker_group, backend_config)
        worker_group.execute(_listen)

    def on_shutdown(self, worker_group: Any, backend_config: SigtermTorchConfig) -> None:
        seen = worker_group.get_latest_poll_status()
        if seen is not None and not seen.errors and not seen.finished:
            note(backend_config.folder, "nodes have come or gone: saving, to go on with another number of ranks")
            worker_group.execute(leave, backend_config.timeout_s)
        super().on_shutdown(worker_group, backend_config)


def _join_network(settings: dict[str, str]) -> None:
    join_network(settings, ray.util.get_node_ip_address())


def _listen() -> None:
    listen()  # returns a handler, which cannot be pickled


class Restarts(UserCallback):
    """Called by Ray's controller when ranks end with an error: notes why, and which of the allowed restarts comes next.

    Args:
        folder: The training's folder.
        allowed: `cluster.max_failures`. As for Ray, a node that announced that it is leaving does not count.
    """

    def __init__(self, folder: Path, allowed: int):
        self.folder, self.allowed, self.failures = folder, allowed, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        causes = {rank: getattr(error, "health_check_failure", error) for rank, error in worker_exceptions.items()}
        if any(getattr(cause, "preempted", False) for cause in causes.values()):
            return
        self.failures += 1
        next_ = f"restart {self.failures} of {self.allowed}" if self.failures <= self.allowed else "no restart is left"
        cause = describe(causes)
        with contextlib.suppress(OSError):  # a full disk
            (self.folder / CAUSE).write_text(cause)
        note(self.folder, f"{cause.rstrip('.')}; {next_}")


class WaitLimit(ControllerCallback):
    """Bounds the wait of Ray Train's controller, which waits silently and forever when lost ranks find no room again.

    Args:
        note: Called with each message.
        cause: The file that says why a training ended.
    """

    def __init__(self, need: Need, timeout_s: float, note: Callable[[str], None], cause: Path):
        self.need, self.timeout_s, self.note, self.cause = need, timeout_s, note, cause
        self._waiting_since_s = 0.0

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        state_name = current_state._state_type.name
        if state_name == "RUNNING":
            self._waiting_since_s = 0.0
        if state_name != "RESCHEDULING":  # Ray's state after it waited a minute for room, in vain
            return
        if not self._waiting_since_s:
            self._waiting_since_s = time.monotonic()
            self.note(f"waits for {self.need}; {free()}")
        waited_s = time.monotonic() - self._waiting_since_s
        if 0 < self.timeout_s <= waited_s:
            self.cause.write_text(waited_in_vain(self.need, waited_s))
            raise StageError(waited_in_vain(self.need, waited_s))


def describe(causes: dict[int, Exception]) -> str:
    """Why a training ended: an error that a rank raised on purpose, else the ranks that died, else the first rank's error."""
    ranks = {kind: [rank for rank in causes if isinstance(causes[rank], kind)] for kind in (RoclipError, RayActorError)}
    if ranks[RoclipError]:
        return str(causes[ranks[RoclipError][0]])
    if ranks[RayActorError]:
        return "; ".join(f"rank {rank} died" for rank in ranks[RayActorError])
    rank, cause = next(iter(causes.items()))
    return f"rank {rank}: {type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"


def note(folder: Path, text: str) -> None:
    """Add a line to the ranks' log, unless the disk is full."""
    path = folder / LOG
    line = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(text.split())}\n"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line)
