"""A Ray of our own is asked about itself, whatever ran on this machine before."""

import os
import tempfile

import pytest
import ray

from cluster.local_ray import one_address, start_local_ray

pytestmark = pytest.mark.ray


@pytest.fixture
def another_was_here(monkeypatch):
    """What a Ray leaves that `ray start` brought up, and that was killed."""
    with tempfile.TemporaryDirectory(
        prefix="r", dir="/tmp", ignore_cleanup_errors=True
    ) as short:  # sockets' names are long
        with open(f"{short}/ray_current_cluster", "w") as file:
            file.write("127.0.0.1:1")
        monkeypatch.setenv("RAY_TMPDIR", short)
        yield


def test_processes_ask_their_own_ray_whether_an_actor_lives(another_was_here):
    @ray.remote
    class Asked:
        def is_there(self) -> str:
            from ray.util.state import get_actor

            return get_actor(ray.get_runtime_context().get_actor_id()).state

    start_local_ray(num_cpus=1, include_dashboard=True, dashboard_host="127.0.0.1")
    try:
        assert ray.get(Asked.remote().is_there.remote()) == "ALIVE"
    finally:
        ray.shutdown()


def test_what_the_processes_are_told_does_not_stay_in_this_one():
    before = dict(os.environ)
    with one_address():
        assert os.environ["RAY_ADDRESS"].endswith(":" + os.environ["RAY_GCS_SERVER_PORT"])
    assert dict(os.environ) == before
