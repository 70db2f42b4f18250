"""Locates the members of an untrusted tar and groups them into samples.

Python's `tarfile` trusts the headers: it reads an extended header of any size into memory, recurses for each extended header
that follows another, and seeks backwards for a negative size. Here members must lie within the file and in order, and only
their names are kept. A name is only data: no file is opened by it.

Supported are the old v7 format, ustar with its prefix, GNU long names and base-256 numbers, and pax `path` and `size`. Anything
but regular files is skipped.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

MAX_HEADER_BYTES = 1 << 20
"""A tar with a longer name or pax header counts as broken."""
MAX_IMAGE_BYTES = 1 << 28
"""Larger images are ignored."""
MAX_TEXT_BYTES = 1 << 20
"""Larger txt or json members are ignored."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of images, in order of preference."""
_BLOCK = 512
_PIECE = 1 << 20
_REGULAR = frozenset((b"0", b"\0", b"7"))
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
"""Links, devices, folders and pipes, whose size field is meaningless."""
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar."""

    name: str
    """Bytes that are not UTF-8 are escaped as `\\xff`."""
    offset: int
    """Start of the content, in bytes from the start of the tar."""
    size: int


class _UnreadableTarError(Exception):
    """The scan cannot continue; the message is the reason."""


class TarScan:
    """Iterates once over a tar and yields its complete regular files.

    It never raises for the contents of the tar. Memory: one block of the file, and one extended header of at most
    `MAX_HEADER_BYTES`.

    Args:
        read: A file's `read`: returns at most the requested number of bytes, and none at the end.
    """

    problem = ""
    """After iteration: `truncated_tar` or `broken_tar` if the end marker was not reached, else empty."""
    size = 0
    """After iteration: size of the tar in bytes."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read, self._state = read, hashlib.sha256()
        self._piece, self._at = b"", 0

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self._members()
        except _UnreadableTarError as error:
            self.problem = str(error)
        while self._next_piece():
            pass

    @property
    def sha256(self) -> str:
        """After iteration: digest of the whole file."""
        return self._state.hexdigest()

    def _members(self) -> Iterator[Member]:
        long_name, pax = "", _Pax()
        while any(header := self._take(_BLOCK)):
            _check(header)
            kind, size = header[156:157], _number(header[124:136])
            if kind == b"L":
                long_name = _text(_until_nul(self._extended(size)))
                continue
            if kind in (b"x", b"X"):
                pax = _parse_pax(self._extended(size))
                continue
            if kind in (b"K", b"g"):  # a link's long target, or global pax headers
                self._skip(size + -size % _BLOCK)
                continue
            name = pax.path or long_name or _own_name(header)
            size = 0 if kind in _WITHOUT_DATA else size if pax.size is None else pax.size
            more = kind == b"S" and header[482]
            while more:
                more = self._take(_BLOCK)[504]
            offset = self.size - len(self._piece) + self._at
            self._skip(size)
            if kind in _REGULAR and not pax.sparse and not name.endswith("/"):  # v7 marks a folder only by its name
                yield Member(name, offset, size)
            self._skip(-size % _BLOCK)
            long_name, pax = "", _Pax()

    def _extended(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise _UnreadableTarError("broken_tar")
        content = self._take(size)
        self._skip(-size % _BLOCK)
        return content

    def _take(self, count: int) -> bytes:
        parts, missing = [], count
        while missing:
            part = self._piece[self._at : self._at + missing]
            self._at += len(part)
            missing -= len(part)
            parts.append(part)
            if missing and not self._next_piece():
                raise _UnreadableTarError("truncated_tar")
        return b"".join(parts)

    def _skip(self, count: int) -> None:
        while count > (held := len(self._piece) - self._at):
            count -= held
            if not self._next_piece():
                raise _UnreadableTarError("truncated_tar")
        self._at += count

    def _next_piece(self) -> bool:
        self._piece, self._at = self._read(_PIECE), 0
        self._state.update(self._piece)
        self.size += len(self._piece)
        return bool(self._piece)


@dataclass(frozen=True)
class _Pax:
    """The fields of a pax header, which apply to the next member."""

    path: str = ""
    size: int | None = None
    sparse: bool = False


def _parse_pax(content: bytes) -> _Pax:
    """Parse records of the form `<length> <key>=<value>\\n`, where length counts the whole record."""
    known: dict[bytes, bytes] = {}
    at = 0
    while at < len(content) and content[at]:
        if not (length := _PAX_LENGTH.match(content, at)):
            raise _UnreadableTarError("broken_tar")
        end = at + int(length[1])
        key, equals, value = content[length.end() : end].partition(b"=")
        if end > len(content) or not equals or not value.endswith(b"\n"):
            raise _UnreadableTarError("broken_tar")
        known[b"sparse" if key.startswith(b"GNU.sparse.") else key] = value[:-1]
        at = end
    size = known.get(b"size")
    if size is not None and not re.fullmatch(rb"[0-9]{1,19}", size):
        raise _UnreadableTarError("broken_tar")
    return _Pax(_text(known.get(b"path", b"")), None if size is None else int(size), b"sparse" in known)


def _check(header: bytes) -> None:
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if (noted := _number(header[148:156])) != unsigned:
        signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])  # as in some old tars
        if noted != signed:
            raise _UnreadableTarError("broken_tar")


def _number(field: bytes) -> int:
    """Parse octal digits or, after a byte 0x80, base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _until_nul(field).strip(b" ")
    if digits.strip(b"01234567"):
        raise _UnreadableTarError("broken_tar")
    return int(digits or b"0", 8)


def _own_name(header: bytes) -> str:
    name, prefix = _until_nul(header[:100]), _until_nul(header[345:500])
    return _text(prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name)


def _until_nul(content: bytes) -> bytes:
    return content.partition(b"\0")[0]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


@dataclass
class TarSample:
    """The members that share a key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """Members by lower-case suffix."""

    @property
    def image(self) -> Member | None:
        found = (self._if_small(MAX_IMAGE_BYTES, suffix) for suffix in IMAGE_SUFFIXES)
        return next((member for member in found if member), None)

    @property
    def caption(self) -> Member | None:
        return self._if_small(MAX_TEXT_BYTES, "txt")

    @property
    def json(self) -> Member | None:
        return self._if_small(MAX_TEXT_BYTES, "json")

    def _if_small(self, size: int, suffix: str) -> Member | None:
        member = self.members.get(suffix)
        return member if member and member.size <= size else None


def group(members: Iterable[Member]) -> Iterator[TarSample]:
    """Group members into samples as webdataset does: consecutive members with the same key.

    The key is the path up to the first dot of its last component; names without a dot are skipped. A repeated suffix starts a
    new sample with the same key.
    """
    sample = None
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not (stem and dot):
            continue
        key, suffix = f"{folder}{slash}{stem}", suffix.lower()
        if sample is None or key != sample.key or suffix in sample.members:
            if sample:
                yield sample
            sample = TarSample(key)
        sample.members[suffix] = member
    if sample:
        yield sample
