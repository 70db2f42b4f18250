"""Writes of which one succeeds when several try: a name is taken once.

On a local folder by a hard link; on a store by its own condition where it has one (`If-None-Match: *` on S3 and what
speaks its language, generations on Google's), which fsspec calls `mode="create"`. A store without one is asked first
whether the name is free: there, two writers at the same moment may both succeed, and must read back what is there.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roclip.storage import content_of, patiently, written_beside


def write_new(path: Path, content: str | bytes) -> bool:
    """Write a file that is not there yet, such that a reader sees all of it or none. False where another is there."""
    content = content.encode() if isinstance(content, str) else content
    if not isinstance(path, Path):
        store: Any = path
        made = _create(store, lambda **mode: store.fs.pipe_file(store.path, content, **mode))
        return made or content_of(path) == content  # the answer to the first try may have been lost
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = written_beside(path, content)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def put_new(source: Path, target: Path) -> bool:
    """Put a file of this machine whole under a name on a store that is free. False where something is there, which may be
    what a failed try of this call has put.

    Raises what the store said after `roclip.data.shards.ATTEMPTS` failures.
    """
    store: Any = target
    return _create(store, lambda **mode: store.fs.put_file(str(source), store.path, **mode))


def _create(store: Any, write: Callable[..., object]) -> bool:
    def ask() -> bool:
        try:
            write(mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno != errno.ENOSYS:  # "not implemented", says the store
                raise
            if store.fs.exists(store.path):
                return False
            write()
        return True

    return patiently(ask)
