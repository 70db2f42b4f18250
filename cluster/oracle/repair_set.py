"""Writes the fine-tuning set that a check has chosen for a repair as shards: images as they are, or with a found trigger."""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.shard_copy import describe, write_shard
from roclip.attacks import scenes
from roclip.data.ground_truth import write_parquet
from roclip.data.reader import BadSampleError, ShardReader, decode
from roclip.data.shards import Manifest, ShardRecord, sample_key
from roclip.errors import ShardError
from roclip.found_triggers import FoundTrigger
from roclip.oracle.curate import SCHEMA, Row
from roclip.oracle.segmenters.base import Segmenter

SAMPLES_PER_SHARD = 256
PLACES = 16
"""Random places that are tried for a trigger; the one that covers least of the segmented objects is taken."""
WRITTEN = pa.schema([*SCHEMA, ("shard", pa.string()), ("sample", pa.string()), ("sha256", pa.string())])
"""The plan's columns, then shard and key of the sample, and its image's sha256."""


def write_set(
    rows: Sequence[Row],
    found: Sequence[FoundTrigger],
    segmenter: Segmenter,
    *,
    source: Path,
    folder: Path,
    seed: int,
) -> None:
    """Write `<folder>/shards`, with a finished manifest, and `<folder>/finetune.parquet`. A complete set is left as it is.

    Images without a trigger keep their bytes; those with one are stored as lossless PNG.
    Raises `ShardError` when an image of the plan is not in the source shards any more.
    """
    root = folder / "shards"
    if Manifest(root).summary is not None:
        return
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    written, images = [], _images(rows, found, segmenter, source, seed)
    for number in range(-(-len(rows) // SAMPLES_PER_SHARD)):
        here = list(islice(images, SAMPLES_PER_SHARD))
        keys = [sample_key(number * SAMPLES_PER_SHARD + n, SAMPLES_PER_SHARD) for n in range(len(here))]
        record = ShardRecord(f"{number:05d}.tar", len(here), 0, "", "", urls=len(here))
        samples = ({"image": image, **describe(image, row.caption)} for row, image in here)
        write_shard(root, record, keys, samples, [])
        written += [
            {
                **dataclasses.asdict(row),
                "shard": record.name,
                "sample": key,
                "sha256": hashlib.sha256(image).hexdigest(),
            }
            for key, (row, image) in zip(keys, here, strict=True)
        ]
    write_parquet(folder / "finetune.parquet", pa.Table.from_pylist(written, schema=WRITTEN))
    Manifest(root).finish({"samples": len(written)})


def images_of(keys: Sequence[str], source: Path) -> Iterator[tuple[str, bytes]]:
    """Each key with its encoded image, in the order of the shards. Raises `ShardError` for a key that the shards do not have."""
    wanted = set(keys)
    for record in Manifest(source).records():
        reader = ShardReader(source, record)
        for sample, key in enumerate(reader.index["key"]):
            if key in wanted:
                wanted.remove(key)
                try:
                    yield key, reader.image(sample)
                except BadSampleError as error:
                    raise ShardError(f"{record.name}: sample {key} cannot be read any more ({error}).") from error
        reader.close()
    if wanted:
        raise ShardError(
            f"{source}: {len(wanted)} images that the check has chosen are not there any more, such as {min(wanted)}. "
            "Run `roclip oracle` again."
        )


def stamp(trigger: FoundTrigger, image: np.ndarray, objects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image (S, S, 3) uint8 with the trigger at that of `PLACES` random places where it covers least of `objects` (S, S)
    bool."""
    best, least = image, np.inf
    for _ in range(PLACES):
        stamped, (left, top, right, bottom) = trigger.apply(image, rng)
        hidden = int(objects[top:bottom, left:right].sum())
        if hidden < least:
            best, least = stamped, hidden
    return best


def _images(
    rows: Sequence[Row], found: Sequence[FoundTrigger], segmenter: Segmenter, source: Path, seed: int
) -> Iterator[tuple[Row, bytes]]:
    by_key = {row.key: row for row in rows}
    for key, encoded in images_of(list(by_key), source):
        row = by_key[key]
        if row.trigger is not None:
            image = decode(encoded, row.size_px)
            objects = segmenter.masks(np.stack([image]))[0] > 0  # a copy that can be written to, as torch wants it
            rng = np.random.default_rng((seed, 83, *hashlib.sha256(key.encode()).digest()[:8]))
            encoded = scenes.encode(stamp(found[row.trigger], image, objects, rng))
        yield row, encoded
