"""SIGKILL, for real, where it hurts: the same command goes on, and ends as if nothing had been."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ends import KILLED_RUN, STEPS, assert_same_end, logged, saved, until
from forked import Trainings, forks_that_say, has_ended, trainings_of
from kit import environment, preset, tiny_shards

from roclip.checkpoint import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Iterator[Trainings]:
    folder = tmp_path_factory.mktemp("kills")
    with trainings_of(preset(folder, KILLED_RUN.format(shards=tiny_shards(folder / "shards")))) as trainings:
        yield trainings


def test_twenty_kills_at_random_moments_change_nothing(trainings, undisturbed, tmp_path):
    moments, reached = random.Random(0), []
    for step in sorted(moments.choices(range(STEPS - 4), k=20)):  # a step seen before is killed in the start
        training = trainings.train(tmp_path)
        if step > logged(tmp_path):
            until(lambda step=step: logged(tmp_path) >= step, trainings.last_words)
            time.sleep(moments.uniform(0.0, 0.1))  # a step and what follows it: log, checkpoint, the next batch
        else:
            time.sleep(moments.uniform(0.0, 1.0))
        assert trainings.kill(training) == -signal.SIGKILL
        reached.append(saved(tmp_path))
    assert reached == sorted(reached)
    assert len(set(reached)) > 4
    assert trainings.end(trainings.train(tmp_path)) == 0
    assert_same_end(undisturbed(1), tmp_path)


def test_a_checkpoint_that_was_being_written_is_never_named(trainings, undisturbed, tmp_path):
    checkpoints = tmp_path / "roclip" / "checkpoints"
    training, before = trainings.train(tmp_path), 0
    until(lambda: logged(tmp_path) > 8, trainings.last_words)  # a save waits for the one before, of step 6
    while True:
        os.kill(training, signal.SIGCONT)
        until(lambda: list(checkpoints.glob(".*.partial")), trainings.last_words)
        os.kill(training, signal.SIGSTOP)
        before = saved(tmp_path)
        partial = list(checkpoints.glob(".*.partial"))
        mid_epoch = partial and partial[0].name not in (".step-00000012.partial", ".step-00000018.partial")
        if mid_epoch and not (partial[0] / checkpoint.SUMS).exists():
            break
    assert trainings.kill(training) == -signal.SIGKILL
    assert partial[0].is_dir()
    assert saved(tmp_path) == before >= 6
    never_that_step_again = "train.checkpoint_every_steps=99"
    assert trainings.end(trainings.train(tmp_path, never_that_step_again)) == 0
    assert_same_end(undisturbed(1), tmp_path)


def test_a_kill_before_any_change_of_a_folder_leaves_checkpoints_to_go_on_from(tmp_path):
    """Of three steps the first is saved, the second too, but LATEST does not name it yet: that kill was before. Now comes a
    second one, as steps 2 and 3 are saved. Then the same command goes on to step 4."""
    script, start = Path(__file__).parent / "killed_writer.py", tmp_path / "start"
    with forks_that_say(tmp_path / "said.txt") as forks:
        for folder, step in ((start, 1), (tmp_path / "later", 2)):
            assert forks.end(forks.start(script, folder, step, 0)) == 0
        (tmp_path / "later" / "step-00000002").rename(start / "step-00000002")
        for moment in itertools.count(1):
            folder = shutil.copytree(start, tmp_path / str(moment))
            code = forks.end(forks.start(script, folder, 3, moment))
            assert forks.end(forks.start(script, folder, 4, 0)) == 0, f"{moment}: {forks.said.read_text()[-3000:]}"
            assert checkpoint.named(folder, "LATEST") == folder / "step-00000004"
            checkpoint.verify(folder / "step-00000004")
            assert [path.name for path in folder.glob("*step-*")] == ["step-00000004"]
            if code == 0:  # all of its moments have been
                break
            assert code == -signal.SIGKILL
    assert moment > 25


def test_a_rank_that_is_killed_ends_its_group_which_then_goes_on(trainings, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "roclip.training", str(trainings.config), f"run_dir={run}"]
    with subprocess.Popen(command, env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL) as group:
        until(lambda: logged(run) >= 7, lambda: "" if group.poll() is None else f"torchrun, with {group.returncode}")
        psutil.Process(group.pid).children()[1].kill()
        assert group.wait(timeout=300) != 0

    ranks = trainings.train_ranks(run, 2)  # nobody watches these: the peer must notice by itself
    until(lambda: logged(run) >= 15, trainings.last_words)
    assert trainings.kill(ranks[0]) == -signal.SIGKILL
    until(lambda: has_ended(ranks[1]), trainings.last_words)
    assert trainings.end(ranks[1]) > 0

    assert [trainings.end(rank) for rank in trainings.train_ranks(run, 2)] == [0, 0]
    assert_same_end(undisturbed(2), run)
