"""SIGKILL, for real, where it hurts: the same command goes on, and ends as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from forked import Trainings, trainings_of
from kit import environment, preset, tiny_shards
from safetensors.torch import load_file

from roclip import checkpoint
from roclip.metrics import read_metrics

pytestmark = pytest.mark.slow

PRESET = """
name: tiny
arms: [roclip]
data: {{shards: {shards}, streams: 4, shuffle_buffer: 64}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 100, witnesses: 8, warmup: 1, gate_frac: [0.1, 0.1], match_every: 4}}
train: {{epochs: 4, global_batch_size: 32, lr: 1e-3, checkpoint_every_steps: 2, log_every_steps: 1}}
"""
STEPS = 24


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Iterator[Trainings]:
    folder = tmp_path_factory.mktemp("kills")
    with trainings_of(preset(folder, PRESET.format(shards=tiny_shards(folder / "shards")))) as trainings:
        yield trainings


@pytest.fixture(scope="module")
def whole(trainings, tmp_path_factory) -> Path:
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("whole")
    assert trainings.end(trainings.start(run)) == 0
    return run


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.0005)


def has_ended(process: int) -> bool:
    return psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def logged(run: Path) -> int:
    """The last step in the log."""
    return max((row["step"] for row in read_metrics(run / "roclip" / "metrics.jsonl")), default=0)


def saved(run: Path) -> int:
    """Steps that LATEST holds; every file of it is read."""
    latest = checkpoint.named(run / "roclip" / "checkpoints", "LATEST")
    if latest is None:
        return 0
    checkpoint.verify(latest)
    return checkpoint.cursor(latest).step


def assert_same_end(one: Path, other: Path) -> None:
    """All that a checkpoint holds, bit for bit; each step once, with the same loss, so from the same samples."""
    ends = [checkpoint.named(run / "roclip" / "checkpoints", "LATEST") for run in (one, other)]
    parts = {path.name for path in ends[0].glob("*.safetensors")}
    assert len(parts) == 5
    for part in parts:
        a, b = (load_file(end / part) for end in ends)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), part
    rows = [read_metrics(run / "roclip" / "metrics.jsonl") for run in (one, other)]
    assert [row["step"] for row in rows[1]] == list(range(1, STEPS + 1))
    for name in ("loss", "samples_seen", "bad_samples", "pool_similarity", "suspected"):
        assert [row.get(name) for row in rows[0]] == [row.get(name) for row in rows[1]], name
    suspects = [pq.read_table(run / "roclip" / "suspects.parquet") for run in (one, other)]
    assert suspects[0].equals(suspects[1])
    assert not list((other / "roclip" / "checkpoints").glob(".*"))


def test_twenty_kills_at_random_moments_change_nothing(trainings, whole, tmp_path):
    moments, reached = random.Random(0), []
    for step in sorted(moments.choices(range(STEPS - 4), k=20)):  # a step seen before is killed in the start
        training = trainings.start(tmp_path)
        if step > logged(tmp_path):
            until(lambda step=step: logged(tmp_path) >= step)
            time.sleep(moments.uniform(0.0, 0.1))  # a step and what follows it: log, checkpoint, the next batch
        else:
            time.sleep(moments.uniform(0.0, 1.0))
        assert trainings.kill(training) == -signal.SIGKILL
        reached.append(saved(tmp_path))
    assert reached == sorted(reached)
    assert len(set(reached)) > 4
    assert trainings.end(trainings.start(tmp_path)) == 0
    assert_same_end(whole, tmp_path)


def test_a_checkpoint_that_was_being_written_is_never_named(trainings, whole, tmp_path):
    checkpoints = tmp_path / "roclip" / "checkpoints"
    training, before = trainings.start(tmp_path), 0
    until(lambda: saved(tmp_path) >= 4)
    while True:
        os.kill(training, signal.SIGCONT)
        until(lambda: list(checkpoints.glob(".*.partial")))
        os.kill(training, signal.SIGSTOP)
        before = saved(tmp_path)
        partial = list(checkpoints.glob(".*.partial"))
        if partial and not (partial[0] / checkpoint.SUMS).exists():
            break
    assert trainings.kill(training) == -signal.SIGKILL
    assert partial[0].is_dir()
    assert saved(tmp_path) == before >= 4
    never_that_step_again = "train.checkpoint_every_steps=5"
    assert trainings.end(trainings.start(tmp_path, never_that_step_again)) == 0
    assert_same_end(whole, tmp_path)


def test_a_rank_that_is_killed_ends_its_group_which_then_goes_on(trainings, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert [trainings.end(rank) for rank in trainings.start_ranks(whole, 2)] == [0, 0]

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "roclip.train", str(trainings.config), f"run_dir={run}"]
    with subprocess.Popen(command, env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL) as group:
        until(lambda: logged(run) >= 7)
        psutil.Process(group.pid).children()[1].kill()
        assert group.wait(timeout=300) != 0

    ranks = trainings.start_ranks(run, 2)  # nobody watches these: the peer must notice by itself
    until(lambda: logged(run) >= 15)
    assert trainings.kill(ranks[0]) == -signal.SIGKILL
    until(lambda: has_ended(ranks[1]))
    assert trainings.end(ranks[1]) > 0

    assert [trainings.end(rank) for rank in trainings.start_ranks(run, 2)] == [0, 0]
    assert_same_end(whole, run)
