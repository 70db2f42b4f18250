"""An S3 server on loopback: moto's, over HTTP, with faults in front of it."""

import contextlib
import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from werkzeug.serving import make_server

READ_TIMEOUT_S = 1.0
Fault = Callable[[str, str, int], str | None]
"""(method, path, which request for it, from 0) -> 'error', 'hang', 'short', 'lost' (done, and answered by an error) or
None."""


@dataclass
class Server:
    """What a test sees of it."""

    url: str
    options: dict[str, Any]
    """For fsspec."""
    fault: Fault = lambda method, path, number: None
    seen: dict[tuple[str, str], int] = field(default_factory=dict)
    """Requests by (method, path)."""


def _silent(status: str, headers: list, *_: Any) -> None:
    """Take an answer's head, and tell nobody."""


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[Server]:
    """Serve an empty bucket on a free port."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    def app(environ: dict[str, Any], start_response: Callable) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with lock:
            number = server.seen.get((method, path), 0)
            server.seen[method, path] = number + 1
        fault = server.fault(method, path, number)
        if fault == "error":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if fault == "hang":
            time.sleep(2 * READ_TIMEOUT_S)
        with lock:  # moto is no database
            answer = b"".join(moto(environ, _silent if fault == "lost" else start_response))
        if fault == "lost":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return [answer[: len(answer) // 2]] if fault == "short" else [answer]

    http = make_server("127.0.0.1", 0, app, threaded=True)
    url = f"http://127.0.0.1:{http.server_port}"
    config = {"read_timeout": READ_TIMEOUT_S, "retries": {"max_attempts": 1}}
    options = {"key": "test", "secret": "test", "endpoint_url": url, "config_kwargs": config}
    server = Server(url, options)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        import s3fs

        # moto keeps its buckets in this process
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir(bucket)
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
