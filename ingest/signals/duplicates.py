"""Which samples of a whole ingest are the same: by URL, by bytes, by caption, by look. Writes `duplicates.parquet`.

Nothing is dropped here. Memory is bounded whatever the number of samples (`group_by.py`, `near_duplicates.py`); shards
are read in the order of their names, so the result does not depend on the order in which they were sealed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ingest.folder.sealed import Keys, numbers, parquet_writer, samples, scratch
from ingest.signals import normal_forms
from ingest.signals.group_by import MEMORY_BYTES, ExternalGroupBy
from ingest.signals.near_duplicates import NearDuplicateGroups, near_duplicate_groups, telling
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
    "url": "the same URL, but for case of scheme and host, default port and fragment",
    "bytes": "the same sha256 of the bytes as fetched",
    "caption": "the same caption, but for case, white space and Unicode form",
    "near": "the same look: perceptual hashes that differ in at most 3 bits, one after the other",
}
_ROW = np.dtype([("hash", "<u8"), ("key", "<u8"), ("shard", "<u4")])
_LOOK = np.dtype([*_ROW.descr, ("phash", "<u8")])


@dataclass(frozen=True)
class Count:
    """Duplicates of one kind."""

    groups: int
    """Of two samples or more."""
    samples: int
    """In these groups."""

    @property
    def surplus(self) -> int:
        """Samples that would go, if one of each group stayed."""
        return self.samples - self.groups


@dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` found."""

    samples: int
    """All that were looked at."""
    counts: dict[str, Count]
    """By kind."""
    looks: NearDuplicateGroups
    """For `suspicion.suspect`."""


def find_duplicates(
    root: str | Path,
    work: str | Path,
    *,
    records: Sequence[ShardRecord] | None = None,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: Progress | None = None,
) -> Duplicates:
    """Find the duplicates among the sealed shards of `root` and write `duplicates.parquet` into the folder `work`.

    Both may be on a store. `records` are the shards to look at, by name; without, all that are published. Raises `ShardError`
    for a shard that cannot be read.
    """
    manifest, work = Manifest(root), place(work)
    records = manifest.records() if records is None else records
    with scratch(work) as folder:
        finder = _Finder(records, folder, memory_bytes)
        finder.read(manifest.root, on_progress or (lambda done, total, text: None))
        with parquet_writer(work / DUPLICATES, SCHEMA, folder) as writer:
            counts = {kind: finder.write(kind, writer.write_table) for kind in KINDS}
    return Duplicates(finder.samples, counts, finder.looks)


class _Finder:
    """One spill a kind."""

    def __init__(self, records: Sequence[ShardRecord], folder: Path, memory_bytes: int):
        self.records, self.folder, self.memory_bytes = records, folder, memory_bytes
        self.expected = sum(record.samples for record in records)
        self.keys, self.samples = Keys(records), 0
        self.looks = NearDuplicateGroups(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        self._spills = {
            kind: ExternalGroupBy(folder / kind, _LOOK if kind == "near" else _ROW, self.expected, memory_bytes // 4)
            for kind in KINDS
        }

    def read(self, root: Path, say: Progress) -> None:
        for shard, table in samples(root, self.records, ("url", "caption", "sha256", "phash")):
            self.keys.note(shard, table["key"])
            key = numbers(self.records[shard], table["key"])
            self.samples += len(table)
            for kind, (hashes, there) in _hashes(table).items():
                rows = np.empty(len(table), _ROW if kind != "near" else _LOOK)
                rows["hash"], rows["key"], rows["shard"] = hashes, key, shard
                if kind == "near":
                    rows["phash"], rows["hash"] = hashes, normal_forms.mix(hashes)
                self._spills[kind].add(rows[there])
            say(shard + 1, len(self.records), f"duplicates: read {self.samples} samples")
        self.looks = near_duplicate_groups(self._spills["near"], self.folder, self.memory_bytes)
        self._spills["near"] = self._by_look(self._spills["near"])

    def _by_look(self, by_hash: ExternalGroupBy) -> ExternalGroupBy:
        """The rows whose hash is linked or has others, by their look."""
        by_look = ExternalGroupBy(self.folder / "look", _ROW, by_hash.rows, self.memory_bytes // 4)
        for groups in by_hash.groups(1):
            phash = groups.rows["phash"]
            look = self.looks(phash)
            near = (groups.size > 1) | (look != phash) | np.isin(phash, self.looks.roots)
            rows = np.empty(int(near.sum()), _ROW)
            rows["hash"] = look[near]
            rows["key"], rows["shard"] = groups.rows["key"][near], groups.rows["shard"][near]
            by_look.add(rows)
        by_hash.close()
        return by_look

    def write(self, kind: str, write: Callable[[pa.Table], None]) -> Count:
        number, samples = 0, 0
        with self._spills[kind] as spill:
            for groups in spill.groups():
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
    """By kind: what samples are grouped by, and which of them have it."""
    urls = normal_forms.normal_urls(table["url"].combine_chunks())
    captions = normal_forms.normal_captions(table["caption"].combine_chunks())
    sha, phash = normal_forms.sha_hashes(table["sha256"].combine_chunks()), table["phash"].to_numpy()
    return {
        "url": (normal_forms.hashes(urls), pc.not_equal(urls, "").to_numpy(zero_copy_only=False)),
        "bytes": (sha, sha != 0),
        "caption": (normal_forms.hashes(captions), pc.not_equal(captions, "").to_numpy(zero_copy_only=False)),
        "near": (phash, telling(phash)),
    }
