"""Waiting for room on a cluster: says what a stage waits for, and bounds how long it may wait.

Room is asked for as a placement group, so that Ray's own scheduler decides and an autoscaler sees the demand. The stage
then takes the group's place. Should another stage be faster, Ray Train waits, and `cluster.train.restarts.WaitLimit` says so.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import state
from ray.util import placement_group, remove_placement_group

from roclip.config import ClusterConfig
from roclip.errors import StageError

JOINING_S = 300.0
"""How long nodes may still join a cluster that could not hold the stage even if idle."""
SAY_AFTER_S = 2.0
SAY_EVERY_S = 60.0
Bundle = dict[str, float]
_POLL_S = 1.0


@dataclass(frozen=True)
class Need:
    """Room for `number` equal bundles, each on one node."""

    what: str
    number: int
    bundle: Bundle

    def __str__(self) -> str:
        return f"{self.number} × {{{_words(self.bundle)}}}"


def training_need(cluster: ClusterConfig, name: str) -> Need:
    """The ranks without which a training cannot start."""
    bundle = {"CPU": cluster.cpus_per_worker, **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})}
    return Need(f"training {name}", cluster.min_workers if cluster.elastic else cluster.workers, bundle)


def ingest_need(cluster: ClusterConfig) -> Need:
    """One task of an ingest."""
    resource = {cluster.ingest_resource: 1.0} if cluster.ingest_resource else {}
    return Need("ingest", 1, {"CPU": cluster.cpus_per_ingest_task, **resource})


def wait_for_room(
    need: Need, cluster: ClusterConfig, say: Callable[[str], None], *, joining_s: float = JOINING_S
) -> None:
    """Return when the cluster has room; say what it waits for, at first and then every minute.

    Raises `StageError` after `cluster.queue_timeout_s`, and for a need that the cluster can never hold and will not grow
    to hold: at once on a Ray of our own, else after `joining_s`.
    """
    if cluster.address == "local" and not holds(need, totals()):
        raise StageError(_too_small(need))
    group = placement_group([need.bundle] * need.number, strategy="PACK")
    begun_s, said_s, said = time.monotonic(), SAY_AFTER_S - SAY_EVERY_S, ""
    try:
        while not group.wait(_POLL_S):
            waited_s = time.monotonic() - begun_s
            never = not holds(need, totals()) and not grows()
            if 0 < cluster.queue_timeout_s <= waited_s:
                raise StageError(waited_in_vain(need, waited_s))
            if never and waited_s >= joining_s:
                raise StageError(_too_small(need))
            text = f"{need.what} waits for {need}; {free()}" + (". It could not hold it even if idle" if never else "")
            if waited_s - said_s >= SAY_EVERY_S and text != said:
                said_s, said = waited_s, text
                say(text)
    finally:
        remove_placement_group(group)


def totals() -> list[Bundle]:
    """The resources of each living node when it is idle."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def holds(need: Need, nodes: Sequence[Bundle]) -> bool:
    """Whether the nodes could hold the need if they were idle."""
    rooms = (
        min(int((node.get(name, 0.0) + 1e-6) / amount) for name, amount in need.bundle.items() if amount)
        for node in nodes
    )
    return sum(rooms) >= need.number


def grows() -> bool:
    """Whether an autoscaler may add nodes to the cluster."""
    return state.get_max_resources_from_cluster_config() is not None


def free() -> str:
    """A sentence that says how much of the cluster's resources is free."""
    now, all_ = ray.available_resources(), ray.cluster_resources()
    names = [name for name in sorted(all_) if ":" not in name and "memory" not in name and "_group_" not in name]
    return (
        "the cluster has " + (", ".join(f"{now.get(name, 0):g} of {all_[name]:g} {name}" for name in names)) + " free"
    )


def waited_in_vain(need: Need, waited_s: float) -> str:
    """The error of a stage that found no room in time, and what to do about it."""
    return (
        f"{need.what} waited {waited_s:.0f} s for {need}, in vain; {free()}. See who has the rest in `ray status`. Wait "
        "longer with cluster.queue_timeout_s (0: as long as it takes), ask for less, or add nodes; the same command goes on."
    )


def _too_small(need: Need) -> str:
    nodes = "; ".join(f"{{{_words({k: v for k, v in node.items() if k in need.bundle})}}}" for node in totals())
    return (
        f"{need.what}: expected nodes that hold {need}, got {nodes or 'no nodes'}. Add nodes, or ask for less with "
        "cluster.workers, cluster.cpus_per_worker, cluster.gpus_per_worker or cluster.ingest_resource."
    )


def _words(bundle: Bundle) -> str:
    return ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items())
