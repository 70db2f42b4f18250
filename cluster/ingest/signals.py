"""Computes signals over an ingest once its list has ended: duplicates, suspicion, drift; and the quarantine that may follow.

    <run>/ingest/
      duplicates.parquet          ingest/signals/duplicates.py
      suspicion.parquet           ingest/signals/suspicion.py, with suspicion_groups.parquet
      drift.parquet               ingest/signals/drift.py, with `ingest.compare_with`
      signals.json                the counts, and a digest of the shards

It runs in the driver: it reads parquets, and decodes the images of a bounded sample.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.signals.drift import CHANGES, find_drift
from ingest.signals.duplicates import KINDS, find_duplicates
from ingest.signals.quarantine import quarantine_path, quarantined, split_index
from ingest.signals.suspect_groups import SUSPICION
from ingest.signals.suspicion import SIGNALS, find_suspects
from roclip.config import IngestConfig
from roclip.data.shards import Manifest, ShardRecord, digest, index_path, read_index
from roclip.metrics.registry import Progress
from roclip.storage import content_of, sha256_file, write_atomic

SIGNALS_FILE = "signals.json"
QUARANTINED = "quarantined"
"""The reason in a record's `failed` for samples that are withheld from training."""


def find_signals(
    config: IngestConfig, shards: Path, folder: Path, records: Sequence[ShardRecord], on_progress: Progress
) -> dict[str, Any]:
    """Find duplicates, suspicion and drift among sealed shards; write them into `folder`. Returns the content of
    `signals.json`.

    Does nothing if the file is already about these very shards. `on_progress` may raise to stop; then nothing is recorded.
    """
    path, shards_digest = folder / SIGNALS_FILE, digest(records)
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("of") == shards_digest and known.get("drift_from", "") == config.compare_with:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    duplicates = find_duplicates(shards, folder, records=records, on_progress=on_progress)
    threads = max(1, (os.cpu_count() or 1) // 2)
    suspicion = find_suspects(
        shards, folder, records=records, near_groups=duplicates.near_groups, threads=threads, on_progress=on_progress
    )
    found: dict[str, Any] = {
        "of": shards_digest,
        "samples": duplicates.samples,
        "images_searched": suspicion.images,
        "duplicates": {
            kind: {"says": KINDS[kind], "groups": count.groups, "samples": count.samples, "surplus": count.surplus}
            for kind, count in duplicates.counts.items()
        },
        "suspicion": {
            name: {"says": signal.description, "groups": suspicion.groups[name], "samples": suspicion.named[name]}
            for name, signal in SIGNALS.items()
        },
    }
    if config.compare_with:
        drift = find_drift(config.compare_with, shards, folder, on_progress=on_progress)
        found["drift_from"] = config.compare_with
        found["drift"] = {
            name: {"says": description, "count": drift.counts[name]} for name, description in CHANGES.items()
        }
    write_atomic(path, json.dumps(found, indent=1))
    return found


def release(
    config: IngestConfig, folder: Path, on_progress: Progress
) -> Callable[[Path, tuple[ShardRecord, ...]], Iterator[ShardRecord]]:
    """The callback with which `cluster.ingest.job.ingest` publishes the shards that it held back, without quarantined samples."""

    def released(shards: Path, held: tuple[ShardRecord, ...]) -> Iterator[ShardRecord]:
        together = {record.name: record for record in (*Manifest(shards).records(), *held)}
        found = find_signals(config, shards, folder, list(together.values()), on_progress)
        named = dict(quarantined(folder / SUSPICION, config.quarantine))
        counts: Counter[str] = Counter()
        for record in held:
            if record.name in named:
                record = _quarantine_samples(shards, record, named[record.name], counts)
            yield record
        write_atomic(folder / SIGNALS_FILE, json.dumps({**found, "quarantined": dict(counts)}, indent=1))

    return released


def _quarantine_samples(shards: Path, record: ShardRecord, named: pa.Table, counts: Counter[str]) -> ShardRecord:
    """Remove samples from a shard's index. If called again after a kill, it includes those that were removed before."""
    index, out = index_path(shards, record.name), quarantine_path(shards, record.name)
    kept, dropped = split_index(read_index(shards, record.name), named)
    if out.exists():
        earlier = pq.read_table(pa.BufferReader(content_of(out)))
        dropped = pa.concat_tables([earlier, split_index(dropped, earlier)[0]])
    write_atomic(out, _parquet(dropped))  # first, so that a kill leaves a sample in both files rather than in neither
    write_atomic(index, _parquet(kept))
    for signals in dropped["signal"].to_pylist():
        counts.update(signals.split(","))
    failed = {**record.failed, QUARANTINED: len(dropped)} if len(dropped) else record.failed
    return replace(record, samples=len(kept), failed=failed, index_sha256=sha256_file(index))


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()
