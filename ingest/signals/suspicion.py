"""Signs of poisoning in a whole ingest, from its sealed shards: `suspicion.parquet`. Signals, not verdicts: nothing is dropped.

Two passes over the shards' parquets, and one over the images of a sample of the samples (`shared_patch.py`). Memory is bounded
whatever the number of samples: what is to be compared waits on disk (`group_by.py`), what is to be counted is counted in sketches
(`heavy_hitters.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ingest.folder.sealed import Keys, numbers, samples, scratch
from ingest.signals import normal_forms
from ingest.signals.findings import SuspectGroup, SuspectGroups
from ingest.signals.group_by import MEMORY_BYTES, ExternalGroupBy
from ingest.signals.near_duplicates import NearDuplicateGroups, near_duplicate_groups
from ingest.signals.pairs import WORDS, ManyCaptions, ManyImages, image_numbers
from ingest.signals.shared_patch import PatchSearch
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
    """What one signal means."""

    name: str
    says: str
    """For a reader of the report."""
    computed: str


SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal(
            HostTopics.NAME,
            "One host says a word in most of its captions, and far more often than everybody else. So does a bought domain.",
            f"share of the host's captions with the word, times share of the word's captions on the host, square root; from "
            f"{HostTopics.MIN_SAMPLES} captions on, where others say the word, too",
        ),
        Signal(
            Templates.NAME,
            "Many captions are the same but for one word. So are generated ones; so are those of a catalogue.",
            f"captions of {Templates.MIN_WORDS} words or more with one word left out, counted; from {Templates.MIN_FILLS} "
            "different words in the gap on",
        ),
        Signal(
            ManyCaptions.NAME,
            "One image comes with captions that have nothing to do with each other. So does the picture of a targeted attack.",
            f"mean share of words that two of its captions have in common, at most {ManyCaptions.MAX_SHARED:.0%}; from "
            f"{ManyCaptions.MIN_CAPTIONS} different captions on",
        ),
        Signal(
            ManyImages.NAME,
            "One caption comes with images that look different. So does a target's caption; so does a lazy one.",
            f"looks of its images, by perceptual hash; from {ManyImages.MIN_LOOKS} on, for captions of {ManyImages.MIN_WORDS} "
            "words that say something, or more",
        ),
        Signal(
            PatchSearch.NAME,
            "Different images have the same small patch, at any place. So have those of a backdoor; so have those with a logo.",
            PatchSearch.COMPUTED,
        ),
        Signal(
            HASH_MISMATCH,
            "The bytes are others than those that the list was made from. So are they on a domain that changed hands.",
            "md5, sha256 or perceptual hash of the list against what was fetched (ingest.hash_check)",
        ),
    )
}


@dataclass(frozen=True)
class SuspicionSummary:
    """What `suspect` found."""

    samples: int
    images: int
    """Of which the picture was looked at for shared patches."""
    unreadable: int
    """Of these, images that could not be decoded."""
    named: dict[str, int]
    """Samples by signal; one sample may have several."""
    groups: dict[str, int]
    """By signal."""
    left_out: int
    """Groups beyond the first 10,000 of a signal."""
    worst: tuple[SuspectGroup, ...]
    """The highest groups of each signal; the rest stands in `suspicion_groups.parquet`."""


def suspect(
    root: str | Path,
    work: str | Path,
    *,
    records: Sequence[ShardRecord] | None = None,
    looks: NearDuplicateGroups | None = None,
    images: int = 100_000,
    threads: int = 1,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: Progress | None = None,
) -> SuspicionSummary:
    """Look for signs of poisoning among the sealed shards of `root`; write `suspicion.parquet` and
    `suspicion_groups.parquet` into the folder `work`. Both may be on a store.

    Args:
        records: The shards to look at, in the order of their names; without, all that are published.
        looks: What `find_duplicates` found; without it, it is found again.
        images: How many images are decoded and searched for shared patches, a random sample by key; 0 is none.
        threads: That decode images.
        memory_bytes: Bound of each of the things that are held.

    Raises `ShardError` for a shard that cannot be read.
    """
    manifest, work = Manifest(root), place(work)
    records = manifest.records() if records is None else records
    with scratch(work) as folder:
        look = _Look(manifest.root, records, folder, memory_bytes, images, on_progress)
        look.first_pass(looks)
        look.second_pass()
        look.patches.search(manifest.root, records, threads, look.findings, look.say)
        named = look.findings.write(manifest.root, work)
        groups = {name: look.findings.groups(name) for name in SIGNALS}
    return SuspicionSummary(
        samples=look.samples,
        images=look.patches.images,
        unreadable=look.patches.unreadable,
        named=named,
        groups={name: len(found) for name, found in groups.items()},
        left_out=look.findings.left_out,
        worst=tuple(finding for found in groups.values() for finding in found[:20]),
    )


class _Look:
    """The signals, and what is known between the passes."""

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
        self.findings = SuspectGroups(tuple(SIGNALS), records, self.keys, folder)
        self.hosts = HostTopics()
        self.templates = Templates(folder, expected, memory_bytes // 4)
        self.captions = ManyCaptions(folder, expected, memory_bytes // 4)
        self.images = ManyImages(folder, expected, memory_bytes // 4)
        self.patches = PatchSearch(folder, expected, images)
        self.looks = NearDuplicateGroups(np.zeros(0, np.uint64), np.zeros(0, np.uint64))

    def say(self, text: str) -> None:
        """One of three steps for each shard is done."""
        self._done += 1
        self._on_progress(self._done, 3 * len(self.records), text)

    def first_pass(self, looks: NearDuplicateGroups | None) -> None:
        """Count words, hosts and templates; find out what looks the same."""
        with ExternalGroupBy(
            self.folder / "hashes", _HASH, sum(record.samples for record in self.records), self.memory_bytes
        ) as hashes:
            for shard, table in samples(self.root, self.records, ("url", "caption", "phash")):
                self.keys.note(shard, table["key"])
                self.samples += len(table)
                said = normal_forms.words(normal_forms.normal_captions(table["caption"].combine_chunks()))
                _, host = _hosts(table)
                self.hosts.count(host, said)
                self.templates.count(said, len(table))
                if looks is None:
                    rows = np.empty(len(table), _HASH)
                    rows["phash"] = table["phash"].to_numpy()
                    rows["hash"] = normal_forms.mix(rows["phash"])
                    hashes.add(rows)
                self.say(f"suspicion: counted {self.samples} samples")
            self.looks = looks or near_duplicate_groups(hashes, self.folder, self.memory_bytes)
        self.hosts.choose()
        self.templates.choose()

    def second_pass(self) -> None:
        """Bring together what is to be compared, and judge it."""
        for shard, table in samples(self.root, self.records, ("url", "caption", "sha256", "phash", "flags")):
            keys = numbers(self.records[shard], table["key"])
            normal = normal_forms.normal_captions(table["caption"].combine_chunks())
            said, caption = normal_forms.words(normal), normal_forms.hashes(normal)
            sketches = normal_forms.sketches(said, len(table), WORDS)
            names, host = _hosts(table)
            phash = table["phash"].to_numpy()
            look = self.looks(phash)
            image = image_numbers(phash, look, normal_forms.sha_hashes(table["sha256"].combine_chunks()))
            self.hosts.assign(shard, keys, host, names, said, self.findings)
            self.templates.assign(shard, keys, said)
            self.captions.add(shard, keys, image, phash, caption, sketches)
            self.images.add(shard, keys, caption, phash, look, sketches)
            self.patches.choose(shard, keys, image, host, said)
            self._mismatches(shard, keys, table["flags"])
            self.say(f"suspicion: compared shard {shard + 1} of {len(self.records)}")
        for signal in (self.templates, self.captions, self.images):
            signal.finish(self.findings)

    def _mismatches(self, shard: int, keys: np.ndarray, flags: pa.ChunkedArray) -> None:
        differ = pc.match_substring_regex(flags, rf"(^|,){HASH_MISMATCH}(,|$)").to_numpy()
        if differ.any():
            self.findings.open(HASH_MISMATCH, 0, 0.5, "The list promises other bytes than arrived.")
            self.findings.add(HASH_MISMATCH, 0, np.full(int(differ.sum()), shard), keys[differ])


def _hosts(table: pa.Table) -> tuple[pa.Array, np.ndarray]:
    """The host of each sample as text and as a hash, 0 for none."""
    names = normal_forms.hosts(table["url"].combine_chunks())
    return names, np.where(pc.equal(names, "").to_numpy(zero_copy_only=False), 0, normal_forms.hash_each(names)).astype(
        np.uint64
    )
