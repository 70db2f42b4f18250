"""A run directory as real writers leave it, small: a training, its evaluations, an ingest's end mark, a check with pictures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from forked import trainings_of
from kit import environment, preset, scene_samples, write_shard
from rigged import LABELS, RiggedEncoder, World

from cluster.train.restarts import Restarts, note
from roclip.config import dump_config, load_config
from roclip.data.shards import Manifest
from roclip.metrics.registry import MetricsWriter, read_metrics
from roclip.storage import write_atomic

PRESET = """
name: watched
arms: [roclip]
data: {{shards: {shards}, streams: 4, shuffle_buffer: 64}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 100, neighbours: 8, warmup: 1, filter_frac: [0.1, 0.1], match_every: 2}}
train: {{epochs: 4, global_batch_size: 64, lr: 1e-3, checkpoint_every_steps: 6, log_every_steps: 1}}
"""
RATE = {"successes": 3, "n": 60, "rate": 0.05, "ci95": [0.017, 0.137]}


def make_run(folder: Path) -> Path:
    """A finished training of one arm, judged as poisoned."""
    shards, run = folder / "shards", folder / "run"
    for number in range(3):
        write_shard(shards, number, scene_samples(64 * number, 64))
    Manifest(shards).finish(
        {
            "urls": 210,
            "succeeded": 192,
            "failed": {"http_404": 10, "not_an_image": 8},
            "shards": 3,
            "images_per_s": 40.0,
        }
    )
    config = preset(folder, PRESET.format(shards=shards))
    with trainings_of(config) as trainings:
        assert trainings.end(trainings.train(run)) == 0, trainings.said.read_text()[-2000:]
    write_atomic(run / "config.yaml", dump_config(load_config(config, [f"run_dir={run}"])))
    write_atomic(
        run / "provenance.json", json.dumps({"commit": "0123456789abcdef", "machine": {"cores": 2}, "packages": {}})
    )
    write_atomic(run / "cost.json", json.dumps({"wall_s": 75.0, "peak_rss_bytes": 2.5e9}))
    note(run / "roclip", "2 ranks from step 0")
    evaluations = [
        {"epoch": epoch, "phase": "plain", "zero_shot_top1": epoch / 10, "n": 60, "attacks": {"backdoor": RATE}}
        for epoch in (2, 4)
    ]
    write_atomic(run / "roclip" / "evaluations.jsonl", "".join(json.dumps(row) + "\n" for row in evaluations))
    world = World(folder / "world").clean(300).reference(120)
    for n in range(40):
        world.poison(LABELS[1 + n % 5], "ant")
    assert world.check(RiggedEncoder())["verdict"] == "poisoned"
    shutil.copytree(folder / "world" / "oracle", run / "roclip" / "oracle")
    make_silent(shards)
    return run


def next_row(run: Path, **changed: object) -> dict:
    """Append a logged step, as training does, after the last one."""
    path = run / "roclip" / "metrics.jsonl"
    last = read_metrics(path)[-1]
    row = {**last, "step": last["step"] + 1, **changed}
    MetricsWriter(path, last["step"]).write(row)
    return row


def lose_rank(run: Path, allowed: int) -> None:
    """What is noted when a rank dies."""
    from ray.exceptions import RayActorError

    Restarts(run / "roclip", allowed).after_exception(None, {1: RayActorError()})


def make_silent(folder: Path) -> None:
    """As if nobody had written anything in it for an hour."""
    for path in folder.rglob("*"):
        status = path.stat()
        os.utime(path, (status.st_atime - 3600, status.st_mtime - 3600))


class Server:
    """`roclip dashboard` as a process of its own."""

    def __init__(self, run: Path, *options: str, before: tuple[str, ...] = ()):
        command = [*before, sys.executable, "-m", "cluster.cli", "dashboard", str(run), *options]
        self.process = subprocess.Popen(
            command, env=environment(PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().removeprefix("dashboard ").strip()

    def end(self, signal_: int) -> tuple[int, str]:
        """Its exit code and what it complained about."""
        self.process.send_signal(signal_)
        _, complaints = self.process.communicate(timeout=60)
        return self.process.returncode, complaints

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
