"""Compares two ingests of one list by URL: which URLs now return other images? Writes `drift.parquet`.

A URL whose content changed after the list was made is how split-view poisoning works (Carlini et al., arXiv:2302.10149). The
two ingests are joined by URL on disk (`group_by.py`), so memory is bounded whatever their size. A URL with several rows,
because the list repeats it or a later pass retried it, counts once: by its first sample, if it has one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ingest.folder.sealed import Keys, key_numbers, parquet_writer, rows, scratch
from ingest.signals import normal_forms
from ingest.signals.group_by import MEMORY_BYTES, ExternalGroupBy
from ingest.signals.near_duplicates import bits, is_informative
from roclip.data.outcomes import reason_of
from roclip.data.shards import Manifest, ShardRecord
from roclip.metrics.registry import Progress
from roclip.storage import place

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
DRIFT = "drift.parquet"
LOOKS_SAME_BITS = 8
"""Images whose perceptual hashes differ in at most this many bits count as looking the same."""
EXAMPLES = 12
CHANGES = {
    "same_bytes": "the same bytes as before",
    "looks_same": "other bytes, but the image looks the same",
    "looks_different": "a different image",
    "other_bytes": "other bytes; whether the image looks the same is not known",
    "gone": "there was a sample before, but not now",
    "came_back": "there was no sample before, but there is one now",
    "failed_again": "no sample in either ingest",
    "only_old": "not in the new list",
    "only_new": "not in the old list",
}
_QUIET = ("same_bytes", "failed_again")
"""Counted, but not listed."""
SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("change", pa.string()),  # one of CHANGES, without same_bytes and failed_again
        ("distance", pa.int32()),  # bits in which the perceptual hashes differ; null where one is not known
        ("caption_changed", pa.bool_()),
        ("reason", pa.string()),  # why it is gone, a name of `roclip.data.outcomes`; else ""
        ("old_key", pa.string()),  # null where there is no row
        ("old_shard", pa.string()),
        ("new_key", pa.string()),
        ("new_shard", pa.string()),
    ]
)
_NAMES = tuple(CHANGES)
_SIDE = [("key", "<u8"), ("shard", "<u4"), ("there", "?"), ("sample", "?")]
_ROW = np.dtype(
    [("hash", "<u8"), ("new", "u1"), *_SIDE, ("sha", "<u8"), ("phash", "<u8"), ("caption", "<u8"), ("reason", "<u2")]
)
_CHANGE = np.dtype(
    [
        ("hash", "<u8"),
        ("old", _SIDE),
        ("now", _SIDE),
        ("change", "u1"),
        ("distance", "<i2"),
        ("caption", "?"),
        ("reason", "<u2"),
    ]
)
_SHARD_BITS = 40


@dataclass(frozen=True)
class ChangedUrl:
    """One example URL; the fields are those of `SCHEMA`."""

    url: str
    change: str
    distance: int | None
    caption_changed: bool
    reason: str
    old_key: str | None
    old_shard: str | None
    new_key: str | None
    new_shard: str | None


@dataclass(frozen=True)
class Drift:
    """The result of `find_drift`."""

    counts: dict[str, int]
    """Number of URLs by change, for all of `CHANGES`."""
    captions_changed: int
    """Number of URLs with a sample in both ingests and different captions."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Failure reasons of the URLs that are gone, most frequent first."""
    examples: dict[str, tuple[ChangedUrl, ...]] = field(default_factory=dict)
    """Up to 12 URLs by change, those with the greatest distance."""


def find_drift(
    old_root: str | Path,
    new_root: str | Path,
    work: str | Path,
    *,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: Progress | None = None,
) -> Drift:
    """Compare two ingests by URL and write `drift.parquet` into the folder `work`. All three may be on a store.

    Raises `ShardError` for a shard that cannot be read.
    """
    work, on_progress = place(work), on_progress or (lambda done, total, text: None)
    old, new = Manifest(old_root), Manifest(new_root)
    with scratch(work) as folder:
        join = _Join((old, new), folder, memory_bytes)
        join.read(on_progress)
        join.compare()
        with parquet_writer(work / DRIFT, SCHEMA, folder) as writer:
            join.write(writer.write_table)
    return join.summary()


class _Join:
    """Joins the rows of both sides by URL, then groups the changes by shard."""

    def __init__(self, sides: tuple[Manifest, Manifest], folder: Path, memory_bytes: int):
        self.roots = [side.root for side in sides]
        self.records: list[Sequence[ShardRecord]] = [side.records() for side in sides]
        self.keys = [Keys(records) for records in self.records]
        expected = sum(record.urls for records in self.records for record in records)
        self._rows = ExternalGroupBy(folder / "rows", _ROW, expected, memory_bytes)
        self._changes = [
            ExternalGroupBy(folder / name, _CHANGE, expected // 8, memory_bytes // 4) for name in ("old", "new")
        ]
        self._reasons: dict[str, int] = {"": 0}
        self.counts: Counter[str] = Counter(dict.fromkeys(_NAMES, 0))
        self.reasons: Counter[str] = Counter()
        self.captions_changed = 0
        self._examples: dict[str, list[tuple[int, ChangedUrl]]] = {name: [] for name in _NAMES}

    def read(self, on_progress: Progress) -> None:
        done, total = 0, sum(map(len, self.records))
        for new, records in enumerate(self.records):
            for shard, record in enumerate(records):
                table = rows(self.roots[new], record, ("url", "caption", "sha256", "phash", "error_message"))
                self.keys[new].record_width(shard, table["key"])
                self._rows.add(self._as_records(new, shard, record, table))
                done += 1
                on_progress(done, total, f"drift: read {done} of {total} shards")

    def _as_records(self, new: int, shard: int, record: ShardRecord, table: pa.Table) -> np.ndarray:
        out = np.zeros(len(table), _ROW)
        out["hash"] = normal_forms.hashes(normal_forms.normal_urls(table["url"].combine_chunks()))
        out["new"], out["shard"], out["there"] = new, shard, True
        out["key"] = key_numbers(record, table["key"])
        out["sample"] = table["sample"].to_numpy()
        out["sha"] = normal_forms.sha_hashes(table["sha256"].combine_chunks())
        out["phash"] = table["phash"].to_numpy()
        out["caption"] = normal_forms.hashes(normal_forms.normal_captions(table["caption"].combine_chunks()))
        messages = table["error_message"].combine_chunks().dictionary_encode()
        codes = [
            self._reasons.setdefault(reason_of(text) if text else "", len(self._reasons))
            for text in messages.dictionary.to_pylist()
        ]
        out["reason"] = np.array([*codes, 0], np.uint16)[messages.indices.to_numpy()]
        return out[pc.not_equal(table["url"], "").to_numpy()]

    def compare(self) -> None:
        with self._rows as group_by:
            for groups in group_by.groups(1):
                old, new = _sides(groups.rows)
                changes = _compared(old, new)
                names, counts = np.unique(changes["change"], return_counts=True)
                self.counts.update(
                    {_NAMES[name]: count for name, count in zip(names.tolist(), counts.tolist(), strict=True)}
                )
                self.captions_changed += int(
                    (changes["caption"] & changes["old"]["sample"] & changes["now"]["sample"]).sum()
                )
                notable = changes[~np.isin(changes["change"], [_NAMES.index(name) for name in _QUIET])]
                for side, mine in ((1, notable["now"]["there"]), (0, ~notable["now"]["there"])):
                    part = notable[mine]
                    part["hash"] = part["now" if side else "old"]["shard"].astype(np.uint64) << np.uint64(_SHARD_BITS)
                    self._changes[side].add(part)

    def write(self, write: Callable[[pa.Table], None]) -> None:
        names = {code: name for name, code in self._reasons.items()}
        for side, group_by in enumerate(self._changes):
            with group_by:
                for shard, changes in _by_shard(group_by):
                    table = self._as_table(side, shard, changes, names)
                    self._keep_examples(table)
                    write(table)

    def _as_table(self, side: int, shard: int, changes: np.ndarray, names: dict[int, str]) -> pa.Table:
        record = self.records[side][shard]
        table = rows(self.roots[side], record, ("url",))
        there = key_numbers(record, table["key"])
        order = np.argsort(there, kind="stable")
        at = order[np.searchsorted(there[order], changes["now" if side else "old"]["key"])]
        far = changes["distance"].astype(np.int32)
        columns = {
            "url": table["url"].take(pa.array(at)),
            "change": pa.array([_NAMES[n] for n in changes["change"].tolist()], pa.string()),
            "distance": pa.array(far, pa.int32(), mask=far < 0),
            "caption_changed": pa.array(changes["caption"]),
            "reason": pa.array([names[n] for n in changes["reason"].tolist()], pa.string()),
        }
        for prefix, part, keys in (("old", "old", self.keys[0]), ("new", "now", self.keys[1])):
            mine, known = changes[part], pa.array(changes[part]["there"])
            for column, texts in (
                ("key", keys.text(mine["shard"], mine["key"])),
                ("shard", keys.names.take(pc.if_else(known, pa.array(mine["shard"]), None))),
            ):
                columns[f"{prefix}_{column}"] = pc.if_else(known, texts, None)
        return pa.table(columns, schema=SCHEMA)

    def _keep_examples(self, table: pa.Table) -> None:
        gone = table.filter(pc.equal(table["change"], "gone"))
        self.reasons.update(gone["reason"].to_pylist())
        for name in pc.unique(table["change"]).to_pylist():
            kept, mine = self._examples[name], table.filter(pc.equal(table["change"], name))
            order = np.argsort(-pc.fill_null(mine["distance"], -1).to_numpy(), kind="stable")[:EXAMPLES]
            for row in mine.take(pa.array(order)).to_pylist():
                kept.append((-1 if row["distance"] is None else row["distance"], ChangedUrl(**row)))
            self._examples[name] = sorted(kept, key=lambda entry: -entry[0])[:EXAMPLES]

    def summary(self) -> Drift:
        examples = {name: tuple(example for _, example in kept) for name, kept in self._examples.items() if kept}
        return Drift(dict(self.counts), self.captions_changed, dict(self.reasons.most_common()), examples)


def _sides(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The old and the new row of each distinct hash, (U,) and (U,); `there` is false for a missing row.

    Of several rows the first sample is taken, or the first row; its caption is the smallest caption hash of them all.
    """
    hashes = np.unique(rows["hash"])
    out = np.zeros((2, len(hashes)), _ROW)
    out["hash"] = hashes
    for new in (0, 1):
        mine = rows[rows["new"] == new]
        mine = mine.take(np.lexsort((~mine["sample"], mine["hash"])))
        known, first = np.unique(mine["hash"], return_index=True)
        at = np.searchsorted(hashes, known)
        out[new, at] = mine[first]
        if len(mine):
            out["caption"][new, at] = np.minimum.reduceat(mine["caption"], first)
    return out[0], out[1]


def _compared(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The change of each URL."""
    out = np.zeros(len(old), _CHANGE)
    out["hash"] = old["hash"]
    for name, _ in _SIDE:
        out["old"][name], out["now"][name] = old[name], new[name]
    both = old["sample"] & new["sample"]
    same = both & (old["sha"] == new["sha"]) & (old["sha"] != 0)
    known = both & is_informative(old["phash"]) & is_informative(new["phash"])
    out["distance"] = np.where(known, bits(old["phash"] ^ new["phash"]).astype(np.int16), -1)
    near = known & (out["distance"] <= LOOKS_SAME_BITS)
    cases = {
        "only_new": ~old["there"],
        "only_old": ~new["there"],
        "failed_again": ~old["sample"] & ~new["sample"],
        "gone": ~new["sample"],
        "came_back": ~old["sample"],
        "same_bytes": same,
        "looks_same": near,
        "looks_different": known,
    }
    out["change"] = np.select(list(cases.values()), [_NAMES.index(name) for name in cases], _NAMES.index("other_bytes"))
    out["caption"] = old["there"] & new["there"] & (old["caption"] != new["caption"])
    out["reason"] = np.where(out["change"] == _NAMES.index("gone"), new["reason"], 0)
    return out


def _by_shard(group_by: ExternalGroupBy) -> Iterator[tuple[int, np.ndarray]]:
    for groups in group_by.groups(1):
        for _, changes in groups.runs():
            part = "now" if changes["now"]["there"][0] else "old"
            yield (
                int(changes["hash"][0] >> np.uint64(_SHARD_BITS)),
                changes.take(np.argsort(changes[part]["key"], kind="stable")),
            )
