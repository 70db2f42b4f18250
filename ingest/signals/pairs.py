"""Signals of mismatched pairs: one image under captions of many kinds, and one caption on images of many kinds."""

from pathlib import Path

import numpy as np

from ingest.signals.group_by import ExternalGroupBy
from ingest.signals.near_duplicates import DISTANCE, bits, is_informative
from ingest.signals.normal_forms import mix
from ingest.signals.suspect_groups import SuspectGroups

MINHASHES = 8
"""Length of a caption's MinHash signature."""
MAX_COMPARED = 64
"""Members of a group that are compared for its score; the others share it."""
_OF_IMAGE = np.dtype(
    [
        ("hash", "<u8"),
        ("phash", "<u8"),
        ("caption", "<u8"),
        ("words", "<u4", (MINHASHES,)),
        ("key", "<u8"),
        ("shard", "<u4"),
    ]
)
_OF_CAPTION = np.dtype(
    [("hash", "<u8"), ("phash", "<u8"), ("near_group", "<u8"), ("words", "u1"), ("key", "<u8"), ("shard", "<u4")]
)


class ManyCaptions:
    """`one_image_many_captions`: the same image (same bytes, or near duplicates) under captions that share no content words.

    With m different captions and J the mean Jaccard index of the content words of two of them: score = (1 - J) (1 - 2^(-(m - 1)
    / 2)), where m >= MIN_CAPTIONS and J <= MAX_SHARED. Of a near-duplicate group, only the images within DISTANCE bits of its
    medoid are taken: chains of catalogue photos are long.
    """

    NAME = "one_image_many_captions"
    MIN_CAPTIONS = 3
    MAX_SHARED = 0.34

    def __init__(self, folder: Path, expected_rows: int, memory_bytes: int):
        self._rows = ExternalGroupBy(folder / "images", _OF_IMAGE, expected_rows, memory_bytes)

    def add(
        self,
        shard: int,
        keys: np.ndarray,
        image: np.ndarray,
        phash: np.ndarray,
        caption: np.ndarray,
        minhashes: np.ndarray,
    ) -> None:
        """Add samples: image (B,) and caption (B,) as hashes, 0 for an unknown image."""
        rows = np.empty(len(keys), _OF_IMAGE)
        rows["hash"], rows["phash"], rows["caption"], rows["words"] = image, phash, caption, minhashes
        rows["key"], rows["shard"] = keys, shard
        self._rows.add(rows[image != 0])

    def finish(self, suspect_groups: SuspectGroups) -> None:
        """Score each image."""
        medoid = np.uint64(0)
        with self._rows as group_by:
            for groups in group_by.groups(self.MIN_CAPTIONS):
                for start, rows in groups.runs():
                    if groups.rank[start] == 0:
                        medoid = _medoid(rows["phash"][:MAX_COMPARED])
                        self._score(_near(rows[:MAX_COMPARED], medoid), suspect_groups)
                    rows = _near(rows, medoid)
                    suspect_groups.add(self.NAME, int(rows["hash"][0]), rows["shard"], rows["key"])

    def _score(self, rows: np.ndarray, suspect_groups: SuspectGroups) -> None:
        _, first = np.unique(rows["caption"], return_index=True)
        number = len(first)
        if number < self.MIN_CAPTIONS:
            return
        shared = _mean_shared(rows["words"][first])
        if shared > self.MAX_SHARED:
            return
        score = (1 - shared) * (1 - 2.0 ** (-(number - 1) / 2))
        evidence = f"{len(rows)} samples that were compared show this image, with {number} different captions"
        evidence = f"{evidence}; two of them share {shared:.0%} of their words."
        suspect_groups.open(self.NAME, int(rows["hash"][0]), score, evidence)


class ManyImages:
    """`one_caption_many_images`: one caption on images that look different.

    With n near-duplicate groups among the MAX_COMPARED samples that are compared, w content words and d the median number of
    bits in which two perceptual hashes differ:  score = (1 - 2^(-n / 16)) min(1, w / 6), where n >= MIN_IMAGES, w >= MIN_WORDS
    and d >= MIN_DISTANCE. A short caption such as "image" fits everything and carries no information.
    """

    NAME = "one_caption_many_images"
    MIN_IMAGES = 8
    MIN_WORDS = 3
    MIN_DISTANCE = 16

    def __init__(self, folder: Path, expected_rows: int, memory_bytes: int):
        self._rows = ExternalGroupBy(folder / "captions", _OF_CAPTION, expected_rows, memory_bytes)

    def add(
        self,
        shard: int,
        keys: np.ndarray,
        caption: np.ndarray,
        phash: np.ndarray,
        near_group: np.ndarray,
        minhashes: np.ndarray,
    ) -> None:
        """Add samples: caption (B,) as a hash, its signature, and perceptual hash and near-duplicate group of the image."""
        rows = np.empty(len(keys), _OF_CAPTION)
        rows["hash"], rows["phash"], rows["near_group"], rows["key"], rows["shard"] = (
            caption,
            phash,
            near_group,
            keys,
            shard,
        )
        rows["words"] = (minhashes != 0).sum(axis=1)
        self._rows.add(rows[is_informative(phash) & (rows["words"] >= self.MIN_WORDS)])

    def finish(self, suspect_groups: SuspectGroups) -> None:
        """Score each caption."""
        with self._rows as group_by:
            for groups in group_by.groups(self.MIN_IMAGES):
                for start, rows in groups.runs():
                    if groups.rank[start] == 0:
                        self._score(rows[:MAX_COMPARED], int(groups.size[start]), suspect_groups)
                    suspect_groups.add(self.NAME, int(rows["hash"][0]), rows["shard"], rows["key"])

    def _score(self, rows: np.ndarray, size: int, suspect_groups: SuspectGroups) -> None:
        _, first = np.unique(rows["near_group"], return_index=True)
        phash = rows["phash"][first]
        if len(phash) < self.MIN_IMAGES:
            return
        low, high = np.triu_indices(len(phash), 1)
        distance = float(np.median(bits(phash[low] ^ phash[high])))
        if distance < self.MIN_DISTANCE:
            return
        words = int(rows["words"][0])
        score = (1 - 2.0 ** (-len(phash) / 16)) * min(1.0, words / 6)
        compared = f" among the first {len(rows)}" if size > len(rows) else ""
        evidence = f"{size} samples have this caption, with {len(phash)} images that look different{compared}"
        evidence = f"{evidence} ({distance:.0f} of 64 bits)."
        suspect_groups.open(self.NAME, int(rows["hash"][0]), score, evidence)


def image_ids(phash: np.ndarray, near_group: np.ndarray, sha: np.ndarray) -> np.ndarray:
    """The identity of each image: its near-duplicate group, or else its bytes; 0 if neither is known."""
    return np.where(is_informative(phash), mix(near_group), sha)


def _medoid(phash: np.ndarray) -> np.uint64:
    """The hash with the fewest differing bits to all others."""
    return np.uint64(phash[bits(phash[:, None] ^ phash[None]).sum(axis=1).argmin()])


def _near(rows: np.ndarray, medoid: np.uint64) -> np.ndarray:
    return rows[bits(rows["phash"] ^ medoid) <= DISTANCE]


def _mean_shared(words: np.ndarray) -> float:
    """Mean Jaccard index of all pairs of signatures, (m, MINHASHES) uint32 padded with zeros."""
    same = (words[:, None, :, None] == words[None, :, None, :]) & (words != 0)[:, None, :, None]
    common = same.any(axis=3).sum(axis=2)
    number = (words != 0).sum(axis=1)
    union = np.maximum(1, number[:, None] + number[None] - common)
    low, high = np.triu_indices(len(words), 1)
    return float((common / union)[low, high].mean())
