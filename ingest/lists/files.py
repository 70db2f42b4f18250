"""Finds and opens the files of a URL list: the same files in the same order on any store.

A file that changes while it is read is an error, so that it cannot become a different list.
"""

import codecs
import io
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from roclip.errors import UrlListError

FORMATS = ("parquet", "csv", "tsv", "jsonl", "json", "txt")
CODECS = {"gz": "gzip", "zst": "zstd"}
"""Compression by file name extension, for all formats except parquet."""
SEPARATOR = "::"
ROW_BYTES = 16 * 2**20
"""Longest row of a text format."""
_BUFFER_BYTES = 2**20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class ListFile:
    """One file of a list."""

    fs: Any
    """The fsspec store."""
    path: str
    """On the store."""
    name: str
    """Relative to what `data.urls` names, so that a list that was moved as a whole is the same list."""
    size_bytes: int
    """As the store lists it; 0 if unknown."""
    format: str
    codec: str | None

    def __str__(self) -> str:
        return self.path


def find_files(urls: str) -> tuple[ListFile, ...]:
    """The files of a list: a file, a folder or a glob on any fsspec store, or several of these separated by `::`.

    The files of one folder or glob are sorted by path. Of a folder, the files with a known extension whose names begin with
    neither `.` nor `_` are taken, without its subfolders (use a glob with `**` for these).

    Raises `UrlListError` if nothing is found, nothing has a known format, or a file is found twice.
    """
    files = [file for pattern in urls.split(SEPARATOR) for file in _match_pattern(pattern)]
    seen: set[tuple[str, str]] = set()
    for file in files:
        key = str(file.fs.protocol), file.path
        if key in seen:
            raise UrlListError(f"{urls}: expected each file once, got {file} twice. Leave one of the patterns out.")
        seen.add(key)
    return tuple(files)


def open_bytes(file: ListFile) -> BinaryIO:
    """Open the file as stored. Raises `UrlListError` if its size differs from the one that the store listed."""
    stream = file.fs.open(file.path, "rb")
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if file.size_bytes and size != file.size_bytes:
        stream.close()
        raise _changed(file, size)
    return stream


def open_text(file: ListFile, count: Callable[[int], None] | None = None) -> BinaryIO:
    """Open the file, decompressed, as UTF-8 without a byte order mark; invalid bytes are replaced.

    `count` is called with the number of bytes read from the store. Reading raises `UrlListError` if the file is UTF-16 or its
    length differs from the one that the store listed, and `OSError` if it is truncated or damaged.
    """
    raw = io.BufferedReader(_SizeCheckedFile(file, count), _BUFFER_BYTES)
    whole: Any = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), file.codec) if file.codec else raw
    return cast(BinaryIO, io.BufferedReader(_Utf8(file, whole, raw), _BUFFER_BYTES))


def lines_of(stream: BinaryIO) -> Iterator[bytes | None]:
    """The non-blank lines, without line ends; None for a line of more than `ROW_BYTES`."""
    while line := stream.readline(ROW_BYTES):
        if len(line) == ROW_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        elif line := line.strip():
            yield line


class _SizeCheckedFile(io.RawIOBase):
    """A stored file that counts the bytes read and, at its end, compares them with its size."""

    def __init__(self, file: ListFile, count: Callable[[int], None] | None):
        self._file, self._count, self._bytes_read = file, count, 0
        self._stream = file.fs.open(file.path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._bytes_read += len(data)
        if data and self._count is not None:
            self._count(len(data))
        if not data and self._file.size_bytes and self._bytes_read != self._file.size_bytes:
            raise _changed(self._file, self._bytes_read)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class _Utf8(io.RawIOBase):
    def __init__(self, file: ListFile, stream: Any, raw: BinaryIO):
        self._file, self._stream, self._raw = file, stream, raw
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._left = memoryview(b"")
        self._started = self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and not self._ended:
            data = self._stream.read(len(buffer))
            if not self._started and data[:2] in _UTF16:
                raise UrlListError(f"{self._file}: expected UTF-8, got UTF-16. Save it as UTF-8.")
            self._started, self._ended = True, not data
            self._left = memoryview(self._decoder.decode(data, final=self._ended).encode())
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


def _match_pattern(pattern: str) -> list[ListFile]:
    try:
        fs, root = fsspec.core.url_to_fs(pattern)
        base, found = _listing(fs, str(root))
    except (ValueError, ImportError, OSError) as error:
        raise UrlListError(f"{pattern}: this URL list cannot be opened ({error}). Check the path.") from error
    if not found:
        raise UrlListError(f"{pattern}: no such URL list. Check data.urls; a file, a folder or a glob is expected.")
    files = []
    for path in sorted(found):
        if kind := _format_and_codec(path):
            name = path.removeprefix(base).lstrip("/")
            files.append(ListFile(fs, path, name, int(found[path].get("size") or 0), *kind))
    if not files:
        names = ", ".join(sorted(posixpath.basename(path) for path in found)[:5])
        raise UrlListError(
            f"{pattern}: expected {', '.join(FORMATS)} (all but parquet also .gz and .zst), got {names}. Convert the list."
        )
    return files


def _listing(fs: Any, root: str) -> tuple[str, dict[str, dict]]:
    """The folder that names are relative to, and the files by path."""
    if fsspec.core.has_magic(root):
        fixed = root[: min(at for mark in "*?[" if (at := root.find(mark)) >= 0)]
        found = fs.glob(root, detail=True)
        return posixpath.dirname(fixed), {path: info for path, info in found.items() if info["type"] == "file"}
    try:
        info = fs.info(root)
    except FileNotFoundError:
        return root, {}
    if info["type"] != "directory":
        return posixpath.dirname(root), {root: info}
    found = {str(info["name"]): info for info in fs.ls(root, detail=True) if info["type"] == "file"}
    visible = {path: info for path, info in found.items() if not posixpath.basename(path).startswith((".", "_"))}
    return root, visible


def _format_and_codec(path: str) -> tuple[str, str | None] | None:
    """Format and compression by the file's name; None for an unknown extension."""
    parts = posixpath.basename(path).lower().split(".")[1:]
    if parts and parts[-1] in FORMATS:
        return parts[-1], None
    if len(parts) > 1 and parts[-1] in CODECS and parts[-2] in FORMATS[1:]:
        return parts[-2], CODECS[parts[-1]]
    return None


def _changed(file: ListFile, size: int) -> UrlListError:
    return UrlListError(
        f"{file}: expected {file.size_bytes} bytes, as listed when ingest began, got {size}: it changed in the meantime. "
        "Run ingest again when no other process writes to it."
    )
