"""What a training reads: the manifest of its shards, the shards of each epoch, and the limit of unreadable samples."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from roclip import distributed
from roclip.config import Config
from roclip.data.ground_truth import poisoned_samples
from roclip.data.shards import Manifest
from roclip.data.stream import Batch, Snapshot, take_snapshot, wait_for_shards
from roclip.data.tar_sources import index_tars, is_pattern, shards_root
from roclip.errors import DataError
from roclip.storage import write_atomic


def open_manifest(config: Config, run: Path) -> Manifest:
    """The manifest of the run's shards. Rank 0 indexes ready-made tars (`data.shards` is a pattern); the others wait for the
    finished manifest, since a collective would time out."""
    manifest = Manifest(shards_root(config.data.shards, run))
    if is_pattern(config.data.shards):
        if distributed.rank() == 0:
            log = logging.getLogger(__name__)
            index_tars(
                config.data.shards, manifest.root, on_progress=lambda done, total, text: log.info("index %s", text)
            )
        while manifest.summary is None:
            time.sleep(1.0)
    return manifest


def snapshot_of_epoch(config: Config, manifest: Manifest, run: Path, epoch: int) -> Snapshot:
    """The shards of an epoch. Rank 0 decides and writes `<run>/snapshots/epoch-<n>.json`, so that a resume and the run's other
    arms read the same data."""

    def decide() -> Sequence[str]:
        path = run / "snapshots" / f"epoch-{epoch:05d}.json"
        if path.exists():
            names = json.loads(path.read_text())["shards"]
            wait_for_shards(manifest, 1, config.data.wait_s, names)  # a replay may be ahead of its ingest
            return names
        wait_for_shards(manifest, config.data.min_shards, config.data.wait_s)
        snapshot = take_snapshot(manifest)
        record = {"epoch": epoch, "digest": snapshot.digest, "samples": snapshot.samples, "shards": snapshot.names}
        write_atomic(path, json.dumps(record, indent=1))
        return snapshot.names

    return take_snapshot(manifest, distributed.lead(decide))


def refuse_bad_samples(batch: Batch, bad: int, step_in_epoch: int, snapshot: Snapshot, config: Config) -> None:
    """Raise `DataError` when `bad`, the unreadable samples of the epoch so far, exceeds `data.max_bad_frac`."""
    if bad > config.data.max_bad_frac * snapshot.samples:
        named = "; ".join(f"{name}: {reason}" for name, reason in batch.bad[:5]) or "on another rank"
        raise DataError(
            f"{bad} samples of this epoch cannot be read after {step_in_epoch} steps, more than data.max_bad_frac = "
            f"{config.data.max_bad_frac} of {snapshot.samples}. The last: {named}. "
            "Bring the shard back as it was, or take its record out of the manifest (its own .json, or the pack that it is "
            "in) and run ingest again, which redoes it; or raise data.max_bad_frac."
        )


def poison_aims(run: Path) -> dict[int, str]:
    """The attacker's aim for each poisoned sample of a run that knows its poisons, by sample id. For metrics only."""
    rows = poisoned_samples(run).to_pylist()
    return {row["id"]: f"{row['attack']}: {row['target_label']}" for row in rows}
