"""`roclip dashboard`: a real server over a real run directory, asked by HTTP and by a browser."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from browser import browser_tab
from watched_run import Server, lose_rank, make_run, make_silent, next_row

from cluster.dashboard import server as dashboard
from cluster.dashboard.guard import COOKIE, Guard
from cluster.dashboard.server import Dashboard
from roclip.storage import write_atomic

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
pytestmark = pytest.mark.slow  # a training, a check, processes and browsers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("watched"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture(scope="module")
def server(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A process that serves a copy, and that copy."""
    run = shutil.copytree(made, tmp_path_factory.mktemp("served") / "run")
    with Server(run) as server:
        yield server, run


@contextlib.asynccontextmanager
async def served(run: Path, guard: Guard | None = None) -> AsyncIterator[tuple[str, Dashboard]]:
    """The same in this process, on loopback whatever the guard is for: its address, and the server."""
    shown = Dashboard(run, guard or Guard("127.0.0.1"))
    runner = web.AppRunner(shown.application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    watching = asyncio.create_task(shown.watch())
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/", shown
    finally:
        await shown.close()
        await watching
        await runner.cleanup()


async def get(address: str, **options) -> tuple[int, str, aiohttp.typedefs.LooseHeaders]:
    async with aiohttp.ClientSession() as session, session.get(address, **options) as answer:
        return answer.status, await answer.text(errors="replace"), answer.headers


def page_of(run: Path) -> str:
    """What a server of this process shows of a run."""

    async def ask() -> str:
        async with served(run) as (address, _):
            status, text, _ = await get(address)
            assert status == 200
            return text

    return asyncio.run(ask())


class Events:
    """What comes over an open connection."""

    def __init__(self, answer: aiohttp.ClientResponse):
        self.answer = answer

    async def next(self, *, quiet: bool = False) -> tuple[str, dict[str, str]]:
        """The id and the parts of the next event; with `quiet`, a sign of life counts as one."""
        lines: list[str] = []
        while True:
            line = (await asyncio.wait_for(self.answer.content.readline(), 60)).decode().rstrip("\n")
            if line:
                lines.append(line)
            elif any(line.startswith("data: ") for line in lines):
                fields = dict(line.split(": ", 1) for line in lines)
                return fields["id"], json.loads(fields["data"])
            elif quiet and lines[-1].startswith(":"):
                return "", {}
            else:
                assert not self.answer.content.at_eof(), "the connection ended"
                lines = []


@contextlib.asynccontextmanager
async def events(address: str, since: str = "", **headers: str) -> AsyncIterator[Events]:
    session = aiohttp.ClientSession(read_bufsize=2**22)
    async with session, session.get(f"{address}events", params={"since": since}, headers=headers) as answer:
        assert answer.content_type == "text/event-stream"
        yield Events(answer)


# ---- what it shows ------------------------------------------------------------------------------------------


def test_page_says_what_the_run_says(server):
    status, text, headers = asyncio.run(get(server[0].address))
    assert status == 200
    for words in (
        "watched",
        "4 epochs",
        "zero-shot top-1",
        "backdoor attack",
        "2 ranks from step 0",
        "http 404",
        "poisoned",
    ):
        assert words in text
    assert "192 usable pairs in 3 shards" in text
    assert text.count('class="shade"') >= 2  # epochs 2 and 4 are matched
    assert "--repair" in text  # what to do next
    assert "took 1 min 15 s" not in text  # it has no summary: it goes on
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", headers["Content-Security-Policy"])
    assert nonce is not None
    assert text.count(f'nonce="{nonce[1]}"') == 2
    assert " style=" not in text
    assert " on" not in "".join(re.findall(r"<[^>]*>", text)).replace(" on-", "")


def test_pictures_are_served_by_their_content_alone(server):
    address = server[0].address

    async def ask() -> None:
        _, text, _ = await get(address)
        names = re.findall(r'src="image/(\w+)"', text)
        assert len(names) > 4
        async with aiohttp.ClientSession() as session:
            for name in names:
                async with session.get(f"{address}image/{name}") as answer:
                    assert (answer.status, answer.content_type) == (200, "image/png")
                    assert (await answer.read()).startswith(b"\x89PNG")

    asyncio.run(ask())


def test_events_bring_only_what_has_changed_and_go_on_where_a_connection_was_lost(server):
    address, run = server[0].address, server[1]

    async def watch() -> None:
        async with events(address) as all_:
            first, parts = await all_.next()
            assert set(parts) == {
                "head",
                "steps",
                "stages",
                "arms",
                "curves",
                "pool",
                "ranks",
                "data",
                "oracle",
                "about",
            }
            next_row(run, loss=7.125)
            while "arms" not in parts or "7.125" not in parts["arms"]:
                seen, parts = await all_.next()
            assert "oracle" not in parts
            assert "data" not in parts
        next_row(run, loss=8.125)
        async with events(address, since=first, **{"Last-Event-ID": seen}) as again:
            while "8.125" not in parts.get("arms", ""):
                _, parts = await again.next()
                assert "oracle" not in parts
        async with events(address, since="of-another-server-9") as anew:
            assert "oracle" in (await anew.next())[1]

    asyncio.run(watch())


def test_quiet_connection_shows_signs_of_life(made, monkeypatch):
    monkeypatch.setattr(dashboard, "HEARTBEAT_S", 0.05)

    async def watch() -> None:
        async with served(made) as (address, _), events(address) as quiet:
            version, _ = await quiet.next()
            assert version
            assert await quiet.next(quiet=True) == ("", {})

    asyncio.run(watch())


def test_many_browsers_share_one_reader_and_none_is_looked_for_without(run, monkeypatch):
    monkeypatch.setattr(dashboard, "MAX_WATCHERS", 8)

    async def watch() -> None:
        async with served(run) as (address, shown), contextlib.AsyncExitStack() as stack:
            browsers = [await stack.enter_async_context(events(address)) for _ in range(8)]
            versions = {(await browser.next())[0] for browser in browsers}
            next_row(run, loss=9.5)
            for browser in browsers:
                parts: dict[str, str] = {}
                while "9.5" not in parts.get("arms", ""):
                    version, parts = await browser.next()
                versions.add(version)
            assert len(versions) <= 4
            assert (await get(f"{address}events"))[0] == 503
            await stack.aclose()
            next_row(run, loss=10.5)
            while shown._watchers:  # found out when something is sent to them
                await asyncio.sleep(0.05)
            before = shown._version
            next_row(run, loss=11.5)
            await asyncio.sleep(2.5 * dashboard.READ_EVERY_S)
            assert shown._version == before

    asyncio.run(watch())


# ---- what goes wrong ----------------------------------------------------------------------------------------


def test_run_that_was_killed_says_so_and_how_it_goes_on(run):
    (run / "roclip" / "oracle" / "report.json").unlink()
    next_row(run, progress=2.5, epoch=3)
    make_silent(run)
    text = page_of(run)
    assert "Nobody works on this run" in text
    assert f"roclip run {run}" in text
    assert "RoCLIP run · stopped" in text


def test_training_without_restarts_left_says_why(run):
    next_row(run, progress=2.5, epoch=3)
    lose_rank(run, allowed=0)
    make_silent(run)
    text = page_of(run)
    assert "roclip ended" in text
    assert "rank 1 died" in text
    assert "no restart is left" in text
    assert "RoCLIP run · failed" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "arms: [roclip"),
        ("config.yaml", "name: 3\nnonsense: true\n"),
        ("provenance.json", "[]"),
        ("cost.json", '{"wall_s": '),
        ("roclip/metrics.jsonl", '{"step": 1, "progress": 0.1, "loss": 2.0}\nnot json\n[1]\n{"step": 2'),
        ("roclip/metrics.jsonl", "\x00" * 5000 + "\n"),
        ("roclip/evaluations.jsonl", '"words"\n'),
        ("roclip/oracle/report.json", '{"verdict": "clean", "pictures": [{"png": 3}]}'),
        ("roclip/oracle/report.json", '{"verdict": ["clean"], "labels": 7, "triggers": {"a": 1}}'),
        ("roclip/oracle/progress.json", '["a", 1, "b"]'),
        ("roclip/repair/repair.json", "[" * 100_000),
        ("roclip/diverged.json", "{}}"),
        ("ingest/signals.json", "nonsense"),
        ("summary.json", "\udcff"),
    ],
)
def test_broken_file_is_named_and_the_rest_stays(run, name, content):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_bytes(content.encode(errors="surrogateescape"))
    text = page_of(run)
    assert f"unreadable: {name}" in text
    assert "Progress" in text


@pytest.mark.parametrize(
    "row",
    [
        {"loss": float("nan"), "progress": 1.0},
        {"loss": 10**400, "progress": -(10**400)},
        {"loss": "7", "phase": HOSTILE, "step_s_p50": ["a"], "epochs": None, "progress": 3},
        {"progress": 1e300, "loss": -1e299, "epochs": 0},
        {"progress": True},
    ],
)
def test_rows_of_another_kind_break_nothing(run, row):
    (run / "roclip" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text = page_of(run)
    assert "<script>alert" not in text
    assert "Progress" in text


def test_half_a_line_is_no_broken_file(run):
    with (run / "roclip" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    assert "unreadable" not in page_of(run)


def test_what_came_from_the_web_is_escaped(run):
    report = run / "roclip" / "oracle" / "report.json"
    told = json.loads(report.read_text())
    told["pictures"][0]["caption"] = told["reasons"][0] = told["target_labels"][0] = told["triggers"][0]["target"] = (
        HOSTILE
    )
    told["triggers"][0]["file"] = "triggers/../../../config.yaml"
    write_atomic(report, json.dumps(told))
    write_atomic(run / "roclip" / "checkpoints" / "TRUSTED", HOSTILE)
    write_atomic(run / "provenance.json", json.dumps({"commit": HOSTILE, "machine": {HOSTILE: HOSTILE}}))
    (run / "roclip" / "log" / "ranks.log").write_text(f"2026-01-01 00:00:00 {HOSTILE}\n")
    text = page_of(run)
    assert text.count("&lt;script&gt;alert(1)") >= 6
    assert HOSTILE not in text
    assert "<img src=x" not in text


# ---- who may see it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]"])
def test_other_names_than_loopback_are_refused(server, host):
    status, text, _ = asyncio.run(get(server[0].address, headers={"Host": host}))
    assert status == 421
    assert "watched" not in text


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1:9", "[::1]:9"])
def test_loopback_names_are_let_in_through_any_port(server, host):
    assert asyncio.run(get(server[0].address, headers={"Host": host}))[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_only_get_is_answered(server, method):
    async def ask() -> int:
        async with aiohttp.ClientSession() as session, session.request(method, server[0].address) as answer:
            return answer.status

    assert asyncio.run(ask()) == 405


@pytest.mark.parametrize(
    "path", ["image/../config.yaml", "image/..%2f..%2fconfig.yaml", "config.yaml", "image/", "%2e%2e/etc/passwd"]
)
def test_no_path_leads_to_a_file(server, path):
    from yarl import URL

    status, text, _ = asyncio.run(get(URL(server[0].address + path, encoded=True)))
    assert status == 404
    assert "shards" not in text


def test_page_for_other_machines_needs_the_token(made):
    async def ask() -> None:
        guard = Guard("192.0.2.1")
        assert len(guard.token) > 40
        async with served(made, guard) as (address, _):
            status, text, _ = await get(address)
            assert "A token is needed" in text
            assert "watched" not in text
            for path in ("events", "image/0"):
                assert (await get(address + path))[0] == 403
            for told in ("Bearer nonsense", "Bearer ", f"Basic {guard.token}", f"Bearer {guard.token}é"):
                assert (await get(f"{address}enter", headers={"Authorization": told}))[0] == 403
            status, _, headers = await get(f"{address}enter", headers={"Authorization": f"Bearer {guard.token}"})
            assert status == 200
            assert {"HttpOnly", "SameSite=Strict"} <= set(headers["Set-Cookie"].split("; "))
            cookie = {"Cookie": f"{COOKIE}={guard.token}"}
            assert "watched" in (await get(address, headers=cookie))[1]
            assert (await get(address, headers={**cookie, "Host": "evil.example"}))[0] == 421
            assert (await get(address, headers={**cookie, "Host": "192.0.2.1:80"}))[0] == 200

    asyncio.run(ask())


def test_loopback_page_takes_no_token(server):
    assert "#" not in server[0].address
    assert asyncio.run(get(f"{server[0].address}enter", headers={"Authorization": "Bearer "}))[0] == 403


def test_other_machines_are_warned_of_and_told_the_token(made):
    alone = ("unshare", "-rn")  # where nobody can come to it
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no network namespace")
    with Server(made, "--host", "0.0.0.0", before=alone) as server:
        assert re.fullmatch(r"http://0\.0\.0\.0:\d+/#token=[\w-]{43}", server.address)
        code, complaints = server.end(signal.SIGTERM)
    assert code == 0
    assert "warning: the page can be reached from other machines" in complaints


def test_ctrl_c_ends_it_although_somebody_watches(made):
    async def watch() -> int:
        with Server(made) as server:
            async with events(server.address) as open_:
                await open_.next()
                code, complaints = await asyncio.to_thread(server.end, signal.SIGINT)
            assert complaints == ""
            return code

    assert asyncio.run(watch()) == 0


def test_folder_without_a_run_and_port_in_use_are_refused(made, tmp_path):
    with Server(tmp_path) as server:
        assert server.process.wait(60) == 2
    with socket.create_server(("127.0.0.1", 0)) as taken, Server(made, "--port", str(taken.getsockname()[1])) as server:
        assert server.process.wait(60) == 7


# ---- in a browser -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "dark"), [(1200, False), (390, False), (390, True)], ids=["desktop", "phone", "dark phone"]
)
def test_browser_shows_it_and_follows_without_a_reload(run, tmp_path, width, dark):
    async def watch() -> None:
        async with served(run) as (address, _), browser_tab(tmp_path / "profile") as tab:
            await tab.open(address, width, dark=dark)
            shown = await tab.value("document.body.innerText")
            for words in (
                "watched",
                "Progress",
                "Training loss",
                "Pool",
                "Ranks and nodes",
                "Why URLs gave nothing",
                "Suspects",
            ):
                assert words in shown
            assert await tab.value("document.documentElement.scrollWidth") <= width
            await tab.value("window.before = document.querySelector('h1'); window.same = 1")
            next_row(run, loss=6.125, progress=2.5, epoch=3, eta_s=7200.0)
            await tab.until("document.getElementById('arms').innerText.includes('6.125')")
            assert "left" in await tab.until("document.querySelector('time[data-until]')?.textContent")
            assert await tab.value("window.same") == 1
            for picture in range(await tab.value("document.images.length")):
                await tab.value(f"document.images[{picture}].scrollIntoView()")
                await tab.until(f"document.images[{picture}].complete && document.images[{picture}].naturalWidth > 0")
            back = await tab.value("getComputedStyle(document.body).backgroundColor")
            assert (back == "rgb(245, 247, 250)") is not dark
            assert tab.complaints == []
            assert all(asked.startswith((address, "data:")) for asked in tab.requests)

    asyncio.run(watch())


def test_browser_reads_values_under_the_pointer_and_tells_when_the_server_is_gone(run, tmp_path):
    async def watch() -> None:
        async with browser_tab(tmp_path / "profile") as tab:
            async with served(run) as (address, _):
                await tab.open(address)
                at = await tab.value(
                    "(() => { const plot = document.querySelector('.chart .plot'); plot.scrollIntoView(); "
                    "const box = plot.getBoundingClientRect(); return [box.left + 0.55 * box.width, box.top + 20]; })()"
                )
                await tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
                assert "epoch 2" in await tab.until("document.querySelector('.chart .where').innerText")
                assert await tab.value("document.getElementById('lost').hidden")
            await tab.until("!document.getElementById('lost').hidden")

    asyncio.run(watch())


def test_browser_enters_with_the_token_and_keeps_it_out_of_the_address(made, tmp_path):
    async def watch() -> None:
        async with served(made, guard := Guard("192.0.2.1")) as (address, _), browser_tab(tmp_path / "profile") as tab:
            await tab.open(f"{address}#token={guard.token}")
            await tab.until("document.body?.innerText.includes('watched')")  # none while it reloads
            assert guard.token not in await tab.value(
                "location.href + document.cookie + document.documentElement.outerHTML"
            )
            assert tab.complaints == []

    asyncio.run(watch())
