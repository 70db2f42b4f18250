"""Reads the body of an answer, unpacked and capped, so that many at the same time fit into memory.

Bodies of up to `SMALL_BYTES` are read at once. A larger one first reserves its size in `Memory`, all of it, so that it
never holds some and waits for more; the longest wait is its deadline. It gives the place back when the image has been
handled. So whatever the number of threads, `LARGE_BODIES` of the largest allowed size are held, and else small ones.
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
_PACKED = ("gzip", "x-gzip", "deflate")


class NoRoomError(FetchError):
    """No memory came free within the deadline, which is not the host's fault."""

    def __init__(self, size_bytes: int):
        super().__init__("too_slow", f"no memory for {size_bytes} bytes came free within the deadline")


class Memory:
    """A number of bytes that is lent out, first come, first served. Safe to use from many threads."""

    def __init__(self, total_bytes: int):
        self._total = self._free = total_bytes
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @property
    def free_bytes(self) -> int:
        return self._free

    def reserve(self, size_bytes: int, patience: Deadline) -> None:
        """Wait until that much is free; raises `NoRoomError` at the deadline."""
        if not self._turn.acquire(timeout=max(0.0, patience.left_s())):
            raise NoRoomError(size_bytes)
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: self._free >= size_bytes, max(0.0, patience.left_s())):
                    raise NoRoomError(size_bytes)
                self._free -= size_bytes
        finally:
            self._turn.release()

    def give_back(self, size_bytes: int) -> None:
        with self._changed:
            self._free = min(self._total, self._free + size_bytes)
            self._changed.notify_all()


def read(response: HTTPResponse, wire: DeadlineSocket, max_bytes: int, memory: Memory, patience: Deadline) -> bytes:
    """The whole body, as unpacked. One of more than `SMALL_BYTES` keeps its size reserved in `memory`.

    Raises `FetchError`: `too_large`, `truncated_image`, `bad_encoding`, `bad_response`; `NoRoomError` where no memory came free.
    """
    known = -1 if response.length is None or _encoding(response) else response.length
    most = max_bytes if known < 0 else known
    sink = io.BytesIO()
    reserved = 0
    try:
        for piece in unpacked(response, wire, max_bytes):
            size = sink.tell() + len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
            if len(piece) == known <= SMALL_BYTES:
                return piece
            if size > SMALL_BYTES and not reserved:
                memory.reserve(most, patience)
                reserved = most
            sink.write(piece)
    except BaseException:
        memory.give_back(reserved)
        raise
    if reserved:
        memory.give_back(reserved - sink.tell())
    return sink.getvalue()


def unpacked(response: HTTPResponse, wire: DeadlineSocket, max_bytes: int) -> Iterator[bytes]:
    """The body piece by piece, at most `max_bytes` of it as sent; what was sent packed comes unpacked."""
    encoding = _encoding(response)
    if encoding and encoding not in _PACKED:
        raise FetchError("bad_encoding", f"asked for identity, got {encoding[:40]!r}")
    if response.length is not None and response.length > max_bytes:
        raise _too_large(max_bytes)
    sent = _sent(response, wire, max_bytes)
    return _unpack(sent, encoding) if encoding else sent


def _encoding(response: HTTPResponse) -> str:
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def _sent(response: HTTPResponse, wire: DeadlineSocket, max_bytes: int) -> Iterator[bytes]:
    size = 0
    try:
        while piece := _next(response):
            size += len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
            if response.chunked and (response.chunk_left or 0) < 0:
                raise FetchError("bad_response", "a chunk of negative size")
            yield piece
    except IncompleteRead as error:
        if not wire.ended:  # more may come, so this is no size of a chunk
            raise FetchError("bad_response", "a broken chunk") from error
        raise FetchError("truncated_image", f"the answer ended within a chunk, after {size} bytes") from error
    if response.length:
        raise FetchError("truncated_image", f"{response.length} of the promised bytes are missing")


def _next(response: HTTPResponse) -> bytes:
    if response.chunked:
        return response.read1(_PIECE_BYTES)  # `read` would follow a chunk of size -1 without end
    return response.read(min(response.length or _PIECE_BYTES, SMALL_BYTES))


def _unpack(sent: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    unpack = zlib.decompressobj(_ZLIB_OR_GZIP)
    first = True
    try:
        for piece in sent:
            if first and encoding == "deflate" and not _is_zlib(piece):
                unpack = zlib.decompressobj(-zlib.MAX_WBITS)  # many servers leave the wrapping out
            first = False
            full = True
            while piece or full:
                out = unpack.decompress(piece, _PIECE_BYTES)
                piece = unpack.unconsumed_tail
                full = len(out) == _PIECE_BYTES
                if out:
                    yield out
            if unpack.eof:
                return
    except zlib.error as error:
        raise FetchError("bad_encoding", f"{encoding}: {error}") from error
    raise FetchError("bad_encoding", f"{encoding}: it ends too early")


def _is_zlib(piece: bytes) -> bool:
    return piece[0] & 0x0F == zlib.DEFLATED and int.from_bytes(piece[:2], "big") % 31 == 0


def _too_large(max_bytes: int) -> FetchError:
    return FetchError("too_large", f"more than {max_bytes} bytes")
