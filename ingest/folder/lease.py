"""A lease, so that one ingest at a time fills a folder: with an owner, a heartbeat and an expiry.

    lease/00000001.json    generation 1: who, since when, last heartbeat. Only its owner rewrites it
    lease/00000002.json    generation 2: taken when 1 was released, or its owner was dead or silent
    lease/publish.lock     local folders only: shared while a shard is published, exclusive while a generation begins

The highest generation holds the lease. A generation begins with an exclusive write (`write_new`), and its number is never
reused. A task presents its `FencingToken` before it publishes, so the work of a driver that was stopped, and resumed after
another one took over, does not become a shard. On a local folder that is exact: nobody takes over while a shard is being
published. On a store, checking and writing are two requests.

Exclusive writes: on a local folder by a hard link; on a store by a conditional write if it has one (`If-None-Match: *` on S3
and compatible stores, generations on Google's), which fsspec calls `mode="create"`. Other stores are asked first whether the
name is free: there, two simultaneous writers may both succeed, and must read back what is there.

The clocks of owners on different machines must agree to within a few seconds.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from roclip.errors import RunLockedError
from roclip.storage import content_of, drop, names_in, patiently, write_atomic, written_beside

FOLDER = "lease"
EXPIRY_S = 60.0
"""An owner that has been silent for this long has lost the lease."""
_BEATS = 6
"""Heartbeats per expiry."""
_LOCK_POLL_S = 0.02
_SETTLE_S = 1.0
"""Time after which a store without conditional writes shows who wrote last."""
_NAME = re.compile(r"(\d{8})\.json")


@dataclass(frozen=True)
class Owner:
    """The contents of a generation's file."""

    id: str
    machine: str
    """Identifies the host, its boot and its process namespace."""
    host: str
    pid: int
    began_s: float
    """Start time of the process, in seconds since 1970."""
    since_s: float
    beat_s: float
    expiry_s: float
    """Longest silence before the lease is lost."""
    released: bool = False

    def is_gone(self) -> bool:
        """Whether it certainly holds nothing: it has released the lease, or was a process of this machine that has ended."""
        if self.released:
            return True
        if self.machine != _machine():
            return False
        try:
            return psutil.Process(self.pid).create_time() != self.began_s
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class FencingToken:
    """The right of a task to publish, tied to one generation of the lease."""

    root: Path
    generation: int

    def check(self) -> None:
        """Raises `RunLockedError` if another ingest has taken over the folder."""
        if (newest := _newest_generation(self.root)) != self.generation:
            raise RunLockedError(
                f"{self.root}: expected to hold lease {self.generation}, got {newest}: another ingest took over while "
                "this one was silent. Nothing was published since; check the other one, or run this again."
            )

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Within the block the lease is held: guaranteed on a local folder, checked on entry on a store."""
        with _lock(self.root, fcntl.LOCK_SH):
            self.check()
            yield


class Lease:
    """The right to fill `root`, kept within a `with` block by a heartbeat thread.

    Entering raises `RunLockedError` if another ingest holds the lease, or if a former owner has been publishing a shard for
    `expiry_s`; the message says who, since when, and what to do.
    """

    def __init__(self, root: Path, *, expiry_s: float = EXPIRY_S):
        self.root, self._expiry_s = root, expiry_s
        self._ended = threading.Event()
        self._problem: RunLockedError | None = None

    def __enter__(self) -> "Lease":
        now_s, me, host = time.time(), psutil.Process(), socket.gethostname()
        self._owner = Owner(uuid.uuid4().hex, _machine(), host, me.pid, me.create_time(), now_s, now_s, self._expiry_s)
        held = _newest_generation(self.root)
        if held:
            self._refuse_if_held(FencingToken(self.root, held))
        with _lock(self.root, fcntl.LOCK_EX, self._expiry_s):
            self.token = FencingToken(self.root, held + 1)
            won = write_new(_path(self.token), self._owner_json())
        if won and not isinstance(self.root, Path):
            time.sleep(_SETTLE_S)
            won = _read(self.token).id == self._owner.id
        if not won:
            raise self._refusal(_read(self.token))
        for generation in _generations(self.root):
            if generation < self.token.generation:
                drop(_path(FencingToken(self.root, generation)))
        self._heartbeat_thread = threading.Thread(target=self._heartbeat_loop, name="lease", daemon=True)
        self._heartbeat_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heartbeat_thread.join()
        if self._problem is None:
            self._owner = replace(self._owner, released=True)
            with contextlib.suppress(Exception):  # if the store is unreachable, the lease expires by itself
                self._write_heartbeat()

    def check(self) -> None:
        """Raises `RunLockedError` if the lease was lost."""
        if self._problem is not None:
            raise self._problem

    def _owner_json(self) -> str:
        return json.dumps(asdict(self._owner), indent=1)

    def _write_heartbeat(self) -> None:
        """Takes no lock: a process that is stopped during a heartbeat must not block the folder. A late heartbeat writes only
        to its own generation, which no longer holds the lease.
        """
        self.token.check()
        write_atomic(_path(self.token), self._owner_json())

    def _heartbeat_loop(self) -> None:
        while not self._ended.wait(self._expiry_s / _BEATS):
            self._owner = replace(self._owner, beat_s=time.time())
            try:
                self._write_heartbeat()
            except RunLockedError as error:
                self._problem = error
                return
            except Exception:  # the store is unreachable: the next heartbeat tries again and checks who holds the lease
                continue

    def _refuse_if_held(self, token: FencingToken) -> None:
        try:
            other = _read(token)
        except (ValueError, TypeError):  # a truncated file, which only a power failure can leave
            return
        if not other.is_gone() and time.time() - other.beat_s <= other.expiry_s:
            raise self._refusal(other)

    def _refusal(self, other: Owner) -> RunLockedError:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(other.since_s))
        silent_s = max(0.0, time.time() - other.beat_s)
        return RunLockedError(
            f"{self.root}: process {other.pid} on {other.host} has been filling these shards since {since} (last heard "
            f"of {silent_s:.0f} s ago). Wait for it or stop it. If it is dead, run this again in "
            f"{max(1.0, other.expiry_s - silent_s):.0f} s."
        )


def _generations(root: Path) -> list[int]:
    return [int(match[1]) for name in names_in(root / FOLDER) if (match := _NAME.fullmatch(name))]


def _newest_generation(root: Path) -> int:
    return max(_generations(root), default=0)


def _path(token: FencingToken) -> Path:
    return token.root / FOLDER / f"{token.generation:08d}.json"


def _read(token: FencingToken) -> Owner:
    return Owner(**json.loads(content_of(_path(token))))


def _machine() -> str:
    """An identity that two processes share if they can see each other's process ids."""
    parts = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(read().strip())
    return " ".join(parts)


@contextlib.contextmanager
def _lock(root: Path, kind: int, timeout_s: float = math.inf) -> Iterator[None]:
    if not isinstance(root, Path):
        yield
        return
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    path, deadline_s = root / FOLDER / "publish.lock", time.monotonic() + timeout_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise RunLockedError(
                        f"{path}: expected the shard that another ingest is publishing to be done within {timeout_s:.0f} "
                        f"s, but it still holds the lock. If that process is stopped (`fuser -v {path}` names it), kill "
                        "it; then run this again."
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield


def write_new(path: Path, content: str | bytes) -> bool:
    """Write a file that does not exist yet, so that readers see all of it or nothing. False if another one exists."""
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
    """Upload a local file under a name on a store that is free. False if something is there, which may be the result of a
    failed attempt of this call.

    Raises the store's error after `roclip.storage.ATTEMPTS` failures.
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
            if error.errno != errno.ENOSYS:  # the store has no conditional writes
                raise
            if store.fs.exists(store.path):
                return False
            write()
        return True

    return patiently(ask)
