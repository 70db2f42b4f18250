"""`roclip dashboard`: a page of one run, live by server-sent events, for those without Grafana.

    GET /                 the page as it is now
    GET /events           the parts that have changed since a version, then each change as it comes
    GET /image/<sha256> an image that the page shows; no path ever comes from a request
    GET /enter            the token for a cookie, where one is needed

One reader reads the run directory each second while somebody watches, for all browsers. A browser that is slow, or that
comes back after its connection was lost, gets the parts that have changed since, not every version that it has missed.
"""

import asyncio
import contextlib
import json
import secrets
import signal
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from cluster.dashboard.guard import COOKIE, Guard, page_headers, plain_headers
from cluster.dashboard.page import PARTS, Page
from roclip.errors import StageError
from roclip.report.oracle_state import PngStore
from roclip.report.run_state import RunReader

READ_EVERY_S = 1.0
HEARTBEAT_S = 15.0
"""Seconds between two heartbeats on a quiet connection: proxies cut silent ones."""
MAX_WATCHERS = 64


class Dashboard:
    """The server's state: the parts of the page, and the version in which each last changed.

    Args:
        run: The run directory.
        guard: Decides who may see it.
    """

    def __init__(self, run: Path, guard: Guard):
        self.guard, self.page, self.images = guard, Page(), PngStore()
        self._reader = RunReader(run, self.images)
        self._parts: dict[str, str] = {}
        self._changed = dict.fromkeys(PARTS, 0)
        self._version, self._start = 0, secrets.token_hex(4)
        self._behind = False
        self._read_s = -READ_EVERY_S
        self._watchers = 0
        self._changes = asyncio.Condition()
        self._reading = asyncio.Lock()
        self.closing = asyncio.Event()

    @property
    def application(self) -> web.Application:
        """Routes and checks."""
        application = web.Application(middlewares=[self.guard.middleware], client_max_size=0)
        for path, handler in {
            "/": self._whole,
            "/events": self._events,
            "/image/{name}": self._image,
            "/enter": self._enter,
        }.items():
            application.router.add_get(path, handler, allow_head=False)
        return application

    async def watch(self) -> None:
        """Read the run directory again and again while somebody watches the page."""
        while not self.closing.is_set():
            if self._watchers:
                await self._update()
            pause_s = 0.0 if self._behind and self._watchers else READ_EVERY_S
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.closing.wait(), pause_s or 0.01)

    async def close(self) -> None:
        """End the connections that wait for changes."""
        self.closing.set()
        async with self._changes:
            self._changes.notify_all()

    async def _update(self) -> None:
        """Bring the parts up to date, in a thread because a long log takes a while."""
        async with self._reading:
            now_s = asyncio.get_running_loop().time()
            if now_s - self._read_s < READ_EVERY_S / 2 and not self._behind:
                return
            parts, self._behind = await asyncio.to_thread(self._read)
            self._read_s = asyncio.get_running_loop().time()
        changed = [name for name in PARTS if parts[name] != self._parts.get(name)]
        if changed:
            self._version += 1
            self._parts = parts
            self._changed.update(dict.fromkeys(changed, self._version))
            async with self._changes:
                self._changes.notify_all()

    def _read(self) -> tuple[dict[str, str], bool]:
        state = self._reader.read()
        return self.page.parts(state), state.behind

    async def _whole(self, request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        if not self.guard.lets_in(request):
            return web.Response(text=self.page.door(nonce), content_type="text/html", headers=page_headers(nonce))
        await self._update()
        text = self.page.whole(self._parts, nonce=nonce, version=self._id)
        return web.Response(text=text, content_type="text/html", headers=page_headers(nonce))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self._need_token(request)
        if self._watchers >= MAX_WATCHERS:
            raise web.HTTPServiceUnavailable(
                text=f"{MAX_WATCHERS} browsers watch already.\n", headers={"Retry-After": "30"}
            )
        seen = self._version_of(request.headers.get("Last-Event-ID") or request.query.get("since", ""))
        answer = web.StreamResponse(headers={**plain_headers(), "X-Accel-Buffering": "no"})
        answer.content_type = "text/event-stream"
        self._watchers += 1
        try:
            await answer.prepare(request)
            await answer.write(b"retry: 2000\n\n")
            while not self.closing.is_set():
                if seen < self._version:
                    changes = {name: self._parts[name] for name in PARTS if self._changed[name] > seen}
                    seen, version = self._version, self._id
                    await answer.write(f"id: {version}\ndata: {json.dumps(changes)}\n\n".encode())
                elif not await self._wait(seen):
                    await answer.write(b": nothing new\n\n")
        except ConnectionError:
            pass  # the browser has gone
        finally:
            self._watchers -= 1
        return answer

    async def _wait(self, seen: int) -> bool:
        """Whether a newer version, or the end, comes within a heartbeat."""
        async with self._changes:
            newer = self._changes.wait_for(lambda: self._version > seen or self.closing.is_set())
            try:
                await asyncio.wait_for(newer, HEARTBEAT_S)
            except asyncio.TimeoutError:
                return False
        return True

    async def _image(self, request: web.Request) -> web.Response:
        self._need_token(request)
        try:
            content = self.images[request.match_info["name"]]
        except KeyError:
            raise web.HTTPNotFound(text="No such image.\n") from None
        cached = {"Cache-Control": "private, max-age=86400, immutable"}  # its name is its content
        return web.Response(body=content, content_type="image/png", headers={**plain_headers(), **cached})

    async def _enter(self, request: web.Request) -> web.Response:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not self.guard.token or not self.guard.is_token(token):
            raise web.HTTPForbidden(text="This is not the token.\n")
        answer = web.Response(text="welcome\n", headers=plain_headers())
        answer.set_cookie(COOKIE, self.guard.token, httponly=True, samesite="Strict", path="/")
        return answer

    def _need_token(self, request: web.Request) -> None:
        if not self.guard.lets_in(request):
            raise web.HTTPForbidden(text="Open the page with its token first.\n")

    @property
    def _id(self) -> str:
        return f"{self._start}-{self._version}"

    def _version_of(self, event_id: str) -> int:
        """The version that a browser has; 0, so that it gets everything, if another server process sent it."""
        start, _, version = event_id.partition("-")
        return int(version) if start == self._start and version.isdecimal() and len(version) < 12 else 0


async def serve(run: Path, host: str, port: int, ready: Callable[[str, Guard], None]) -> None:
    """Serve the page of a run until SIGINT or SIGTERM.

    Args:
        port: 0 takes a free one.
        ready: Called with the address once it answers.

    Raises `StageError` if the address cannot be listened on.
    """
    dashboard = Dashboard(run, Guard(host))
    runner = web.AppRunner(dashboard.application, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise StageError(
                f"{host}:{port}: expected an address to listen on, got {error.strerror}. Take another --port."
            ) from error
        watching = asyncio.create_task(dashboard.watch())
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{runner.addresses[0][1]}/", dashboard.guard)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([watching, stopping], return_when=asyncio.FIRST_COMPLETED)
        await dashboard.close()
        await watching  # says what went wrong, if it ended by itself
    finally:
        await runner.cleanup()
