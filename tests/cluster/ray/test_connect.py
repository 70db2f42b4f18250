"""The Ray that a run works on is asked about itself, whatever else runs or ran on this machine."""

import os
import tempfile
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.display import Display
from cluster.ray.session import Session
from roclip.config import ClusterConfig, Config, DataConfig

pytestmark = pytest.mark.ray


@pytest.fixture
def last_started(monkeypatch):
    """Where Ray notes the Ray that was last started on this machine."""
    # A short path, as those of sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        yield Path(folder) / "ray" / "ray_current_cluster"


@ray.remote
class Asked:
    def is_there(self) -> str:
        from ray.util.state import get_actor

        return get_actor(ray.get_runtime_context().get_actor_id()).state


def is_there(cluster: ClusterConfig, folder: Path) -> str:
    """What Ray's state API says in an actor of a run about that actor."""
    Session(Config(data=DataConfig(scenes=1), cluster=cluster), folder, Display()).need_ray()
    try:
        return ray.get(Asked.remote().is_there.remote())
    finally:
        ray.shutdown()


def test_actor_is_alive_for_its_own_ray(last_started, tmp_path):
    before = dict(os.environ)
    last_started.write_text("127.0.0.1:1")
    assert is_there(ClusterConfig(workers=1, dashboard=True), tmp_path) == "ALIVE"
    assert "RAY_ADDRESS" not in os.environ
    assert "RAY_GCS_SERVER_PORT" not in os.environ
    assert before.items() <= os.environ.items()


def test_actor_is_alive_for_the_ray_that_the_run_joined(last_started, tmp_path):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    last_started.write_text("127.0.0.1:1")
    try:
        assert is_there(ClusterConfig(address=cluster.address), tmp_path) == "ALIVE"
    finally:
        cluster.shutdown()
