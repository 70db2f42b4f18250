"""Which images look the same, by 64-bit perceptual hashes that differ in at most 3 bits, over any number of images.

Hashes are cut into 5 blocks. Two that differ in 3 bits agree in 2 blocks at least, so each pair meets in one of 10 tables
(Manku, Jain, Das Sarma: Detecting Near-Duplicates for Web Crawling, WWW 2007). There it is compared bit by bit. Alike is
then whatever is connected by such pairs.

Bounded work: where many hashes agree in two blocks, each is compared with the next `WINDOW` in order only.
"""

from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ingest.signals.group_by import MEMORY_BYTES, ExternalGroupBy, HashGroups
from ingest.signals.normal_forms import mix

DISTANCE = 3
"""Bits in which two hashes of one look may differ."""
BLOCKS = 5
WINDOW = 64
FLAT_BITS = 6
"""A hash with fewer ones, or fewer zeros, says nothing: it is of a plain surface."""
_PAIR = np.dtype([("hash", "<u8"), ("phash", "<u8")])
_BYTES_PER_LINK = 64
"""What a linked hash costs while links are joined."""


def bits(numbers: np.ndarray) -> np.ndarray:
    """Number of ones in each uint64, as uint8."""
    with np.errstate(over="ignore"):
        x = numbers - ((numbers >> np.uint64(1)) & np.uint64(0x5555555555555555))
        x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
        x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def telling(phash: np.ndarray) -> np.ndarray:
    """Which hashes say something: neither absent (0) nor of a plain surface."""
    ones = bits(phash)
    return (ones >= FLAT_BITS) & (ones <= 64 - FLAT_BITS)


class NearDuplicateGroups:
    """Which look each perceptual hash belongs to: the smallest hash that it is connected with.

    Args:
        linked: Hashes that are connected with a smaller one, ascending.
        look: That smallest one.
        left_out: Links that did not fit into memory.
        windowed: Comparisons that were cut off at `WINDOW`, counted by hash and table.
    """

    def __init__(self, linked: np.ndarray, look: np.ndarray, left_out: int = 0, windowed: int = 0):
        self.linked, self._look = linked, look
        self.roots = np.unique(look)
        self.left_out, self.windowed = left_out, windowed

    def __call__(self, phash: np.ndarray) -> np.ndarray:
        """The look of each hash; of one that is connected with none, itself."""
        if not len(self.linked):
            return phash
        at = np.minimum(np.searchsorted(self.linked, phash), len(self.linked) - 1)
        return np.where(self.linked[at] == phash, self._look[at], phash)


def near_duplicate_groups(
    hashes: ExternalGroupBy, folder: Path, memory_bytes: int = MEMORY_BYTES
) -> NearDuplicateGroups:
    """Connect the perceptual hashes of a spill, whose rows have the field `phash` and its `mix` as `hash`."""
    links = _Links(memory_bytes // _BYTES_PER_LINK)
    distinct, number = folder / "distinct", 0
    with distinct.open("wb") as file:
        for groups in hashes.groups(1):
            phash = groups.rows["phash"][groups.rank == 0]
            phash = phash[telling(phash)]
            number += len(phash)
            phash.tofile(file)
    windowed = 0
    for table, mask in enumerate(_masks()):
        with ExternalGroupBy(folder / f"table{table}", _PAIR, number, memory_bytes) as spill:
            for phash in _pieces(distinct):
                rows = np.empty(len(phash), _PAIR)
                rows["hash"], rows["phash"] = mix(phash & mask), phash
                spill.add(rows)
            for groups in spill.groups():
                windowed += _compare(groups, links)
    distinct.unlink()
    linked, look = links.joined()
    return NearDuplicateGroups(linked, look, links.left_out, windowed)


def _masks() -> Iterator[np.uint64]:
    """The bits in which the hashes of a table agree: those of all blocks but `DISTANCE`."""
    bounds = np.linspace(0, 64, BLOCKS + 1).round().astype(int).tolist()
    blocks = [(1 << high) - (1 << low) for low, high in pairwise(bounds)]
    for chosen in combinations(blocks, BLOCKS - DISTANCE):
        yield np.uint64(sum(chosen))


def _pieces(path: Path, number: int = 1 << 18) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(piece := np.fromfile(file, "<u8", number)):
            yield piece


def _compare(groups: HashGroups, links: "_Links") -> int:
    """Link what is near within each group; how many hashes were not compared with all of theirs."""
    order = np.lexsort((groups.rows["phash"], groups.rows["hash"]))
    group, phash = groups.rows["hash"][order], groups.rows["phash"][order]
    at = np.arange(len(phash))
    for step in range(1, WINDOW + 1):
        at = at[at + step < len(phash)]
        at = at[group[at] == group[at + step]]
        if not len(at):
            return 0
        near = at[bits(phash[at] ^ phash[at + step]) <= DISTANCE]
        links.add(phash[near], phash[near + step])
    return len(at)


class _Links:
    """Pairs that are connected, kept as a forest: each hash with a smaller one."""

    def __init__(self, most: int):
        self.most, self.left_out = most, 0
        self._low: list[np.ndarray] = []
        self._high: list[np.ndarray] = []
        self._held = 0

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        self._low.append(first)
        self._high.append(second)
        self._held += len(first)
        if self._held > 2 * self.most:
            self.joined()

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes, ascending, and the smallest that each is connected with, where that is another."""
        if not self._held:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        nodes, at = np.unique(np.concatenate([*self._low, *self._high]), return_inverse=True)
        low, high = np.split(at.reshape(-1), 2)
        graph = coo_matrix((np.ones(len(low), np.int8), (low, high)), shape=(len(nodes), len(nodes)))
        _, component = connected_components(graph, directed=False)
        _, smallest = np.unique(component, return_index=True)  # nodes ascend, so the first is the smallest
        root = nodes[smallest][component]
        linked = root != nodes
        nodes, root = nodes[linked], root[linked]
        self.left_out += max(0, len(nodes) - self.most)
        nodes, root = nodes[: self.most], root[: self.most]
        self._low, self._high, self._held = [root], [nodes], len(nodes)
        return nodes, root
