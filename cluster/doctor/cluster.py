"""Is this cluster fit for what a config needs? Each node looks at itself (`node.py`); here they are compared."""

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

from cluster.doctor.actors import Finding, NodeActors, Say
from cluster.doctor.checks import Check, Status, judge
from cluster.doctor.dns import first_hosts
from cluster.doctor.node import Node, NodeExam, Rank, is_loopback
from cluster.plan import RunPlan, human_bytes, make_plan
from cluster.ray.network import network_environment, ring_bytes
from roclip.config import ClusterConfig, Config, run_directory
from roclip.errors import RoclipError

LARGEST_SKEW_S = 2.0
"""Owners of an ingest's lease, which lasts a minute, compare clocks."""
SLOWEST_STORE_S = 1.0
"""To write, rename or read a file of a few bytes."""
SLOWEST_BYTES_PER_S = 1e8
"""Of an all-reduce: about a link of 1 Gb/s."""
REDUCED_BYTES = {"gloo": 16 * 2**20, "nccl": 128 * 2**20}
_VISIBLE_S = 15.0
"""In which a node must see another's file."""
_CLOCK_READINGS = 5


def examine(config: Config | None, dashboard_url: str, say: Say, timeout_s: float = 60.0) -> list[Finding]:
    """Look at every node of the cluster that Ray is connected to, against what `config` needs where one is given.

    A node that does not answer within `timeout_s` is a failed check, and is not asked again. Leaves nothing behind.
    """
    plan = None
    if config is not None:
        with contextlib.suppress(RoclipError):  # `roclip doctor CONFIG` says what is wrong with it
            plan = make_plan(config)
    steps: dict[str, Callable[[NodeActors], list[Finding]]] = {
        "versions": _versions,
        "disks, memory, limits, GPUs": lambda ward: _looks(ward, config, plan),
        "clocks": _clocks,
        "dashboard": lambda ward: _dashboard(ward, dashboard_url),
        "names": lambda ward: _names(ward, config),
        "stores": lambda ward: _stores(ward, config),
        "all-reduce": lambda ward: _all_reduce(ward, config, plan),
    }
    findings = []
    with NodeActors(say, timeout_s) as ward:
        for number, (words, step) in enumerate(steps.items()):
            ward.begin(number, len(steps), words)
            findings += step(ward)
        ward.begin(len(steps), len(steps), f"{len(ward.nodes)} nodes")
        return [*ward.attendance(), *_room(ward, config), *findings]


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
    said = [f"{_some(nodes[got], len(group))}: {got}" for got in shown]
    left = len(group) - sum(len(nodes[got]) for got in shown)
    return dataclasses.replace(having[0].check, got="; ".join(said) + f"; {left} more" * bool(left))


def _some(names: list[str], total: int) -> str:
    """Up to three names, or all."""
    if 1 < len(names) == total:
        return f"all {total}"
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _versions(ward: NodeActors) -> list[Finding]:
    """Against what most have, this process included."""
    found = {"this command": NodeExam().versions(), **ward.ask_all("versions")}
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


def _looks(ward: NodeActors, config: Config | None, plan: RunPlan | None) -> list[Finding]:
    calls = {}
    for name in ward.present:
        node, resources = ward.nodes[name], ward.nodes[name]["Resources"]
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
    return [Finding(name, check) for name, checks in ward.ask("look", calls).items() for check in checks]


@dataclass(frozen=True)
class Reading:
    """A remote clock against this one."""

    ahead_s: float
    error_s: float
    """Half of the round trip."""


def clock_reading(asked_s: float, said_s: float, answered_s: float) -> Reading:
    """From when it was asked and when it answered, by this clock, and what it said."""
    return Reading(said_s - (asked_s + answered_s) / 2, (answered_s - asked_s) / 2)


def clock_check(head: Reading, node: Reading) -> Check:
    """A node's clock against the head's. It fails only if it is wrong for sure."""
    ahead_s, error_s = node.ahead_s - head.ahead_s, node.error_s + head.error_s
    got = f"{ahead_s * 1e3:+,.1f} ms to the head's, ± {error_s * 1e3:,.1f} ms"
    advice = "Run chrony or systemd-timesyncd there: an ingest's lease and signed requests to stores compare clocks."
    return judge("clock", abs(ahead_s) - error_s <= LARGEST_SKEW_S, got, f"within {LARGEST_SKEW_S:g} s", advice)


def _clocks(ward: NodeActors) -> list[Finding]:
    """The quickest of a few readings of each node, one node after another: who waits for many reads late."""
    best = {}
    for name in ward.ask_all("now"):
        readings = []
        for _ in range(_CLOCK_READINGS):
            asked_s = time.time()
            with contextlib.suppress(RayError):  # who is lost meanwhile is missed at the next question
                said_s: Any = ray.get(ward.actors[name].now.remote(), timeout=ward.timeout_s)
                readings.append(clock_reading(asked_s, said_s, time.time()))
        if readings:
            best[name] = min(readings, key=lambda reading: reading.error_s)
    if ward.head not in best:
        return []
    return [Finding(name, clock_check(best[ward.head], reading)) for name, reading in best.items()]


def _dashboard(ward: NodeActors, url: str) -> list[Finding]:
    if not url or ward.head not in ward.present:
        return []
    answers = ward.ask("dashboard", {ward.head: (url,)})
    return [Finding(name, dashboard_check(url, *answer)) for name, answer in answers.items()]


def dashboard_check(url: str, bound: list[str], asks: bool | None) -> Check:
    """A dashboard that others reach must ask for a token."""
    heard = "does not answer" if asks is None else f"asks for {'a' if asks else 'no'} token"
    got = f"{url} listens on {', '.join(bound) or 'an unknown address'}, {heard}"
    advice = (
        "Start the head with --dashboard-host 127.0.0.1 and come by `ssh -L 8265:127.0.0.1:8265 HEAD`, or start every node "
        "with RAY_AUTH_MODE=token: who reaches this dashboard runs code on the cluster."
    )
    inside = bool(bound) and all(map(is_loopback, bound))
    return judge("dashboard", bool(asks), got, "loopback and a token", advice, otherwise="warn" if inside else "fail")


def _room(ward: NodeActors, config: Config | None) -> list[Finding]:
    """Whether all ranks fit at the same time, if nothing else runs, and somebody may ingest."""
    if config is None:
        return []
    cluster, resources = config.cluster, [node["Resources"] for node in ward.nodes.values()]
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
    """So many fit on a node with these resources."""
    room = resources.get("CPU", 0) // cluster.cpus_per_worker
    if cluster.gpus_per_worker:
        room = min(room, resources.get("GPU", 0) // cluster.gpus_per_worker)
    return int(room)


def _names(ward: NodeActors, config: Config | None) -> list[Finding]:
    if config is None or not config.data.urls:
        return []
    try:
        hosts = first_hosts(config)
    except RoclipError as error:
        return [Finding("this command", Check("names", "fail", str(error), "a URL list", "Correct data.urls."))]
    wanted = config.cluster.ingest_resource or "CPU"
    fetching = [name for name in ward.present if wanted in ward.nodes[name]["Resources"]]
    answers = ward.ask("names", dict.fromkeys(fetching, (hosts, config.ingest.policy)))
    return [Finding(name, check) for name, check in answers.items()]


def _stores(ward: NodeActors, config: Config | None) -> list[Finding]:
    if config is None or not ward.present:
        return []
    first = ward.present[0]
    path = str(run_directory(config).resolve().parent)
    folder = ward.ask("existing", {first: (path,)}).get(first, path)
    stores = {
        "data.shards": config.data.shards if config.data.fetches else "",
        "train.checkpoint_store": config.train.checkpoint_store,
    }
    findings = _store(ward, "run store", "`runs`", folder)
    for key, where in stores.items():
        findings += _store(ward, key, key, where) if "://" in where else []
    return findings


def _store(ward: NodeActors, name: str, setting: str, where: str) -> list[Finding]:
    """Each node writes a file. The first that could must see all, and all must see that one's."""
    mark = f".roclip-doctor-{secrets.token_hex(4)}"
    files = {node: f"{mark}-{index}" for index, node in enumerate(ward.present)}
    try:
        written = ward.ask("write", {node: (where, file) for node, file in files.items()})
        good = [node for node in written if not isinstance(written[node], str)]
        wanted = {node: [files[good[0]]] if node != good[0] else [files[other] for other in good] for node in good}
        seen = ward.ask("sees", {node: (where, names, _VISIBLE_S) for node, names in wanted.items()})
    finally:
        here = [node for node in files if node in ward.present]
        mine = {node: list(files.values()) if node == here[0] else [files[node]] for node in here}
        ward.ask("clear", {node: (where, names) for node, names in mine.items()})
    owners = {file: node for node, file in files.items()}
    findings = []
    for node, took in written.items():
        if isinstance(took, str):
            findings.append(Finding(node, _store_fails(name, setting, took)))
        elif node in seen:
            after_s, missing = seen[node]
            blind = f"{where}: what {', '.join(owners[file] for file in missing[:3])} wrote is not there"
            fine = _store_answers(name, where, took, after_s)
            findings.append(Finding(node, _store_fails(name, setting, blind) if missing else fine))
    return findings


def _store_fails(name: str, setting: str, got: str) -> Check:
    advice = f"Set {setting} to storage that all nodes share and may write to, at the same path, and mount it there."
    return Check(name, "fail", got, "one place for all nodes", advice)


def _store_answers(name: str, where: str, took: Mapping[str, float], after_s: float) -> Check:
    times = ", ".join(f"{step} {seconds * 1e3:.1f} ms" for step, seconds in took.items())
    got = f"{where}: {times}, others' files after {after_s * 1e3:.1f} ms"
    advice = "Look for a busy server or a mount with the wrong options: shards and checkpoints wait for it."
    quick = max(took.values()) <= SLOWEST_STORE_S
    return judge(name, quick, got, f"{SLOWEST_STORE_S:g} s a step", advice, otherwise="warn")


def _all_reduce(ward: NodeActors, config: Config | None, plan: RunPlan | None) -> list[Finding]:
    """A sum with NCCL over one rank a GPU, unless there are none or the config uses none; else with gloo, one rank a node."""
    gpus = {name: int(ward.nodes[name]["Resources"].get("GPU", 0)) for name in ward.present}
    ranks: list[tuple[str, int | None]] = []
    if any(gpus.values()) and (config is None or config.cluster.gpus_per_worker):
        backend = "nccl"
        for name, count in gpus.items():
            ranks += [(ward.enlist(name, gpu) if gpu else name, gpu) for gpu in range(count)]
    else:
        backend = "gloo"
        ranks += [(name, None) for name in ward.present if ward.nodes[name]["Resources"].get("CPU", 0)]
    if not ranks:
        return []
    first, size = ranks[0][0], REDUCED_BYTES[backend]
    port = ward.ask("free_port", {first: ()}).get(first)
    address = {name: ward.nodes[name.partition(" #")[0]]["NodeManagerAddress"] for name, _ in ranks}
    network = network_environment()
    calls = {
        name: (
            Rank(rank, len(ranks), f"{address[first]}:{port}", address[name], gpu, network),
            size,
            ward.timeout_s / 2,
        )
        for rank, (name, gpu) in enumerate(ranks)
    }
    answers = ward.ask("all_reduce", calls)
    wrong = {name: str(answers.get(name, "no answer")) for name in calls if not isinstance(answers.get(name), float)}
    need = f"a right sum over {len(ranks)} rank{'s' * (len(ranks) > 1)}"
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
    check = judge("all-reduce", rate >= SLOWEST_BYTES_PER_S, got, need, advice, otherwise="warn")
    return [Finding("the cluster", check)]


def _expected(config: Config | None, plan: RunPlan | None, rate: float) -> str:
    """What the gradients of the config's model will take at that rate."""
    if config is None or plan is None or not plan.parameters or plan.ranks == 1:
        return ""
    size = plan.parameters * (2 if config.train.precision == "bf16" else 4)
    seconds = ring_bytes(size, plan.ranks) / rate
    return f"; {config.model.name}'s {human_bytes(size)} of gradients take {seconds:.2g} s over {plan.ranks} ranks"
