"""Makes a verified shard exist: its files first, the manifest's record last.

A kill between any two steps leaves files without a record, which are no shard: doing the part again replaces
them. A store needs neither rename nor append for it: each file is put whole under its final name. Who no longer holds
the lease publishes nothing (`ingest/folder/lease.py`).
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from ingest.folder.exclusive import put_new, write_new
from ingest.folder.lease import Ticket
from ingest.shard.fetch import Fetched
from ingest.shard.verify import ShardReport
from roclip.data.shards import HELD, Manifest, ShardRecord, index_path
from roclip.errors import ShardError
from roclip.storage import ATTEMPTS, drop, sha256_file


@dataclass(frozen=True)
class Seal:
    """What the record says beside what is in the shard, and where it goes."""

    rows_sha256: str = ""
    retried: dict[str, int] = field(default_factory=dict)
    """Both as in `ShardRecord`."""
    held: bool = False
    """Keep it from training: its record goes to `roclip.data.shards.HELD`."""
    ticket: Ticket | None = None
    """The right to publish here; None where nobody else can be."""


def publish(root: Path, fetched: Fetched, report: ShardReport, seal: Seal | None = None) -> ShardRecord:
    """Move tar, parquet and index of a part into `root`, on the same file system, or put them there, if that is a store;
    then seal the shard.

    A shard that is sealed already stays as it is, and its record is returned. Raises `RunLockedError` when another ingest
    has taken over, and what a store says that cannot be written to after several attempts.
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
    with seal.ticket.publishing() if seal.ticket else contextlib.nullcontext():
        if sealed := sealed_record(root, name):
            return sealed
        if isinstance(root, Path):
            _move(files, root)
        else:
            for path in files:
                _put(path, root / path.name, seal.ticket)
            if seal.ticket:
                seal.ticket.check()
        manifest = Manifest(root, HELD) if seal.held else Manifest(root)
        if not write_new(manifest.path_of(name), json.dumps(asdict(record), indent=1)):
            raise ShardError(f"{root / name}: expected to seal it, but somebody else just did. Run ingest again.")
    return record


def sealed_record(root: Path, name: str) -> ShardRecord | None:
    """The record of a shard, published or held."""
    return Manifest(root).get(name) or Manifest(root, HELD).get(name)


def _put(path: Path, target: Path, ticket: Ticket | None) -> None:
    """Put a file on a store in the place of what a killed attempt left there, but never of what a later owner has put
    while this upload took its time."""
    for _ in range(ATTEMPTS):
        if put_new(path, target):
            return
        if ticket:
            ticket.check()
        drop(target)
    raise ShardError(
        f"{target}: expected to put it there, but another file came back {ATTEMPTS} times. Who writes there?"
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
