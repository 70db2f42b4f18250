"""Reads sealed shards sample by sample, and writes shards with the same names, keys and failures but other samples."""

import dataclasses
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ingest.shard.fetch import FetchedShard
from ingest.shard.publish import publish
from ingest.shard.verify import verify
from roclip.data.reader import BadSampleError, ShardReader
from roclip.data.shards import Manifest, ShardRecord
from roclip.errors import ShardError

STORED = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("original_width", pa.int64()),
        ("original_height", pa.int64()),
        ("sha256", pa.string()),
    ]
)
"""The columns of img2dataset's parquet that are copied."""


class Shards:
    """The samples of a manifest, numbered consecutively over its shards."""

    def __init__(self, root: Path):
        """Raises `ShardError` where the manifest has no shards."""
        self.records = Manifest(root).records()
        if not self.records:
            raise ShardError(f"{root}: expected sealed shards, got none. Run `roclip ingest` first.")
        self._readers = {record.name: ShardReader(root, record) for record in self.records}
        self._starts = np.cumsum([0, *(record.samples for record in self.records)])
        self._root, self._open = root, self.records[0].name
        self._outcomes = lru_cache(maxsize=4)(self._read_outcomes)

    def keys(self, record: ShardRecord) -> list[str]:
        """The keys of a shard's samples, in order."""
        return self._readers[record.name].index["key"]

    def captions(self) -> list[str]:
        """The captions of all samples, in order."""
        captions = []
        for record in self.records:
            captions += [self._read(record, position)[1] for position in range(record.samples)]
        return captions

    def sample(self, number: int) -> dict[str, Any]:
        """The encoded image (`image`) and the columns of `STORED`. Raises `ShardError` for a sample that cannot be read."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        record, position = self.records[shard], number - int(self._starts[shard])
        image, caption = self._read(record, position)
        outcome = self._outcomes(record.name).get(self.keys(record)[position])
        return {"image": image, **(outcome or describe(image, caption)), "caption": caption}

    def failed(self, record: ShardRecord) -> list[dict[str, Any]]:
        """Rows of the shard's parquet that gave no sample."""
        usable = set(self.keys(record))
        return [row for key, row in self._outcomes(record.name).items() if key not in usable]

    def _read(self, record: ShardRecord, position: int) -> tuple[bytes, str]:
        if record.name != self._open:
            self._readers[self._open].close()  # there may be more shards than files that can be open
            self._open = record.name
        try:
            return self._readers[record.name].read(position)
        except BadSampleError as error:
            raise ShardError(
                f"{record.name}: sample {position} cannot be read ({error}). Run `roclip ingest` again: the shard is redone."
            ) from error

    def _read_outcomes(self, name: str) -> dict[str, dict[str, Any]]:
        path = self._root / f"{Path(name).stem}.parquet"
        if not path.exists():
            return {}
        columns = [column for column in STORED.names if column in pq.read_schema(path).names]
        return {row["key"]: row for row in pq.read_table(path, columns=columns).to_pylist()}


def describe(image: bytes, caption: str) -> dict[str, Any]:
    """The columns of `STORED` for a sample that comes from no list: no URL, and its size is the original size."""
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
    size = {"width": width, "height": height, "original_width": width, "original_height": height}
    return {"url": "", "caption": caption, "status": "success", **size, "sha256": hashlib.sha256(image).hexdigest()}


def suffix_of(image: bytes) -> str:
    """`png`, `webp` or `jpg`, from the image's first bytes."""
    if image[:4] == b"\x89PNG":
        return "png"
    return "webp" if image[:4] == b"RIFF" else "jpg"


def write_shard(
    root: Path, record: ShardRecord, keys: list[str], samples: Iterable[dict[str, Any]], failed: list[dict[str, Any]]
) -> None:
    """Write and publish a shard of the same name, keys and failures under `root`, verified as ingest verifies its own.

    Raises `ShardError` when a sample cannot be read back.
    """
    with tempfile.TemporaryDirectory(dir=root) as folder:
        tar, parquet = Path(folder) / record.name, Path(folder) / f"{Path(record.name).stem}.parquet"
        rows = []
        with tarfile.open(tar, "w") as archive:
            for key, sample in zip(keys, samples, strict=True):
                rows.append({**{name: sample.get(name) for name in STORED.names}, "key": key})
                note = json.dumps(rows[-1]).encode()
                for suffix, content in (
                    (suffix_of(sample["image"]), sample["image"]),
                    ("txt", sample["caption"].encode()),
                    ("json", note),
                ):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        pq.write_table(pa.Table.from_pylist([*rows, *failed], schema=STORED), parquet)
        report = verify(tar, parquet, urls=record.urls)
        if report.samples != record.samples:
            raise ShardError(
                f"{record.name}: expected {record.samples} samples to be read back, got {report.samples}. "
                "Check the disk, and the clean shard with `roclip ingest`."
            )
        report = dataclasses.replace(report, failed=record.failed)  # a copy does not have every reason
        publish(root, FetchedShard(tar, parquet, record.urls), report)
