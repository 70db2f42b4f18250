"""Publishes a verified shard: its files first, the manifest's record last.

A kill between any two steps leaves files without a record, which are not a shard: redoing the part replaces them. A store needs
neither rename nor append: each file is put whole under its final name. A process that has lost the lease publishes nothing
(`ingest/folder/lease.py`).
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from ingest.folder.lease import FencingToken, put_new, write_new
from ingest.shard.fetch import FetchedShard
from ingest.shard.verify import ShardReport
from roclip.data.shards import HELD, Manifest, ShardRecord, index_path
from roclip.errors import ShardError
from roclip.storage import ATTEMPTS, drop, sha256_file


@dataclass(frozen=True)
class Seal:
    """Fields of the record beside the shard's contents, and where it is published."""

    rows_sha256: str = ""
    retried: dict[str, int] = field(default_factory=dict)
    """Both as in `ShardRecord`."""
    held: bool = False
    """Withhold the shard from training: its record goes to `roclip.data.shards.HELD`."""
    token: FencingToken | None = None
    """The right to publish here; None if no other process can be publishing."""


def publish(root: Path, fetched: FetchedShard, report: ShardReport, seal: Seal | None = None) -> ShardRecord:
    """Seal a shard: move tar, parquet and index into `root`, on the same file system or on a store, then write the record.

    If the shard is sealed already, nothing is changed and its record is returned. Raises `RunLockedError` if another ingest has
    taken over, and the store's error if it cannot be written to after several attempts.
    """
    seal = seal or Seal()
    name = fetched.tar.name
    index = index_path(fetched.tar.parent, name)
    pq.write_table(report.index, index)
    record = ShardRecord(
        name=name,
        samples=report.samples,
        bytes=fetched.tar.stat().st_size,
        sha256=sha256_file(fetched.tar),
        index_sha256=sha256_file(index),
        urls=report.urls,
        failed=report.failed,
        rows_sha256=seal.rows_sha256,
        retried=seal.retried,
    )
    files = (fetched.tar, fetched.parquet, index)
    with seal.token.publishing() if seal.token else contextlib.nullcontext():
        if sealed := sealed_record(root, name):
            return sealed
        if isinstance(root, Path):
            _move(files, root)
        else:
            for path in files:
                _put(path, root / path.name, seal.token)
            if seal.token:
                seal.token.check()
        manifest = Manifest(root, HELD) if seal.held else Manifest(root)
        if not write_new(manifest.path_of(name), json.dumps(asdict(record), indent=1)):
            raise ShardError(f"{root / name}: expected to seal it, but another process just did. Run ingest again.")
    return record


def sealed_record(root: Path, name: str) -> ShardRecord | None:
    """The record of a shard, published or held, or None."""
    return Manifest(root).get(name) or Manifest(root, HELD).get(name)


def _put(path: Path, target: Path, token: FencingToken | None) -> None:
    """Upload a file, replacing what a killed attempt left there, but never what a later owner put there during this upload."""
    for _ in range(ATTEMPTS):
        if put_new(path, target):
            return
        if token:
            token.check()
        drop(target)
    raise ShardError(
        f"{target}: expected to write this file, but another one reappeared {ATTEMPTS} times. What else writes there?"
    )


def _move(files: Iterable[Path], root: Path) -> None:
    for path in files:
        _sync(path)
        os.replace(path, root / path.name)
    _sync(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
