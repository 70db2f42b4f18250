"""Files that another process writes, read while it does: what has been read is kept until the file changes, a log is read
where the last look ended, and what cannot be read is told and not raised.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from roclip.errors import RoclipError

LARGEST_BYTES = 64 * 2**20
"""Of a file that is read whole."""
LINE_BYTES = 2**20
"""Longest line of a log; what is longer is none of ours."""
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
"""What reading a file may raise whose content is broken, or is not what its name promises."""
T = TypeVar("T")
_Stamp = tuple[int, int, int]


class WatchedFiles:
    """The files of a folder, each read again only when it has changed.

    Args:
        root: The folder; names are paths below it.
    """

    def __init__(self, root: Path):
        self.root = root
        self.unreadable: dict[str, str] = {}
        """Name -> what is wrong with it, of files that are there and cannot be used."""
        self._known: dict[tuple[str, Callable[[bytes], Any]], tuple[_Stamp, Any]] = {}

    def changed_s(self, name: str) -> float | None:
        """When it was last written, in seconds since 1970; None where there is none."""
        stamp = self._stamp(name)
        return None if stamp is None else stamp[0] / 1e9

    def read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        """What `parse` makes of the content; None where there is no such file. A broken one is noted in `unreadable`, and
        what it said before stands."""
        stamp = self._stamp(name)
        if stamp is None:
            self._known.pop((name, parse), None)
            self.unreadable.pop(name, None)
            return None
        before, value = self._known.get((name, parse), (None, None))
        if before == stamp:
            return value
        try:
            if stamp[1] > LARGEST_BYTES:
                raise ValueError(f"{stamp[1]:,} bytes are more than it ever has")
            value = parse((self.root / name).read_bytes())
            self.unreadable.pop(name, None)
        except FileNotFoundError:
            return None
        except UNUSABLE as error:
            self.unreadable[name] = _words(error)
        self._known[name, parse] = (stamp, value)
        return value

    def table(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; empty where there is none."""
        return self.read(name, _json_object) or {}

    def rows(self, name: str) -> tuple[dict[str, Any], ...]:
        """The JSON objects of a short file of lines."""
        return self.read(name, _json_lines) or ()

    def words(self, name: str) -> str:
        """The text of a file; empty where there is none."""
        return self.read(name, _text) or ""

    def note(self, name: str, problem: str) -> None:
        """Say what is wrong with a file that somebody else reads; nothing takes it back."""
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
    """The lines that a growing file of JSON objects has got since the last look.

    Args:
        path: The file; it need not be there yet.
        most_bytes: Read in one look.
    """

    def __init__(self, path: Path, most_bytes: int = 16 * 2**20):
        self.path, self.most_bytes = path, most_bytes
        self.share_read = 1.0
        """How much of the file has been read."""
        self.bad_lines = 0
        self._inode, self._offset = 0, 0

    def look(self, begin: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """The new whole lines. `begin` is called first where the file is another one than at the last look, or was cut:
        what it said before is void then."""
        try:
            file = self.path.open("rb")
        except OSError:
            if self._offset:
                self._inode = self._offset = self.bad_lines = 0
                begin()
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self.bad_lines = status.st_ino, 0, 0
                begin()
            file.seek(self._offset)
            left = self.most_bytes
            while left > 0 and (line := file.readline(LINE_BYTES)):
                if not line.endswith(b"\n") and len(line) < LINE_BYTES:
                    break  # it is still being written
                self._offset += len(line)
                left -= len(line)
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield row
                else:
                    self.bad_lines += 1
            self.share_read = self._offset / max(self._offset, status.st_size, 1) if left <= 0 else 1.0


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


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
