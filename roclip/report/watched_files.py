"""Read files while another process writes them. A file is parsed again only after it has changed, a log is read on from
where the last read ended, and what cannot be read is recorded instead of raised.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from roclip.errors import RoclipError

LARGEST_BYTES = 64 * 2**20
"""Largest file that is read whole."""
LINE_BYTES = 2**20
"""Longest line of a log; this project writes no longer one."""
UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    RoclipError,
)
"""What parsing a file may raise when its content is broken or is not what its name promises."""
T = TypeVar("T")
_Stamp = tuple[int, int, int]


class WatchedFiles:
    """The files of a folder, each parsed again only after it has changed.

    Args:
        root: The folder; file names are relative to it.
    """

    def __init__(self, root: Path):
        self.root = root
        self.unreadable: dict[str, str] = {}
        """File name -> the problem, for files that exist and cannot be used."""
        self.bytes_read = 0
        """Bytes that files and their tails have read so far."""
        self._parsed: dict[tuple[str, Callable[[bytes], Any]], tuple[_Stamp, Any]] = {}

    def tail(self, name: str, parse: "Callable[[bytes], Any] | None" = None) -> "Tail":
        """A reader of a growing log in the folder."""
        return Tail(self.root / name, parse or _json_row, self._count)

    def _count(self, read_bytes: int) -> None:
        self.bytes_read += read_bytes

    def changed_s(self, name: str) -> float | None:
        """When the file was last written, in seconds since 1970; None if it does not exist."""
        stamp = self._stamp(name)
        return None if stamp is None else stamp[0] / 1e9

    def read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        """The parsed content; None if the file does not exist. A broken file is recorded in `unreadable`, and its previous
        content stays in use."""
        stamp = self._stamp(name)
        if stamp is None:
            self._parsed.pop((name, parse), None)
            self.unreadable.pop(name, None)
            return None
        before, value = self._parsed.get((name, parse), (None, None))
        if before == stamp:
            return value
        try:
            if stamp[1] > LARGEST_BYTES:
                raise ValueError(f"expected at most {LARGEST_BYTES:,} bytes, got {stamp[1]:,}")
            content = (self.root / name).read_bytes()
            self._count(len(content))
            value = parse(content)
            self.unreadable.pop(name, None)
        except FileNotFoundError:
            return None
        except UNUSABLE as error:
            self.unreadable[name] = _message(error)
        self._parsed[name, parse] = (stamp, value)
        return value

    def table(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; empty if the file does not exist."""
        return self.read(name, _json_object) or {}

    def rows(self, name: str) -> tuple[dict[str, Any], ...]:
        """The JSON objects in a short file of lines."""
        return self.read(name, _json_lines) or ()

    def text(self, name: str) -> str:
        """The text of a file; empty if the file does not exist."""
        return self.read(name, _text) or ""

    def note(self, name: str, problem: str) -> None:
        """Record a problem with a file that the caller has read; an empty problem removes the record."""
        if problem:
            self.unreadable[name] = problem
        else:
            self.unreadable.pop(name, None)

    def _stamp(self, name: str) -> _Stamp | None:
        try:
            status = (self.root / name).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class Tail:
    """The lines that a growing log has gained since the last read.

    Args:
        path: The log; it need not exist yet.
        parse: Makes a record of a line, None of a line that is not one; by default a line is a JSON object.
        count: Called with the number of bytes of each read.
        most_bytes: Limit of one read.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[bytes], Any] | None = None,
        count: Callable[[int], None] = lambda _: None,
        most_bytes: int = 16 * 2**20,
    ):
        self.path, self.most_bytes = path, most_bytes
        self.share_read = 1.0
        """Share of the log that has been read."""
        self.bad_lines = 0
        self._parse, self._count = parse or _json_row, count
        self._inode, self._offset = 0, 0

    def read(self, restart: Callable[[], None]) -> Iterator[Any]:
        """The records of the new complete lines. `restart` is called first if the log was replaced or cut since the last
        read, because all earlier records are void then."""
        try:
            file = self.path.open("rb")
        except OSError:
            if self._offset:
                self._inode = self._offset = self.bad_lines = 0
                restart()
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self.bad_lines = status.st_ino, 0, 0
                restart()
            file.seek(self._offset)
            left = self.most_bytes
            while left > 0 and (line := file.readline(LINE_BYTES)):
                self._count(len(line))
                if not line.endswith(b"\n") and len(line) < LINE_BYTES:
                    break  # it is still being written
                self._offset += len(line)
                left -= len(line)
                record = self._parse(line)
                if record is None:
                    self.bad_lines += 1
                else:
                    yield record
            self.share_read = self._offset / max(self._offset, status.st_size, 1) if left <= 0 else 1.0


def _json_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _json_object(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _json_lines(content: bytes) -> tuple[dict[str, Any], ...]:
    rows = tuple(json.loads(line) for line in content.split(b"\n")[:-1])
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line that is not a JSON object")
    return rows


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


def _message(error: BaseException) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__
