"""A local disk cache for the shards of a store: whole files, verified on download, evicted by least recent use.

Any number of processes share one folder without a lock: a file is renamed into place when it is complete, and a file that is
evicted while another process reads it stays readable there until it is closed.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from roclip.config import DataConfig
from roclip.data.shards import ShardRecord, tar_path
from roclip.errors import DataError
from roclip.storage import patiently

_PIECE = 1 << 22
T = TypeVar("T")


def shard_cache(data: DataConfig) -> "ShardCache | None":
    """Return the cache of a config, or None if `data.cache_bytes` is 0."""
    folder = Path(data.cache_dir or Path(tempfile.gettempdir()) / f"roclip-shards-{os.getuid()}")
    return ShardCache(folder, data.cache_bytes) if data.cache_bytes else None


class ShardUnreadableError(DataError):
    """A shard cannot be read; the message is the reason under which its samples are counted."""


def read_patiently(read: Callable[[], T]) -> T:
    """Call `read`, retried as by `patiently`. Raises `ShardUnreadableError` when it keeps failing."""
    try:
        return patiently(read)
    except FileNotFoundError as error:
        raise ShardUnreadableError("shard_not_there") from error
    except ShardUnreadableError:
        raise
    except Exception as error:  # each store has errors of its own
        raise ShardUnreadableError("shard_not_readable") from error


class ShardCache:
    """Local copies of tars.

    Args:
        folder: Where the copies are stored; created when needed.
        limit_bytes: Maximum total size. The most recently requested copy is kept in any case.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self.hits = self.misses = 0
        """Requests of this process that were served from the folder, and those that downloaded."""

    def get(self, root: Path, record: ShardRecord) -> Path:
        """Return the local copy of a shard whose tar is on a store. Raises `ShardUnreadableError`."""
        path = self.folder / f"{record.sha256}.tar"
        try:
            os.utime(path)  # marks it as recently used
            self.hits += 1
            return path
        except FileNotFoundError:
            pass
        self.folder.mkdir(parents=True, exist_ok=True)
        self.misses += 1
        read_patiently(lambda: self._fetch(tar_path(root, record), path, record))
        self._evict(path)
        return path

    def _fetch(self, source: Path, path: Path, record: ShardRecord) -> None:
        state, size = hashlib.sha256(), 0
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".fetching-")
        try:
            with os.fdopen(descriptor, "wb") as out, source.open("rb") as file:
                while (piece := file.read(_PIECE)) and size <= record.bytes:
                    state.update(piece)
                    size += len(piece)
                    out.write(piece)
            if size != record.bytes or state.hexdigest() != record.sha256:
                raise ShardUnreadableError("shard_sha256_differs")
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        found = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process evicted it
                status = path.stat()
                found.append((path == keep, status.st_mtime_ns, path, status.st_size))
        held = sum(size for *_, size in found)
        for kept, _, path, size in sorted(found):
            if held <= self.limit_bytes or kept:
                return
            path.unlink(missing_ok=True)
            held -= size
