"""A cluster whose object store, a host of its own, cannot be reached for a while: nothing is lost or doubled."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ends import KILLED_RUN, STEPS, assert_same_end, logged, until
from kit import preset, tiny_shards
from netns import Host
from ray_netns import RayNodes, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.nodes]
AWAY_S = 10.0
"""Longer than a request's time-out and the first tries after it."""
SERVER = Path(__file__).parents[2] / "support" / "s3.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[RayNodes, Host]]:
    """A head without room for a rank, a node with room for two, and the store."""
    with ray_nodes(head_cpus=0) as nodes:
        store = nodes.net.add("store")
        server = subprocess.Popen(
            store.command(sys.executable, SERVER, store.address),
            env=nodes.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with server:
            assert server.stdout is not None
            nodes.environment["FSSPEC_S3"] = server.stdout.readline().strip()
            nodes.add_node("one", cpus=2)
            yield nodes, store
            store.kill()


def on_store(cluster: RayNodes, code: str) -> str:
    """What Python says on the head, where `s3` is the store."""
    options = json.loads(cluster.environment["FSSPEC_S3"])
    program = f"import s3fs; s3 = s3fs.S3FileSystem(**{options!r}); {code}"
    with cluster.drive(sys.executable, "-c", program) as process:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        return said


def test_training_waits_for_a_store_that_is_away_and_ends_with_the_same_numbers(cluster, undisturbed, tmp_path):
    nodes, store = cluster
    shards = tiny_shards(tmp_path / "shards")
    config = preset(tmp_path, KILLED_RUN.format(shards=shards) + "cluster: {workers: 2, max_failures: 0}\n")
    run = tmp_path / "run"
    on_store(nodes, f"s3.put({str(shards)!r}, 'bucket/shards', recursive=True)")
    words = (
        f"run_dir={run}",
        "data.shards=s3://bucket/shards",
        "data.cache_bytes=0",
        "train.checkpoint_store=s3://bucket/kept",
    )
    with nodes.roclip("train", config, *words) as process:
        until(lambda: logged(run) >= 7, lambda: "" if process.poll() is None else process.communicate()[0])
        nodes.net.cut(store)
        time.sleep(AWAY_S)
        assert logged(run) < STEPS, "it did not need the store"
        nodes.net.heal(store)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert "restart" not in said
    assert_same_end(undisturbed(2), run)
    kept = on_store(nodes, "print(s3.cat('bucket/kept/run/roclip/LATEST').decode())")
    assert kept.split()[-1] == (run / "roclip" / "checkpoints" / "LATEST").read_text().strip()
