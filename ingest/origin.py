"""A small web server for the demo and the tests: `python -m ingest.origin CORPUS.parquet`.

The corpus has one row per URL: `path` (`/0.jpg`), `image` (encoded bytes), `caption` and `behaviour`:

    ok         served                               missing    404
    redirect   302 to another path that serves it   broken     200 with bytes that are not an image
    slow       served after a second                truncated  the connection closes after half of the image
    hang       never answers                        refused    the URL names a closed port
                                                    dead_host  the URL names a host that cannot exist

It listens on 127.0.0.1 only, prints its port as the first line of stdout, and ends when its stdin is closed.
"""

import argparse
import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from roclip.errors import DataError

BEHAVIOURS = ("ok", "missing", "redirect", "broken", "slow", "truncated", "hang", "refused", "dead_host")
COLUMNS = ("path", "image", "caption", "behaviour")
SLOW_S = 1.0
HOST = "127.0.0.1"
_ELSEWHERE = "/moved"


class Origin:
    """A running origin, in its own process, which ends with the `with` block or with this process."""

    def __init__(self, corpus: Path, port: int = 0):
        """`port` is preferred; if it is taken, another one is chosen."""
        self.corpus = corpus
        self._wish = port
        self.port = 0

    def __enter__(self) -> "Origin":
        home = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "ingest.origin", str(self.corpus), "--port", str(self._wish)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C must reach the parent only, which needs its origin while it shuts down
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip().isdigit():
            self._end()
            raise DataError(f"{self.corpus}: the origin did not start; see its messages above.")
        self.port = int(line)
        # A socket that is bound but does not listen refuses connections and keeps its port reserved.
        self._closed = socket.socket()
        self._closed.bind((HOST, 0))
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.close()
        self._end()

    def _end(self) -> None:
        with self._process as process:  # closes its stdin, which ends it, and waits
            process.kill()

    def url(self, path: str) -> str:
        """The URL of a path of the corpus."""
        return f"http://{HOST}:{self.port}{path}"

    def url_list(self, path: Path) -> None:
        """Write the corpus as a URL list: a parquet of `url` and `caption`, row by row."""
        corpus = pq.read_table(self.corpus, columns=["path", "caption", "behaviour"]).to_pydict()
        hosts = {
            "refused": f"http://{HOST}:{self._closed.getsockname()[1]}",
            "dead_host": "http://no-such-host.invalid",
        }
        urls = [
            hosts.get(behaviour, f"http://{HOST}:{self.port}") + at
            for at, behaviour in zip(corpus["path"], corpus["behaviour"], strict=True)
        ]
        pq.write_table(pa.table({"url": urls, "caption": corpus["caption"]}), path)


class _Pages:
    """The responses of the server."""

    def __init__(self, corpus: Path):
        names = pq.read_schema(corpus).names
        if missing := [column for column in COLUMNS if column not in names]:
            raise DataError(f"{corpus}: expected the columns {', '.join(COLUMNS)}, got no {', '.join(missing)}.")
        table = pq.read_table(corpus, columns=["path", "image", "behaviour"])
        self.images = table.column("image")
        self.behaviours = table.column("behaviour").to_pylist()
        if unknown := set(self.behaviours) - set(BEHAVIOURS):
            raise DataError(
                f"{corpus}: unknown behaviour {', '.join(sorted(unknown))}; known: {', '.join(BEHAVIOURS)}."
            )
        self.rows = {path: row for row, path in enumerate(table.column("path").to_pylist())}

    async def answer(self, path: str) -> bytes | None:
        """The complete response to a GET; None to never answer."""
        moved = path.startswith(_ELSEWHERE)
        row = self.rows.get(path.removeprefix(_ELSEWHERE))
        behaviour = "missing" if row is None else "ok" if moved else self.behaviours[row]
        if behaviour == "missing" or row is None:
            return _response("404 Not Found", b"", "text/plain")
        if behaviour == "redirect":
            return _response("302 Found", b"", "text/plain", f"Location: {_ELSEWHERE}{path}\r\n")
        if behaviour == "hang":
            return None
        if behaviour == "slow":
            await asyncio.sleep(SLOW_S)
        image = self.images[row].as_py()
        if behaviour == "broken":
            return _response("200 OK", b"<html>This domain is for sale.</html>", "image/jpeg")
        whole = _response("200 OK", image, "image/jpeg")
        return whole[: -(len(image) // 2)] if behaviour == "truncated" else whole


def _response(status: str, body: bytes, kind: str, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}"
    return f"{head}Connection: close\r\n\r\n".encode() + body


async def serve(corpus: Path, port: int) -> None:
    """Serve until stdin is closed. Prints the port."""
    pages = _Pages(corpus)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            request = await reader.readuntil(b"\r\n\r\n")
            answer = await pages.answer(request.split(b" ", 2)[1].decode("latin-1"))
            if answer is None:
                await reader.read()  # until the client gives up
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(client, HOST, port, backlog=1024)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        server = await asyncio.start_server(client, HOST, 0, backlog=1024)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # at once: hanging connections would delay an orderly shutdown


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ingest.origin", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--port", type=int, default=0, help="any free one if 0 or taken")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options.corpus, options.port))


if __name__ == "__main__":
    main()
