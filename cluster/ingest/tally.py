"""Counts over the parquets of sealed shards, each read once: outcomes by reason and by host, sizes of the originals. Memory is
bounded.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from roclip.data.outcomes import reason_of
from roclip.data.shards import Manifest, ShardRecord
from roclip.storage import content_of

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
HOSTS = 4096
"""Hosts that are kept, those with the most URLs; pruned at twice as many."""
USABLE = "usable"
SIZES_PX = (0, 64, 128, 256, 512, 1024, 2048, 4096, 1 << 30)
"""Bin edges of the histogram of the originals' shorter sides."""
_COLUMNS = ["url", "status", "error_message", "original_width", "original_height"]
_HOST = r"^(?i:https?)://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/:?#]*)"


class OutcomeTally:
    """Counts over the sealed shards of a folder.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path):
        self._root, self._manifest = root, Manifest(root)
        self.hosts: dict[str, Counter[str]] = {}
        """Host -> rows by outcome: `usable` or a reason."""
        self.sizes = np.zeros(len(SIZES_PX) - 1, np.int64)
        """Usable samples by the shorter side of the image as it was fetched."""
        self.hosts_dropped = 0
        """Hosts with few URLs that are no longer counted."""
        self._seen: set[str] = set()

    def update(self) -> None:
        """Count the shards that were sealed since the last call."""
        for record in self._manifest.records():
            if record.name not in self._seen:
                self._seen.add(record.name)
                self._add(record)

    def outcomes(self) -> Counter[str]:
        """Rows by outcome, over all hosts."""
        return sum(self.hosts.values(), Counter())

    def top_hosts(self, number: int) -> list[tuple[str, Counter[str]]]:
        """The hosts with the most URLs, in descending order."""
        return sorted(self.hosts.items(), key=lambda item: (-item[1].total(), item[0]))[:number]

    def worst_hosts(self, number: int, at_least: int = 5) -> list[tuple[str, Counter[str]]]:
        """The hosts of at least `at_least` URLs with the most failures, in descending order."""
        lossy = [(host, outcomes) for host, outcomes in self.hosts.items() if outcomes.total() >= at_least]
        lossy = [(host, outcomes) for host, outcomes in lossy if outcomes.total() > outcomes[USABLE]]
        return sorted(lossy, key=lambda item: (item[1][USABLE] - item[1].total(), item[0]))[:number]

    def _add(self, record: ShardRecord) -> None:
        stem = Path(record.name).stem
        try:
            table = pq.read_table(pa.BufferReader(content_of(self._root / f"{stem}.parquet")), columns=_COLUMNS)
        except (OSError, ValueError):  # shards that were made elsewhere may have none
            return
        outcomes = _outcomes(table)
        found = pc.struct_field(pc.extract_regex(table["url"].combine_chunks(), _HOST), "host")
        hosts = pc.if_else(pc.equal(pc.fill_null(found, ""), ""), "(no host)", pc.utf8_lower(found))
        counted = (
            pa.table({"host": hosts, "outcome": outcomes}).group_by(["host", "outcome"]).aggregate([([], "count_all")])
        )
        for host, outcome, count in zip(*(column.to_pylist() for column in counted.columns), strict=True):
            self.hosts.setdefault(re.sub(r"[^\w.:\[\]() -]", "?", host[:100]), Counter())[outcome] += count
        if len(self.hosts) > 2 * HOSTS:
            self.hosts_dropped += len(self.hosts) - HOSTS
            self.hosts = dict(self.top_hosts(HOSTS))
        shorter = pc.min_element_wise(table["original_width"], table["original_height"]).drop_null()
        self.sizes += np.histogram(shorter.to_numpy(), SIZES_PX)[0]


def _outcomes(table: pa.Table) -> pa.Array:
    """Each row's outcome: the reason of its message, looked up once per distinct message."""
    messages = pc.fill_null(table["error_message"].combine_chunks(), "").dictionary_encode()
    names = pa.array([reason_of(message) for message in messages.dictionary.to_pylist()], pa.string())
    good = pc.equal(table["status"].combine_chunks(), "success")
    return pc.if_else(pc.fill_null(good, False), USABLE, names.take(messages.indices))
