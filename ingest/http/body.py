"""Reads response bodies, decompressed and capped, within a memory budget shared by all threads.

A body of up to `SMALL_BYTES` is read at once. A larger one first reserves its whole size in a `MemoryBudget`, waiting at most
until its deadline; reserving everything at once rules out a deadlock between half-read bodies. The reservation ends when the
image has been processed. So whatever the number of threads, at most `LARGE_BODIES` bodies of the largest allowed size are in
memory, beside small ones.
"""

import io
import threading
import zlib
from collections.abc import Iterator
from http.client import HTTPResponse, IncompleteRead

from ingest.http.deadline_socket import Deadline, DeadlineSocket
from roclip.data.outcomes import FetchError

SMALL_BYTES = 2**20
LARGE_BODIES = 4
_PIECE_BYTES = 1 << 16
_ZLIB_OR_GZIP = zlib.MAX_WBITS | 32
_COMPRESSED = ("gzip", "x-gzip", "deflate")


class NoMemoryLeftError(FetchError):
    """The memory budget stayed exhausted until the deadline. The host is not to blame."""

    def __init__(self, size_bytes: int):
        super().__init__("too_slow", f"no memory for {size_bytes} bytes came free within the deadline")


class MemoryBudget:
    """A semaphore over `total_bytes`, served in order of arrival. Thread-safe."""

    def __init__(self, total_bytes: int):
        self._total = self._free = total_bytes
        self._queue_lock = threading.Lock()
        self._changed = threading.Condition()

    @property
    def free_bytes(self) -> int:
        return self._free

    def reserve(self, size_bytes: int, deadline: Deadline) -> None:
        """Wait until `size_bytes` are free and take them. Raises `NoMemoryLeftError` at the deadline."""
        if not self._queue_lock.acquire(timeout=max(0.0, deadline.remaining_s())):
            raise NoMemoryLeftError(size_bytes)
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: self._free >= size_bytes, max(0.0, deadline.remaining_s())):
                    raise NoMemoryLeftError(size_bytes)
                self._free -= size_bytes
        finally:
            self._queue_lock.release()

    def release(self, size_bytes: int) -> None:
        """Return reserved bytes."""
        with self._changed:
            self._free = min(self._total, self._free + size_bytes)
            self._changed.notify_all()


def read(
    response: HTTPResponse, sock: DeadlineSocket, max_bytes: int, memory: MemoryBudget, deadline: Deadline
) -> bytes:
    """Read the whole body, decompressed. A body of more than `SMALL_BYTES` keeps its size reserved in `memory`.

    Raises `FetchError`: `too_large`, `truncated_image`, `bad_encoding` or `bad_response`; `NoMemoryLeftError` if the memory
    budget is exhausted until the deadline.
    """
    known = -1 if response.length is None or _encoding(response) else response.length
    most = max_bytes if known < 0 else known
    sink = io.BytesIO()
    reserved = 0
    try:
        for piece in decompressed(response, sock, max_bytes):
            size = sink.tell() + len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
            if len(piece) == known <= SMALL_BYTES:
                return piece
            if size > SMALL_BYTES and not reserved:
                memory.reserve(most, deadline)
                reserved = most
            sink.write(piece)
    except BaseException:
        memory.release(reserved)
        raise
    if reserved:
        memory.release(reserved - sink.tell())
    return sink.getvalue()


def decompressed(response: HTTPResponse, sock: DeadlineSocket, max_bytes: int) -> Iterator[bytes]:
    """Yield the body in pieces, decompressed. `max_bytes` bounds the bytes received, before decompression."""
    encoding = _encoding(response)
    if encoding and encoding not in _COMPRESSED:
        raise FetchError("bad_encoding", f"asked for identity, got {encoding[:40]!r}")
    if response.length is not None and response.length > max_bytes:
        raise _too_large(max_bytes)
    sent = _transferred(response, sock, max_bytes)
    return _decompress(sent, encoding) if encoding else sent


def _encoding(response: HTTPResponse) -> str:
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def _transferred(response: HTTPResponse, sock: DeadlineSocket, max_bytes: int) -> Iterator[bytes]:
    size = 0
    try:
        while piece := _read_piece(response):
            size += len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
            if response.chunked and (response.chunk_left or 0) < 0:
                raise FetchError("bad_response", "a chunk of negative size")
            yield piece
    except IncompleteRead as error:
        if not sock.at_eof:  # the server may still send, so the chunk's size line itself was malformed
            raise FetchError("bad_response", "a broken chunk") from error
        raise FetchError("truncated_image", f"the response ended within a chunk, after {size} bytes") from error
    if response.length:
        raise FetchError("truncated_image", f"{response.length} bytes of Content-Length are missing")


def _read_piece(response: HTTPResponse) -> bytes:
    if response.chunked:
        return response.read1(_PIECE_BYTES)  # `read` would follow a chunk of size -1 without end
    return response.read(min(response.length or _PIECE_BYTES, SMALL_BYTES))


def _decompress(sent: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(_ZLIB_OR_GZIP)
    first = True
    try:
        for piece in sent:
            if first and encoding == "deflate" and not _has_zlib_header(piece):
                decompressor = zlib.decompressobj(-zlib.MAX_WBITS)  # many servers omit the zlib header
            first = False
            full = True
            while piece or full:
                out = decompressor.decompress(piece, _PIECE_BYTES)
                piece = decompressor.unconsumed_tail
                full = len(out) == _PIECE_BYTES
                if out:
                    yield out
            if decompressor.eof:
                return
    except zlib.error as error:
        raise FetchError("bad_encoding", f"{encoding}: {error}") from error
    raise FetchError("bad_encoding", f"{encoding}: the compressed stream ends too early")


def _has_zlib_header(piece: bytes) -> bool:
    return piece[0] & 0x0F == zlib.DEFLATED and int.from_bytes(piece[:2], "big") % 31 == 0


def _too_large(max_bytes: int) -> FetchError:
    return FetchError("too_large", f"more than {max_bytes} bytes")
