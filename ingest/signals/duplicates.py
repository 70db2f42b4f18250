"""Finds duplicate samples in a whole ingest: by URL, bytes, caption, and near-duplicate images. Writes `duplicates.parquet`.

Nothing is removed here. Memory is bounded whatever the number of samples (`group_by.py`, `near_duplicates.py`); shards are read
in the order of their names, so the result does not depend on the order in which they were sealed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ingest.folder.sealed import Keys, key_numbers, parquet_writer, samples, scratch
from ingest.signals import normal_forms
from ingest.signals.group_by import MEMORY_BYTES, ExternalGroupBy
from ingest.signals.near_duplicates import NearDuplicateGroups, is_informative, near_duplicate_groups
from roclip.data.shards import Manifest, ShardRecord
from roclip.metrics.registry import Progress
from roclip.storage import place

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
DUPLICATES = "duplicates.parquet"
SCHEMA = pa.schema(
    [
        ("group", pa.string()),  # <kind>:<16 hex digits>; rows of a group follow one another
        ("kind", pa.string()),  # one of KINDS
        ("key", pa.string()),
        ("shard", pa.string()),  # file name of its tar
    ]
)
KINDS = {
    "url": "the same URL, ignoring case of scheme and host, default port and fragment",
    "bytes": "the same sha256 of the bytes as fetched",
    "caption": "the same caption, ignoring case, white space and Unicode form",
    "near": "near-duplicate images: linked by perceptual hashes that differ in at most 3 bits",
}
_ROW = np.dtype([("hash", "<u8"), ("key", "<u8"), ("shard", "<u4")])
_NEAR_ROW = np.dtype([*_ROW.descr, ("phash", "<u8")])


@dataclass(frozen=True)
class Count:
    """The duplicates of one kind."""

    groups: int
    """Groups of two or more samples."""
    samples: int
    """Samples in these groups."""

    @property
    def surplus(self) -> int:
        """Samples that would be removed if one of each group were kept."""
        return self.samples - self.groups


@dataclass(frozen=True)
class Duplicates:
    """The result of `find_duplicates`."""

    samples: int
    """Number of samples compared."""
    counts: dict[str, Count]
    """By kind."""
    near_groups: NearDuplicateGroups
    """Input of `suspicion.find_suspects`."""


def find_duplicates(
    root: str | Path,
    work: str | Path,
    *,
    records: Sequence[ShardRecord] | None = None,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: Progress | None = None,
) -> Duplicates:
    """Find the duplicates among the sealed shards of `root` and write `duplicates.parquet` into the folder `work`.

    Both may be on a store. `records` are the shards to compare, sorted by name; by default all published ones. Raises
    `ShardError` for a shard that cannot be read.
    """
    manifest, work = Manifest(root), place(work)
    records = manifest.records() if records is None else records
    with scratch(work) as folder:
        finder = _Finder(records, folder, memory_bytes)
        finder.read(manifest.root, on_progress or (lambda done, total, text: None))
        with parquet_writer(work / DUPLICATES, SCHEMA, folder) as writer:
            counts = {kind: finder.write(kind, writer.write_table) for kind in KINDS}
    return Duplicates(finder.samples, counts, finder.near_groups)


class _Finder:
    """One external group-by per kind."""

    def __init__(self, records: Sequence[ShardRecord], folder: Path, memory_bytes: int):
        self.records, self.folder, self.memory_bytes = records, folder, memory_bytes
        self.expected = sum(record.samples for record in records)
        self.keys, self.samples = Keys(records), 0
        self.near_groups = NearDuplicateGroups(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        self._group_bys = {
            kind: ExternalGroupBy(
                folder / kind, _NEAR_ROW if kind == "near" else _ROW, self.expected, memory_bytes // 4
            )
            for kind in KINDS
        }

    def read(self, root: Path, on_progress: Progress) -> None:
        for shard, table in samples(root, self.records, ("url", "caption", "sha256", "phash")):
            self.keys.record_width(shard, table["key"])
            key = key_numbers(self.records[shard], table["key"])
            self.samples += len(table)
            for kind, (hashes, there) in _hashes(table).items():
                rows = np.empty(len(table), _ROW if kind != "near" else _NEAR_ROW)
                rows["hash"], rows["key"], rows["shard"] = hashes, key, shard
                if kind == "near":
                    rows["phash"], rows["hash"] = hashes, normal_forms.mix(hashes)
                self._group_bys[kind].add(rows[there])
            on_progress(shard + 1, len(self.records), f"duplicates: read {self.samples} samples")
        self.near_groups = near_duplicate_groups(self._group_bys["near"], self.folder, self.memory_bytes)
        self._group_bys["near"] = self._by_group(self._group_bys["near"])

    def _by_group(self, by_hash: ExternalGroupBy) -> ExternalGroupBy:
        """The rows whose hash is shared or linked to others, grouped by near-duplicate group."""
        by_group = ExternalGroupBy(self.folder / "near_group", _ROW, by_hash.rows, self.memory_bytes // 4)
        for groups in by_hash.groups(1):
            phash = groups.rows["phash"]
            near_group = self.near_groups(phash)
            near = (groups.size > 1) | (near_group != phash) | np.isin(phash, self.near_groups.roots)
            rows = np.empty(int(near.sum()), _ROW)
            rows["hash"] = near_group[near]
            rows["key"], rows["shard"] = groups.rows["key"][near], groups.rows["shard"][near]
            by_group.add(rows)
        by_hash.close()
        return by_group

    def write(self, kind: str, write: Callable[[pa.Table], None]) -> Count:
        number, samples = 0, 0
        with self._group_bys[kind] as group_by:
            for groups in group_by.groups():
                rows = groups.rows
                number += int((groups.rank == 0).sum())
                samples += len(rows)
                names = [f"{kind}:{value:016x}" for value in rows["hash"].tolist()]
                columns = [
                    pa.array(names, pa.string()),
                    pa.array([kind] * len(rows), pa.string()),
                    self.keys.text(rows["shard"], rows["key"]),
                    self.keys.names.take(pa.array(rows["shard"])),
                ]
                write(pa.Table.from_arrays(columns, schema=SCHEMA))
        return Count(number, samples)


def _hashes(table: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind: the hashes to group by, and which samples have one."""
    urls = normal_forms.normal_urls(table["url"].combine_chunks())
    captions = normal_forms.normal_captions(table["caption"].combine_chunks())
    sha, phash = normal_forms.sha_hashes(table["sha256"].combine_chunks()), table["phash"].to_numpy()
    return {
        "url": (normal_forms.hashes(urls), pc.not_equal(urls, "").to_numpy(zero_copy_only=False)),
        "bytes": (sha, sha != 0),
        "caption": (normal_forms.hashes(captions), pc.not_equal(captions, "").to_numpy(zero_copy_only=False)),
        "near": (phash, is_informative(phash)),
    }
