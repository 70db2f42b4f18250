"""`shared_patch`: different images with the same small patch, at any position. A BadNets trigger is one; a logo is, too.

The windows of images (`patches.py`) are points in a space of 48 colours. Natural windows form clouds: around a point with some
images near it, there are several times as many a little farther away. A copied patch is isolated: there is nothing else around
it. So a candidate point counts as a peak if

    images within NEAR  >=  PEAK * images within FAR        (root mean square of the difference, in levels of 0 to 255)

In 34,000 clean photos the highest ratio was 0.37, at a point that every seventh of them has; so patches in more than MAX_FRAC
of the images are ignored. Near-duplicate images count once. The candidates come from locality-sensitive hashing (signs of
random projections, Charikar, STOC 2002): they are the means of buckets of similar windows. Peaks that share images, or are
close, are one patch.

It cannot find what is not copied: fresh noise, a blend over the whole image, a warp; nor a patch of one colour, whose windows
contain what is behind it. Letters: N windows, C candidates, L near-duplicate groups.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.compute
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ingest.folder.sealed import rows
from ingest.signals import normal_forms, patches
from ingest.signals.suspect_groups import MAX_SHOWN_CHARS, SuspectGroups
from roclip.data.shards import ShardRecord, read_index, tar_path
from roclip.storage import patiently

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
NEAR, MEMBER, FAR = 24.0, 36.0, 42.0
PEAK = 0.5
MAX_FRAC = 0.1
"""Largest fraction of the images."""
MIN_IMAGES = 8
TABLES, BITS = 10, 18
SPREAD = 30.0
"""Largest spread of a bucket around its mean; wider ones are no candidates."""
MAX_CANDIDATES = 512
SAMPLE = 20_000
"""Windows that estimate the density around a candidate."""
_ALIKE = 12.0
_BUCKET = 4096
"""Windows of one bucket that are averaged."""
_BLOCK = 1 << 14
_AT_A_TIME = 64
_WORDS = 16
_IMAGE = np.dtype(
    [("key", "<u8"), ("shard", "<u4"), ("near_group", "<u8"), ("host", "<u8"), ("words", "<u4", (_WORDS,))]
)
_WINDOW = np.dtype([("numbers", "u1", (patches.WIDTH,)), ("box", "<u2", (4,)), ("image", "<u4")])


@dataclass(frozen=True)
class SharedPatch:
    """Images that share a patch."""

    images: np.ndarray
    """(n,) indices of chosen images, ascending."""
    boxes: np.ndarray
    """(n, 4) uint16."""
    peak: float
    """Images within NEAR over images within FAR, of the best candidate."""


class PatchSearch:
    """Samples images, describes their windows, and finds the patches that they share.

    Args:
        folder: Temporary folder.
        expected: Number of all images.
        images: How many of them are searched: those whose keys, mixed, are smallest.
    """

    NAME = "shared_patch"
    COMPUTED = (
        f"windows of {patches.WINDOW_PX} px at the {patches.CORNERS} strongest corners of an image at "
        f"{' and '.join(map(str, patches.SIDES_PX))} px; a place among them is a peak where images within {NEAR:.0f} levels "
        f"are {PEAK:.0%} of those within {FAR:.0f}; from {MIN_IMAGES} different images to {MAX_FRAC:.0%} of all; "
        "the score halves where their captions have no word in common"
    )

    def __init__(self, folder: Path, expected: int, images: int):
        self.folder, self.expected = folder, expected
        share = min(1.0, images / max(1, expected))
        self._limit = np.uint64(min(2**64 - 1, int(share * 2**64)))
        self._everything, self._nothing = share >= 1, images == 0
        self._chosen: list[np.ndarray] = []
        self.images = self.unreadable = 0

    def choose(
        self,
        shard: int,
        keys: np.ndarray,
        near_group: np.ndarray,
        host: np.ndarray,
        caption_words: normal_forms.CaptionWords,
    ) -> None:
        """Add samples (B,), with their image ids and hosts as numbers, 0 for unknown."""
        chosen = np.flatnonzero((normal_forms.mix(keys) < self._limit) | self._everything)
        if self._nothing or not len(chosen):
            return
        rows = np.empty(len(chosen), _IMAGE)
        rows["key"], rows["shard"], rows["host"] = keys[chosen], shard, host[chosen]
        rows["near_group"] = np.where(near_group[chosen] == 0, normal_forms.mix(keys[chosen]), near_group[chosen])
        rows["words"] = normal_forms.minhashes(caption_words, len(keys), _WORDS)[chosen]
        self._chosen.append(rows)

    def search(
        self, root: Path, records: Sequence[ShardRecord], threads: int, suspect_groups: SuspectGroups, on_progress: Any
    ) -> None:
        """Search the chosen images, one shard after the other, and add the groups that share a patch."""
        images = np.concatenate([np.zeros(0, _IMAGE), *self._chosen])
        path = self.folder / "windows"
        with path.open("wb") as file, ThreadPoolExecutor(threads) as pool:
            for shard, record in enumerate(records):
                first, last = np.searchsorted(images["shard"], [shard, shard + 1]).tolist()
                encoded = _encoded(root, record, images["key"][first:last])
                for number, found in enumerate(_each(pool, encoded), first):
                    self.images += 1
                    self.unreadable += found is None
                    if found is not None:
                        rows = np.empty(len(found.numbers), _WINDOW)
                        rows["numbers"], rows["box"], rows["image"] = found.numbers, found.boxes, number
                        rows.tofile(file)
                on_progress(f"suspicion: looked at {self.images} images")
        if path.stat().st_size:
            windows = np.memmap(path, _WINDOW, "r")
            near_groups, near_group = np.unique(images["near_group"], return_inverse=True)
            for patch in find_shared_patches(windows, near_group.reshape(-1), len(near_groups)):
                self._report(patch, images, root, records, suspect_groups)
            del windows
        path.unlink()

    def _report(
        self,
        patch: SharedPatch,
        images: np.ndarray,
        root: Path,
        records: Sequence[ShardRecord],
        suspect_groups: SuspectGroups,
    ) -> None:
        members = images[patch.images]
        number = int(normal_forms.mix(members["key"][:1])[0])
        near_groups, hosts = len(np.unique(members["near_group"])), len(np.unique(members["host"]))
        word, inside, outside = _common_word(members["words"], images["words"])
        coherence = max(0.0, (inside - outside) / max(1e-9, 1 - outside))
        score = min(1.0, patch.peak / 0.6) * (1 + coherence) / 2
        text = _word_text(word, members, root, records)
        suspect_groups.open(
            self.NAME,
            number,
            score,
            f"{near_groups} images that look different have the same patch, {patch.peak:.0%} of all images with similar ones; "
            f"they come from {hosts} hosts. {inside:.0%} of their captions have the word “{text}”, {outside:.1%} of all do. "
            f"{len(images)} of {self.expected} images were searched.",
        )
        suspect_groups.add(self.NAME, number, members["shard"], members["key"], patch.boxes)


def find_shared_patches(
    windows: np.ndarray, near_group: np.ndarray, near_groups: int, seed: int = 0
) -> list[SharedPatch]:
    """The patches that images share, those of most images first.

    Args:
        windows: (N,) with the fields numbers, box and image; may be memory-mapped.
        near_group: (images,) int: index of each image's near-duplicate group, below `near_groups`.
    """
    rng = np.random.default_rng(seed)
    sample = windows["numbers"][np.sort(rng.choice(len(windows), min(SAMPLE, len(windows)), replace=False))].astype(
        np.float32
    )
    candidates = _candidates(windows, near_group, sample, rng)
    near, far = _images_around(windows, near_group, near_groups, candidates)
    peaks = (near >= MIN_IMAGES) & (near <= MAX_FRAC * near_groups) & (near >= PEAK * far)
    return _merge_peaks(windows, near_group, candidates[peaks], (near / np.maximum(1, far))[peaks])


def _candidates(
    windows: np.ndarray, near_group: np.ndarray, sample: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(C, 48): means of buckets with similar windows of several images, the most isolated first, without similar ones."""
    center = sample.mean(axis=0)
    means, isolation = [np.zeros((0, patches.WIDTH), np.float32)], [np.zeros(0)]
    for _ in range(TABLES):
        planes = rng.standard_normal((patches.WIDTH, BITS)).astype(np.float32)
        code = np.concatenate([_codes(block["numbers"], center, planes) for block in _blocks(windows)])
        for mean, images in _buckets(windows, near_group, code):
            around = [
                _within(some, sample, FAR).sum(axis=1) for some in np.array_split(mean, len(mean) // _AT_A_TIME + 1)
            ]
            crowd = np.concatenate(around) * (len(windows) / len(sample))
            means.append(mean)
            isolation.append(images / (images + crowd))
        best = np.argsort(-np.concatenate(isolation), kind="stable")[: 16 * MAX_CANDIDATES]
        means, isolation = [np.concatenate(means)[best]], [np.concatenate(isolation)[best]]
    kept = np.zeros((0, patches.WIDTH), np.float32)
    for mean in means[0]:
        if len(kept) == MAX_CANDIDATES:
            break
        if not _within(mean[None], kept, _ALIKE).any():
            kept = np.concatenate([kept, mean[None]])
    return kept


def _codes(numbers: np.ndarray, center: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """(n,) uint32: on which side of each hyperplane."""
    return (((numbers - center) @ planes > 0) @ (1 << np.arange(BITS))).astype(np.uint32)


def _buckets(windows: np.ndarray, near_group: np.ndarray, code: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of the buckets that are narrow and have enough images: means (b, 48), and numbers of images (b,)."""
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(code[order]) != 0]))
    sizes = np.diff(np.append(starts, len(code)))
    starts, sizes = starts[sizes >= MIN_IMAGES], np.minimum(sizes[sizes >= MIN_IMAGES], _BUCKET)
    for part in np.array_split(np.arange(len(starts)), max(1, -(-int(sizes.sum()) // _BLOCK))):
        if not len(part):
            continue
        size = sizes[part]
        bounds = np.concatenate([[0], np.cumsum(size)[:-1]])
        at = order[np.repeat(starts[part] - bounds, size) + np.arange(size.sum())]
        rows = windows[at]
        numbers = rows["numbers"].astype(np.float32)
        mean = np.add.reduceat(numbers, bounds) / size[:, None]
        spread = np.add.reduceat(((numbers - np.repeat(mean, size, axis=0)) ** 2).mean(axis=1), bounds) / size
        bucket = np.repeat(np.arange(len(part)), size)
        different = np.unique(bucket.astype(np.int64) << 32 | near_group[rows["image"]])
        images = np.bincount(different >> 32, minlength=len(part))
        good = (spread < SPREAD**2) & (images >= MIN_IMAGES)
        yield mean[good], images[good]


def _images_around(
    windows: np.ndarray, near_group: np.ndarray, near_groups: int, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(C,) and (C,): near-duplicate groups with a window within NEAR of each candidate, and within FAR."""
    near, far = np.zeros(len(candidates), np.int64), np.zeros(len(candidates), np.int64)
    for first in range(0, len(candidates), _AT_A_TIME):
        some = candidates[first : first + _AT_A_TIME]
        seen = np.zeros((2, len(some), near_groups), bool)
        for block in _blocks(windows):
            distance = _distance(some, block["numbers"].astype(np.float32))
            for which, radius in enumerate((NEAR, FAR)):
                candidate, window = np.nonzero(distance < radius**2)
                seen[which, candidate, near_group[block["image"][window]]] = True
        near[first : first + len(some)], far[first : first + len(some)] = seen.sum(axis=2)
    return near, far


def _merge_peaks(
    windows: np.ndarray, near_group: np.ndarray, candidates: np.ndarray, peak: np.ndarray
) -> list[SharedPatch]:
    """Merge peaks that share images, or are close, into patches."""
    if not len(candidates):
        return []
    hits = [
        _hits(block, first, candidates)
        for first, block in zip(range(0, len(windows), _BLOCK), _blocks(windows), strict=True)
    ]
    candidate, window = np.concatenate(hits, axis=1)
    image = windows["image"][window].astype(np.int64)
    images = int(image.max()) + 1
    has = coo_matrix((np.ones(len(candidate)), (candidate, image)), shape=(len(candidates), images)).tocsr()
    has.data[:] = 1
    common = (has @ has.T).toarray()
    one, other = common.diagonal()[:, None], common.diagonal()[None]
    same = (common >= 0.3 * np.minimum(one, other)) & (common >= 0.1 * np.maximum(one, other))
    same |= _distance(candidates, candidates) < NEAR**2
    number, of_patch = connected_components(coo_matrix(same), directed=False)
    found = []
    for patch in range(number):
        mine = of_patch[candidate] == patch
        members = np.unique(image[mine])
        boxes = windows["box"][window[mine]]
        order = np.argsort(image[mine], kind="stable")
        starts = np.searchsorted(image[mine][order], members)
        low, high = np.minimum.reduceat(boxes[order], starts), np.maximum.reduceat(boxes[order], starts)
        found.append(
            SharedPatch(
                members, np.concatenate([low[:, :2], high[:, 2:]], axis=1), float(peak[of_patch == patch].max())
            )
        )
    return sorted(found, key=lambda patch: (-len(np.unique(near_group[patch.images])), patch.images[0]))


def _hits(block: np.ndarray, first: int, candidates: np.ndarray) -> np.ndarray:
    """(2, h): candidate and window of each pair within MEMBER."""
    candidate, window = np.nonzero(_distance(candidates, block["numbers"].astype(np.float32)) < MEMBER**2)
    return np.stack([candidate, window + first])


def _blocks(windows: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(windows), _BLOCK):
        yield np.asarray(windows[first : first + _BLOCK])


def _distance(candidates: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(C, n): mean square of the difference."""
    square = (candidates**2).sum(axis=1)[:, None] + (numbers**2).sum(axis=1)[None] - 2 * (candidates @ numbers.T)
    return square / patches.WIDTH


def _within(candidates: np.ndarray, numbers: np.ndarray, radius: float) -> np.ndarray:
    return _distance(candidates, numbers) < radius**2


def _each(pool: ThreadPoolExecutor, encoded: Iterator[bytes | None]) -> Iterator[patches.Windows | None]:
    while some := list(islice(encoded, _AT_A_TIME)):
        yield from pool.map(_windows, some)


def _windows(encoded: bytes | None) -> patches.Windows | None:
    image = patches.decode(encoded) if encoded else None
    return None if image is None else patches.windows(image)


def _encoded(root: Path, record: ShardRecord, keys: np.ndarray) -> Iterator[bytes | None]:
    """The stored images of some samples, in the order of `keys`; None if the tar does not contain all of one."""
    if not len(keys):
        return
    index = read_index(root, record.name, ["key", "image_offset", "image_size"])
    at = dict(zip(map(int, index["key"].to_pylist()), range(len(index)), strict=True))
    offsets, sizes = index["image_offset"].to_pylist(), index["image_size"].to_pylist()
    tar: Any = tar_path(root, record)
    given = 0
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tar.open("rb")) if isinstance(tar, Path) else None
            for key in keys.tolist():
                piece = _piece(tar, file, offsets[at[key]], sizes[at[key]])
                given += 1
                yield piece if len(piece) == sizes[at[key]] else None
        except FileNotFoundError:
            yield from [None] * (len(keys) - given)


def _piece(tar: Any, file: BinaryIO | None, offset: int, size: int) -> bytes:
    if file is None:
        return patiently(lambda: tar.fs.cat_file(tar.path, start=offset, end=offset + size))
    file.seek(offset)
    return file.read(size)


def _common_word(inside: np.ndarray, everywhere: np.ndarray) -> tuple[int, float, float]:
    """The word that is most over-represented in the members' captions: its hash, its share there and among all."""
    numbers, counts = np.unique(inside[inside != 0], return_counts=True)
    if not len(numbers):
        return 0, 0.0, 0.0
    at = np.minimum(np.searchsorted(numbers, everywhere), len(numbers) - 1)
    among_all = np.bincount(at[numbers[at] == everywhere], minlength=len(numbers)) / len(everywhere)
    best = int(np.argmax(counts / len(inside) - among_all))
    return int(numbers[best]), float(counts[best] / len(inside)), float(among_all[best])


def _word_text(word: int, members: np.ndarray, root: Path, records: Sequence[ShardRecord]) -> str:
    """The word behind a hash of a signature, from the caption of a member that has it."""
    for member in members[(members["words"] == word).any(axis=1)][:1] if word else ():
        table = rows(root, records[int(member["shard"])], ("caption",))
        tokens = table.filter(pc.equal(table["key"].cast("uint64"), int(member["key"])))
        caption_words = normal_forms.words(normal_forms.normal_captions(tokens["caption"].combine_chunks()))
        for text, number in zip(
            caption_words.known.to_pylist(), normal_forms.short(caption_words.hash).tolist(), strict=True
        ):
            if number == word:
                return text[:MAX_SHOWN_CHARS]
    return ""
