"""What an ingest says of itself once its list has ended: duplicates, suspicion, drift; and the quarantine that may follow.

    <run>/ingest/
      duplicates.parquet          ingest/signals/duplicates.py
      suspicion.parquet           ingest/signals/suspicion.py, with suspicion_groups.parquet
      drift.parquet               ingest/signals/drift.py, with `ingest.compare_with`
      signals.json                the counts, and of which shards they are

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

from ingest.signals.drift import CHANGES, drift
from ingest.signals.duplicates import KINDS, find_duplicates
from ingest.signals.findings import SUSPICION
from ingest.signals.quarantine import quarantine_path, quarantined, split_index
from ingest.signals.suspicion import SIGNALS, suspect
from roclip.config import IngestConfig
from roclip.data.shards import Manifest, ShardRecord, digest, index_path, read_index
from roclip.metrics.registry import Progress
from roclip.storage import content_of, sha256_file, write_atomic

SIGNALS_FILE = "signals.json"
QUARANTINED = "quarantined"
"""The reason in a record's `failed` for samples that are kept from training."""


def look(
    config: IngestConfig, shards: Path, folder: Path, records: Sequence[ShardRecord], say: Progress
) -> dict[str, Any]:
    """Find duplicates, suspicion and drift among sealed shards; write them into `folder`. Returns what `signals.json` holds.

    Does nothing where that is known of these very shards. `say` may raise to leave; then nothing is known.
    """
    path, of = folder / SIGNALS_FILE, digest(records)
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("of") == of and known.get("drift_from", "") == config.compare_with:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    twice = find_duplicates(shards, folder, records=records, on_progress=say)
    threads = max(1, (os.cpu_count() or 1) // 2)
    suspicion = suspect(shards, folder, records=records, looks=twice.looks, threads=threads, on_progress=say)
    found: dict[str, Any] = {
        "of": of,
        "samples": twice.samples,
        "images_searched": suspicion.images,
        "duplicates": {
            kind: {"says": KINDS[kind], "groups": count.groups, "samples": count.samples, "surplus": count.surplus}
            for kind, count in twice.counts.items()
        },
        "suspicion": {
            name: {"says": signal.says, "groups": suspicion.groups[name], "samples": suspicion.named[name]}
            for name, signal in SIGNALS.items()
        },
    }
    if config.compare_with:
        changed = drift(config.compare_with, shards, folder, on_progress=say)
        found["drift_from"] = config.compare_with
        found["drift"] = {name: {"says": says, "count": changed.counts[name]} for name, says in CHANGES.items()}
    write_atomic(path, json.dumps(found, indent=1))
    return found


def release(
    config: IngestConfig, folder: Path, say: Progress
) -> Callable[[Path, tuple[ShardRecord, ...]], Iterator[ShardRecord]]:
    """What `cluster.ingest.job.ingest` calls to publish the shards that it held back: without the samples in quarantine."""

    def released(shards: Path, held: tuple[ShardRecord, ...]) -> Iterator[ShardRecord]:
        together = {record.name: record for record in (*Manifest(shards).records(), *held)}
        found = look(config, shards, folder, list(together.values()), say)
        named = dict(quarantined(folder / SUSPICION, config.quarantine))
        counts: Counter[str] = Counter()
        for record in held:
            if record.name in named:
                record = _shut_out(shards, record, named[record.name], counts)
            yield record
        write_atomic(folder / SIGNALS_FILE, json.dumps({**found, "quarantined": dict(counts)}, indent=1))

    return released


def _shut_out(shards: Path, record: ShardRecord, named: pa.Table, counts: Counter[str]) -> ShardRecord:
    """Take samples out of a shard's index. Called again after a kill, it finds those that were taken out before."""
    index, out = index_path(shards, record.name), quarantine_path(shards, record.name)
    kept, left_out = split_index(read_index(shards, record.name), named)
    if out.exists():
        before = pq.read_table(pa.BufferReader(content_of(out)))
        left_out = pa.concat_tables([before, split_index(left_out, before)[0]])
    write_atomic(out, _parquet(left_out))  # first: a sample stands in both for a moment rather than in none
    write_atomic(index, _parquet(kept))
    for signals in left_out["signal"].to_pylist():
        counts.update(signals.split(","))
    failed = {**record.failed, QUARANTINED: len(left_out)} if len(left_out) else record.failed
    return replace(record, samples=len(kept), failed=failed, index_sha256=sha256_file(index))


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()
