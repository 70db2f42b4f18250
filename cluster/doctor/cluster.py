"""Checks whether a cluster is fit for what a config needs. Each node examines itself (`node.py`); the results are compared
here.
"""

import contextlib
import dataclasses
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.doctor.actors import Finding, NodeActors
from cluster.doctor.checks import Check, Status, judge
from cluster.doctor.dns import first_hosts
from cluster.doctor.node import Node, NodeExam, Rank, is_loopback
from cluster.plan import RunPlan, human_bytes, make_plan
from cluster.ray.network import network_environment, ring_bytes
from roclip.config import ClusterConfig, Config, run_directory
from roclip.errors import RoclipError
from roclip.metrics.registry import Progress

MAX_CLOCK_SKEW_S = 2.0
"""Owners of an ingest's lease, which lasts a minute, compare clocks."""
MAX_STORE_STEP_S = 1.0
"""To write, rename or read a file of a few bytes."""
MIN_REDUCE_BYTES_PER_S = 1e8
"""Bandwidth of an all-reduce: about a link of 1 Gb/s."""
REDUCED_BYTES = {"gloo": 16 * 2**20, "nccl": 128 * 2**20}
_VISIBLE_S = 15.0
"""Time in which a node must see another's file."""
_CLOCK_READINGS = 5


def examine(config: Config | None, dashboard_url: str, on_progress: Progress, timeout_s: float = 60.0) -> list[Finding]:
    """Check every node of the cluster that Ray is connected to, against the needs of `config` if given.

    A node that does not answer within `timeout_s` is a failed check, and is not called again. Leaves nothing behind.
    """
    plan = None
    if config is not None:
        with contextlib.suppress(RoclipError):  # `roclip doctor CONFIG` reports what is wrong with it
            plan = make_plan(config)
    steps: dict[str, Callable[[NodeActors], list[Finding]]] = {
        "versions": _versions,
        "disks, memory, limits, GPUs": lambda node_actors: _inspections(node_actors, config, plan),
        "clocks": _clocks,
        "dashboard": lambda node_actors: _dashboard(node_actors, dashboard_url),
        "names": lambda node_actors: _names(node_actors, config),
        "stores": lambda node_actors: _stores(node_actors, config),
        "all-reduce": lambda node_actors: _all_reduce(node_actors, config, plan),
    }
    findings = []
    with NodeActors(on_progress, timeout_s) as node_actors:
        for number, (title, step) in enumerate(steps.items()):
            node_actors.begin_step(number, len(steps), title)
            findings += step(node_actors)
        node_actors.begin_step(len(steps), len(steps), f"{len(node_actors.nodes)} nodes")
        return [*node_actors.reachability(), *_room(node_actors, config), *findings]


def by_check(findings: Iterable[Finding]) -> list[Check]:
    """One check for all nodes: the worst status, and the nodes that have it."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.check.name, []).append(finding)
    return [_worst(group) for group in groups.values()]


def by_node(findings: Iterable[Finding]) -> list[Check]:
    """Each check of each node, named after both."""
    return [dataclasses.replace(finding.check, name=f"{finding.check.name}, {finding.node}") for finding in findings]


def _worst(group: list[Finding]) -> Check:
    order: tuple[Status, ...] = ("fail", "warn", "ok")
    status = min((finding.check.status for finding in group), key=order.index)
    having = [finding for finding in group if finding.check.status == status]
    nodes: dict[str, list[str]] = {}
    for finding in having:
        nodes.setdefault(finding.check.got, []).append(finding.node)
    if status == "ok" and len(nodes) > 1:
        return dataclasses.replace(
            having[0].check, got=f"all {len(group)}, such as {having[0].node}: {having[0].check.got}"
        )
    shown = list(nodes)[:3]
    summary = [f"{_some(nodes[got], len(group))}: {got}" for got in shown]
    left = len(group) - sum(len(nodes[got]) for got in shown)
    return dataclasses.replace(having[0].check, got="; ".join(summary) + f"; {left} more" * bool(left))


def _some(names: list[str], total: int) -> str:
    """Up to three names, or all."""
    if 1 < len(names) == total:
        return f"all {total}"
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _versions(node_actors: NodeActors) -> list[Finding]:
    """Compare each node's versions with those of the majority, this process included."""
    found = {"this command": NodeExam().versions(), **node_actors.call_all("versions")}
    names = dict.fromkeys(name for versions in found.values() for name in versions)
    usual = {name: Counter(each.get(name, "none") for each in found.values()).most_common(1)[0][0] for name in names}
    advice = (
        "Install the same packages and the same roclip in the Python that starts Ray there; then start Ray there again."
    )

    def check(versions: Mapping[str, str]) -> Check:
        odd = {name: versions.get(name, "none") for name in names if versions.get(name, "none") != usual[name]}
        got = odd or {name: usual[name] for name in ("python", "torch", "ray", "deepspeed", "roclip") if name in usual}
        need = "like most: " + _pairs({name: usual[name] for name in odd}) if odd else "the same everywhere"
        return judge("versions", not odd, _pairs(got), need, advice)

    return [Finding(node, check(versions)) for node, versions in found.items()]


def _pairs(items: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in items.items())


def _inspections(node_actors: NodeActors, config: Config | None, plan: RunPlan | None) -> list[Finding]:
    calls = {}
    for name in node_actors.present:
        node, resources = node_actors.nodes[name], node_actors.nodes[name]["Resources"]
        calls[name] = (
            Node(
                address=node["NodeManagerAddress"],
                session=str(Path(node["ObjectStoreSocketName"]).parents[1]),
                object_store_bytes=int(resources.get("object_store_memory", 0)),
                gpus=int(resources.get("GPU", 0)),
                run_directory=str(run_directory(config).resolve()) if config else "",
                disk_bytes=plan.disk_bytes if plan else 0,
            ),
        )
    return [Finding(name, check) for name, checks in node_actors.call("inspect", calls).items() for check in checks]


@dataclass(frozen=True)
class ClockReading:
    """The offset of a remote clock from this one."""

    ahead_s: float
    error_s: float
    """Half of the round trip."""


def clock_reading(sent_s: float, remote_s: float, received_s: float) -> ClockReading:
    """A reading from the local times of call and answer, and the remote time."""
    return ClockReading(remote_s - (sent_s + received_s) / 2, (received_s - sent_s) / 2)


def clock_check(head: ClockReading, node: ClockReading) -> Check:
    """Compare a node's clock with the head's. It fails only if the skew is certain."""
    ahead_s, error_s = node.ahead_s - head.ahead_s, node.error_s + head.error_s
    got = f"{ahead_s * 1e3:+,.1f} ms to the head's, ± {error_s * 1e3:,.1f} ms"
    advice = "Run chrony or systemd-timesyncd there: an ingest's lease and signed requests to stores compare clocks."
    return judge("clock", abs(ahead_s) - error_s <= MAX_CLOCK_SKEW_S, got, f"within {MAX_CLOCK_SKEW_S:g} s", advice)


def _clocks(node_actors: NodeActors) -> list[Finding]:
    """The quickest of a few readings of each node, one node after another: concurrent calls would delay each other's answers."""
    best = {}
    for name in node_actors.call_all("now"):
        readings = []
        for _ in range(_CLOCK_READINGS):
            sent_s = time.time()
            with contextlib.suppress(RayError):  # a node that is lost meanwhile is noticed at the next call
                remote_s: Any = ray.get(node_actors.actors[name].now.remote(), timeout=node_actors.timeout_s)
                readings.append(clock_reading(sent_s, remote_s, time.time()))
        if readings:
            best[name] = min(readings, key=lambda reading: reading.error_s)
    if node_actors.head not in best:
        return []
    return [Finding(name, clock_check(best[node_actors.head], reading)) for name, reading in best.items()]


def _dashboard(node_actors: NodeActors, url: str) -> list[Finding]:
    if not url or node_actors.head not in node_actors.present:
        return []
    answers = node_actors.call("dashboard", {node_actors.head: (url,)})
    return [Finding(name, dashboard_check(url, *answer)) for name, answer in answers.items()]


def dashboard_check(url: str, bound: list[str], asks: bool | None) -> Check:
    """A dashboard that other machines reach must ask for a token."""
    heard = "does not answer" if asks is None else f"asks for {'a' if asks else 'no'} token"
    got = f"{url} listens on {', '.join(bound) or 'an unknown address'}, {heard}"
    advice = (
        "Start the head with --dashboard-host 127.0.0.1 and come by `ssh -L 8265:127.0.0.1:8265 HEAD`, or start every node "
        "with RAY_AUTH_MODE=token: who reaches this dashboard runs code on the cluster."
    )
    inside = bool(bound) and all(map(is_loopback, bound))
    return judge("dashboard", bool(asks), got, "loopback and a token", advice, otherwise="warn" if inside else "fail")


def _room(node_actors: NodeActors, config: Config | None) -> list[Finding]:
    """Whether all ranks fit at the same time, if nothing else runs, and some node may ingest."""
    if config is None:
        return []
    cluster, resources = config.cluster, [node["Resources"] for node in node_actors.nodes.values()]
    ranks = sum(_ranks(cluster, each) for each in resources)
    got = f"{ranks} with {cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker:g} GPUs each"
    advice = "Add nodes, or lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker."
    findings = [judge("ranks", ranks >= cluster.workers, got, f"{cluster.workers}", advice)]
    wanted = cluster.ingest_resource
    if wanted and config.data.fetches:
        units = sum(each.get(wanted, 0) for each in resources)
        advice = f"""Start nodes that fetch with `ray start --resources '{{"{wanted}": 8}}'`, or unset cluster.ingest_resource."""
        findings.append(judge("ingest room", units >= 1, f"{units:g} of {wanted}", "1", advice))
    return [Finding("the cluster", check) for check in findings]


def _ranks(cluster: ClusterConfig, resources: Mapping[str, float]) -> int:
    """Number of ranks that fit on a node with these resources."""
    room = resources.get("CPU", 0) // cluster.cpus_per_worker
    if cluster.gpus_per_worker:
        room = min(room, resources.get("GPU", 0) // cluster.gpus_per_worker)
    return int(room)


def _names(node_actors: NodeActors, config: Config | None) -> list[Finding]:
    if config is None or not config.data.urls:
        return []
    try:
        hosts = first_hosts(config)
    except RoclipError as error:
        return [Finding("this command", Check("names", "fail", str(error), "a URL list", "Correct data.urls."))]
    wanted = config.cluster.ingest_resource or "CPU"
    fetching = [name for name in node_actors.present if wanted in node_actors.nodes[name]["Resources"]]
    answers = node_actors.call("names", dict.fromkeys(fetching, (hosts, config.ingest.policy)))
    return [Finding(name, check) for name, check in answers.items()]


def _stores(node_actors: NodeActors, config: Config | None) -> list[Finding]:
    if config is None or not node_actors.present:
        return []
    first = node_actors.present[0]
    path = str(run_directory(config).resolve().parent)
    folder = node_actors.call("nearest_folder", {first: (path,)}).get(first, path)
    stores = {
        "data.shards": config.data.shards if config.data.fetches else "",
        "train.checkpoint_store": config.train.checkpoint_store,
    }
    findings = _store(node_actors, "run store", "`runs`", folder)
    for key, where in stores.items():
        findings += _store(node_actors, key, key, where) if "://" in where else []
    return findings


def _store(node_actors: NodeActors, name: str, setting: str, where: str) -> list[Finding]:
    """Each node writes a file. The first node that could must see all files, and all others must see its file."""
    mark = f".roclip-doctor-{secrets.token_hex(4)}"
    files = {node: f"{mark}-{index}" for index, node in enumerate(node_actors.present)}
    try:
        written = node_actors.call("write", {node: (where, file) for node, file in files.items()})
        good = [node for node in written if not isinstance(written[node], str)]
        wanted = {node: [files[good[0]]] if node != good[0] else [files[other] for other in good] for node in good}
        seen = node_actors.call("wait_for_files", {node: (where, names, _VISIBLE_S) for node, names in wanted.items()})
    finally:
        here = [node for node in files if node in node_actors.present]
        mine = {node: list(files.values()) if node == here[0] else [files[node]] for node in here}
        node_actors.call("clear", {node: (where, names) for node, names in mine.items()})
    owners = {file: node for node, file in files.items()}
    findings = []
    for node, durations in written.items():
        if isinstance(durations, str):
            findings.append(Finding(node, _store_fails(name, setting, durations)))
        elif node in seen:
            after_s, missing = seen[node]
            blind = f"{where}: what {', '.join(owners[file] for file in missing[:3])} wrote is not there"
            fine = _store_answers(name, where, durations, after_s)
            findings.append(Finding(node, _store_fails(name, setting, blind) if missing else fine))
    return findings


def _store_fails(name: str, setting: str, got: str) -> Check:
    advice = f"Set {setting} to storage that all nodes share and may write to, at the same path, and mount it there."
    return Check(name, "fail", got, "one place for all nodes", advice)


def _store_answers(name: str, where: str, durations: Mapping[str, float], after_s: float) -> Check:
    times = ", ".join(f"{step} {seconds * 1e3:.1f} ms" for step, seconds in durations.items())
    got = f"{where}: {times}, others' files after {after_s * 1e3:.1f} ms"
    advice = "Check for a busy server or a mount with wrong options: shards and checkpoints wait for it."
    quick = max(durations.values()) <= MAX_STORE_STEP_S
    return judge(name, quick, got, f"{MAX_STORE_STEP_S:g} s a step", advice, otherwise="warn")


def _all_reduce(node_actors: NodeActors, config: Config | None, plan: RunPlan | None) -> list[Finding]:
    """An all-reduce with NCCL, one rank per GPU, unless there are none or the config uses none; else with gloo, one rank per
    node.
    """
    gpus = {name: int(node_actors.nodes[name]["Resources"].get("GPU", 0)) for name in node_actors.present}
    ranks: list[tuple[str, int | None]] = []
    if any(gpus.values()) and (config is None or config.cluster.gpus_per_worker):
        backend = "nccl"
        for name, count in gpus.items():
            ranks += [(node_actors.add(name, gpu) if gpu else name, gpu) for gpu in range(count)]
    else:
        backend = "gloo"
        ranks += [(name, None) for name in node_actors.present if node_actors.nodes[name]["Resources"].get("CPU", 0)]
    if not ranks:
        return []
    first, size = ranks[0][0], REDUCED_BYTES[backend]
    port = node_actors.call("free_port", {first: ()}).get(first)
    address = {name: node_actors.nodes[name.partition(" #")[0]]["NodeManagerAddress"] for name, _ in ranks}
    network = network_environment()
    calls = {
        name: (
            Rank(rank, len(ranks), f"{address[first]}:{port}", address[name], gpu, network),
            size,
            node_actors.timeout_s / 2,
        )
        for rank, (name, gpu) in enumerate(ranks)
    }
    answers = node_actors.call("all_reduce", calls)
    wrong = {name: str(answers.get(name, "no answer")) for name in calls if not isinstance(answers.get(name), float)}
    need = f"a correct sum over {len(ranks)} rank{'s' * (len(ranks) > 1)}"
    advice = (
        "Open all ports between the nodes; name the interface that they share with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
        "(--verbose shows each node's). NCCL_DEBUG=INFO says more."
    )
    if wrong:
        return [
            Finding(name, Check("all-reduce", "fail", f"{backend}: {why}", need, advice)) for name, why in wrong.items()
        ]
    if len(ranks) == 1:
        return [Finding(first, Check("all-reduce", "ok", f"{backend}: one rank, nothing to send", need))]
    rate = ring_bytes(size, len(ranks)) / max(answers.values())
    got = f"{backend}, {len(ranks)} ranks: {rate / 1e9:.2f} GB/s" + _expected(config, plan, rate)
    check = judge("all-reduce", rate >= MIN_REDUCE_BYTES_PER_S, got, need, advice, otherwise="warn")
    return [Finding("the cluster", check)]


def _expected(config: Config | None, plan: RunPlan | None, rate: float) -> str:
    """How long the gradients of the config's model will take at that rate."""
    if config is None or plan is None or not plan.parameters or plan.ranks == 1:
        return ""
    size = plan.parameters * (2 if config.train.precision == "bf16" else 4)
    seconds = ring_bytes(size, plan.ranks) / rate
    return f"; {config.model.name}'s {human_bytes(size)} of gradients take {seconds:.2g} s over {plan.ranks} ranks"
