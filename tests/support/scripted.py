"""Servers that send exactly what a test tells them, and a record of every address that this process connects to."""

import contextlib
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

Pieces = Iterable[bytes | float]
"""What is sent; a number is a pause in seconds, which the end of the test cuts short."""

_records: list[list[tuple]] = []


def _audit(event: str, args: tuple) -> None:
    if event == "socket.connect" and isinstance(args[1], tuple):
        for record in _records:
            record.append(args[1])


sys.addaudithook(_audit)  # for the whole process, of all libraries; it cannot be taken away


@contextlib.contextmanager
def connects() -> Iterator[list[tuple]]:
    """The (address, port, ...) of each connection that anything in this process tries to make meanwhile."""
    record: list[tuple] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


class Server:
    """Listens on a random port and answers each connection with `answer(request)`, then closes it.

    `requests` are the bytes that came up to the first empty line; `talk` instead of `answer` gets the socket itself.
    """

    def __init__(
        self,
        answer: Pieces | Callable[[bytes], Pieces] = (),
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        talk: Callable[[socket.socket], None] | None = None,
    ):
        self._answer = answer if callable(answer) else lambda _: answer
        self._talk = talk or self._speak
        self._tls = tls
        self.host = host
        self.requests: list[bytes] = []
        self.ending = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> "Server":
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for thread in self._threads[1:]:
            thread.join()

    def url(self, path: str = "/x.jpg", host: str = "", scheme: str = "") -> str:
        host = host or (f"[{self.host}]" if ":" in self.host else self.host)
        return f"{scheme or ('https' if self._tls else 'http')}://{host}:{self.port}{path}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,))
                thread.start()
                self._threads.append(thread)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            if not self._tls:
                return self._talk(client)
            with self._tls.wrap_socket(client, server_side=True) as secured:
                return self._talk(secured)

    def _speak(self, client: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            if not (came := client.recv(65536)):
                return
            request += came
        self.requests.append(request)
        for piece in self._answer(request):
            if isinstance(piece, bytes):
                client.sendall(piece)
            elif self.ending.wait(piece):
                return
        # Closing with unread bytes would reset the connection and lose what was sent.
        client.shutdown(socket.SHUT_WR)


def ok(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A 200 with a body."""
    lines = [f"Content-Length: {len(body) if length is None else length}", *headers]
    return head("200 OK", *lines) + body


def moved(location: str, status: str = "302 Found") -> bytes:
    """A redirect."""
    return head(status, f"Location: {location}", "Content-Length: 0")


def head(status: str, *headers: str) -> bytes:
    """A status line and headers."""
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1")
