"""Groups near-duplicate images, by 64-bit perceptual hashes that differ in at most 3 bits, for any number of images.

Hashes are cut into 5 blocks. Two that differ in 3 bits agree in at least 2 blocks, so each pair meets in one of 10 tables
(Manku, Jain, Das Sarma: Detecting Near-Duplicates for Web Crawling, WWW 2007), where they are compared bit by bit. A group is a
connected component of such pairs.

Bounded work: if many hashes agree in two blocks, each is compared only with the next `WINDOW` in order.
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
"""Most bits in which two linked hashes differ."""
BLOCKS = 5
WINDOW = 64
FLAT_BITS = 6
"""A hash with fewer ones, or fewer zeros, is of a plain surface and carries no information."""
_PAIR = np.dtype([("hash", "<u8"), ("phash", "<u8")])
_BYTES_PER_LINK = 64
"""Memory per linked hash while links are joined."""


def bits(numbers: np.ndarray) -> np.ndarray:
    """Number of ones in each uint64, as uint8."""
    with np.errstate(over="ignore"):
        x = numbers - ((numbers >> np.uint64(1)) & np.uint64(0x5555555555555555))
        x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
        x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def is_informative(phash: np.ndarray) -> np.ndarray:
    """Whether each hash is usable: neither missing (0) nor of a plain surface."""
    ones = bits(phash)
    return (ones >= FLAT_BITS) & (ones <= 64 - FLAT_BITS)


class NearDuplicateGroups:
    """Maps perceptual hashes to near-duplicate groups. A group is named by its smallest hash.

    Args:
        linked: Hashes that are linked with a smaller one, ascending.
        near_group: The smallest hash of each one's group.
        dropped: Links that did not fit into memory.
        truncated: Comparisons that were cut off at `WINDOW`, counted by hash and table.
    """

    def __init__(self, linked: np.ndarray, near_group: np.ndarray, dropped: int = 0, truncated: int = 0):
        self.linked, self._group = linked, near_group
        self.roots = np.unique(near_group)
        self.dropped, self.truncated = dropped, truncated

    def __call__(self, phash: np.ndarray) -> np.ndarray:
        """The group of each hash; the hash itself if it has no links."""
        if not len(self.linked):
            return phash
        at = np.minimum(np.searchsorted(self.linked, phash), len(self.linked) - 1)
        return np.where(self.linked[at] == phash, self._group[at], phash)


def near_duplicate_groups(
    hashes: ExternalGroupBy, folder: Path, memory_bytes: int = MEMORY_BYTES
) -> NearDuplicateGroups:
    """Group the perceptual hashes of `hashes`, whose rows have the field `phash` and its `mix` as `hash`."""
    links = _Links(memory_bytes // _BYTES_PER_LINK)
    distinct, number = folder / "distinct", 0
    with distinct.open("wb") as file:
        for groups in hashes.groups(1):
            phash = groups.rows["phash"][groups.rank == 0]
            phash = phash[is_informative(phash)]
            number += len(phash)
            phash.tofile(file)
    truncated = 0
    for table, mask in enumerate(_masks()):
        with ExternalGroupBy(folder / f"table{table}", _PAIR, number, memory_bytes) as group_by:
            for phash in _pieces(distinct):
                rows = np.empty(len(phash), _PAIR)
                rows["hash"], rows["phash"] = mix(phash & mask), phash
                group_by.add(rows)
            for groups in group_by.groups():
                truncated += _compare(groups, links)
    distinct.unlink()
    linked, near_group = links.connected()
    return NearDuplicateGroups(linked, near_group, links.dropped, truncated)


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
    """Link near hashes within each group. Returns how many hashes were not compared with all others of their group."""
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
    """Links as a forest: each hash with a smaller one of its component."""

    def __init__(self, max_links: int):
        self.max_links, self.dropped = max_links, 0
        self._low: list[np.ndarray] = []
        self._high: list[np.ndarray] = []
        self._buffer = 0

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        self._low.append(first)
        self._high.append(second)
        self._buffer += len(first)
        if self._buffer > 2 * self.max_links:
            self.connected()

    def connected(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes that are linked with a smaller one, ascending, and the smallest hash of each one's component."""
        if not self._buffer:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        nodes, at = np.unique(np.concatenate([*self._low, *self._high]), return_inverse=True)
        low, high = np.split(at.reshape(-1), 2)
        graph = coo_matrix((np.ones(len(low), np.int8), (low, high)), shape=(len(nodes), len(nodes)))
        _, component = connected_components(graph, directed=False)
        _, smallest = np.unique(component, return_index=True)  # nodes ascend, so the first is the smallest
        root = nodes[smallest][component]
        linked = root != nodes
        nodes, root = nodes[linked], root[linked]
        self.dropped += max(0, len(nodes) - self.max_links)
        nodes, root = nodes[: self.max_links], root[: self.max_links]
        self._low, self._high, self._buffer = [root], [nodes], len(nodes)
        return nodes, root
