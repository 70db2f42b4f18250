"""Signals of pairs that do not fit: one image under captions of many kinds, and one caption on images of many kinds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ingest.signals.findings import SuspectGroups
from ingest.signals.group_by import ExternalGroupBy, HashGroups
from ingest.signals.near_duplicates import DISTANCE, bits, telling
from ingest.signals.normal_forms import mix

WORDS = 8
"""Of a caption's sketch."""
LOOKED_AT = 64
"""Members of a group that its score is made from; the others share it."""
_OF_IMAGE = np.dtype(
    [
        ("hash", "<u8"),
        ("phash", "<u8"),
        ("caption", "<u8"),
        ("words", "<u4", (WORDS,)),
        ("key", "<u8"),
        ("shard", "<u4"),
    ]
)
_OF_CAPTION = np.dtype(
    [("hash", "<u8"), ("phash", "<u8"), ("look", "<u8"), ("words", "u1"), ("key", "<u8"), ("shard", "<u4")]
)


class ManyCaptions:
    """`one_image_many_captions`: images that are the same (bytes, or look) under captions that share no content words.

    With m different captions and J the mean share of content words that two of them have in common (Jaccard):
    score = (1 - J) (1 - 2^(-(m - 1) / 2)), where m >= MIN_CAPTIONS and J <= MAX_SHARED. Of a look, only the images within
    DISTANCE bits of its middle one are taken: chains of catalogue photos are long.
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
        sketches: np.ndarray,
    ) -> None:
        """Samples: image (B,) and caption (B,) as hashes, 0 for an image that nothing is known of."""
        rows = np.empty(len(keys), _OF_IMAGE)
        rows["hash"], rows["phash"], rows["caption"], rows["words"] = image, phash, caption, sketches
        rows["key"], rows["shard"] = keys, shard
        self._rows.add(rows[image != 0])

    def finish(self, into: SuspectGroups) -> None:
        """Judge each image."""
        middle = np.uint64(0)
        with self._rows as spill:
            for groups in spill.groups(self.MIN_CAPTIONS):
                for start, rows in _runs(groups):
                    if groups.rank[start] == 0:
                        middle = _middle(rows["phash"][:LOOKED_AT])
                        self._judge(_near(rows[:LOOKED_AT], middle), into)
                    rows = _near(rows, middle)
                    into.add(self.NAME, int(rows["hash"][0]), rows["shard"], rows["key"])

    def _judge(self, rows: np.ndarray, into: SuspectGroups) -> None:
        _, first = np.unique(rows["caption"], return_index=True)
        number = len(first)
        if number < self.MIN_CAPTIONS:
            return
        shared = _mean_shared(rows["words"][first])
        if shared > self.MAX_SHARED:
            return
        score = (1 - shared) * (1 - 2.0 ** (-(number - 1) / 2))
        said = f"{len(rows)} samples that were compared show this image, with {number} different captions"
        said = f"{said}; two of them share {shared:.0%} of their words."
        into.open(self.NAME, int(rows["hash"][0]), score, said)


class ManyImages:
    """`one_caption_many_images`: one caption on images that look different.

    With n different looks of the LOOKED_AT samples that are compared, w content words and d the median number of bits in
    which two perceptual hashes differ:  score = (1 - 2^(-n / 16)) min(1, w / 6), where n >= MIN_LOOKS, w >= MIN_WORDS and
    d >= MIN_DISTANCE. A short caption such as "image" says nothing and fits all.
    """

    NAME = "one_caption_many_images"
    MIN_LOOKS = 8
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
        look: np.ndarray,
        sketches: np.ndarray,
    ) -> None:
        """Samples: caption (B,) as a hash, its sketch, and perceptual hash and look of the image."""
        rows = np.empty(len(keys), _OF_CAPTION)
        rows["hash"], rows["phash"], rows["look"], rows["key"], rows["shard"] = caption, phash, look, keys, shard
        rows["words"] = (sketches != 0).sum(axis=1)
        self._rows.add(rows[telling(phash) & (rows["words"] >= self.MIN_WORDS)])

    def finish(self, into: SuspectGroups) -> None:
        """Judge each caption."""
        with self._rows as spill:
            for groups in spill.groups(self.MIN_LOOKS):
                for start, rows in _runs(groups):
                    if groups.rank[start] == 0:
                        self._judge(rows[:LOOKED_AT], int(groups.size[start]), into)
                    into.add(self.NAME, int(rows["hash"][0]), rows["shard"], rows["key"])

    def _judge(self, rows: np.ndarray, size: int, into: SuspectGroups) -> None:
        _, first = np.unique(rows["look"], return_index=True)
        phash = rows["phash"][first]
        if len(phash) < self.MIN_LOOKS:
            return
        low, high = np.triu_indices(len(phash), 1)
        distance = float(np.median(bits(phash[low] ^ phash[high])))
        if distance < self.MIN_DISTANCE:
            return
        words = int(rows["words"][0])
        score = (1 - 2.0 ** (-len(phash) / 16)) * min(1.0, words / 6)
        looked = f" among the first {len(rows)}" if size > len(rows) else ""
        said = f"{size} samples have this caption, with {len(phash)} images that look different{looked}"
        said = f"{said} ({distance:.0f} of 64 bits)."
        into.open(self.NAME, int(rows["hash"][0]), score, said)


def image_numbers(phash: np.ndarray, look: np.ndarray, sha: np.ndarray) -> np.ndarray:
    """By what an image is the same: its look, else its bytes; 0 where neither is known."""
    return np.where(telling(phash), mix(look), sha)


def _runs(groups: HashGroups) -> Iterator[tuple[int, np.ndarray]]:
    bounds = groups.starts()
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield start, groups.rows[start:stop]


def _middle(phash: np.ndarray) -> np.uint64:
    """That with the fewest bits between it and the others."""
    return np.uint64(phash[bits(phash[:, None] ^ phash[None]).sum(axis=1).argmin()])


def _near(rows: np.ndarray, middle: np.uint64) -> np.ndarray:
    return rows[bits(rows["phash"] ^ middle) <= DISTANCE]


def _mean_shared(words: np.ndarray) -> float:
    """Mean Jaccard index of all pairs of sketches, (m, WORDS) uint32 with zeros for no word."""
    same = (words[:, None, :, None] == words[None, :, None, :]) & (words != 0)[:, None, :, None]
    common = same.any(axis=3).sum(axis=2)
    number = (words != 0).sum(axis=1)
    union = np.maximum(1, number[:, None] + number[None] - common)
    low, high = np.triu_indices(len(words), 1)
    return float((common / union)[low, high].mean())
