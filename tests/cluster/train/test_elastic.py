"""Ranks under Ray Train that die or are told to go: the training goes on by itself. `nodes/test_lose_nodes.py` loses nodes."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ends import KILLED_RUN, assert_same_end, logged, until
from kit import environment, preset, tiny_shards

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
