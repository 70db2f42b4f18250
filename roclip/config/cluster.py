"""The Ray cluster that a run uses."""

from dataclasses import dataclass

from roclip.config.strict import positive
from roclip.errors import ConfigError

OBJECT_STORE_BYTES = 256 * 2**20
"""Object store of a local Ray; shards never pass through it."""


@dataclass(frozen=True)
class ClusterConfig:
    """The Ray cluster and what the run takes of it."""

    address: str = "local"
    """`local` starts a Ray of its own on loopback; otherwise the address of a running cluster, or `auto`."""
    workers: int = 1
    """Number of training ranks."""
    min_workers: int = 0
    """Fewest ranks that training goes on with when nodes are lost; 0 is all `workers`."""
    resize_every_s: float = 60.0
    """Seconds between looks for a node with room for more ranks, while training has fewer than `workers`."""
    cpus_per_worker: float = 1.0
    """CPUs of a training rank."""
    gpus_per_worker: float = 0.0
    """GPUs of a training rank; 0 trains on CPUs."""
    cpus_per_ingest_task: float = 1.0
    """CPUs of a task that fetches one shard."""
    ingest_resource: str = ""
    """Custom Ray resource, such as `ingest`, of which a fetching task takes one unit, so that downloads stay off GPU nodes."""
    dashboard: bool = False
    """Start Ray's dashboard on loopback, with `address: local`."""
    max_failures: int = 1
    """Restarts of a training after a worker died."""
    queue_timeout_s: float = 0.0
    """Seconds that a stage waits for room on the cluster before the command ends; 0 waits as long as it takes. What can
    never have room is waited for at most five minutes, as nodes may join, and not at all with `address: local`."""

    def __post_init__(self) -> None:
        positive(self, "cluster", "workers", "cpus_per_worker", "cpus_per_ingest_task", "resize_every_s")
        if self.queue_timeout_s < 0:
            raise ConfigError(f"cluster.queue_timeout_s: expected 0 or more, got {self.queue_timeout_s}.")
        if self.address.startswith("ray://"):
            raise ConfigError(
                f"cluster.address: expected local, auto or IP:PORT on a node of the cluster, got {self.address!r}: Ray's "
                "client cannot drive a training. From outside use `roclip submit CONFIG --address http://HEAD:8265`."
            )
        if not 0 <= self.min_workers <= self.workers:
            raise ConfigError(
                f"cluster.min_workers: expected 0 to cluster.workers = {self.workers}, got {self.min_workers}. Set 0."
            )

    @property
    def elastic(self) -> bool:
        """Whether a training may go on with fewer ranks than `workers`."""
        return 0 < self.min_workers < self.workers
