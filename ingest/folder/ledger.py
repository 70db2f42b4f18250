"""The ledger of which shard number stands for which rows: `ledger.json`, beside the manifest.

Shard numbers are assigned in consecutive segments:

    list    shard `first_shard + k` has the k-th `samples_per_shard` rows of the list from row `first_row` on
    pass    shard `first_shard + k` has the k-th `samples_per_shard` rows of those that failed in the segment before it
            for one of `reasons` (`ingest/folder/retries.py`), in the order of their shards and keys

A list that has grown begins a new segment, so a short last part stays as it is. A segment is recorded before its first shard is
begun, and its length as soon as that is known. Everything else is a function of the sealed shards alone, so an ingest that is
killed at any moment continues with the same parts.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from roclip.data.shards import SHARD_DIGITS, ShardRecord
from roclip.errors import DataError
from roclip.storage import content_of, write_atomic

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Segment:
    """Consecutive shard numbers and the rows that they stand for."""

    first_shard: int
    samples_per_shard: int
    first_row: int = 0
    """In the list; 0 for a pass."""
    pass_number: int = 0
    """0 for the list itself, from 1 for its later passes."""
    reasons: tuple[str, ...] = ()
    """For a pass: the failure reasons of the rows that it retries."""
    rows: int | None = None
    """None until the list has been read to its end."""
    list_name: str = ""
    digest: str = ""
    """Digest of the list as it was last seen."""

    @property
    def shards(self) -> int | None:
        return None if self.rows is None else -(-self.rows // self.samples_per_shard)

    def numbers(self, records: Mapping[int, ShardRecord]) -> list[int]:
        """The numbers of its sealed shards, in order."""
        end = 10**SHARD_DIGITS if self.shards is None else self.first_shard + self.shards
        return sorted(number for number in records if self.first_shard <= number < end)

    def rows_of(self, number: int) -> int | None:
        """How many rows one of its shards stands for, or None if not known yet."""
        if self.rows is None:
            return None
        return min(self.samples_per_shard, self.rows - (number - self.first_shard) * self.samples_per_shard)


class Ledger:
    """The segments of a folder. Only the holder of its lease may change it.

    Args:
        root: The folder of the shards.
        check_lease: Called before each write; raises if the lease was lost.
    """

    def __init__(self, root: Path, check_lease: Callable[[], None] = lambda: None):
        self._path, self._check_lease = root / LEDGER, check_lease
        try:
            saved = json.loads(content_of(self._path))
            self.segments = [Segment(**{**row, "reasons": tuple(row["reasons"])}) for row in saved["segments"]]
        except FileNotFoundError:
            self.segments: list[Segment] = []
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self._path}: expected the ledger of an ingest, got something else ({error}). Restore it: it says "
                "which rows each shard number stands for."
            ) from error

    @property
    def lists(self) -> list[Segment]:
        """The segments of the list, without its passes."""
        return [segment for segment in self.segments if not segment.pass_number]

    @property
    def next_shard(self) -> int:
        """The first unassigned number. The length of the last segment must be known."""
        if not self.segments:
            return 0
        last = self.segments[-1]
        assert last.shards is not None
        return last.first_shard + last.shards

    def add(self, segment: Segment) -> Segment:
        """Record a new segment. Raises `DataError` if the shard numbers do not suffice."""
        if segment.first_shard + (segment.shards or 1) > 10**SHARD_DIGITS:
            raise DataError(
                f"{self._path}: expected at most {10**SHARD_DIGITS} shards, got more. Set ingest.samples_per_shard higher, "
                "for another folder."
            )
        self._write([*self.segments, segment])
        return segment

    def end(self, segment: Segment, rows: int) -> Segment:
        """Record the number of rows of a segment."""
        return self._replace(segment, replace(segment, rows=rows))

    def set_list(self, segment: Segment, name: str, digest: str) -> Segment:
        """Record which list was found to have the rows of a segment."""
        return self._replace(segment, replace(segment, list_name=name, digest=digest))

    def _replace(self, old: Segment, new: Segment) -> Segment:
        if new != old:
            self._write([new if segment == old else segment for segment in self.segments])
        return new

    def _write(self, segments: Iterable[Segment]) -> None:
        self._check_lease()
        self.segments = list(segments)
        write_atomic(self._path, json.dumps({"segments": [asdict(segment) for segment in self.segments]}, indent=1))
