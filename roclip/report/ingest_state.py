"""The state of a run's ingest, read from its log, from the manifest, which is ahead of the log, and from its end mark."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roclip.data.shards import END, HELD, PACK, Manifest
from roclip.report.ingest_progress import ShardCounts
from roclip.report.training_state import is_number
from roclip.report.watched_files import UNUSABLE, WatchedFiles

COUNTED_SHARDS = 20_000
"""With more shards the manifest is not counted at each read: the log has the same numbers twice a minute."""
_REASONS = 40


@dataclass(frozen=True)
class IngestState:
    """Counts over sealed shards."""

    done_urls: int
    total_urls: int | None
    succeeded: int
    failed: Mapping[str, int]
    """Rows by the reason of their last failure, most frequent first."""
    shards: int
    total_shards: int | None
    images_per_s: float | None
    ended: bool
    """No more shards will come."""
    last_update_s: float | None
    """When a shard was last sealed or the log last written, in seconds since 1970."""
    ends_s: float | None
    """When the list will be done at the present rate, in seconds since 1970."""
    duplicates: int | None = None
    """Samples whose bytes are those of an earlier sample."""
    suspicion: Mapping[str, int] = field(default_factory=dict)
    """Samples by signal."""

    @property
    def usable(self) -> float | None:
        """Share of the fetched URLs that gave a sample."""
        return self.succeeded / self.done_urls if self.done_urls else None


class IngestReader:
    """Reads the files of an ingest again and again; each read costs only what is new.

    Args:
        files: The files of the run.
    """

    def __init__(self, files: WatchedFiles):
        self.files = files
        self._tail = files.tail("ingest/progress.jsonl")
        self._row: dict[str, Any] = {}
        self._counted: tuple[tuple[int, ...], dict[str, Any]] = ((), {})

    def read(self, shards: Path | None) -> IngestState | None:
        """Read what is new; None if nothing was ingested.

        Args:
            shards: Folder of the sealed shards; without it the log alone is read.
        """
        for row in self._tail.read(self._row.clear):
            self._row = row
        log, manifest = dict(self._row), f"{shards}/manifest"
        end = self.files.table(f"{manifest}/{END}") if shards else {}
        counts = end or {**log, **(self._count(shards) if shards else {})}
        if not counts and not log:
            return None
        done = _whole(counts.get("done_urls", counts.get("urls"))) or 0
        signals = self.files.table("ingest/signals.json")
        eta_s, logged_s = log.get("eta_s"), log.get("time_s")
        suspicion = _part(signals, "suspicion")
        return IngestState(
            done_urls=done,
            total_urls=done if end else _whole(log.get("total_urls")),
            succeeded=_whole(counts.get("succeeded")) or 0,
            failed=_counts(counts.get("failed")),
            shards=_whole(counts.get("shards")) or 0,
            total_shards=_whole(counts.get("shards") if end else log.get("total_shards")),
            images_per_s=log["images_per_s"] if is_number(log.get("images_per_s")) else None,
            ended=bool(end),
            last_update_s=max(
                filter(None, map(self.files.changed_s, ("ingest/progress.jsonl", manifest))), default=None
            ),
            ends_s=logged_s + eta_s if not end and is_number(eta_s) and is_number(logged_s) else None,
            duplicates=_whole(_part(_part(signals, "duplicates"), "bytes").get("surplus")),
            suspicion={name[:60]: _whole(_part(suspicion, name).get("samples")) or 0 for name in suspicion},
        )

    def _count(self, root: Path) -> dict[str, Any]:
        """Counts of the manifest, made again when it has changed; empty if the log is no older."""
        folders = [root / "manifest", root / HELD]
        try:
            stamps = tuple(folder.stat().st_mtime_ns for folder in folders if folder.is_dir())
            if stamps == self._counted[0]:
                return self._counted[1]
            names = [name.name for folder in folders if folder.is_dir() for name in folder.iterdir()]
            shards = sum(PACK if name.startswith("pack-") else name.endswith(".json") for name in names)
            if not 0 < shards <= COUNTED_SHARDS:
                return {}
            tally = ShardCounts(Manifest(root).records() + Manifest(root, HELD).records())
        except UNUSABLE as error:
            self.files.note(f"{root}/manifest", str(error)[:200])
            return {}
        self.files.note(f"{root}/manifest", "")
        self._counted = stamps, {**tally.summary(), "done_urls": tally.urls}
        return self._counted[1]


def _whole(value: Any) -> int | None:
    return int(value) if is_number(value) and value >= 0 else None


def _part(found: Any, key: str) -> dict[str, Any]:
    """An object inside an object; empty if it is anything else."""
    part = found.get(key)
    return part if isinstance(part, dict) else {}


def _counts(failed: Any) -> dict[str, int]:
    rows = {str(name)[:60]: rows for name, rows in failed.items() if _whole(rows)} if isinstance(failed, dict) else {}
    return dict(sorted(rows.items(), key=lambda item: -item[1])[:_REASONS])
