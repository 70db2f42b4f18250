"""What has changed between two ingests of one list: the same URLs, other pictures? Writes `drift.parquet`.

A URL that shows something else than it did when the list was made is how split-view poisoning works (Carlini et al.,
arXiv:2302.10149). The two ingests are joined by URL on disk (`group_by.py`), so memory is bounded whatever their size. A URL that
has several rows, because a list repeats it or a later pass tried it again, counts once: by its first sample, if it has one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ingest.folder.sealed import Keys, numbers, parquet_writer, rows, scratch
from ingest.signals import normal_forms
from ingest.signals.group_by import MEMORY_BYTES, ExternalGroupBy
from ingest.signals.near_duplicates import bits, telling
from roclip.data.outcomes import reason_of
from roclip.data.shards import Manifest, ShardRecord
from roclip.metrics.registry import Progress
from roclip.storage import place

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
DRIFT = "drift.parquet"
LOOKS_SAME_BITS = 8
"""Perceptual hashes that differ in so many bits or fewer are of pictures that look the same."""
EXAMPLES = 12
CHANGES = {
    "same_bytes": "the same bytes as before",
    "looks_same": "other bytes, but the picture looks the same",
    "looks_different": "another picture",
    "other_bytes": "other bytes; whether the picture looks the same is not known",
    "gone": "there was a sample, and now there is none",
    "came_back": "there was no sample, and now there is one",
    "failed_again": "neither then nor now",
    "only_old": "not in the new list",
    "only_new": "not in the old list",
}
_QUIET = ("same_bytes", "failed_again")
"""Counted only."""
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
class Changed:
    """One URL of the examples; the fields are those of `SCHEMA`."""

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
    """What `drift` found."""

    counts: dict[str, int]
    """URLs by change, all of `CHANGES`."""
    captions_changed: int
    """URLs with a sample then and now whose caption is another one."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Of those that are gone, the most frequent first."""
    examples: dict[str, tuple[Changed, ...]] = field(default_factory=dict)
    """By change, up to 12: those with the greatest distance."""


def drift(
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
    work, say = place(work), on_progress or (lambda done, total, text: None)
    old, new = Manifest(old_root), Manifest(new_root)
    with scratch(work) as folder:
        join = _Join((old, new), folder, memory_bytes)
        join.read(say)
        join.compare()
        with parquet_writer(work / DRIFT, SCHEMA, folder) as writer:
            join.write(writer.write_table)
    return join.summary()


class _Join:
    """Rows of both sides by URL, then changes by the shard that knows the URL."""

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
        self._examples: dict[str, list[tuple[int, Changed]]] = {name: [] for name in _NAMES}

    def read(self, say: Progress) -> None:
        done, total = 0, sum(map(len, self.records))
        for new, records in enumerate(self.records):
            for shard, record in enumerate(records):
                table = rows(self.roots[new], record, ("url", "caption", "sha256", "phash", "error_message"))
                self.keys[new].note(shard, table["key"])
                self._rows.add(self._numbered(new, shard, record, table))
                done += 1
                say(done, total, f"drift: read {done} of {total} shards")

    def _numbered(self, new: int, shard: int, record: ShardRecord, table: pa.Table) -> np.ndarray:
        out = np.zeros(len(table), _ROW)
        out["hash"] = normal_forms.hashes(normal_forms.normal_urls(table["url"].combine_chunks()))
        out["new"], out["shard"], out["there"] = new, shard, True
        out["key"] = numbers(record, table["key"])
        out["sample"] = table["sample"].to_numpy()
        out["sha"] = normal_forms.sha_hashes(table["sha256"].combine_chunks())
        out["phash"] = table["phash"].to_numpy()
        out["caption"] = normal_forms.hashes(normal_forms.normal_captions(table["caption"].combine_chunks()))
        said = table["error_message"].combine_chunks().dictionary_encode()
        codes = [
            self._reasons.setdefault(reason_of(text) if text else "", len(self._reasons))
            for text in said.dictionary.to_pylist()
        ]
        out["reason"] = np.array([*codes, 0], np.uint16)[said.indices.to_numpy()]
        return out[pc.not_equal(table["url"], "").to_numpy()]

    def compare(self) -> None:
        with self._rows as spill:
            for groups in spill.groups(1):
                old, new = _sides(groups.rows)
                changes = _compared(old, new)
                names, counts = np.unique(changes["change"], return_counts=True)
                self.counts.update(
                    {_NAMES[name]: count for name, count in zip(names.tolist(), counts.tolist(), strict=True)}
                )
                self.captions_changed += int(
                    (changes["caption"] & changes["old"]["sample"] & changes["now"]["sample"]).sum()
                )
                loud = changes[~np.isin(changes["change"], [_NAMES.index(name) for name in _QUIET])]
                for side, mine in ((1, loud["now"]["there"]), (0, ~loud["now"]["there"])):
                    part = loud[mine]
                    part["hash"] = part["now" if side else "old"]["shard"].astype(np.uint64) << np.uint64(_SHARD_BITS)
                    self._changes[side].add(part)

    def write(self, write: Callable[[pa.Table], None]) -> None:
        names = {code: name for name, code in self._reasons.items()}
        for side, spill in enumerate(self._changes):
            with spill:
                for shard, changes in _by_shard(spill):
                    table = self._told(side, shard, changes, names)
                    self._keep_examples(table)
                    write(table)

    def _told(self, side: int, shard: int, changes: np.ndarray, names: dict[int, str]) -> pa.Table:
        record = self.records[side][shard]
        table = rows(self.roots[side], record, ("url",))
        there = numbers(record, table["key"])
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
                kept.append((-1 if row["distance"] is None else row["distance"], Changed(**row)))
            self._examples[name] = sorted(kept, key=lambda entry: -entry[0])[:EXAMPLES]

    def summary(self) -> Drift:
        examples = {name: tuple(example for _, example in kept) for name, kept in self._examples.items() if kept}
        return Drift(dict(self.counts), self.captions_changed, dict(self.reasons.most_common()), examples)


def _sides(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each different hash its old row and its new one, (U,) and (U,); one that is not there has `there` false.

    Of several rows it is the first sample, or the first row; its caption is the smallest hash of all.
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
    """What became of each URL."""
    out = np.zeros(len(old), _CHANGE)
    out["hash"] = old["hash"]
    for name, _ in _SIDE:
        out["old"][name], out["now"][name] = old[name], new[name]
    both = old["sample"] & new["sample"]
    same = both & (old["sha"] == new["sha"]) & (old["sha"] != 0)
    known = both & telling(old["phash"]) & telling(new["phash"])
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


def _by_shard(spill: ExternalGroupBy) -> Iterator[tuple[int, np.ndarray]]:
    for groups in spill.groups(1):
        bounds = groups.starts()
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            changes = groups.rows[start:stop]
            part = "now" if changes["now"]["there"][0] else "old"
            yield (
                int(changes["hash"][0] >> np.uint64(_SHARD_BITS)),
                changes.take(np.argsort(changes[part]["key"], kind="stable")),
            )
