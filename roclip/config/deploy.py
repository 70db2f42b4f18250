"""The description of a cluster, a YAML file of its own that only `roclip render` reads."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from roclip.config import strict
from roclip.config.secrets import refuse_secrets
from roclip.config.strict import positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class KubernetesConfig:
    """KubeRay 1.7."""

    namespace: str = "roclip"
    """Namespace of everything that is made."""
    volume_claim: str = ""
    """Existing claim, readable and writable from all nodes, for run directories; empty makes one named after the run."""
    volume_gib: int = 1000
    """Size of a claim that is made."""
    storage_class: str = ""
    """Storage class of a claim that is made, which must offer ReadWriteMany; empty is the cluster's default."""
    service_account: str = ""
    """Service account of the pods, their identity at the object store."""
    secret: str = ""
    """Secret whose entries the pods get as environment variables, such as AWS_ACCESS_KEY_ID."""
    retries: int = 3
    """Number of times that a failed job resumes on a new cluster."""
    keep_s: int = 3600
    """Seconds that the head of a finished job stays, for its dashboard and logs; workers are removed at once."""


@dataclass(frozen=True)
class CloudConfig:
    """`ray up` on AWS or GCP."""

    region: str = ""
    """Region of the nodes."""
    zone: str = ""
    """Zone of the nodes; GCP needs one."""
    project: str = ""
    """Id of the GCP project."""
    head_type: str = ""
    """Machine type of the head."""
    train_type: str = ""
    """Machine type of the nodes that train."""
    ingest_type: str = ""
    """Machine type of the nodes that only fetch."""
    machine_image: str = ""
    """Machine image with Docker and, for GPUs, the driver; empty, on AWS, is the Deep Learning AMI that Ray knows."""
    role: str = ""
    """Identity of the nodes at the object store: ARN of an AWS instance profile, or mail address of a GCP service account."""
    disk_gib: int = 500
    """Size of a node's disk."""
    spot: bool = False
    """Train on spot instances, which may be taken back at any time."""
    nfs: str = ""
    """NFS export, as `server:/export`, that all nodes mount for run directories."""


@dataclass(frozen=True)
class OnPremiseConfig:
    """`ray up` on machines that exist already."""

    hosts: tuple[str, ...] = ()
    """IP addresses of the head, then of the nodes that train, then of those that only fetch."""


@dataclass(frozen=True)
class SlurmConfig:
    """One batch job."""

    partition: str = ""
    """Partition of the nodes; empty is Slurm's default."""
    ingest_partition: str = ""
    """Partition of the nodes that only fetch; empty is `partition`."""
    account: str = ""
    """Account that the job is charged to; empty is Slurm's default."""
    time_limit: str = "24:00:00"
    """Time limit, at which the job stops cleanly, queues again and resumes."""
    setup: str = "source .venv/bin/activate"
    """Shell line that makes `roclip` and `ray` available, on all nodes."""

    def __post_init__(self) -> None:
        for key in ("partition", "ingest_partition", "account", "time_limit"):
            if any(c.isspace() for c in getattr(self, key)):
                raise ConfigError(f"deploy.slurm.{key}: expected one word, got {getattr(self, key)!r}.")


@dataclass(frozen=True)
class DeployConfig:
    """The cluster that `roclip render` describes. The number of nodes follows from the run's `cluster.workers`."""

    image: str = "roclip:0.1.0"
    """Container image that contains roclip (`configs/cluster/Dockerfile`)."""
    workers_per_node: int = 8
    """Training ranks on a node."""
    memory_gib_per_worker: int = 32
    """Memory of a training rank."""
    ingest_nodes: int = 0
    """Number of nodes without GPU that only fetch; with 0, the nodes that train also fetch."""
    memory_gib_per_ingest_task: int = 2
    """Memory of a task that fetches one shard."""
    head_cpus: int = 4
    """CPUs of the head."""
    head_memory_gib: int = 16
    """Memory of the head."""
    shm_gib: int = 16
    """Size of /dev/shm of each node, which holds Ray's object store."""
    shared_dir: str = "/data"
    """Folder on a file system that all nodes share; relative paths in the config start there."""
    ssh_user: str = "ubuntu"
    """User that `ray up` logs in as."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    aws: CloudConfig = field(
        default_factory=lambda: CloudConfig(
            region="us-west-2", head_type="m7i.2xlarge", train_type="p4d.24xlarge", ingest_type="c7i.8xlarge"
        )
    )
    gcp: CloudConfig = field(
        default_factory=lambda: CloudConfig(
            region="us-central1",
            zone="us-central1-a",
            head_type="n2-standard-8",
            train_type="a2-highgpu-8g",
            ingest_type="c3-highcpu-44",
        )
    )
    on_premise: OnPremiseConfig = field(default_factory=OnPremiseConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        refuse_secrets(self)
        positive(self, "deploy", "workers_per_node", "memory_gib_per_worker", "memory_gib_per_ingest_task", "shm_gib")
        positive(self, "deploy", "head_cpus", "head_memory_gib")
        if self.ingest_nodes < 0:
            raise ConfigError(f"deploy.ingest_nodes: expected 0 or more, got {self.ingest_nodes}.")
        if not self.shared_dir.startswith("/"):
            raise ConfigError(f"deploy.shared_dir: expected an absolute path, got {self.shared_dir!r}.")


@dataclass(frozen=True)
class _File:
    deploy: DeployConfig = field(default_factory=DeployConfig)


def load_deploy(path: Path | None, overrides: Sequence[str] = ()) -> DeployConfig:
    """Read a cluster's description, and apply overrides such as `deploy.ingest_nodes=4`; without a file the defaults hold.

    Raises `ConfigError` that names the file (or the override) and the key.
    """
    if path is not None and not path.is_file():
        raise ConfigError(f"{path}: expected a description of a cluster (YAML), got no file.")
    text = path.read_text() if path else ""
    if any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        text = "deploy:\n" + textwrap.indent(text, "  ")
    return strict.load(_File, str(path or "deploy"), text, overrides).deploy
