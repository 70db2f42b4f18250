"""Finds signs of poisoning in the sealed shards of an ingest: `suspicion.parquet`. Signals, not verdicts: nothing is removed.

Two passes over the shards' parquets, and one over a sample of the images (`shared_patch.py`). Memory is bounded whatever the
number of samples: what is compared waits on disk (`group_by.py`), what is counted is approximated by heavy hitters
(`heavy_hitters.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ingest.folder.sealed import Keys, key_numbers, samples, scratch
from ingest.signals import normal_forms
from ingest.signals.group_by import MEMORY_BYTES, ExternalGroupBy
from ingest.signals.near_duplicates import NearDuplicateGroups, near_duplicate_groups
from ingest.signals.pairs import MINHASHES, ManyCaptions, ManyImages, image_ids
from ingest.signals.shared_patch import PatchSearch
from ingest.signals.suspect_groups import SuspectGroup, SuspectGroups
from ingest.signals.text import HostTopics, Templates
from roclip.data.shards import Manifest, ShardRecord
from roclip.metrics.registry import Progress
from roclip.storage import place

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
HASH_MISMATCH = "hash_mismatch"
"""Both the signal and the flag of the shard's parquet that it is read from."""
_HASH = np.dtype([("hash", "<u8"), ("phash", "<u8")])


@dataclass(frozen=True)
class Signal:
    """The meaning of one signal."""

    name: str
    description: str
    """For readers of the report."""
    computed: str


SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal(
            HostTopics.NAME,
            "One host uses a word in most of its captions, and far more often than others. So does a bought domain.",
            f"geometric mean of the share of the host's captions with the word and the share of the word's captions on the host; "
            f"at least {HostTopics.MIN_SAMPLES} captions, of a word that others use, too",
        ),
        Signal(
            Templates.NAME,
            "Many captions differ in one word only. So do generated ones, and those of a catalogue.",
            f"counts of captions of at least {Templates.MIN_WORDS} words with one word left out; at least {Templates.MIN_FILLS} "
            "different words in the gap",
        ),
        Signal(
            ManyCaptions.NAME,
            "One image has captions that have nothing to do with each other. So does the image of a targeted attack.",
            f"mean share of words that two of its captions have in common, at most {ManyCaptions.MAX_SHARED:.0%}; at least "
            f"{ManyCaptions.MIN_CAPTIONS} different captions",
        ),
        Signal(
            ManyImages.NAME,
            "One caption has images that look different. So does a target's caption, and a lazy one.",
            f"number of its images without near duplicates, by perceptual hash; at least {ManyImages.MIN_IMAGES}, for captions "
            f"of at least {ManyImages.MIN_WORDS} content words",
        ),
        Signal(
            PatchSearch.NAME,
            "Different images have the same small patch, at any position. So do those of a backdoor, and those with a logo.",
            PatchSearch.COMPUTED,
        ),
        Signal(
            HASH_MISMATCH,
            "The bytes differ from those that the list was made from. So they do on a domain that changed hands.",
            "md5, sha256 or perceptual hash of the list against what was fetched (ingest.hash_check)",
        ),
    )
}


@dataclass(frozen=True)
class SuspicionSummary:
    """The result of `find_suspects`."""

    samples: int
    images: int
    """Images that were searched for shared patches."""
    unreadable: int
    """Images among them that could not be decoded."""
    named: dict[str, int]
    """Samples by signal; one sample may have several."""
    groups: dict[str, int]
    """By signal."""
    dropped: int
    """Groups beyond the first 10,000 of a signal."""
    worst: tuple[SuspectGroup, ...]
    """The highest groups of each signal; the others are in `suspicion_groups.parquet`."""


def find_suspects(
    root: str | Path,
    work: str | Path,
    *,
    records: Sequence[ShardRecord] | None = None,
    near_groups: NearDuplicateGroups | None = None,
    images: int = 100_000,
    threads: int = 1,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: Progress | None = None,
) -> SuspicionSummary:
    """Find signs of poisoning among the sealed shards of `root`; write `suspicion.parquet` and `suspicion_groups.parquet` into
    the folder `work`. Both may be on a store.

    Args:
        records: The shards, sorted by name; by default all published ones.
        near_groups: The groups that `find_duplicates` found; by default they are computed again.
        images: Number of images that are searched for shared patches, a random sample by key; 0 for none.
        threads: Threads that decode images.
        memory_bytes: Memory bound of each data structure.

    Raises `ShardError` for a shard that cannot be read.
    """
    manifest, work = Manifest(root), place(work)
    records = manifest.records() if records is None else records
    with scratch(work) as folder:
        scan = _Scan(manifest.root, records, folder, memory_bytes, images, on_progress)
        scan.first_pass(near_groups)
        scan.second_pass()
        scan.patches.search(manifest.root, records, threads, scan.suspect_groups, scan.step_done)
        named = scan.suspect_groups.write(manifest.root, work)
        groups = {name: scan.suspect_groups.groups(name) for name in SIGNALS}
    return SuspicionSummary(
        samples=scan.samples,
        images=scan.patches.images,
        unreadable=scan.patches.unreadable,
        named=named,
        groups={name: len(found) for name, found in groups.items()},
        dropped=scan.suspect_groups.dropped,
        worst=tuple(group for found in groups.values() for group in found[:20]),
    )


class _Scan:
    """The signals, and their state between the passes."""

    def __init__(
        self,
        root: Path,
        records: Sequence[ShardRecord],
        folder: Path,
        memory_bytes: int,
        images: int,
        on_progress: Progress | None,
    ):
        self.root, self.records, self.folder, self.memory_bytes = root, records, folder, memory_bytes
        self._on_progress = on_progress or (lambda done, total, text: None)
        self._done = 0
        expected, self.samples = sum(record.samples for record in records), 0
        self.keys = Keys(records)
        self.suspect_groups = SuspectGroups(tuple(SIGNALS), records, self.keys, folder)
        self.hosts = HostTopics()
        self.templates = Templates(folder, expected, memory_bytes // 4)
        self.captions = ManyCaptions(folder, expected, memory_bytes // 4)
        self.images = ManyImages(folder, expected, memory_bytes // 4)
        self.patches = PatchSearch(folder, expected, images)
        self.near_groups = NearDuplicateGroups(np.zeros(0, np.uint64), np.zeros(0, np.uint64))

    def step_done(self, text: str) -> None:
        """Report one of three steps per shard."""
        self._done += 1
        self._on_progress(self._done, 3 * len(self.records), text)

    def first_pass(self, near_groups: NearDuplicateGroups | None) -> None:
        """Count words, hosts and templates; group near duplicates."""
        with ExternalGroupBy(
            self.folder / "hashes", _HASH, sum(record.samples for record in self.records), self.memory_bytes
        ) as hashes:
            for shard, table in samples(self.root, self.records, ("url", "caption", "phash")):
                self.keys.record_width(shard, table["key"])
                self.samples += len(table)
                caption_words = normal_forms.words(normal_forms.normal_captions(table["caption"].combine_chunks()))
                _, host = _hosts(table)
                self.hosts.count(host, caption_words)
                self.templates.count(caption_words, len(table))
                if near_groups is None:
                    rows = np.empty(len(table), _HASH)
                    rows["phash"] = table["phash"].to_numpy()
                    rows["hash"] = normal_forms.mix(rows["phash"])
                    hashes.add(rows)
                self.step_done(f"suspicion: counted {self.samples} samples")
            self.near_groups = near_groups or near_duplicate_groups(hashes, self.folder, self.memory_bytes)
        self.hosts.choose()
        self.templates.choose()

    def second_pass(self) -> None:
        """Group what is to be compared, and score it."""
        for shard, table in samples(self.root, self.records, ("url", "caption", "sha256", "phash", "flags")):
            keys = key_numbers(self.records[shard], table["key"])
            normal = normal_forms.normal_captions(table["caption"].combine_chunks())
            caption_words, caption = normal_forms.words(normal), normal_forms.hashes(normal)
            minhashes = normal_forms.minhashes(caption_words, len(table), MINHASHES)
            names, host = _hosts(table)
            phash = table["phash"].to_numpy()
            near_group = self.near_groups(phash)
            image = image_ids(phash, near_group, normal_forms.sha_hashes(table["sha256"].combine_chunks()))
            self.hosts.assign(shard, keys, host, names, caption_words, self.suspect_groups)
            self.templates.assign(shard, keys, caption_words)
            self.captions.add(shard, keys, image, phash, caption, minhashes)
            self.images.add(shard, keys, caption, phash, near_group, minhashes)
            self.patches.choose(shard, keys, image, host, caption_words)
            self._mismatches(shard, keys, table["flags"])
            self.step_done(f"suspicion: compared shard {shard + 1} of {len(self.records)}")
        for signal in (self.templates, self.captions, self.images):
            signal.finish(self.suspect_groups)

    def _mismatches(self, shard: int, keys: np.ndarray, flags: pa.ChunkedArray) -> None:
        differ = pc.match_substring_regex(flags, rf"(^|,){HASH_MISMATCH}(,|$)").to_numpy()
        if differ.any():
            self.suspect_groups.open(HASH_MISMATCH, 0, 0.5, "The list expects other bytes than arrived.")
            self.suspect_groups.add(HASH_MISMATCH, 0, np.full(int(differ.sum()), shard), keys[differ])


def _hosts(table: pa.Table) -> tuple[pa.Array, np.ndarray]:
    """The host of each sample as text and as a hash, 0 for none."""
    names = normal_forms.hosts(table["url"].combine_chunks())
    return names, np.where(pc.equal(names, "").to_numpy(zero_copy_only=False), 0, normal_forms.hash_each(names)).astype(
        np.uint64
    )
