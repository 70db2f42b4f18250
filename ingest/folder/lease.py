"""One ingest at a time fills a folder: a lease with an owner, a heartbeat and an end.

    lease/00000001.json    generation 1: who, since when, last heartbeat. Only its owner writes it again
    lease/00000002.json    generation 2: taken when 1 was given back, or its owner was dead or silent
    lease/publish.lock     local folders only: shared while a shard is published, exclusive while a generation begins

The highest generation holds. A generation is begun by a write that only one can win (`ingest.folder.exclusive`), and its number
is never used again. A task shows its `Ticket` before it publishes, so what a driver that was stopped, and woke up after
somebody took over, had under way does not become a shard. On a local folder that is exact: nobody takes over while a
shard is being published. On a store the look and the write are two requests.

Owners on several machines compare clocks: they must agree to within a few seconds.
"""

import contextlib
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from ingest.folder.exclusive import write_new
from roclip.errors import RunLockedError
from roclip.storage import content_of, drop, names_in, write_atomic

FOLDER = "lease"
EXPIRY_S = 60.0
"""An owner that was silent for so long has lost the lease."""
_BEATS = 6
"""Heartbeats in that time."""
_LOCK_POLL_S = 0.02
_SETTLE_S = 1.0
"""After which a store without conditional writes shows who wrote last."""
_NAME = re.compile(r"(\d{8})\.json")


@dataclass(frozen=True)
class Owner:
    """What a generation's file says."""

    id: str
    machine: str
    """Changes with the host, its boot and its process namespace."""
    host: str
    pid: int
    began_s: float
    """When the process began, in seconds since 1970."""
    since_s: float
    beat_s: float
    expiry_s: float
    """Silent for longer, it has lost the lease."""
    released: bool = False

    def gone(self) -> bool:
        """Whether it is known to hold nothing: it gave the lease back, or was a process of this machine and is no more."""
        if self.released:
            return True
        if self.machine != _machine():
            return False
        try:
            return psutil.Process(self.pid).create_time() != self.began_s
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class Ticket:
    """What a task shows before it publishes."""

    root: Path
    generation: int

    def check(self) -> None:
        """Raises `RunLockedError` when somebody else has taken the folder over."""
        if (newest := _newest(self.root)) != self.generation:
            raise RunLockedError(
                f"{self.root}: expected to hold lease {self.generation}, got {newest}: another ingest took over while "
                "this one was silent. Nothing was published since; look at the other one, or run this again."
            )

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Within it the lease is held; on a local folder for sure, on a store when it was entered."""
        with _lock(self.root, fcntl.LOCK_SH):
            self.check()
            yield


class Lease:
    """The right to fill `root`, held within a `with` block by a thread that says so now and then.

    Entering raises `RunLockedError` when another ingest holds it, or one that lost it has been publishing a shard for
    `expiry_s` since; it says who, since when, and what to do.
    """

    def __init__(self, root: Path, *, expiry_s: float = EXPIRY_S):
        self.root, self._expiry_s = root, expiry_s
        self._ended = threading.Event()
        self._problem: RunLockedError | None = None

    def __enter__(self) -> "Lease":
        now_s, me, host = time.time(), psutil.Process(), socket.gethostname()
        self._owner = Owner(uuid.uuid4().hex, _machine(), host, me.pid, me.create_time(), now_s, now_s, self._expiry_s)
        held = _newest(self.root)
        if held:
            self._refuse_if_held(Ticket(self.root, held))
        with _lock(self.root, fcntl.LOCK_EX, self._expiry_s):
            self.ticket = Ticket(self.root, held + 1)
            won = write_new(_path(self.ticket), self._said())
        if won and not isinstance(self.root, Path):
            time.sleep(_SETTLE_S)
            won = _read(self.ticket).id == self._owner.id
        if not won:
            raise self._refusal(_read(self.ticket))
        for generation in _generations(self.root):
            if generation < self.ticket.generation:
                drop(_path(Ticket(self.root, generation)))
        self._beater = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beater.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beater.join()
        if self._problem is None:
            self._owner = replace(self._owner, released=True)
            with contextlib.suppress(Exception):  # a store that is away: the lease ends by itself
                self._tell()

    def check(self) -> None:
        """Raises `RunLockedError` when the lease was lost."""
        if self._problem is not None:
            raise self._problem

    def _said(self) -> str:
        return json.dumps(asdict(self._owner), indent=1)

    def _tell(self) -> None:
        """Without the lock: a process that is stopped in mid beat must not keep the folder. A beat that comes late writes
        only to its own generation, which holds nothing any more."""
        self.ticket.check()
        write_atomic(_path(self.ticket), self._said())

    def _beat(self) -> None:
        while not self._ended.wait(self._expiry_s / _BEATS):
            self._owner = replace(self._owner, beat_s=time.time())
            try:
                self._tell()
            except RunLockedError as error:
                self._problem = error
                return
            except Exception:  # the store is away: the next beat tries again, and looks first who holds it then
                continue

    def _refuse_if_held(self, ticket: Ticket) -> None:
        try:
            other = _read(ticket)
        except (ValueError, TypeError):  # cut short: only a power failure does that
            return
        if not other.gone() and time.time() - other.beat_s <= other.expiry_s:
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


def _newest(root: Path) -> int:
    return max(_generations(root), default=0)


def _path(ticket: Ticket) -> Path:
    return ticket.root / FOLDER / f"{ticket.generation:08d}.json"


def _read(ticket: Ticket) -> Owner:
    return Owner(**json.loads(content_of(_path(ticket))))


def _machine() -> str:
    """Two processes with the same answer see each other's ids."""
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
                        f"s, but it holds the lock still. If that process is stopped (`fuser -v {path}` names it), end "
                        "it; then run this again."
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield
