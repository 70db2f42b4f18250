"""The oracle's scan by a pool of Ray Data actors: each loads model and segmenter once, then scans shard after shard.

An actor saves the scan of a shard in a file (`roclip/oracle/scan/saved.py`). The files are the source of truth: a shard that
has one is skipped, and only counts go through Ray.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError

from cluster.ray.failures import words_of
from roclip.data.shards import ShardRecord
from roclip.errors import ShardError, StageError
from roclip.metrics.registry import Progress
from roclip.oracle.scan.saved import SavedScans
from roclip.oracle.scan.scan import Throughput, sealed_records
from roclip.oracle.scan.scorer import Scorer
from roclip.oracle.scan.shard import scan_shard

TRIES_AGAIN = 3
"""Retries of a shard whose actor died."""


def scan_with_actors(
    make: Callable[[], Scorer],
    shards: Path,
    saved: SavedScans,
    *,
    name: str,
    actors: int,
    cpus: float,
    gpus: float,
    progress: Progress,
) -> None:
    """Scan every sealed shard that `saved` does not hold yet; return when it holds all.

    Args:
        make: Creates an actor's scorer, in the actor; Ray pickles it.
        name: Name of the actors and their dataset on Ray's dashboard.
        cpus: CPUs of an actor, which is also its number of threads; `gpus` likewise.

    Raises `ShardError` for a shard without an index, and `StageError` when an actor dies again and again.
    """
    records = [record for record in sealed_records(shards) if not saved.has(record)]
    if not records:
        return
    throughput = Throughput(len(records), "shards scanned")
    try:
        with _quiet():
            looks = _scanned(records, make, shards, saved, name, actors, cpus, gpus)
            replies: Any = iter(looks.iter_batches(batch_size=1))
            with contextlib.closing(replies) as done:
                for batch in done:
                    if error := str(batch["error"][0]):
                        raise ShardError(error)
                    throughput.add(progress, 1, int(batch["images"][0]))
    except RayError as error:
        raise StageError(
            f"{name}: an actor failed, and a shard was given up after {TRIES_AGAIN} more tries ({words_of(error)}). "
            "What was seen stays: run the same command again when the cause is gone."
        ) from error


def _scanned(
    records: Sequence[ShardRecord],
    make: Callable[[], Scorer],
    shards: Path,
    saved: SavedScans,
    name: str,
    actors: int,
    cpus: float,
    gpus: float,
) -> ray.data.Dataset:
    items = [json.dumps(asdict(record)) for record in records]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.set_name(name)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset.map_batches(
        type(name, (_ScanActor,), {}),  # Ray names the actors by it
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(items)), max_tasks_in_flight_per_actor=1),
        batch_size=1,
        fn_constructor_args=(make, shards, saved),
        num_cpus=cpus,
        num_gpus=gpus or None,
        max_restarts=-1,
        max_task_retries=TRIES_AGAIN,
    )


def cpus_per_actor(nodes: Sequence[float], actors: int) -> float:
    """The most CPUs that each of so many actors can have on nodes with these; 1 where not all have room at once."""
    for cpus in range(int(max(nodes)), 1, -1):
        if sum(int(node // cpus) for node in nodes) >= actors:
            return float(cpus)
    return 1.0


class _ScanActor:
    """An actor. Takes shard records as JSON, gives how many distinct images each had, and what was wrong with it."""

    def __init__(self, make: Callable[[], Scorer], shards: Path, saved: SavedScans):
        self.scorer, self.shards, self.saved = make(), shards, saved

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        said = [self._scan(ShardRecord(**json.loads(item))) for item in batch["item"]]
        return {"images": [images for images, _ in said], "error": [error for _, error in said]}

    def _scan(self, record: ShardRecord) -> tuple[int, str]:
        try:
            shard_scan = scan_shard(self.scorer, self.shards, record, self.saved.caption_key, self.saved.size_px)
        except ShardError as error:  # Ray Data would tell the user to report a bug of its own
            return 0, str(error)
        self.saved.write(record, shard_scan)
        return len(shard_scan.sha256), ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it Ray Data says nothing but errors on the terminal, which is the display's, and warns of no setting that it
    made itself."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
