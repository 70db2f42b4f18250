"""Put, get, list and wait: files on this machine or on any store that fsspec knows.

Every file that another process may read is written whole (`write_atomic`), and a store that is away for a minute is asked
again (`patiently`).
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from roclip.errors import ConfigError

ATTEMPTS = 10
FIRST_WAIT_S = 0.5
"""Wait before the second attempt; each further wait is twice as long, up to `_LONGEST_WAIT_S`: 80 s in all."""
_LONGEST_WAIT_S = 16.0
T = TypeVar("T")


def place(where: str | Path) -> Path:
    """A folder or file on this machine, or, given `scheme://…`, on a store that fsspec knows, with the same methods.

    Raises `ConfigError` for a scheme that it does not know.
    """
    if isinstance(where, str) and where.startswith("file://"):
        where = where.removeprefix("file://")
    if isinstance(where, str) and "://" in where:
        from upath import UPath

        try:
            store: Any = UPath(where)
        except ValueError as error:
            raise ConfigError(f"{where}: expected a store that fsspec knows, such as s3://, got {error}.") from error
        return store
    return Path(where) if isinstance(where, str) else where


def names_in(folder: Path) -> list[str]:
    """Names of the files in a folder; empty if the folder does not exist."""
    try:
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                return [entry.name for entry in entries if not entry.name.startswith(".")]
        store: Any = folder
        store.fs.invalidate_cache()  # it remembers listings, and others publish
        paths = patiently(lambda: store.fs.ls(store.path, detail=False))
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
    except FileNotFoundError:
        return []


def content_of(path: Path) -> bytes:
    """The content of a file, here or on a store, with retries."""
    if isinstance(path, Path):
        return path.read_bytes()
    store: Any = path
    return patiently(lambda: store.fs.cat_file(store.path))


def drop(path: Path) -> None:
    """Delete a file, here or on a store, with retries; a missing file is no error."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
    else:
        patiently(lambda: path.unlink(missing_ok=True))


def put(source: Path, target: Path) -> None:
    """Copy a local file to a store, whole. Raises the store's error after `ATTEMPTS` failures."""
    store: Any = target
    patiently(lambda: store.fs.put_file(str(source), store.path))


def patiently(ask: Callable[[], T]) -> T:
    """The result of `ask`, which is called again after a failure, `ATTEMPTS` times in all.

    A store may be away for a minute. Raises the last failure; a missing file or a refused permission is raised at once.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return ask()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:  # each store has errors of its own
            time.sleep(min(_LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)))
    return ask()


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never half of it."""
    content = content.encode() if isinstance(content, str) else content
    if not isinstance(path, Path):  # a store puts objects whole
        store: Any = path
        patiently(lambda: store.fs.pipe_file(store.path, content))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = written_beside(path, content)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def written_beside(path: Path, content: bytes) -> Path:
    """Write the content to a temporary file in the same folder as the local `path`, synced to disk; returns its path."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Path(temporary)
