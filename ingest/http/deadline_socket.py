"""A connection whose every wait is bounded: by the time for the next byte, and by the deadline of the whole URL.

`http.client` parses what comes; it reads through `DeadlineSocket`, which looks at the clock before each operation on the
socket. So a server that drips its head byte by byte is left at the deadline, too.
"""

import contextlib
import functools
import io
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPResponse
from typing import Any

from ingest.http.urls import Target
from roclip.data.outcomes import FetchError

MAX_ADDRESSES_TRIED = 4
_BUFFER_BYTES = 1 << 15


class Deadline:
    """How long one URL may still take: `timeout_s` for each wait, until the moment `ends_s` of the monotonic clock."""

    def __init__(self, timeout_s: float, ends_s: float):
        self.timeout_s = timeout_s
        self.ends_s = ends_s

    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.ends_s - time.monotonic()

    def wait_s(self) -> float:
        """The longest that the next wait may take; raises `FetchError("too_slow")` after the deadline."""
        left_s = self.ends_s - time.monotonic()
        if left_s <= 0:
            raise self.over()
        return min(self.timeout_s, left_s)

    def over(self) -> FetchError:
        """What is raised at the deadline."""
        return FetchError("too_slow", "the answer was not complete within the deadline")


class DeadlineSocket(io.RawIOBase):
    """What `http.client` takes for a socket, and its parser for a file. Closing it leaves the socket open."""

    def __init__(self, sock: socket.socket, patience: Deadline, max_header_bytes: int):
        super().__init__()
        self._sock = sock
        self._sock_timeout_s = sock.gettimeout()
        self._patience = patience
        self._max_header_bytes = max_header_bytes
        self._head_left: int | None = max_header_bytes
        self.received_bytes = 0
        self.ended = False
        """The server has closed its side."""

    def ask(self, request: bytes) -> HTTPResponse:
        """Send a request and read the head of its answer; `100 Continue` and its like are passed over."""
        self._wait_no_longer_than_allowed()
        self._sock.sendall(request)
        response = HTTPResponse(self, method=request.split(b" ", 1)[0].decode())  # type: ignore[arg-type]
        response.begin()
        while 100 <= response.status < 200:
            response.headers = None  # type: ignore[assignment]  # so that it begins again, in the same buffer
            response.begin()
        self._head_left = None
        return response

    def makefile(self, mode: str = "rb", *_: Any) -> io.BufferedReader:
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)
        if self._head_left is not None:
            if not self._head_left:
                raise FetchError("bad_response", f"a head of more than {self._max_header_bytes} bytes")
            room = room[: self._head_left]
        self._wait_no_longer_than_allowed()
        size = self._sock.recv_into(room)
        if self._head_left is not None:
            self._head_left -= size
        self.received_bytes += size
        self.ended = not size
        return size

    def _wait_no_longer_than_allowed(self) -> None:
        wait_s = self._patience.wait_s()
        if wait_s != self._sock_timeout_s:  # a system call, needed once the deadline is nearer than the timeout
            self._sock.settimeout(wait_s)
            self._sock_timeout_s = wait_s


@contextlib.contextmanager
def connected(
    target: Target, addresses: Sequence[str], patience: Deadline, proxy: tuple[Sequence[str], int] | None
) -> Iterator[socket.socket]:
    """A socket to one of the addresses of a target, with TLS for https, verified for the target's name.

    `proxy` is the addresses and the port of an HTTP proxy. It is asked for a tunnel to the first address, for http as
    well: a proxy that gets a request instead replaces its Host header by what the request is for (RFC 9112, 3.2.2),
    which is an address here. So it must allow CONNECT to port 80. Raises what sockets raise, or `FetchError`.
    """
    with (
        _tunnel(proxy, addresses[0], target.port, patience) if proxy else _connect(addresses, target.port, patience)
    ) as sock:
        if target.scheme == "http":
            yield sock
            return
        sock.settimeout(patience.wait_s())
        with tls_context().wrap_socket(sock, server_hostname=target.host) as secured:
            yield secured


@functools.lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Verifies against the system's certificates, or those of the variable `SSL_CERT_FILE`; TLS 1.2 or later.

    Made once in a process: reading the certificates takes longer than a small image.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _connect(addresses: Sequence[str], port: int, patience: Deadline) -> socket.socket:
    failure: OSError = FetchError("no_host", "no address")
    for address in addresses[:MAX_ADDRESSES_TRIED]:
        wait_s = patience.wait_s()
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.settimeout(wait_s)
            sock.connect((address, port))
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _tunnel(proxy: tuple[Sequence[str], int], address: str, port: int, patience: Deadline) -> socket.socket:
    sock = _connect(*proxy, patience)
    try:
        authority = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        request = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode("ascii")
        status = DeadlineSocket(sock, patience, 1 << 13).ask(request).status
        if status != 200:
            raise FetchError("unreachable", f"the proxy answered {status} for {authority}")
    except BaseException:
        sock.close()
        raise
    return sock
