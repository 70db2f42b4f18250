"""Writes the files that start a cluster for a run: Kubernetes (KubeRay), `ray up`, Slurm.

How many nodes there are and what each offers follows from the run's config and the cluster's description: `cluster.workers`
ranks, `workers_per_node` on a node, and `ingest.max_in_flight` tasks on the nodes that fetch. Nothing secret is in a file.
"""

import ipaddress
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from roclip.config import CloudConfig, Config, DeployConfig, model_file
from roclip.errors import ConfigError

PROVIDERS = ("aws", "gcp", "on-premise")
RAY_VERSION = "2.60.0"
"""Version in the container image, as in its constraints file."""
PUBLIC = {
    "0.0.0.0/0": (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    ),
    "2000::/3": ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
}
"""Networks that may be fetched from, and the parts of them that may not: `ingest/http/policy.py` as a network policy."""
_NAME_CHARS = 40  # KubeRay takes 47 for a RayJob


@dataclass(frozen=True)
class Group:
    """Nodes of one kind."""

    name: str
    nodes: int
    fewest: int
    """Fewest nodes that the run continues with."""
    cpus: int
    gpus: int
    memory_gib: int
    custom: dict[str, int]
    """Ray's custom resources of a node."""
    fetches: bool

    @property
    def ingest(self) -> bool:
        """Whether these nodes only fetch."""
        return bool(self.custom)

    @property
    def resources(self) -> dict[str, int]:
        """Resources of one node, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {}), **self.custom}

    @property
    def quantities(self) -> dict[str, str]:
        """`resources` as KubeRay writes them."""
        return {name: str(number) for name, number in self.resources.items()}


def node_groups(config: Config, deploy: DeployConfig) -> list[Group]:
    """The nodes that train and, with `ingest_nodes`, those that only fetch.

    Raises `ConfigError` where ranks or oracle actors do not fit on the nodes.
    """
    cluster = config.cluster
    per_node = min(deploy.workers_per_node, cluster.workers)
    nodes = math.ceil(cluster.workers / per_node)
    gpus = per_node * cluster.gpus_per_worker
    if gpus != int(gpus):
        raise ConfigError(
            f"deploy.workers_per_node: expected ranks that fill whole GPUs, got {per_node} of {cluster.gpus_per_worker} GPU."
        )
    if config.oracle.actors * config.oracle.gpus_per_actor > nodes * gpus:
        raise ConfigError(
            f"oracle.actors: expected at most {nodes * int(gpus)} GPUs, which the nodes that train have, got "
            f"{config.oracle.actors} actors of {config.oracle.gpus_per_actor}. Take fewer."
        )
    fetching = config.ingest.max_in_flight if config.data.fetches else 0
    tasks = math.ceil(fetching / (deploy.ingest_nodes or nodes))
    task_cpus = math.ceil(tasks * cluster.cpus_per_ingest_task)
    beside = 0 if deploy.ingest_nodes else tasks  # tasks on a node that trains
    fewest = math.ceil((cluster.min_workers or cluster.workers) / per_node)
    train = Group(
        name="train",
        nodes=nodes,
        fewest=fewest,
        cpus=math.ceil(per_node * cluster.cpus_per_worker) + (task_cpus if beside else 0),
        gpus=int(gpus),
        memory_gib=per_node * deploy.memory_gib_per_worker + beside * deploy.memory_gib_per_ingest_task,
        custom={},
        fetches=bool(beside),
    )
    if not deploy.ingest_nodes or not tasks:
        return [train]
    memory_gib = tasks * deploy.memory_gib_per_ingest_task
    resource = {ingest_resource(config, deploy): tasks}
    return [train, Group("ingest", deploy.ingest_nodes, deploy.ingest_nodes, task_cpus, 0, memory_gib, resource, True)]


def ingest_resource(config: Config, deploy: DeployConfig) -> str:
    """Custom resource of the nodes that fetch; empty if the nodes that train also fetch."""
    return config.cluster.ingest_resource or ("ingest" if deploy.ingest_nodes else "")


def run_command(config: Config, deploy: DeployConfig, preset: str, overrides: Sequence[str]) -> list[str]:
    """The command for the cluster's head, always the same, so that it resumes where it stopped."""
    ours = {
        "cluster.address": "auto",
        "cluster.ingest_resource": ingest_resource(config, deploy),
        "run_dir": config.run_dir or f"{config.runs}/{config.name}",
    }
    given = [override for override in overrides if override.partition("=")[0] not in ours]
    return ["roclip", "run", preset, *given, *(f"{key}={value}" for key, value in ours.items() if value)]


def render_k8s(
    config: Config, deploy: DeployConfig, path: Path, overrides: Sequence[str], header: str
) -> dict[str, str]:
    """Manifests by file name: common objects, a RayCluster that stays, and a RayJob for this run alone."""
    preset = f"{config.name}.yaml"
    allowed = [
        str(network) for network in map(_network, config.ingest.policy.allow_networks) if not network.is_loopback
    ]
    values = {
        "k8s": deploy.kubernetes,
        "preset": preset,
        "text": path.read_text(),
        "model": model_file(config),
        "command": shlex.join(run_command(config, deploy, f"/etc/roclip/{preset}", overrides)),
        "ray_version": RAY_VERSION,
        "public": PUBLIC,
        "allow_networks": allowed,
    }
    files = ("common.yaml", "raycluster.yaml", "rayjob.yaml")
    return {file: header + "\n" + _fill("k8s.yaml.jinja", config, deploy, file=file, **values) for file in files}


def render_ray(config: Config, deploy: DeployConfig, provider: str, header: str) -> dict[str, str]:
    """The YAML for `ray up`. Raises `ConfigError` if a setting that the provider needs is missing."""
    groups = node_groups(config, deploy)
    if provider not in PROVIDERS:
        raise ConfigError(f"--provider: expected one of {', '.join(PROVIDERS)}, got {provider!r}.")
    cloud: CloudConfig | None = {"aws": deploy.aws, "gcp": deploy.gcp}.get(provider)
    hosts = deploy.on_premise.hosts
    if cloud is None:
        _check_hosts(groups, hosts)
    else:
        needed = ["region", "head_type", "train_type", "ingest_type", "nfs"]
        needed += ["zone", "project", "machine_image"] if provider == "gcp" else []
        if missing := [key for key in needed if not getattr(cloud, key)]:
            raise ConfigError(
                f"deploy.{provider}: expected {', '.join(missing)}, got none. Set deploy.{provider}.{missing[0]}=…"
            )
    values = {
        "provider": provider,
        "cloud": cloud,
        "hosts": hosts,
        "offers": _offers(groups, hosts[1:]),
        "head_setup": {
            "aws": ["python -m pip install --user 'boto3>=1.34'"],
            "gcp": ["python -m pip install --user 'google-api-python-client>=2' 'google-auth>=2'"],
        }.get(provider, []),
    }
    return {f"{provider}.yaml": header + "\n" + _fill("ray.yaml.jinja", config, deploy, **values)}


def render_slurm(
    config: Config, deploy: DeployConfig, path: Path, overrides: Sequence[str], header: str
) -> dict[str, str]:
    """The script for `sbatch`."""
    values = {
        "slurm": deploy.slurm,
        "header": header,
        "command": shlex.join(run_command(config, deploy, str(path), overrides)),
    }
    return {f"{cluster_name(config)}.sbatch": _fill("slurm.sh.jinja", config, deploy, **values)}


def cluster_name(config: Config) -> str:
    """The config's name in a form that Kubernetes, clouds and Slurm all accept."""
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in config.name.lower())
    name = name.lstrip("-0123456789")[:_NAME_CHARS].rstrip("-")
    if not name:
        raise ConfigError(f"name: expected a letter, which names of clusters begin with, got {config.name!r}.")
    return name


def _fill(template: str, config: Config, deploy: DeployConfig, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"json": json.dumps, "quote": shlex.quote}
    shared = {"name": cluster_name(config), "deploy": deploy, "groups": node_groups(config, deploy)}
    return environment.get_template(template).render(**shared, **values)


def _check_hosts(groups: list[Group], hosts: Sequence[str]) -> None:
    kinds = ", ".join(f"{group.nodes} for {group.name}" for group in groups)
    if len(hosts) != 1 + sum(group.nodes for group in groups):
        raise ConfigError(f"deploy.on_premise.hosts: expected addresses of the head, {kinds}; got {len(hosts)}.")
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError as error:
            raise ConfigError(f"deploy.on_premise.hosts: expected IP addresses, got {host!r}.") from error


def _offers(groups: list[Group], hosts: Sequence[str]) -> str:
    """Shell code that sets `$offer` to the options of `ray start` for the machine it runs on, recognised by its addresses."""
    cases, left = [], list(hosts)
    for group in groups:
        here, left = left[: group.nodes], left[group.nodes :]
        pattern = "|".join(f'*" {host} "*' for host in here)
        custom = f" --resources={json.dumps(group.custom, separators=(',', ':'))}" if group.custom else ""
        cases.append(f"{pattern}) offer='--num-cpus={group.cpus} --num-gpus={group.gpus}{custom}' ;;")
    return f'case " $(hostname -I) " in {" ".join(cases)} esac'


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigError(
            f"ingest.policy.allow_networks: expected networks such as 10.1.0.0/16, got {text!r}."
        ) from error
