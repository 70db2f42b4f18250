"""Ranks under Ray Train that die, are told to go, or lose their node: the training goes on by itself."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ends import KILLED_RUN, STEPS, assert_same_end, logged, until
from kit import environment, preset, tiny_shards
from ray.cluster_utils import Cluster

from roclip.metrics.registry import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    return preset(folder, KILLED_RUN.format(shards=tiny_shards(folder / "shards")) + "cluster: {workers: 2}\n")


@contextlib.contextmanager
def training(config: Path, run: Path, *overrides: str, **extra: str) -> Iterator[subprocess.Popen]:
    """`roclip train` in a process of its own; it and what it started are gone in the end."""
    command = [sys.executable, "-m", "cluster.cli", "train", str(config), f"run_dir={run}", *overrides]
    with subprocess.Popen(
        command, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for left in [*psutil.Process(process.pid).children(recursive=True), process]:
                    left.kill()


def last_words(process: subprocess.Popen) -> str:
    """What it said, if it has ended."""
    return "" if process.poll() is None else process.communicate()[0]


def ranks() -> list[psutil.Process]:
    """The processes in which Ray trains: of this test, as no two run at once."""
    me = psutil.Process()
    return [p for p in me.children(recursive=True) if p.name().startswith("ray::RayTrain")]


def test_ranks_that_die_or_are_told_to_go_are_started_again(config, undisturbed, tmp_path):
    with training(config, tmp_path, "cluster.max_failures=2") as process:
        until(lambda: logged(tmp_path) >= 7, lambda: last_words(process))
        ranks()[1].kill()
        until(lambda: logged(tmp_path) >= 15, lambda: last_words(process))
        ranks()[0].send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    assert "rank 1 died; restart 1 of 2" in said
    assert "SIGTERM; saved at step" in said
    assert "restart 2 of 2" in said
    assert said.count(" 2 ranks from step") == 3
    assert_same_end(undisturbed(2), tmp_path)


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """A Ray cluster with room for one rank on each of its two nodes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def test_training_goes_on_with_fewer_ranks_when_a_node_is_lost(config, undisturbed, two_nodes, tmp_path):
    where = [f"cluster.address={two_nodes.address}", "cluster.min_workers=1"]
    patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}  # how long Ray waits for a node to come back
    with training(config, tmp_path, *where, **patience) as process:
        until(lambda: logged(tmp_path) >= 7, lambda: last_words(process))
        (lost,) = two_nodes.worker_nodes
        two_nodes.remove_node(lost, allow_graceful=False)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    assert "restart 1 of 1" in said
    assert " 1 ranks from step" in said
    one, two = (read_metrics(run / "roclip" / "metrics.jsonl") for run in (undisturbed(2), tmp_path))
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)
