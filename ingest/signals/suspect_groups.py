"""Collects the groups of samples that signals suspect, with score and evidence, and writes them as two parquets.

`suspicion.parquet` has a row per sample and signal, `suspicion_groups.parquet` one per group, with up to a dozen of its samples
as examples. The members of groups wait on disk; of the groups themselves, the `MAX_GROUPS` highest of each signal are kept.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from ingest.folder.sealed import Keys, key_numbers, parquet_writer, rows
from ingest.signals.group_by import ExternalGroupBy
from roclip.data.shards import ShardRecord

SUSPICION = "suspicion.parquet"
GROUPS = "suspicion_groups.parquet"
EXAMPLES = 12
MAX_GROUPS = 10_000
MAX_SHOWN_CHARS = 120
"""Most characters of an untrusted text that the evidence quotes."""
Box = tuple[int, int, int, int]
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # file name of its tar
        ("url", pa.string()),
        ("caption", pa.string()),
        ("signal", pa.string()),
        ("score", pa.float32()),  # from 0 to 1, of the group
        ("evidence", pa.string()),
        ("group", pa.string()),  # <signal>:<16 hex digits>
        ("box", pa.list_(pa.int32())),  # left, top, right, bottom in pixels of the stored image; null for no place
    ]
)
_EXAMPLE = pa.struct([("key", pa.string()), ("shard", pa.string()), ("box", pa.list_(pa.int32()))])
GROUP_SCHEMA = pa.schema(
    [
        ("group", pa.string()),
        ("signal", pa.string()),
        ("score", pa.float32()),
        ("samples", pa.int64()),
        ("evidence", pa.string()),
        ("examples", pa.list_(_EXAMPLE)),
    ]
)
_MEMBER = np.dtype([("hash", "<u8"), ("key", "<u8"), ("group", "<u8"), ("signal", "u1"), ("box", "<u2", (4,))])
_SHARD_BITS = 40
NO_BOX = np.zeros(4, np.uint16)


@dataclass
class SuspectGroup:
    """A group of samples that one signal suspects together."""

    signal: str
    number: int
    """64 bits that identify the group."""
    score: float
    evidence: str
    samples: int = 0
    examples: list[tuple[int, int, Box | None]] = field(default_factory=list)
    """Shard, key as a number, box."""

    @property
    def group(self) -> str:
        return f"{self.signal}:{self.number:016x}"


class SuspectGroups:
    """Collects groups and their members until they are written.

    Args:
        signals: Names of the signals.
        records: The shards.
        keys: Formats keys.
        folder: Temporary folder for the members.
    """

    def __init__(self, signals: Sequence[str], records: Sequence[ShardRecord], keys: Keys, folder: Path):
        self.signals, self.records, self.keys, self.folder = list(signals), records, keys, folder
        self._waiting = ExternalGroupBy(folder / "members", _MEMBER, sum(record.samples for record in records) // 4)
        self._groups: dict[str, dict[int, SuspectGroup]] = {name: {} for name in signals}
        self._order: dict[str, list[tuple[float, int]]] = {name: [] for name in signals}
        self.dropped = 0
        """Groups beyond `MAX_GROUPS`."""

    def open(self, signal: str, number: int, score: float, evidence: str) -> bool:
        """Start a group. False if there are already `MAX_GROUPS` with a higher score."""
        order, groups = self._order[signal], self._groups[signal]
        if number in groups:
            return True
        entry = (score, -number)
        if len(order) >= MAX_GROUPS:
            self.dropped += 1
            if entry <= order[0]:
                return False
            del groups[-heapq.heapreplace(order, entry)[1]]
        else:
            heapq.heappush(order, entry)
        groups[number] = SuspectGroup(signal, number, score, evidence)
        return True

    def add(
        self, signal: str, number: int, shards: np.ndarray, keys: np.ndarray, boxes: np.ndarray | None = None
    ) -> None:
        """Add members to a group that was opened. `boxes` is (members, 4)."""
        group = self._groups[signal].get(number)
        if group is None:
            return
        members = np.zeros(len(keys), _MEMBER)
        members["hash"], members["key"] = shards.astype(np.uint64) << np.uint64(_SHARD_BITS), keys
        members["group"], members["signal"] = number, self.signals.index(signal)
        if boxes is not None:
            members["box"] = boxes
        group.samples += len(keys)
        for index in range(min(len(keys), EXAMPLES - len(group.examples))):
            box = tuple(boxes[index].tolist()) if boxes is not None else None
            group.examples.append((int(shards[index]), int(keys[index]), box))
        self._waiting.add(members)

    def groups(self, signal: str) -> list[SuspectGroup]:
        """The groups of a signal, highest score first."""
        return sorted(self._groups[signal].values(), key=lambda group: (-group.score, group.number))

    def write(self, root: Path, work: Path) -> dict[str, int]:
        """Write both parquets into `work`. Returns the number of samples by signal. `root` is the folder of the shards."""
        named = dict.fromkeys(self.signals, 0)
        with self._waiting as waiting, parquet_writer(work / SUSPICION, SCHEMA, self.folder) as writer:
            for shard, members in _by_shard(waiting):
                table = self._rows(root, shard, members)
                for name, count in _counts(table):
                    named[name] += count
                writer.write_table(table)
        found = [group for signal in self.signals for group in self.groups(signal)]
        with parquet_writer(work / GROUPS, GROUP_SCHEMA, self.folder) as writer:
            writer.write_table(pa.Table.from_pylist([self._as_row(group) for group in found], GROUP_SCHEMA))
        return named

    def _rows(self, root: Path, shard: int, members: np.ndarray) -> pa.Table:
        record = self.records[shard]
        table = rows(root, record, ("url", "caption"))
        there = key_numbers(record, table["key"])
        order = np.argsort(there, kind="stable")
        known = [
            self._groups[self.signals[s]].get(g)
            for s, g in zip(members["signal"].tolist(), members["group"].tolist(), strict=True)
        ]
        keep = np.array([group is not None for group in known], bool)
        kept, members = [group for group in known if group is not None], members[keep]
        at = order[np.searchsorted(there[order], members["key"])]
        found = table.select(["key", "url", "caption"]).take(pa.array(at))
        boxes = [box if any(box) else None for box in members["box"].tolist()]
        columns = {
            "key": found["key"],
            "shard": pa.array([record.name] * len(members), pa.string()),
            "url": found["url"],
            "caption": found["caption"],
            "signal": pa.array([group.signal for group in kept], pa.string()),
            "score": pa.array([group.score for group in kept], pa.float32()),
            "evidence": pa.array([group.evidence for group in kept], pa.string()),
            "group": pa.array([group.group for group in kept], pa.string()),
            "box": pa.array(boxes, pa.list_(pa.int32())),
        }
        return pa.table(columns, schema=SCHEMA)

    def _as_row(self, group: SuspectGroup) -> dict:
        return {
            "group": group.group,
            "signal": group.signal,
            "score": group.score,
            "samples": group.samples,
            "evidence": group.evidence,
            "examples": [self._example(*example) for example in group.examples],
        }

    def _example(self, shard: int, key: int, box: Box | None) -> dict:
        text = self.keys.text(np.array([shard]), np.array([key]))[0].as_py()
        return {"key": text, "shard": self.records[shard].name, "box": box and list(box)}


def _by_shard(waiting: ExternalGroupBy) -> Iterator[tuple[int, np.ndarray]]:
    """The members of each shard, sorted by key and signal."""
    for groups in waiting.groups(1):
        for _, members in groups.runs():
            members = members.take(np.lexsort((members["group"], members["signal"], members["key"])))
            yield int(members["hash"][0] >> np.uint64(_SHARD_BITS)), members


def _counts(table: pa.Table) -> list[tuple[str, int]]:
    counted = table["signal"].value_counts().to_pylist()
    return [(each["values"], each["counts"]) for each in counted]
