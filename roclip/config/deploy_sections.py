"""Settings of a run's cluster: read by `roclip render`, by nothing that trains or fetches."""

from dataclasses import dataclass, field

from roclip.config.strict import positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class KubernetesConfig:
    """KubeRay 1.7."""

    namespace: str = "roclip"
    volume_claim: str = ""
    """A claim that is there, readable and writable from all nodes, for run directories; empty makes one of the run's name."""
    volume_gib: int = 1000
    storage_class: str = ""
    """Of the claim that is made; empty is the cluster's default. It must offer ReadWriteMany."""
    service_account: str = ""
    """Identity of the pods at the object store."""
    secret: str = ""
    """Secret whose entries the pods get as environment variables, such as AWS_ACCESS_KEY_ID."""
    retries: int = 3
    """Times that a failed job gets a new cluster, where it goes on."""
    keep_s: int = 3600
    """How long the head of a finished job stays, for its dashboard and logs. Workers go at once."""


@dataclass(frozen=True)
class CloudConfig:
    """`ray up` on AWS or GCP."""

    region: str = ""
    zone: str = ""
    project: str = ""
    """GCP's project id."""
    head_type: str = ""
    train_type: str = ""
    ingest_type: str = ""
    machine_image: str = ""
    """With Docker and, for GPUs, the driver. Empty on AWS is the Deep Learning AMI that Ray knows for the region."""
    role: str = ""
    """Identity of the nodes at the object store: ARN of an AWS instance profile, or mail address of a GCP service account."""
    disk_gib: int = 500
    spot: bool = False
    """Take nodes for training that may be taken back at any time."""
    nfs: str = ""
    """`server:/export` that all nodes mount for the run directories."""


@dataclass(frozen=True)
class OnPremiseConfig:
    """`ray up` on machines that are there."""

    hosts: tuple[str, ...] = ()
    """Addresses: the head, then the nodes that train, then those that fetch."""


@dataclass(frozen=True)
class SlurmConfig:
    """One batch job."""

    partition: str = ""
    ingest_partition: str = ""
    """Of the nodes that fetch; empty is `partition`."""
    account: str = ""
    time_limit: str = "24:00:00"
    """At its end the job stops cleanly, queues again and goes on."""
    setup: str = "source .venv/bin/activate"
    """Shell line after which `roclip` and `ray` are found, on all nodes."""

    def __post_init__(self) -> None:
        for key in ("partition", "ingest_partition", "account", "time_limit"):
            if any(c.isspace() for c in getattr(self, key)):
                raise ConfigError(f"deploy.slurm.{key}: expected one word, got {getattr(self, key)!r}.")


@dataclass(frozen=True)
class DeployConfig:
    """The cluster that `roclip render` describes. How many nodes follows from `cluster.workers`."""

    image: str = "roclip:0.1.0"
    """Container with roclip in it (`configs/cluster/Dockerfile`)."""
    workers_per_node: int = 8
    """Training ranks on one node."""
    memory_gib_per_worker: int = 32
    ingest_nodes: int = 0
    """Nodes without GPU that only fetch. With 0 the nodes that train fetch, too."""
    memory_gib_per_ingest_task: int = 2
    head_cpus: int = 4
    head_memory_gib: int = 16
    shm_gib: int = 16
    """/dev/shm of each node, where Ray's object store lies."""
    shared_dir: str = "/data"
    """Folder on a file system that all nodes share: relative paths of the config start there."""
    ssh_user: str = "ubuntu"
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
        positive(self, "deploy", "workers_per_node", "memory_gib_per_worker", "memory_gib_per_ingest_task", "shm_gib")
        positive(self, "deploy", "head_cpus", "head_memory_gib")
        if self.ingest_nodes < 0:
            raise ConfigError(f"deploy.ingest_nodes: expected 0 or more, got {self.ingest_nodes}.")
        if not self.shared_dir.startswith("/"):
            raise ConfigError(f"deploy.shared_dir: expected an absolute path, got {self.shared_dir!r}.")
