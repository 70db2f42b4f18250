"""A headless Chromium that a test drives through the DevTools protocol: it reads the page as a user has it, and hears all
that the page asks for and complains about.
"""

import asyncio
import base64
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from debian import program


class Tab:
    """One page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._number = socket, 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        self.complaints: list[str] = []
        """What stands in its console, and what went wrong in its scripts."""
        self._listening = asyncio.create_task(self._listen())

    async def call(self, method: str, **given: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": given})
        return await asyncio.wait_for(answer, 60)

    async def open(self, address: str, width: int = 1200, height: int = 900, *, dark: bool = False) -> None:
        """Load a page in a window of this size."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'")

    async def value(self, script: str) -> Any:
        """What an expression is in the page."""
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"])
        return result["result"].get("value")

    async def until(self, script: str, within_s: float = 60.0) -> Any:
        """The expression's value as soon as it is true."""
        deadline_s = time.monotonic() + within_s
        while True:
            with contextlib.suppress(RuntimeError):  # the page was being left
                if value := await self.value(script):
                    return value
            assert time.monotonic() < deadline_s, f"never true: {script}"
            await asyncio.sleep(0.05)

    async def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def _listen(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                answer = self._answers.pop(told["id"])
                if not answer.done():
                    if "error" in told:
                        answer.set_exception(RuntimeError(str(told["error"])))
                    else:
                        answer.set_result(told["result"])
            elif told["method"] == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            elif told["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(told["params"])[:2000])


@contextlib.asynccontextmanager
async def browser_tab(folder: Path) -> AsyncIterator[Tab]:
    """A tab of a Chromium of its own, which ends with the block.

    Args:
        folder: For its profile.
    """
    command = [
        program("chromium", "chromium"),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"]
    command += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = folder / "DevToolsActivePort"
        deadline_s = time.monotonic() + 60
        while not (told.exists() and "\n" in told.read_text()):
            assert process.poll() is None, "Chromium ended"
            assert time.monotonic() < deadline_s, "Chromium did not start"
            await asyncio.sleep(0.05)
        at = f"http://127.0.0.1:{told.read_text().splitlines()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{at}/json") as answer:
                page = next(page for page in await answer.json() if page["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                try:
                    yield tab
                finally:
                    tab._listening.cancel()
    finally:
        process.terminate()
        process.wait(20)
