"""An open web on loopback, for benches and demonstrations: many hosts, one process, misbehaving where a path says so.

    http://127.1.0.7:<port>/ok/123.jpg       an image, the 123rd of a parquet
    http://127.1.0.7:<port>/drip/123.jpg     the same, a byte now and then
    http://127.2.0.7:<port>/ok/123.jpg       a dead host: nobody answers a connection

Every address of 127.1.0.1 to 127.1.0.<hosts> is a host. A dead one is a socket whose queue of connections is full, so
that the kernel drops what comes: as on the web, only a timeout tells. `/robots.txt` closes `/closed/`.
"""

import argparse
import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from kit import SHARED_DATA

DRIP_EVERY_S, DRIP_S = 0.5, 60.0
"""A dripping answer ends by itself after `DRIP_S`, so that a client without a deadline ends too."""
HUGE_BYTES = 256 * 2**20
HOSTS = 200
FAULTS = {"dead_host": 0.05, "drip": 0.02, "huge": 0.01}
"""What the benches put into their lists, as shares of the URLs."""
PHOTOS = SHARED_DATA / "clothing-masks" / "masks.parquet"
_ROBOTS = b"User-agent: *\nDisallow: /closed/\n"
_ERRORS = {
    "missing": "404 Not Found",
    "gone": "410 Gone",
    "forbidden": "403 Forbidden",
    "failing": "500 Internal Error",
}


class Web:
    """A running web, in a process of its own that ends with the `with` block or with this process."""

    def __init__(self, images: Path, hosts: int = 100, dead_hosts: int = 10, column: str = "image"):
        self.images, self.hosts, self.dead_hosts, self.column = images, hosts, dead_hosts, column
        self.port = 0

    def __enter__(self) -> "Web":
        command = [sys.executable, __file__, str(self.images), str(self.hosts), str(self.dead_hosts), self.column]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:  # closes its stdin, which ends it
            process.kill()

    def url(self, number: int, behaviour: str = "ok") -> str:
        """The URL of an image: which of the hosts serves it follows from its number."""
        if behaviour == "dead_host":
            return f"http://{address(2, number % self.dead_hosts)}:{self.port}/ok/{number}.jpg"
        return f"http://{address(1, number % self.hosts)}:{self.port}/{behaviour}/{number}.jpg"


def url_list(path: Path, web: Web, number: int, faults: dict[str, float]) -> Path:
    """A parquet of `url` and `caption`; where which fault stands is drawn with a fixed seed."""
    draw = random.Random(0)
    kinds, weights = ["ok", *faults], [1 - sum(faults.values()), *faults.values()]
    behaviours = draw.choices(kinds, weights, k=number)
    urls = [web.url(row, behaviour) for row, behaviour in enumerate(behaviours)]
    pq.write_table(pa.table({"url": urls, "caption": [f"photo number {row}" for row in range(number)]}), path)
    return path


def address(net: int, number: int) -> str:
    """The loopback address of a host."""
    return f"127.{net}.{number // 250}.{1 + number % 250}"


class _Client(asyncio.Protocol):
    """One connection: answers requests one after the other until the client closes."""

    def __init__(self, images) -> None:
        self.images, self.head = images, b""
        self.task: asyncio.Task | None = None

    def connection_made(self, transport) -> None:
        self.transport = transport

    def connection_lost(self, exc) -> None:
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.head += data
        while b"\r\n\r\n" in self.head:
            head, _, self.head = self.head.partition(b"\r\n\r\n")
            self.closes = b"onnection: close" in head
            self._answer(head.split(b" ", 2)[1].decode("latin-1"))

    def _answer(self, path: str) -> None:
        if path == "/robots.txt":
            return self._send("200 OK", _ROBOTS, "text/plain")
        _, behaviour, name = path.split("/", 2)
        image = self.images[int(name.partition(".")[0]) % len(self.images)]
        if behaviour in ("ok", "closed"):
            return self._send("200 OK", image, "image/jpeg")
        if behaviour in _ERRORS:
            return self._send(_ERRORS[behaviour], b"", "text/plain")
        if behaviour == "busy":
            return self._send("429 Too Many Requests", b"", "text/plain", "Retry-After: 1\r\n")
        if behaviour == "redirect":
            return self._send("302 Found", b"", "text/plain", f"Location: /ok/{name}\r\n")
        if behaviour == "loop":
            return self._send("302 Found", b"", "text/plain", f"Location: {path}\r\n")
        if behaviour == "opted_out":
            return self._send("200 OK", image, "image/jpeg", "X-Robots-Tag: noai\r\n")
        if behaviour == "parked":
            return self._send("200 OK", b"<html>This domain is for sale.</html>", "image/jpeg")
        if behaviour == "same":
            return self._send("200 OK", self.images[0], "image/jpeg")
        if behaviour == "truncated":
            self.transport.write(_head("200 OK", len(image), "image/jpeg") + image[: len(image) // 2])
            return self.transport.close()
        assert behaviour in ("drip", "huge", "hang"), path
        self.task = asyncio.create_task(self._slow(behaviour, image))
        return None

    async def _slow(self, behaviour: str, image: bytes) -> None:
        if behaviour == "drip":
            self.transport.write(_head("200 OK", len(image), "image/jpeg"))
            for _ in range(int(DRIP_S / DRIP_EVERY_S)):
                if self.transport.is_closing():
                    return
                self.transport.write(image[:1])
                await asyncio.sleep(DRIP_EVERY_S)
        elif behaviour == "huge":
            self.transport.write(_head("200 OK", HUGE_BYTES, "image/jpeg"))
            for _ in range(HUGE_BYTES >> 20):
                if self.transport.is_closing():
                    return
                self.transport.write(bytes(1 << 20))
                while self.transport.get_write_buffer_size() > 1 << 20:
                    await asyncio.sleep(0.01)
        else:
            await asyncio.sleep(DRIP_S)
        self.transport.close()

    def _send(self, status: str, body: bytes, kind: str, more: str = "") -> None:
        self.transport.write(_head(status, len(body), kind, more) + body)
        if self.closes:
            self.transport.close()


def _head(status: str, size: int, kind: str, more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n{more}\r\n".encode()


def _listeners(hosts: int) -> list[socket.socket]:
    """One socket a host, all on the same free port."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            port, sockets = 0, []
            for number in range(hosts):
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((address(1, number), port))
                listener.listen(1024)
                port = listener.getsockname()[1]
                sockets.append(listener)
            stack.pop_all()
            return sockets


def _deaden(hosts: int, port: int) -> list[socket.socket]:
    """Sockets of hosts whose queue is full."""
    kept = []
    for number in range(hosts):
        listener = socket.socket()
        listener.bind((address(2, number), port))
        listener.listen(0)
        kept.append(listener)
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex((address(2, number), port))
            kept.append(client)
    return kept


async def _serve(images: list[bytes], hosts: int, dead_hosts: int) -> None:
    loop = asyncio.get_running_loop()
    sockets = _listeners(hosts)
    port = sockets[0].getsockname()[1]
    dead = _deaden(dead_hosts, port)
    for listener in sockets:
        await loop.create_server(lambda: _Client(images), sock=listener)
    threading.Thread(target=_end_with_stdin, args=[dead], daemon=True).start()
    print(port, flush=True)
    await asyncio.Event().wait()


def _end_with_stdin(_kept: object) -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("hosts", type=int)
    parser.add_argument("dead_hosts", type=int)
    parser.add_argument("column")
    given = parser.parse_args()
    content = pq.read_table(given.images, columns=[given.column]).column(given.column).to_pylist()
    asyncio.run(_serve(content, given.hosts, given.dead_hosts))
