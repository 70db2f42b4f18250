"""The nodes of a cluster while `roclip doctor --cluster` looks at them: an actor on each, asked in parallel, in time."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.checks import Check, judge
from cluster.doctor.node import NodeExam
from cluster.ray.connect import reach
from roclip.errors import StageError

Say = Callable[[float, float, str], None]
"""Told how far it is: done, total, words."""
_WHAT_TO_DO = (
    "Look at that node and at Ray's logs there (raylet.out and worker-*.err of the session): is it up, is roclip installed "
    "in the Python that Ray was started with, do head and node reach each other? Then start Ray there again."
)


@dataclass(frozen=True)
class Finding:
    """A check of one node."""

    node: str
    check: Check


@contextlib.contextmanager
def connected(address: str) -> Iterator[str]:
    """Be connected to a running Ray, and know its dashboard's `host:port`. Raises `StageError` where there is none."""
    try:
        reach(address)
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise StageError(
            f"{address}: expected a running Ray, got: {_reason(error).rstrip('.')}. Name its head with --address HOST:6379 "
            "(ray://HOST:10001 from outside); where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
        ) from error
    try:
        yield getattr(context, "dashboard_url", "") or ""
    finally:
        ray.shutdown()


class NodeActors:
    """An actor on each living node. Needs a Ray that is initialised.

    Args:
        say: Told how far a step is, as in `Display.show`.
        timeout_s: For each answer. Who gives none is lost and not asked again.

    Attributes:
        nodes: Ray's own description of each node, by a short name; the head is the first.
        head: The head's name.
        actors: By name of the node. They end with the block.
    """

    def __init__(self, say: Say, timeout_s: float):
        self.timeout_s = timeout_s
        self.nodes = _living()
        self.head = next(iter(self.nodes))
        self.actors: dict[str, Any] = {}
        self._say = say
        self._step = (0, 1, "")
        self._lost: dict[str, str] = {}
        self._took_s: dict[str, float] = {}
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

    def begin(self, number: int, steps: int, words: str) -> None:
        """Say that so many of the steps are done; questions from here on belong to the next one."""
        self._step = (number, steps, words)
        self._say(number, steps, words)

    def enlist(self, name: str, index: int) -> str:
        """One more actor on a node; its name."""
        extra = f"{name} #{index}"
        self.actors[extra] = self._actor(name)
        return extra

    def ask(self, question: str, calls: Mapping[str, tuple]) -> dict[str, Any]:
        """Each named actor's answer to a method of `NodeExam` with its arguments; without those that did not answer."""
        number, steps, words = self._step
        until_s = time.monotonic() + self.timeout_s
        pending = {getattr(self.actors[name], question).remote(*calls[name]): name for name in calls}
        answers: dict[str, Any] = {}
        while pending and (left_s := until_s - time.monotonic()) > 0:
            self._say(number, steps, f"{words}: {len(answers)} of {len(calls)} nodes")
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(left_s, 1.0))
            for reference in ready:
                name = pending.pop(reference)
                try:
                    answers[name] = ray.get(reference)
                    self._took_s.setdefault(name, time.monotonic() - self._began_s)
                except RayError as error:
                    self._lose(name, f"{words}: {_reason(error)}")
        for name in pending.values():
            self._lose(name, f"{words}: no answer within {self.timeout_s:g} s")
        return {name: answers[name] for name in calls if name in answers}

    def ask_all(self, question: str, *arguments: Any) -> dict[str, Any]:
        """The same question to all nodes that are present."""
        return self.ask(question, dict.fromkeys(self.present, arguments))

    def attendance(self) -> list[Finding]:
        """Who answered to all that was asked."""
        need = f"answers within {self.timeout_s:g} s"
        return [
            Finding(name, judge("nodes", name not in self._lost, self._standing(name), need, _WHAT_TO_DO))
            for name in self.nodes
        ]

    def _standing(self, name: str) -> str:
        return self._lost.get(name) or f"first answer after {self._took_s.get(name, 0.0):.1f} s"

    def _actor(self, name: str) -> Any:
        where = NodeAffinitySchedulingStrategy(self.nodes[name]["NodeID"], soft=False)
        return ray.remote(NodeExam).options(num_cpus=0, max_restarts=0, scheduling_strategy=where).remote()

    def _lose(self, name: str, why: str) -> None:
        self._lost.setdefault(name.partition(" #")[0], why)
        ray.kill(self.actors.pop(name))


def _living() -> dict[str, dict]:
    """Ray's nodes by name, with the beginning of their id where several have one name; the head, then the others."""
    nodes = sorted(
        (node for node in ray.nodes() if node["Alive"]), key=lambda node: (not _is_head(node), node["NodeName"])
    )
    count = Counter(node["NodeName"] for node in nodes)
    unique = [node["NodeName"] + f"/{node['NodeID'][:6]}" * (count[node["NodeName"]] > 1) for node in nodes]
    return dict(zip(unique, nodes, strict=True))


def _is_head(node: dict) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _reason(error: Exception) -> str:
    """The last line that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
