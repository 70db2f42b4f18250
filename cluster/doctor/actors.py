"""An actor on each node for `roclip doctor --cluster`: called in parallel, with a timeout."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.checks import Check, judge
from cluster.doctor.node import NodeExam
from cluster.ray.connect import reach
from roclip.errors import StageError
from roclip.metrics.registry import Progress

_WHAT_TO_DO = (
    "Check that node and Ray's logs there (raylet.out and worker-*.err of the session): is it up, is roclip installed "
    "in the Python that Ray was started with, do head and node reach each other? Then start Ray there again."
)


@dataclass(frozen=True)
class Finding:
    """A check of one node."""

    node: str
    check: Check


@contextlib.contextmanager
def connected(address: str) -> Iterator[str]:
    """Connect to a running Ray; yields its dashboard's `host:port`. Raises `StageError` if there is none."""
    try:
        reach(address)
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise StageError(
            f"{address}: expected a running Ray, got: {_reason(error).rstrip('.')}. Name its head with --address HOST:6379 "
            "(ray://HOST:10001 from outside); if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
        ) from error
    try:
        yield getattr(context, "dashboard_url", "") or ""
    finally:
        ray.shutdown()


class NodeActors:
    """An actor on each living node. Ray must be initialised.

    Args:
        on_progress: Called with the progress of a step.
        timeout_s: For each answer. A node without an answer is lost and not called again.

    Attributes:
        nodes: Ray's description of each node, by a short name; the head is the first.
        head: The head's name.
        actors: By name of the node. They are killed at the end of the block.
    """

    def __init__(self, on_progress: Progress, timeout_s: float):
        self.timeout_s = timeout_s
        self.nodes = _living()
        self.head = next(iter(self.nodes))
        self.actors: dict[str, Any] = {}
        self._on_progress = on_progress
        self._step = (0, 1, "")
        self._lost: dict[str, str] = {}
        self._first_answer_s: dict[str, float] = {}
        self._began_s = time.monotonic()

    def __enter__(self) -> "NodeActors":
        self.actors = {name: self._actor(name) for name in self.nodes}
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors.values():
            ray.kill(actor)

    @property
    def present(self) -> list[str]:
        """Nodes that are not lost."""
        return [name for name in self.nodes if name in self.actors]

    def begin_step(self, number: int, steps: int, title: str) -> None:
        """Report that `number` of the steps are done; calls from here on belong to the next one."""
        self._step = (number, steps, title)
        self._on_progress(number, steps, title)

    def add(self, name: str, index: int) -> str:
        """Start one more actor on a node; returns its name."""
        extra = f"{name} #{index}"
        self.actors[extra] = self._actor(name)
        return extra

    def call(self, method: str, calls: Mapping[str, tuple]) -> dict[str, Any]:
        """Call a method of `NodeExam` on the named actors with their arguments. Returns the results, without actors that did
        not answer.
        """
        number, steps, title = self._step
        until_s = time.monotonic() + self.timeout_s
        pending = {getattr(self.actors[name], method).remote(*calls[name]): name for name in calls}
        answers: dict[str, Any] = {}
        while pending and (left_s := until_s - time.monotonic()) > 0:
            self._on_progress(number, steps, f"{title}: {len(answers)} of {len(calls)} nodes")
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(left_s, 1.0))
            for ref in ready:
                name = pending.pop(ref)
                try:
                    answers[name] = ray.get(ref)
                    self._first_answer_s.setdefault(name, time.monotonic() - self._began_s)
                except RayError as error:
                    self._mark_lost(name, f"{title}: {_reason(error)}")
        for name in pending.values():
            self._mark_lost(name, f"{title}: no answer within {self.timeout_s:g} s")
        return {name: answers[name] for name in calls if name in answers}

    def call_all(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call a method with the same arguments on all nodes that are present."""
        return self.call(method, dict.fromkeys(self.present, arguments))

    def reachability(self) -> list[Finding]:
        """Which nodes answered all calls."""
        need = f"answers within {self.timeout_s:g} s"
        return [
            Finding(name, judge("nodes", name not in self._lost, self._status(name), need, _WHAT_TO_DO))
            for name in self.nodes
        ]

    def _status(self, name: str) -> str:
        return self._lost.get(name) or f"first answer after {self._first_answer_s.get(name, 0.0):.1f} s"

    def _actor(self, name: str) -> Any:
        where = NodeAffinitySchedulingStrategy(self.nodes[name]["NodeID"], soft=False)
        return ray.remote(NodeExam).options(num_cpus=0, max_restarts=0, scheduling_strategy=where).remote()

    def _mark_lost(self, name: str, why: str) -> None:
        self._lost.setdefault(name.partition(" #")[0], why)
        ray.kill(self.actors.pop(name))


def _living() -> dict[str, dict]:
    """Ray's nodes by name, with the beginning of their id if a name is not unique; the head first."""
    nodes = sorted(
        (node for node in ray.nodes() if node["Alive"]), key=lambda node: (not _is_head(node), node["NodeName"])
    )
    count = Counter(node["NodeName"] for node in nodes)
    unique = [node["NodeName"] + f"/{node['NodeID'][:6]}" * (count[node["NodeName"]] > 1) for node in nodes]
    return dict(zip(unique, nodes, strict=True))


def _is_head(node: dict) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _reason(error: Exception) -> str:
    """The last non-empty line, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
