"""A disk that is full: the run stops with words, and the same command goes on when there is room."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ends import KILLED_RUN, assert_same_end, logged, saved, until
from forked import trainings_of
from ingesting import sealed_captions
from kit import environment, preset, tiny_shards

from roclip.data.shards import Manifest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.nodes]
STAGE = 7
INGEST = """
name: full
data: {{scenes: {scenes}, shards: {shards}, faults: false}}
ingest:
  samples_per_shard: 8
  image_size: 64
  encode_format: png
  encode_quality: 6
  shard_retries: 1
  max_in_flight: 1
  policy: {{allow_networks: [127.0.0.0/8], robots: false, host_connections: 64, host_requests_per_s: 1.0e6}}
"""


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of 120 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return ballast


def roclip(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "cluster.cli", *map(str, words)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen) -> str:
    return "" if process.poll() is None else process.communicate()[0]


def test_checkpoint_that_finds_no_room_ends_the_run_which_goes_on_when_there_is(disk, undisturbed, tmp_path):
    config = preset(tmp_path, KILLED_RUN.format(shards=tiny_shards(tmp_path / "shards")))
    run = disk / "run"
    with roclip("train", config, f"run_dir={run}") as process:
        until(lambda: logged(run) >= 7, lambda: ended(process))
        ballast = fill(disk)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == STAGE, said
    assert "no space is left" in said
    assert "training roclip: ." not in said, "the error says nothing"
    assert "run the same command again" in " ".join(said.split())
    kept = saved(run)
    assert kept >= 4
    ballast.unlink()
    with trainings_of(config) as trainings:  # without Ray, whose start takes long
        assert trainings.end(trainings.train(run)) == 0, trainings.said.read_text()
    assert_same_end(undisturbed(1), run)


def test_shard_that_finds_no_room_ends_the_ingest_which_goes_on_when_there_is(disk, tmp_path):
    shards, scenes = disk / "shards", 48
    config = preset(tmp_path, INGEST.format(scenes=scenes, shards=shards))
    ballast = fill(disk)
    os.truncate(ballast, ballast.stat().st_size - (200 << 10))
    with roclip("ingest", config, f"run_dir={tmp_path / 'run'}") as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == STAGE, said
    assert "No space left" in said or "no space is left" in said
    before = [record.sha256 for record in Manifest(shards).records()]
    assert Manifest(shards).summary is None
    ballast.unlink()
    with roclip("ingest", config, f"run_dir={tmp_path / 'run'}") as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    captions = sealed_captions(shards)
    assert len(captions) == scenes
    assert [record.sha256 for record in Manifest(shards).records()][: len(before)] == before
