"""A headless Chromium that is spoken to by its own protocol: cookies before the first page, and pages waited for."""

import asyncio
import base64
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
WITHIN_S = 120


class Chromium:
    """Sees pages of loopback only; ended with the `with` block."""

    def __init__(self, folder: Path, width: int = 1400, height: int = 1000):
        if not BROWSER:
            pytest.skip("no Chromium on this machine: install Debian's chromium")
        self.folder = folder
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        self.process = subprocess.Popen(
            [BROWSER, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def see(self, url: str, words: Sequence[str], picture: Path, cookies: dict[str, str]) -> str:
        """Text of a page, once it has all the words; also takes a picture of it. What it says by then if it never has."""
        return asyncio.run(self._see(url, words, picture, cookies))

    async def _see(self, url: str, words: Sequence[str], picture: Path, cookies: dict[str, str]) -> str:
        deadline_s = time.monotonic() + WITHIN_S
        file = self.folder / "DevToolsActivePort"
        while not file.exists() or not file.read_text().strip():
            assert self.process.poll() is None
            assert time.monotonic() < deadline_s, "Chromium did not start"
            await asyncio.sleep(0.1)
        port = file.read_text().split()[0]
        async with aiohttp.ClientSession() as http:
            async with http.put(f"http://127.0.0.1:{port}/json/new?about:blank") as reply:
                tab = (await reply.json())["webSocketDebuggerUrl"]
            async with http.ws_connect(tab, max_msg_size=0) as page:
                for name, value in cookies.items():
                    await _ask(page, "Network.setCookie", name=name, value=value, url=url)
                await _ask(page, "Page.navigate", url=url)
                text = ""
                while not all(word in text for word in words) and time.monotonic() < deadline_s:
                    await asyncio.sleep(0.5)
                    seen = await _ask(page, "Runtime.evaluate", expression="document.body.innerText")
                    text = seen["result"].get("value", "")
                shot = await _ask(page, "Page.captureScreenshot", format="png")
                picture.write_bytes(base64.b64decode(shot["data"]))
                return text


async def _ask(page: aiohttp.ClientWebSocketResponse, method: str, **params: Any) -> dict[str, Any]:
    await page.send_json({"id": 1, "method": method, "params": params})
    while True:
        said = await page.receive_json()
        if said.get("id") == 1:
            assert "error" not in said, said
            return said["result"]
