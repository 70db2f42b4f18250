"""A connection whose every wait is bounded: by a timeout for the next byte, and by the deadline of the whole URL.

`http.client` parses the response; it reads through `DeadlineSocket`, which sets the timeout before each operation on the
socket. So a server that sends its head byte by byte is given up at the deadline, too.
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
    """The time budget of one URL: `timeout_s` for each wait, until `at_s` of the monotonic clock."""

    def __init__(self, timeout_s: float, at_s: float):
        self.timeout_s = timeout_s
        self.at_s = at_s

    def remaining_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.at_s - time.monotonic()

    def next_timeout_s(self) -> float:
        """The longest that the next wait may take, in seconds. Raises `FetchError("too_slow")` after the deadline."""
        remaining_s = self.at_s - time.monotonic()
        if remaining_s <= 0:
            raise self.error()
        return min(self.timeout_s, remaining_s)

    def error(self) -> FetchError:
        """The error to raise at the deadline."""
        return FetchError("too_slow", "the response was not complete within the deadline")


class DeadlineSocket(io.RawIOBase):
    """Wraps a socket for `http.client`, which takes it for a socket and for a file. Closing it leaves the socket open."""

    def __init__(self, sock: socket.socket, deadline: Deadline, max_header_bytes: int):
        super().__init__()
        self._sock = sock
        self._sock_timeout_s = sock.gettimeout()
        self._deadline = deadline
        self._max_header_bytes = max_header_bytes
        self._head_left: int | None = max_header_bytes
        self.received_bytes = 0
        self.at_eof = False
        """Whether the server has closed its side."""

    def request(self, request: bytes) -> HTTPResponse:
        """Send a request and read the head of the response. Interim responses such as `100 Continue` are skipped."""
        self._set_timeout()
        self._sock.sendall(request)
        response = HTTPResponse(self, method=request.split(b" ", 1)[0].decode())  # type: ignore[arg-type]
        response.begin()
        while 100 <= response.status < 200:
            response.headers = None  # type: ignore[assignment]  # makes `begin` parse again, from the same buffer
            response.begin()
        self._head_left = None
        return response

    def makefile(self, mode: str = "rb", *_: Any) -> io.BufferedReader:
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if self._head_left is not None:
            if not self._head_left:
                raise FetchError("bad_response", f"a head of more than {self._max_header_bytes} bytes")
            view = view[: self._head_left]
        self._set_timeout()
        size = self._sock.recv_into(view)
        if self._head_left is not None:
            self._head_left -= size
        self.received_bytes += size
        self.at_eof = not size
        return size

    def _set_timeout(self) -> None:
        timeout_s = self._deadline.next_timeout_s()
        if timeout_s != self._sock_timeout_s:  # saves a system call until the deadline is nearer than the timeout
            self._sock.settimeout(timeout_s)
            self._sock_timeout_s = timeout_s


@contextlib.contextmanager
def connected(
    target: Target, addresses: Sequence[str], deadline: Deadline, proxy: tuple[Sequence[str], int] | None
) -> Iterator[socket.socket]:
    """Connect to one of the addresses of a target, with TLS for https, verified for the target's host name.

    `proxy` is the addresses and the port of an HTTP proxy. It is asked for a tunnel to the first address, for http as
    well: a proxy that gets a plain request replaces its Host header by the request's target (RFC 9112, 3.2.2),
    which is an address here. So it must allow CONNECT to port 80. Raises `OSError` of the socket, or `FetchError`.
    """
    with (
        _tunnel(proxy, addresses[0], target.port, deadline) if proxy else _connect(addresses, target.port, deadline)
    ) as sock:
        if target.scheme == "http":
            yield sock
            return
        sock.settimeout(deadline.next_timeout_s())
        with tls_context().wrap_socket(sock, server_hostname=target.host) as secured:
            yield secured


@functools.lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """TLS 1.2 or later, verified against the system's certificates or those of the variable `SSL_CERT_FILE`.

    Cached for the process: reading the certificates takes longer than fetching a small image.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _connect(addresses: Sequence[str], port: int, deadline: Deadline) -> socket.socket:
    failure: OSError = FetchError("no_host", "no address")
    for address in addresses[:MAX_ADDRESSES_TRIED]:
        timeout_s = deadline.next_timeout_s()
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect((address, port))
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _tunnel(proxy: tuple[Sequence[str], int], address: str, port: int, deadline: Deadline) -> socket.socket:
    sock = _connect(*proxy, deadline)
    try:
        authority = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        request = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode("ascii")
        status = DeadlineSocket(sock, deadline, 1 << 13).request(request).status
        if status != 200:
            raise FetchError("unreachable", f"the proxy answered {status} for {authority}")
    except BaseException:
        sock.close()
        raise
    return sock
