"""The opener that replaces urllib's: redirects, opt-outs, rate limits, retries; asserted at the socket."""

import contextlib
import io
import threading
import time
import urllib.error
import urllib.request
from email.utils import formatdate

import pytest
from hostile import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from name_server import NameServer
from scripted import Server, connects, head, moved, ok

from ingest.http import connection
from ingest.http.connection import MAX_RETRY_AFTER_S, MAX_ROBOTS_BYTES, FetchedBody, Opener
from roclip.config import FetchPolicy
from roclip.data.outcomes import FetchError, reason_of
from roclip.errors import ConfigError

PUBLIC, PRIVATE = "127.0.0.2", "127.0.0.1"
"""Loopback plays both: the policy of these tests allows one of its addresses."""
RULES = {"allow_networks": (f"{PUBLIC}/32",)}


def opener(*, timeout_s=5.0, retries=0, limiter=None, robots=None, **rules):
    return Opener(
        FetchPolicy(**{**RULES, **rules}), timeout_s=timeout_s, retries=retries, limiter=limiter, robots=robots
    )


def get(url, **options):
    with opener(**options).open(url) as answer:
        return answer.read()


@contextlib.contextmanager
def nothing_private():
    """Fails when anything connects to another address than the allowed one, whatever the URL led to."""
    with connects() as tried:
        yield tried
    assert {address for address, *_ in tried} <= {PUBLIC}


@contextlib.contextmanager
def private():
    """A server that must not be reached."""
    with Server([ok(b"secret")], PRIVATE) as server:
        yield server
        assert server.requests == []


def test_answer_is_what_urllib_gives():
    with Server([ok(b"image", "X-A: 1", "X-A: 2")], PUBLIC) as server, nothing_private():
        with opener().open(urllib.request.Request(server.url()), timeout=5) as answer:
            assert (answer.status, answer.code, answer.geturl()) == (200, 200, server.url())
            assert answer.info().get_all("x-a") == answer.headers.get_all("X-A") == ["1", "2"]
            assert answer.read() == b"image"
        assert answer.closed


def test_request_says_who_we_are_and_nothing_else():
    request = urllib.request.Request("http://x", headers={"User-Agent": "Mozilla/5.0", "Cookie": "a=b", "Referer": "x"})
    hops = {b"/a": moved("/b"), b"/b": head("302 Found", "Location: /c", "Set-Cookie: a=b", "Content-Length: 0")}

    with Server(lambda said: [hops.get(said.split(b" ")[1], ok(b"image"))], PUBLIC) as server:
        request.full_url = server.url("/a#part")
        assert opener(contact="https://a.example/bot").open(request).read() == b"image"
    for path, said in zip(("/a", "/b", "/c"), server.requests, strict=True):
        lines = said.decode().split("\r\n")
        assert lines[:2] == [f"GET {path} HTTP/1.1", f"Host: {PUBLIC}:{server.port}"]
        names = {line.partition(":")[0].lower() for line in lines[1:] if line}
        assert names == {"host", "user-agent", "accept", "accept-encoding", "connection"}
        assert "User-Agent: roclip/0.1.0 (+https://a.example/bot)" in lines


def test_install_serves_urlopen():
    before = urllib.request._opener
    try:
        with Server([ok(b"image")], PUBLIC) as server, nothing_private():
            installed = connection.install(FetchPolicy(**RULES), timeout_s=5.0)
            with urllib.request.urlopen(urllib.request.Request(server.url()), timeout=5) as answer:
                assert io.BytesIO(answer.read()).read() == b"image"  # as img2dataset does
            with pytest.raises(FetchError, match="refused_scheme"):
                urllib.request.urlopen("file:///etc/hostname")
        assert urllib.request._opener is installed
    finally:
        urllib.request.install_opener(before)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://{private}/x", "refused_address"),
        ("http://2130706433:{port}/x", "refused_address"),
        ("http://0x7f.1:{port}/x", "refused_address"),
        ("http://127.1:{port}/x", "refused_address"),
        ("http://%31%32%37.0.0.1:{port}/x", "refused_address"),
        ("http://localhost:{port}/x", "refused_address"),
        ("http://[::1]:{port}/x", "refused_address"),
        ("http://[::ffff:127.0.0.1]:{port}/x", "refused_address"),
        ("http://[::127.0.0.1]:{port}/x", "refused_address"),
        ("http://[64:ff9b::127.0.0.1]:{port}/x", "refused_address"),
        ("http://[2002:7f00:1::]:{port}/x", "refused_address"),
        ("http://0:{port}/x", "refused_address"),
        ("http://169.254.169.254/latest/meta-data/", "refused_address"),
        ("http://[fd00:ec2::254]/latest/meta-data/", "refused_address"),
        ("https://{private}/x", "refused_address"),
        ("http://user:secret@{private}/x", "refused_credentials"),
        ("http://{private}\\@good.example/x", "refused_credentials"),
        ("http://good.example:25/x", "refused_port"),
        ("file:///etc/hostname", "refused_scheme"),
        ("ftp://{private}/x", "refused_scheme"),
        ("gopher://{private}/x", "refused_scheme"),
        ("data:image/png;base64,AAAA", "refused_scheme"),
    ],
)
def test_forbidden_url_is_refused_at_once_and_behind_a_redirect(url, reason):
    with private() as secret, nothing_private() as tried:
        url = url.format(private=f"{PRIVATE}:{secret.port}", port=secret.port)
        with pytest.raises(FetchError, match=f"^{reason}: "):
            get(url)
        assert tried == []
        with Server([moved(url)], PUBLIC) as server:
            with pytest.raises(FetchError, match=f"^{reason}: "):
                get(server.url(), retries=2)
            assert len(server.requests) == 1
        assert len(tried) == 1


def test_name_that_changes_its_mind_is_connected_to_where_it_was_allowed():
    names = {"rebind.example": [[PUBLIC], [PRIVATE]], "later.example": [[PRIVATE], [PUBLIC]]}
    with NameServer(names, ttl_s=0) as dns, Server([ok(b"image")], PUBLIC) as server, nothing_private() as tried:
        ours = opener(nameservers=(dns.address,))
        assert ours.open(server.url(host="rebind.example")).read() == b"image"
        with pytest.raises(FetchError, match=f"refused_address: rebind.example is at {PRIVATE}"):
            ours.open(server.url(host="rebind.example"))
        with pytest.raises(FetchError, match="refused_address"):
            ours.open(server.url(host="later.example"))
        assert ours.open(server.url(host="later.example")).read() == b"image"
        assert len(tried) == 2
        assert dns.asked == {"rebind.example": 2, "later.example": 2}  # one lookup a connection, none in between
        assert f"Host: rebind.example:{server.port}".encode() in server.requests[0]


def test_only_the_public_addresses_of_a_name_are_used():
    names = {"both.example": [[PRIVATE, "10.0.0.1", "::1", "169.254.169.254", PUBLIC]]}
    with NameServer(names) as dns, Server([ok(b"image")], PUBLIC) as server, nothing_private() as tried:
        assert get(server.url(host="both.example"), nameservers=(dns.address,)) == b"image"
    assert [address for address, *_ in tried] == [PUBLIC]


def test_redirect_to_a_name_at_a_private_address_is_refused():
    dns = NameServer({"a.example": [[PUBLIC]], "inside.example": [[PRIVATE, "::1"]]})
    with dns, private() as secret, nothing_private():
        server = Server([moved(secret.url(host="inside.example"))], PUBLIC)
        with server, pytest.raises(FetchError, match="refused_address"):
            get(server.url(host="a.example"), nameservers=(dns.address,))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_followed(status):
    def answer(said):
        return [ok(b"image") if b"GET /b%20c?d" in said else moved(" /b c?d \t", f"{status} Moved")]

    with Server(answer, PUBLIC) as server, opener().open(server.url("/a")) as got:
        assert got.read() == b"image"
        assert got.url == server.url("/b%20c?d")


def test_redirects_are_counted():
    def answer(said):
        left = int(said.split(b" ")[1][1:])
        return [moved(f"/{left - 1}") if left else ok(b"image")]

    with Server(answer, PUBLIC) as server:
        assert get(server.url("/3"), max_redirects=3) == b"image"
        with pytest.raises(FetchError, match="too_many_redirects"):
            get(server.url("/4"), max_redirects=3)
        with pytest.raises(FetchError, match="too_many_redirects"):
            get(server.url("/1"), max_redirects=0)
        assert len(server.requests) == 4 + 4 + 1


def test_loop_of_redirects_ends():
    turn = {b"/a": "/b", b"/b": "/A", b"/A": "/c", b"/c": "/b#other"}
    with Server(lambda said: [moved(turn[said.split(b" ")[1]])], PUBLIC) as server:
        with pytest.raises(FetchError, match="too_many_redirects: a loop"):
            get(server.url("/a"), max_redirects=50)
        assert len(server.requests) == 4


def test_deadline_holds_over_all_redirects():
    def answer(_):
        return [0.2, moved(f"/{len(server.requests)}")]

    with Server(answer, PUBLIC) as server, pytest.raises(FetchError, match="too_slow"):
        get(server.url(), max_redirects=100, deadline_s=0.7)
    assert len(server.requests) < 10


@pytest.mark.parametrize("status", [201, 204, 205, 206, 300, 304, 400, 403, 404, 410, 429, 451, 500, 503, 599, 999])
def test_other_status_is_its_own_reason(status):
    answer = head(f"{status} opted_out: what the server says is not repeated", "Content-Length: 0")
    with Server([answer], PUBLIC) as server, pytest.raises(urllib.error.HTTPError) as error:
        get(server.url())
    assert error.value.code == status
    assert reason_of(str(error.value)) == f"http_{status}"
    error.value.close()


def test_redirect_that_leads_nowhere_is_its_own_reason():
    nowhere = Server([head("302 Found", "Content-Length: 0")], PUBLIC)
    with nowhere as server, pytest.raises(urllib.error.HTTPError, match="HTTP Error 302") as error:
        get(server.url())
    error.value.close()


@pytest.mark.parametrize(
    "headers", [["noai"], ["all", "roclip: noml"], ["unavailable_after: Fri, 1 Jan 2027 1:0:0 GMT, noai"]]
)
def test_site_that_opts_out_is_left_before_its_body(headers):
    endless = Server([ok(b"", *(f"X-Robots-Tag: {value}" for value in headers), length=10**6), 30.0], PUBLIC)
    with endless as server, pytest.raises(FetchError, match="opted_out"):
        get(server.url())
    with Server([ok(b"image", *(f"x-robots-tag: {value}" for value in headers))], PUBLIC) as server:
        assert get(server.url(), opt_out=False) == b"image"


def test_opt_out_of_others_is_not_for_us():
    with Server([ok(b"image", "X-Robots-Tag: otherbot: noai, noindex", "X-Robots-Tag: nofollow")], PUBLIC) as server:
        assert get(server.url()) == b"image"


class OnePermit:
    """A limiter with one permit per host, which records its calls."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls = []
        self.inside = set()

    def acquire(self, host, deadline_s, *, crawl_delay_s=0.0):
        assert host not in self.inside, "a permit within a permit would wait for itself"
        if "down" in host:
            raise FetchError("host_down", host)
        self.inside.add(host)
        self.calls.append(("acquire", host, crawl_delay_s))

    def release(self, host, *, failed=False, busy=False, retry_after_s=0.0, size_bytes=0):
        self.inside.remove(host)
        self.calls.append(("failed" if failed else "busy" if busy else "ok", retry_after_s, size_bytes > 0))


class Rules:
    """A real robots.txt, in the simplest of forms: what it says is the start of the paths that are forbidden."""

    def __init__(self, fetch):
        self.fetch = fetch

    def allows(self, url, deadline_s):
        origin, _, path = url.removeprefix("http://").partition("/")
        status, content = self.fetch(f"http://{origin}/robots.txt")
        return status == 404 or not f"/{path}".startswith(content.decode())

    def crawl_delay_s(self, url, deadline_s):
        return 1.5


def test_each_hop_acquires_its_own_permit_and_asks_its_own_robots_txt():
    paths = {b"/robots.txt": ok(b"/private"), b"/open": ok(b"image"), b"/away": moved("/private/x")}
    with Server(lambda said: [paths[said.split(b" ")[1]]], PUBLIC) as server:
        limiter = OnePermit()
        rules = Rules(opener(limiter=limiter).fetch_robots)
        with Server([moved(server.url("/open"))], f"{PUBLIC[:-1]}3") as first:
            allow = ("127.0.0.2/31",)
            rules.fetch = opener(limiter=limiter, allow_networks=allow).fetch_robots
            assert get(first.url("/robots.txt-is-here-too"), limiter=limiter, allow_networks=allow) == b"image"
        for path in ("/private/x", "/away"):
            with pytest.raises(FetchError, match="robots_txt"):
                get(server.url(path), limiter=limiter, robots=rules)
        assert get(server.url("/open"), limiter=limiter, robots=rules) == b"image"
    assert b"GET /private" not in b"".join(server.requests)
    assert limiter.inside == set()
    assert limiter.calls[0] == ("acquire", f"127.0.0.3:{first.port}", 0.0)
    assert limiter.calls[2] == ("acquire", f"127.0.0.2:{server.port}", 0.0)
    assert limiter.calls[-4:] == [
        ("acquire", f"127.0.0.2:{server.port}", 0.0),
        ("ok", 0.0, True),
        ("acquire", f"127.0.0.2:{server.port}", 1.5),
        ("ok", 0.0, True),
    ]


def test_robots_txt_is_not_asked_when_the_policy_says_so():
    with Server([ok(b"/")], PUBLIC) as server:
        rules = FetchPolicy(**RULES, robots=False)
        asked = Rules(Opener(rules, timeout_s=5.0).fetch_robots)
        assert Opener(rules, timeout_s=5.0, robots=asked).open(server.url()).read() == b"/"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([ok(b"image")], ("ok", 0.0, True)),
        ([head("404 Not Found")], ("ok", 0.0, True)),
        ([ok(b"", length=7)], ("ok", 0.0, True)),
        ([b"no http\r\n\r\n"], ("ok", 0.0, True)),
        ([30.0], ("failed", 0.0, False)),
        ([ok(b"x", length=7), 30.0], ("failed", 0.0, True)),
        ([], ("failed", 0.0, False)),
        ([head("429 Too Many Requests")], ("busy", 0.0, True)),
        ([head("503 Service Unavailable", "Retry-After: 7")], ("busy", 7.0, True)),
        ([head("503 Service Unavailable", "Retry-After: soon")], ("busy", 0.0, True)),
        ([head("503 Service Unavailable", "Retry-After: -7")], ("busy", 0.0, True)),
        ([head("503 Service Unavailable", "Retry-After: " + "9" * 400)], ("busy", MAX_RETRY_AFTER_S, True)),
        (
            [head("503 Service Unavailable", "Retry-After: Fri, 31 Dec 2199 23:59:59 GMT")],
            ("busy", MAX_RETRY_AFTER_S, True),
        ),
        ([head("503 Service Unavailable", "Retry-After: Fri, 31 Dec 1999 23:59:59 -0000")], ("busy", 0.0, True)),
    ],
)
def test_host_is_told_how_it_went(pieces, said):
    limiter = OnePermit()
    with Server(pieces, PUBLIC) as server, contextlib.suppress(OSError):
        get(server.url(), limiter=limiter, timeout_s=0.3)
    assert limiter.calls[1:] == [said]


def test_retry_after_a_date_is_the_time_until_then():
    limiter = OnePermit()
    date = formatdate(time.time() + 600, usegmt=True)
    with (
        Server([head("503 Service Unavailable", f"Retry-After: {date}")], PUBLIC) as server,
        contextlib.suppress(OSError),
    ):
        get(server.url(), limiter=limiter)
    assert 500 < limiter.calls[1][1] <= 600


def test_host_has_failed_when_it_has_no_address_or_drips_and_not_when_others_took_its_time():
    limiter = OnePermit()
    with NameServer({}) as dns, pytest.raises(FetchError, match="no_host"):
        get("http://dead.example/", limiter=limiter, nameservers=(dns.address,))
    drip = [ok(b"", length=100), *[part for _ in range(100) for part in (b"x", 0.05)]]
    with Server(drip, PUBLIC) as server, pytest.raises(FetchError, match="too_slow"):
        get(server.url(), limiter=limiter, timeout_s=0.2, deadline_s=0.6)
    with Server([5.0], PUBLIC) as victim:
        blamer = Server([0.4, moved(victim.url())], PUBLIC)
        with blamer as server, pytest.raises(FetchError, match="too_slow"):
            get(server.url(), limiter=limiter, timeout_s=0.5, deadline_s=0.7)
    assert [call[0] for call in limiter.calls] == ["acquire", "failed"] * 2 + ["acquire", "ok"] * 2


def test_host_that_is_left_alone_is_not_asked():
    limiter = OnePermit()
    with pytest.raises(FetchError, match="host_down"):
        get("http://down.example/", limiter=limiter, retries=3)
    assert limiter.calls == []


def flaky(*answers):
    """A server that answers the first requests so, and then with an image."""
    left = list(answers)
    return Server(lambda _: left.pop(0) if left else [ok(b"image")], PUBLIC)


@pytest.mark.parametrize("answer", [[], [head("500 Oops")], [head("502 Bad Gateway")], [ok(b"half", length=9)]])
def test_failure_that_may_pass_is_tried_again(answer):
    with flaky(answer, answer) as server:
        with pytest.raises(OSError, match=r"connection_reset|HTTP Error 50|truncated_image"):
            get(server.url(), retries=0)
        assert get(server.url(), retries=1) == b"image"
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    "answer",
    [
        [head("404 Not Found")],
        [head("503 Service Unavailable")],
        [head("429 Too Many Requests")],
        [ok(b"image", "X-Robots-Tag: noai")],
        [b"no http\r\n\r\n"],
        [ok(b"x" * 2000)],
        [ok(b"x", "Content-Encoding: gzip")],
        [5.0],
    ],
)
def test_failure_that_stays_or_asks_for_patience_is_not_tried_again_at_once(answer):
    with flaky(answer) as server:
        with pytest.raises(OSError):  # noqa: PT011  # each for its own reason
            get(server.url(), retries=5, max_bytes=1000, timeout_s=0.3)
        assert len(server.requests) == 1


def test_tries_end_with_the_deadline():
    oops = Server([0.1, head("500 Oops")], PUBLIC)
    with oops as server, pytest.raises(OSError, match=r"HTTP Error 500|too_slow"):
        get(server.url(), retries=10**6, deadline_s=1.0)
    assert 1 < len(server.requests) <= 10


def test_robots_txt_of_any_status_and_size_is_fetched_under_the_policy():
    paths = {
        b"/a": head("503 Oops") + b"down",
        b"/b": moved("/c"),
        b"/c": head("200 OK") + b"x" * (2 * MAX_ROBOTS_BYTES),
    }
    with Server(lambda said: [paths[said.split(b" ")[1]]], PUBLIC) as server, private() as secret, nothing_private():
        ours = opener(timeout_s=1.0, robots=Rules(None))  # robots.txt asks no robots.txt
        assert ours.fetch_robots(server.url("/a")) == (503, b"down")
        status, content = ours.fetch_robots(server.url("/b"))
        assert (status, len(content)) == (200, MAX_ROBOTS_BYTES)
        with pytest.raises(FetchError, match="refused_address"):
            ours.fetch_robots(secret.url("/robots.txt"))


def test_ipv6_is_fetched_when_allowed():
    try:
        server = Server([ok(b"image")], "::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        assert get(server.url(), allow_networks=("::1/128",)) == b"image"
        with pytest.raises(FetchError, match="refused_address"):
            get(server.url())
    assert f"Host: [::1]:{server.port}".encode() in server.requests[0]


@pytest.mark.parametrize(
    "rules",
    [
        {"proxy": "socks://x"},
        {"contact": "\n"},
        {"allow_hosts": ("@/no/such/file",)},
        {"deny_hosts": ("a b",)},
        {"nameservers": ("x",)},
    ],
)
def test_policy_that_cannot_be_used_is_a_config_error_at_the_start(rules):
    with pytest.raises(ConfigError, match=r"ingest\.policy"):
        opener(**rules)


def test_only_get_is_done():
    with pytest.raises(ValueError, match="only GET"):
        opener().open("http://a.example/", b"data")


@pytest.fixture(scope="module")
def parrot():
    """A server that sends what `parrot.answer` holds."""
    with Server(lambda _: [server.answer], PUBLIC) as server:
        yield server


HEADERS = st.sampled_from(
    [
        b"Content-Length: 5", b"Content-Length: -5", b"Content-Length: 5, 5", b"Content-Length: 1e3", b"Content-Length: \xb2",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Content-Encoding: gzip", b"Content-Encoding: deflate",
        b"Location: http://[::1", b"Location: //\xff", b"Location: http://127.0.0.1/", b"Location: \t", b"X-Robots-Tag: \xff:,:",
        b" folded", b":", b"no colon", b"\x00", b"Retry-After: Mon, 99 Foo 2020 99:99:99 GMT", b"Retry-After: 1_0",
    ]
)  # fmt: skip
BODIES = st.sampled_from(
    [b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"-1\r\nx", b"\x1f\x8b\x08", b"x\x9c\x03", b"HTTP/1.1 200 OK\r\n\r\n"]
)


@settings(max_examples=150, **SETTINGS)
@given(
    st.sampled_from(
        [
            b"HTTP/1.1 200 OK",
            b"HTTP/1.0 302 ",
            b"HTTP/1.1 503 x",
            b"HTTP/1.1 200",
            b"HTTP/1.1 100",
            b"HTTP/9 1 1",
            b"\x00",
        ]
    ),
    st.lists(HEADERS, max_size=5),
    st.one_of(BODIES, st.binary(max_size=40)),
)
def test_any_answer_is_an_image_or_a_named_failure(parrot, status, headers, body):
    parrot.answer = b"\r\n".join([status, *headers, b"", body])
    limiter, reason = OnePermit(), ""
    with nothing_private():
        try:
            with opener(limiter=limiter, deadline_s=5.0).open(parrot.url()) as answer:
                assert isinstance(answer, FetchedBody)
                assert answer.read()
        except OSError as error:
            reason = reason_of(str(error))
    assert reason != "other"
    assert limiter.inside == set()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(ok(b"", length=10**9), "too_large"), (moved("file:///x"), "refused_scheme"), (b"\n", "bad_resp")],
)
def test_connection_is_closed_when_the_url_is_given_up(answer, reason):
    seen = []

    def talk(client):
        client.recv(1 << 16)
        client.sendall(answer)
        client.settimeout(20)
        with contextlib.suppress(ConnectionError):
            seen.append(client.recv(1 << 16))
            return
        seen.append(b"")

    with Server(talk=talk, host=PUBLIC) as server, pytest.raises(FetchError, match=reason):
        get(server.url())
    assert seen == [b""]
