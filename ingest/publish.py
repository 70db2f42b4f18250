"""Makes a verified shard exist: its files first, the manifest's record last.

A kill between any two steps leaves files without a record, which are no shard: doing the part again replaces
them. A store needs neither rename nor append for it: each file is put whole under its final name.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq

from ingest.fetch import Fetched
from ingest.verify import ShardReport
from roclip.shards import Manifest, ShardRecord, index_path, put, sha256_file


def publish(root: Path, fetched: Fetched, report: ShardReport) -> ShardRecord:
    """Move tar, parquet and index of a part into `root`, on the same file system, or put them there, if that is a store;
    then seal the shard.

    A shard that is sealed already stays as it is, and its record is returned. Raises what a store says that cannot be
    written to after several attempts.
    """
    manifest = Manifest(root)
    name = fetched.tar.name
    if sealed := manifest.get(name):
        return sealed
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
    )
    files = (fetched.tar, fetched.parquet, index)
    if isinstance(root, Path):
        _move(files, root)
    else:
        for path in files:
            put(path, root / path.name)
    manifest.publish(record)
    return record


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
