"""Runs that are killed, and what they must end with."""

import fcntl
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from forked import trainings_of
from kit import preset, tiny_shards
from safetensors.torch import load_file

from roclip.checkpoint import checkpoint
from roclip.metrics.registry import read_metrics

KILLED_RUN = """
name: tiny
arms: [roclip]
data: {{shards: {shards}, streams: 4, shuffle_buffer: 64}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 100, neighbours: 8, warmup: 1, filter_frac: [0.1, 0.1], match_every: 4}}
train: {{epochs: 4, global_batch_size: 32, lr: 1e-3, checkpoint_every_steps: 2, log_every_steps: 1}}
"""
STEPS = 24


def undisturbed(shared: Path, ranks: int) -> Path:
    """A run of `KILLED_RUN` that nothing befell, without Ray: trained by the first process that asks, for all of a session."""
    folder = shared / f"undisturbed-{ranks}"
    with (shared / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ended").exists():
            shutil.rmtree(folder, ignore_errors=True)
            config = preset(folder, KILLED_RUN.format(shards=tiny_shards(folder / "shards")))
            with trainings_of(config) as trainings:
                codes = [trainings.end(rank) for rank in trainings.train_ranks(folder / "run", ranks)]
                assert codes == [0] * ranks, trainings.said.read_text()[-3000:]
            (folder / "ended").touch()
    return folder / "run"


def until(condition: Callable[[], object], last_words: Callable[[], str]) -> None:
    """Wait for it while nobody has `last_words`: those of a process that should bring it about, and has ended."""
    deadline_s = time.monotonic() + 300
    while not condition():
        words = last_words()
        assert not words or condition(), f"ended before it was to:\n{words}"
        assert time.monotonic() < deadline_s, "runs, and did not come so far"
        time.sleep(0.005)


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
    assert not list((other / "roclip" / "checkpoints").glob(".step-*"))
