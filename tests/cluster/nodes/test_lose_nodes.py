"""A cluster of several hosts that loses a node, a link, or its speed: the training goes on, with the same numbers."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ends import KILLED_RUN, STEPS, assert_same_end, logged, until
from kit import preset, tiny_shards
from ray_netns import RayNodes, ray_nodes

from roclip.metrics.registry import read_metrics
from roclip.report.training_state import LOG

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.nodes]
PATIENCE = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
LIMIT_S = 240


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lose")
    return preset(folder, KILLED_RUN.format(shards=tiny_shards(folder / "shards")) + "cluster: {workers: 2}\n")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    """A head on which no rank fits, and two nodes with room for one each."""
    with ray_nodes(head_cpus=0) as nodes:
        nodes.add_node("one")
        nodes.add_node("two")
        yield nodes


@contextlib.contextmanager
def training(cluster: RayNodes, config: Path, run: Path, *overrides: str) -> Iterator[subprocess.Popen]:
    with cluster.roclip("train", config, f"run_dir={run}", *overrides, **PATIENCE) as process:
        yield process


def reach(process: subprocess.Popen, run: Path, step: int) -> None:
    until(lambda: logged(run) >= step, lambda: last_words(process))


def last_words(process: subprocess.Popen) -> str:
    return "" if process.poll() is None else process.communicate()[0]


def befell(run: Path) -> str:
    path = run / "roclip" / LOG
    return path.read_text() if path.exists() else ""


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    return said


def assert_same_numbers(whole: Path, run: Path) -> None:
    """Of runs whose number of ranks differed: the same samples in each step, sums in another order."""
    one, other = (read_metrics(path / "roclip" / "metrics.jsonl") for path in (whole, run))
    assert [row["step"] for row in other] == list(range(1, STEPS + 1))
    assert [row["samples_seen"] for row in other] == [row["samples_seen"] for row in one]
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in one], rel=1e-3)


def test_training_shrinks_when_a_node_is_killed_and_grows_when_it_is_back(cluster, config, undisturbed, tmp_path):
    with training(cluster, config, tmp_path, "cluster.min_workers=1", "cluster.resize_every_s=1") as process:
        reach(process, tmp_path, 7)
        cluster.kill_node("two")
        until(lambda: " 1 ranks from step" in befell(tmp_path), lambda: last_words(process))
        (rank,) = cluster.processes_of("one", "ray::RayTrain")
        reach(process, tmp_path, logged(tmp_path) + 1)
        rank.send_signal(signal.SIGSTOP)  # so that steps are left when the node is there
        cluster.add_node("two")
        until(lambda: "nodes have come" in befell(tmp_path), lambda: last_words(process))
        reached = logged(tmp_path)
        rank.send_signal(signal.SIGCONT)
        said = finish(process)
    assert "2 nodes, 2 ranks, gloo over eth0" in said
    assert "1 node, 1 rank: no all-reduce" in said
    last = next(line for line in reversed(befell(tmp_path).splitlines()) if "ranks from step" in line)
    assert " 2 ranks from step" in last
    assert int(last.split()[-1]) >= reached, "a step was lost in growing"
    assert_same_numbers(undisturbed(2), tmp_path)


def test_link_that_is_slow_and_lossy_and_then_cut_for_a_moment_changes_no_number(
    cluster, config, undisturbed, tmp_path
):
    with training(cluster, config, tmp_path) as process:
        reach(process, tmp_path, 2)
        cluster.net.slow(cluster.net.hosts["two"], delay_s=0.002, loss_frac=0.005)
        try:
            reach(process, tmp_path, 8)
        finally:
            cluster.net.heal(cluster.net.hosts["two"])
        cluster.net.cut(cluster.net.hosts["two"])
        time.sleep(3)
        assert logged(tmp_path) < STEPS
        cluster.net.heal(cluster.net.hosts["two"])
        said = finish(process)
    assert "restart" not in said
    assert_same_end(undisturbed(2), tmp_path)


def test_node_that_cannot_be_reached_is_given_up_and_training_goes_on_without_it(
    cluster, config, undisturbed, tmp_path
):
    with training(cluster, config, tmp_path, "cluster.min_workers=1") as process:
        reach(process, tmp_path, 7)
        cluster.net.cut(cluster.net.hosts["two"])
        said = finish(process)
    assert "died; restart 1 of 1" in said
    assert " 1 ranks from step" in said
    assert_same_numbers(undisturbed(2), tmp_path)
    cluster.net.heal(cluster.net.hosts["two"])
    until(lambda: not cluster.processes_of("two", "ray::RayTrain"), lambda: "")
