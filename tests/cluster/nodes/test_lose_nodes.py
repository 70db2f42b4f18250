"""A cluster of several hosts that loses a node, a link, or its speed: the training goes on, with the same numbers."""

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ends import KILLED_RUN, STEPS, logged, until
from kit import preset, tiny_shards
from ray_netns import RayNodes, ray_nodes

from roclip.metrics.registry import read_metrics
from roclip.report.training_state import LOG

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.nodes]
PATIENCE = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
ELASTIC = ("cluster.min_workers=1", "cluster.resize_every_s=1", "cluster.max_failures=2")
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


def ranks_from(run: Path) -> list[tuple[int, int]]:
    """Ranks and the step from which they trained, of each start."""
    return [(int(ranks), int(step)) for ranks, step in re.findall(r" (\d+) ranks from step (\d+)", befell(run))]


def test_training_outlives_a_bad_link_a_lost_node_its_return_and_a_node_out_of_reach(
    cluster, config, undisturbed, tmp_path
):
    """One training, as each start of ranks takes many seconds. Of two ranks that are not disturbed, all numbers are those of
    an undisturbed run; of another number of ranks, sums are in another order."""
    two = cluster.net.hosts["two"]
    with training(cluster, config, tmp_path, *ELASTIC) as process:
        reach(process, tmp_path, 1)
        cluster.net.slow(two, delay_s=0.002, loss_frac=0.005)
        reach(process, tmp_path, 4)
        cluster.net.heal(two)
        cluster.net.cut(two)
        time.sleep(3)
        cluster.net.heal(two)
        reach(process, tmp_path, 7)
        assert ranks_from(tmp_path) == [(2, 0)], "a link that was cut for a moment ended the ranks"

        cluster.kill_node("two")
        until(lambda: ranks_from(tmp_path)[-1][0] == 1, lambda: last_words(process))
        shrunk = ranks_from(tmp_path)[-1][1]
        (rank,) = cluster.processes_of("one", "ray::RayTrain")
        reach(process, tmp_path, logged(tmp_path) + 1)
        rank.send_signal(signal.SIGSTOP)  # so that steps are left when the node is there
        cluster.add_node("two")
        until(lambda: "nodes have come" in befell(tmp_path), lambda: last_words(process))
        grown = logged(tmp_path)
        rank.send_signal(signal.SIGCONT)
        until(lambda: ranks_from(tmp_path)[-1][0] == 2, lambda: last_words(process))
        assert ranks_from(tmp_path)[-1][1] >= grown, "a step was lost in growing"

        reach(process, tmp_path, grown + 2)
        cluster.net.cut(cluster.net.hosts["two"])
        said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    assert [ranks for ranks, _ in ranks_from(tmp_path)] == [2, 1, 2, 1]
    assert "2 nodes, 2 ranks, gloo over eth0" in said
    assert "1 node, 1 rank: no all-reduce" in said
    whole, rows = (read_metrics(run / "roclip" / "metrics.jsonl") for run in (undisturbed(2), tmp_path))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["samples_seen"] for row in rows] == [row["samples_seen"] for row in whole]
    losses, expected = ([row["loss"] for row in run] for run in (rows, whole))
    assert losses[:shrunk] == expected[:shrunk]
    assert losses == pytest.approx(expected, rel=1e-3)
    cluster.net.heal(cluster.net.hosts["two"])
    until(lambda: not cluster.processes_of("two", "ray::RayTrain"), lambda: "")
